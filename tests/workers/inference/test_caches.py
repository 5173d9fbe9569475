"""What a worker keeps: bounded in bytes, each tenant's own, computed once, and gone when it has to go."""

from __future__ import annotations

import gc
import random
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.waiting import wait_for
from workers.inference.caches import Cache, Caches, nbytes_of
from workers.jobs import Outcome

TENANTS = ("ann", "bob")
KEYS = range(5)
WAIT_S = 20.0


def sources_of(key: int) -> frozenset[str]:
    """Pictures that a key's value is derived from: two keys share one."""
    return frozenset({f"picture {key // 2}"})


@dataclass
class PlainLru:
    """What the cache should do, written to be read: a list of (tenant, key, value), oldest use first."""

    limit: int
    rows: list[tuple[str, int, bytes]] = field(default_factory=list)

    def find(self, tenant: str, key: int) -> bytes | None:
        for row in self.rows:
            if row[:2] == (tenant, key):
                self.rows.remove(row)
                self.rows.append(row)
                return row[2]
        return None

    def fetch(self, tenant: str, key: int, value: bytes) -> tuple[bytes, Outcome]:
        found = self.find(tenant, key)
        if found is not None:
            return found, "hit"
        if 0 < len(value) <= self.limit:
            self.rows.append((tenant, key, value))
            while sum(len(row[2]) for row in self.rows) > self.limit:
                del self.rows[0]
        return value, "miss"

    def purge(self, tenant: str, artifact: str) -> int:
        gone = [row for row in self.rows if row[0] == tenant and artifact in sources_of(row[1])]
        self.rows = [row for row in self.rows if row not in gone]
        return len(gone)


tenants, keys = st.sampled_from(TENANTS), st.sampled_from(KEYS)
operations = st.one_of(
    st.tuples(st.just("fetch"), tenants, keys, st.integers(1, 12)),
    st.tuples(st.just("find"), tenants, keys),
    st.tuples(st.just("purge"), tenants, st.sampled_from([f"picture {n}" for n in range(3)])),
    st.tuples(st.just("clear")),
)


@given(limit=st.integers(0, 30), plan=st.lists(operations, max_size=60))
def test_it_is_an_lru_bounded_in_bytes(limit: int, plan: list[tuple]) -> None:
    """After any operations it holds what a plain LRU holds, in its order, and never more bytes than its limit."""
    cache, plain = Cache[bytes](limit), PlainLru(limit)
    for number, (operation, *arguments) in enumerate(plan):
        match operation:
            case "fetch":
                tenant, key, size = arguments
                value = bytes([number]) * size
                assert cache.fetch(tenant, key, lambda v=value: v, sources_of(key)) == plain.fetch(tenant, key, value)
            case "find":
                assert cache.find(*arguments) == plain.find(*arguments)
            case "purge":
                assert cache.purge(*arguments) == plain.purge(*arguments)
            case _:
                cache.clear()
                plain.rows.clear()
        counts = cache.counts()
        assert counts.nbytes == sum(len(row[2]) for row in plain.rows) <= limit
        assert counts.entries == len(plain.rows)
        assert [(*place, entry.value) for place, entry in cache._kept.items()] == plain.rows


def test_counts() -> None:
    """Hits, misses and evictions are counted apart; a purge is no eviction, a value that is too large makes no room."""
    cache = Cache[bytes](10)
    for key, size in ((1, 6), (1, 6), (2, 4), (3, 11), (4, 5)):
        cache.fetch("t", key, lambda n=size: bytes(n), frozenset({"p"}))
    assert cache.find("t", 4) is not None and cache.find("t", 3) is None
    counts = cache.counts()
    assert (counts.hits, counts.misses, counts.evictions) == (2, 4, 1)
    assert (counts.entries, counts.nbytes) == (2, 9)
    assert cache.purge("t", "p") == 2
    assert cache.counts().evictions == 1


def test_everything_of_a_value_is_weighed() -> None:
    """Tensors by dtype, arrays and bytes, in dataclasses and tuples; the rest is nothing."""

    @dataclass(frozen=True)
    class Value:
        name: str
        tensor: torch.Tensor
        parts: tuple[object, ...]

    assert nbytes_of(Value("x", torch.zeros(512, 4096, dtype=torch.bfloat16), ())) == 4 * 2**20
    assert nbytes_of(Value("x", torch.zeros(3), (np.zeros((2, 5), np.uint8), b"abc", None, (7, b"d")))) == 12 + 10 + 4


def test_a_tenant_is_never_served_anothers_value_nor_waits_for_it() -> None:
    """While one tenant's value is computed, and after, another who asks for the same key computes his own."""
    cache, begun, release = Cache[bytes](100), threading.Event(), threading.Event()

    def slow() -> bytes:
        begun.set()
        assert release.wait(WAIT_S)
        return b"ann's"

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(cache.fetch, "ann", "key", slow)
        assert begun.wait(WAIT_S)
        assert cache.fetch("bob", "key", lambda: b"bob's") == (b"bob's", "miss")
        assert not first.done()
        release.set()
        assert first.result(WAIT_S) == (b"ann's", "miss")
    assert cache.find("ann", "key") == b"ann's"
    assert cache.find("bob", "key") == b"bob's"
    assert cache.find("cy", "key") is None


@dataclass
class Herd:
    """One thread that computes a value, and others that ask for it meanwhile and are known to wait."""

    cache: Cache[bytes]
    first: Future[tuple[bytes, Outcome]]
    others: list[Future[tuple[bytes, Outcome]]]
    finish: Callable[[], None]


def herd(pool: ThreadPoolExecutor, cache: Cache[bytes], compute: Callable[[], bytes], size: int = 6) -> Herd:
    begun, release = threading.Event(), threading.Event()

    def gated() -> bytes:
        begun.set()
        assert release.wait(WAIT_S)
        return compute()

    def never() -> bytes:
        raise AssertionError("computed a second time")

    first = pool.submit(cache.fetch, "t", "key", gated, frozenset({"p"}))
    assert begun.wait(WAIT_S)
    asked = cache.counts().hits
    others = [pool.submit(cache.fetch, "t", "key", never) for _ in range(size)]
    wait_for(lambda: cache.counts().hits == asked + size, "the others to ask", WAIT_S)
    return Herd(cache, first, others, release.set)


@pytest.fixture
def pool():
    with ThreadPoolExecutor(8) as threads:
        yield threads


@pytest.mark.parametrize("limit", [100, 1])
def test_a_herd_computes_once(pool: ThreadPoolExecutor, limit: int) -> None:
    """All who ask while it is computed get that very value, even one too large to keep; other keys need not wait."""
    value = bytes(50)
    gathered = herd(pool, Cache(limit), lambda: value)
    assert gathered.cache.fetch("t", "another key", lambda: b"!") == (b"!", "miss")
    gathered.finish()
    assert gathered.first.result(WAIT_S) == (value, "miss")
    assert all(waited.result(WAIT_S)[0] is value and waited.result()[1] == "hit" for waited in gathered.others)
    counts = gathered.cache.counts()
    assert (counts.hits, counts.misses) == (6, 2)
    assert (gathered.cache.find("t", "key") is value) is (limit == 100)


def test_an_exception_reaches_every_waiter_and_is_not_kept(pool: ThreadPoolExecutor) -> None:
    """Of all who asked none hangs or gets something else; the next one computes again."""
    fault = KeyError("no")

    def fail() -> bytes:
        raise fault

    gathered = herd(pool, Cache(100), fail)
    gathered.finish()
    assert all(asked.exception(WAIT_S) is fault for asked in (gathered.first, *gathered.others))
    assert gathered.cache.fetch("t", "key", lambda: b"now") == (b"now", "miss")


def test_a_failed_computation_holds_nothing() -> None:
    """What it had in hand is freed with the exception, not at some later garbage collection: it may fill a GPU."""

    class Large:
        pass

    seen: list[weakref.ref[Large]] = []

    def fail() -> bytes:
        large = Large()
        seen.append(weakref.ref(large))
        raise MemoryError

    gc.disable()
    try:
        with pytest.raises(MemoryError) as caught:
            Cache[bytes](100).fetch("t", "key", fail)
        assert seen[0]() is not None
        del caught
        assert seen[0]() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("drop", ["purge", "clear"])
def test_what_is_being_computed_is_dropped_too(pool: ThreadPoolExecutor, drop: str) -> None:
    """Whoever asks after a purge or a clear gets a new value; the old one is not kept when it arrives."""
    gathered = herd(pool, Cache(100), lambda: b"old")
    if drop == "purge":
        gathered.cache.purge("t", "p")
    else:
        gathered.cache.clear()
    assert gathered.cache.fetch("t", "key", lambda: b"new") == (b"new", "miss")
    gathered.finish()
    assert gathered.first.result(WAIT_S) == (b"old", "miss")
    assert all(waited.result(WAIT_S) == (b"old", "hit") for waited in gathered.others)
    assert gathered.cache.find("t", "key") == b"new"
    assert gathered.cache.counts().nbytes == 3


@pytest.mark.parametrize("tenant_and_picture", [("ann", "p"), ("t", "q")])
def test_a_purge_leaves_others_alone(pool: ThreadPoolExecutor, tenant_and_picture: tuple[str, str]) -> None:
    """Another tenant's purge of the same picture, or of another picture, drops neither values nor computations."""
    cache = Cache[bytes](100)
    cache.fetch("t", "kept", lambda: b"k", frozenset({"p", "mask"}))
    gathered = herd(pool, cache, lambda: b"v")
    assert cache.purge(*tenant_and_picture) == 0
    gathered.finish()
    assert all(asked.result(WAIT_S)[0] == b"v" for asked in (gathered.first, *gathered.others))
    assert (cache.find("t", "kept"), cache.find("t", "key")) == (b"k", b"v")


def test_many_threads(pool: ThreadPoolExecutor) -> None:
    """Under any interleaving everyone gets the value of his place, and the books balance."""
    cache, draw = Cache[bytes](40), random.Random(1)
    plans = [[(draw.choice(TENANTS), draw.choice(KEYS), draw.random()) for _ in range(400)] for _ in range(8)]

    def walk(plan: list[tuple[str, int, float]]) -> int:
        asked = 0
        for tenant, key, chance in plan:
            if chance < 0.05:
                cache.purge(tenant, f"picture {key // 2}")
            elif chance < 0.06:
                cache.clear()
            else:
                expected = f"{tenant} {key}".encode() * (1 + key)
                assert cache.fetch(tenant, key, lambda v=expected: v, sources_of(key))[0] == expected
                asked += 1
            assert cache.counts().nbytes <= 40
        return asked

    asked = sum(pool.map(walk, plans))
    counts = cache.counts()
    assert counts.hits + counts.misses == asked
    assert counts.nbytes == sum(len(entry.value) for entry in cache._kept.values())
    assert cache._flights == {}


def test_a_workers_caches_are_purged_and_cleared_together() -> None:
    """A picture goes from both caches that derive from it; prompts and adapters stay until the model changes."""
    caches = Caches(prompts=10, prepared=10, latents=10, adapters=10)
    for cache in (caches.prompts, caches.prepared, caches.latents, caches.adapters):
        derives = cache is caches.prepared or cache is caches.latents
        cache.fetch("t", 1, lambda: b"value", frozenset({"p"} if derives else ()))
    assert caches.purge("t", "p") == 2
    assert {name: counts.entries for name, counts in caches.counts().items()} == {
        "prompts": 1,
        "prepared": 0,
        "latents": 0,
        "adapters": 1,
    }
    caches.clear()
    assert all(counts.nbytes == 0 for counts in caches.counts().values())
