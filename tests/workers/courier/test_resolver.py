"""Look-ups in threads that cannot be broken off: silent name servers of one tenant keep no other's from being done."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address

import pytest

from tests.fuzz.urls import PUBLIC_ADDRESS, PUBLIC_HOST
from tests.waiting import wait_for
from tests.workers.conftest import MakeJob
from tests.workers.courier.hosts import AUTHORITY, NEAR, PATIENT, Host, World, always, said
from tests.workers.courier.test_fetching import PNG, at
from workers.artifacts import ArtifactStore
from workers.books.values import Delivery
from workers.courier.addresses import Address
from workers.courier.egress import Caps, Egress, EgressError, SystemResolver, trust
from workers.courier.fetching import FetchError, ReferenceFetcher
from workers.courier.webhooks import WebhookSender

THREADS = 8
PART = THREADS // 4
BRIEF = Caps(open_s=0.5)
FOUND = [ip_address(PUBLIC_ADDRESS)]
SECRET = "whsec_" + "A" * 43 + "="


@dataclass(slots=True)
class Names:
    """A resolver that blocks: names that begin with `silent` until they are released, `together` until two are asked
    for at once.
    """

    asked: list[str] = field(default_factory=list[str])
    running: int = 0
    most: int = 0
    released: threading.Event = field(default_factory=threading.Event)
    pair: threading.Barrier = field(default_factory=lambda: threading.Barrier(2, timeout=60))
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def look_up(self, host: str) -> Sequence[Address]:
        with self._lock:
            self.asked.append(host)
            self.running += 1
            self.most = max(self.most, self.running)
        if host.startswith("silent"):
            self.released.wait()
        if host.startswith("together"):
            self.pair.wait()
        with self._lock:
            self.running -= 1
        return FOUND


@pytest.fixture
def names() -> Iterator[Names]:
    made = Names()
    yield made
    made.released.set()


async def gives_up(resolver: SystemResolver, tenant: str, host: str, after_s: float = 0.2) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(after_s):
            await resolver(tenant, host)


@pytest.mark.parametrize(("part", "caps"), [(PART, PATIENT), pytest.param(THREADS, BRIEF, id="control")])
def test_another_tenants_fetches_and_messages_go_on(
    names: Names, make_job: MakeJob, store: ArtifactStore, part: int, caps: Caps
) -> None:
    """Nine pictures and nine messages of one tenant at name servers that say nothing, given up by their callers and
    still being looked up. Another's picture and message arrive. Control: where a tenant may have all threads, neither.
    """
    resolver = SystemResolver(THREADS, part, names.look_up)

    async def travel(world: World) -> Sequence[object]:
        egress = Egress(NEAR, trust(AUTHORITY), resolve=resolver, dial=world.dial)

        async def fetch(tenant: str, caps: Caps, hosts: Sequence[str]) -> object:
            references = tuple(at(slot, "/png", host) for slot, host in enumerate(hosts, 1))
            return await ReferenceFetcher(egress, store, caps=caps).fetch(
                make_job("job_1", references=references, tenant=tenant)
            )

        async def send(tenant: str, caps: Caps, host: str) -> object:
            delivery = Delivery("msg_1", "job_1", tenant, 1, f"https://{host}/hook", "terminal", "{}")
            return await WebhookSender(egress, lambda _: [SECRET], caps).send(delivery, b"{}")

        silent = [f"silent{number}.{PUBLIC_HOST}" for number in range(9)]
        floods = [fetch("slow", BRIEF, silent), *(send("slow", BRIEF, host) for host in silent)]
        failed = await asyncio.gather(*floods, return_exceptions=True)
        assert {type(error) for error in failed} == {FetchError, EgressError}
        assert names.running == part
        return await asyncio.gather(
            fetch("other", caps, [PUBLIC_HOST]), send("other", caps, PUBLIC_HOST), return_exceptions=True
        )

    with Host(always(said(200, PNG))) as public:
        outcomes = asyncio.run(travel(World(public.port, 1)))
        failures = [type(outcome) for outcome in outcomes if isinstance(outcome, BaseException)]
        assert failures == ([] if part == PART else [FetchError, EgressError])
        assert len(public.seen) == (2 if part == PART else 0)
    names.released.set()
    resolver.close()


def test_a_thread_is_a_tenants_until_its_look_up_returns(names: Names) -> None:
    """Callers who gave up do not make room: nothing more of theirs is begun. When the look-ups have returned, all of
    the part is there again, which only look-ups at the same time can tell.
    """
    resolver = SystemResolver(THREADS, PART, names.look_up)

    async def travel() -> None:
        await asyncio.gather(*(gives_up(resolver, "a", f"silent{number}") for number in range(PART)))
        await gives_up(resolver, "a", "quick")
        assert sorted(names.asked) == [f"silent{number}" for number in range(PART)]
        assert await resolver("b", "quick") == FOUND
        names.released.set()
        assert await asyncio.gather(*(resolver("a", f"together{number}") for number in range(PART))) == [FOUND] * PART

    asyncio.run(travel())
    resolver.close()


def test_a_part_is_enough_for_who_is_answered(names: Names) -> None:
    """Many look-ups of one tenant at once are all done, however many more than its part, which they never exceed."""
    resolver = SystemResolver(THREADS, PART, names.look_up)

    async def travel() -> list[Sequence[Address]]:
        return await asyncio.gather(*(resolver("a", f"quick{number}") for number in range(300)))

    assert asyncio.run(travel()) == [FOUND] * 300
    assert names.most <= PART
    resolver.close()


def test_look_ups_outlive_the_loop_in_peace(names: Names, caplog: pytest.LogCaptureFixture) -> None:
    """At the end of the process look-ups come back to a loop that has closed, or never begin: nobody is told of it."""
    before = set(threading.enumerate())
    resolver = SystemResolver(1, 2, names.look_up)

    async def travel() -> None:
        await asyncio.gather(*(gives_up(resolver, "a", f"silent{number}") for number in range(2)))

    asyncio.run(travel())
    resolver.close()
    names.released.set()
    wait_for(lambda: not set(threading.enumerate()) - before, "the threads' end")
    assert names.asked == ["silent0"]
    assert caplog.records == []


def test_a_look_up_that_cannot_begin_keeps_no_place(names: Names) -> None:
    """Without a thread a name is as good as unknown, again and again, also while another look-up goes on."""
    resolver = SystemResolver(THREADS, PART, names.look_up)

    async def travel() -> None:
        await gives_up(resolver, "a", "silent")
        resolver.close()
        for _ in range(2):
            with pytest.raises(OSError, match="no thread"):
                async with asyncio.timeout(60):
                    await resolver("a", "quick")

    asyncio.run(travel())
