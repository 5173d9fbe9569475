"""What a worker keeps between jobs: encoded prompts, prepared references and their latents.

Nobody but the tenant whose job computed a value is ever served it, not even in time: a place is (tenant, key). What
tenants share is the room, so the most that one learns of another is that its own old values have gone.

Keeping is invisible but for time. Values are frozen and shared, so nobody may write into their tensors or arrays.
No torch here.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass, field, fields, is_dataclass
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar, cast

from workers.jobs import Outcome

if TYPE_CHECKING:
    from model.pipeline import EncodedReference, PreparedReference
    from model.text import PromptEmbeds
    from model.weights.adapted import LoadedAdapter

MIB: Final = 2**20
V = TypeVar("V")

_Place = tuple[str, Hashable]


@dataclass(frozen=True, slots=True)
class Counts:
    """A cache so far: hits (asking while another computes it is one), misses, values that made room; what it holds."""

    hits: int
    misses: int
    evictions: int
    entries: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class _Entry(Generic[V]):
    value: V
    nbytes: int
    sources: frozenset[str]


@dataclass(frozen=True, slots=True, eq=False)
class _Flight(Generic[V]):
    """A computation under way, and who waits for it."""

    sources: frozenset[str]
    landing: Future[V] = field(default_factory=Future[V])


class Cache(Generic[V]):
    """The values used last, as many as fit into `limit` bytes. Any thread may use it.

    Counted are the values' tensors, arrays and bytes (`nbytes_of`), not keys and Python's own objects. A value that
    is larger than the limit is not kept; a limit of 0 keeps and shares nothing.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._lock = threading.Lock()
        self._kept: OrderedDict[_Place, _Entry[V]] = OrderedDict()
        self._flights: dict[_Place, _Flight[V]] = {}
        self._nbytes = self._hits = self._misses = self._evictions = 0

    def fetch(
        self, tenant: str, key: Hashable, compute: Callable[[], V], sources: frozenset[str] = frozenset()
    ) -> tuple[V, Outcome]:
        """The value of a key; `compute` runs outside the lock, and once for all who ask meanwhile.

        Args:
            compute: may raise; everyone who waits gets the same exception, and the next to ask computes again. It
                must not ask this cache for the same key.
            sources: sha256 of the stored pictures that the value is derived from.
        """
        if self.limit == 0:
            with self._lock:
                self._misses += 1
            return compute(), "miss"
        place = (tenant, key)
        with self._lock:
            if (entry := self._use(place)) is not None:
                return entry.value, "hit"
            flight = self._flights.get(place)
            leads = flight is None
            if flight is None:
                self._flights[place] = flight = _Flight(sources)
                self._misses += 1
            else:
                self._hits += 1
        try:
            if leads:
                return self._lead(place, flight, compute), "miss"
            return flight.landing.result(), "hit"
        finally:
            # A flight that failed holds this frame by the exception's traceback: with it, a cycle, and what the
            # computation held (perhaps all of a GPU's memory) would stay until the next collection.
            del flight

    def find(self, tenant: str, key: Hashable) -> V | None:
        """The value, if it is there; its absence is counted by the `fetch` that follows."""
        with self._lock:
            entry = self._use((tenant, key))
        return None if entry is None else entry.value

    def purge(self, tenant: str, artifact: str) -> int:
        """Drop what was derived from a stored picture of a tenant; also what is being derived from it just now, which
        those still get who have asked.

        Args:
            artifact: its sha256.

        Returns:
            How many values were dropped.
        """
        with self._lock:
            gone = [place for place, entry in self._kept.items() if place[0] == tenant and artifact in entry.sources]
            for place in gone:
                self._nbytes -= self._kept.pop(place).nbytes
            for place in [p for p, flight in self._flights.items() if p[0] == tenant and artifact in flight.sources]:
                del self._flights[place]
        return len(gone)

    def clear(self) -> None:
        """Drop everything, also what is being computed. Counts go on."""
        with self._lock:
            self._kept.clear()
            self._flights.clear()
            self._nbytes = 0

    def counts(self) -> Counts:
        with self._lock:
            return Counts(self._hits, self._misses, self._evictions, len(self._kept), self._nbytes)

    def _use(self, place: _Place) -> _Entry[V] | None:
        entry = self._kept.get(place)
        if entry is not None:
            self._kept.move_to_end(place)
            self._hits += 1
        return entry

    def _lead(self, place: _Place, flight: _Flight[V], compute: Callable[[], V]) -> V:
        try:
            value = compute()
            entry = _Entry(value, nbytes_of(value), flight.sources)
        except BaseException as error:
            self._land(place, flight, None)
            flight.landing.set_exception(error)
            raise
        else:
            self._land(place, flight, entry)
            flight.landing.set_result(value)
            return value
        finally:
            del flight  # as in `fetch`

    def _land(self, place: _Place, flight: _Flight[V], entry: _Entry[V] | None) -> None:
        """End a flight; keep its value unless a purge has come in between."""
        with self._lock:
            if self._flights.get(place) is not flight:
                return
            del self._flights[place]
            if entry is None or entry.nbytes > self.limit:
                return
            while self._nbytes + entry.nbytes > self.limit:
                _, oldest = self._kept.popitem(last=False)
                self._nbytes -= oldest.nbytes
                self._evictions += 1
            self._kept[place] = entry
            self._nbytes += entry.nbytes


class Caches:
    """The caches of one worker, each with its limit in bytes; 0 turns one off.

    Their sizes for FLUX.1-dev in bfloat16: a prompt is 512 × 4096 values, 4 MiB, so 256 MiB hold 63 of them. A
    reference of 512² pixels is 768 KiB once prepared and 256 KiB as latents; of 1024², four times that. Prompts and
    latents lie where the model does: on CUDA their limits are GPU memory to be left free beside weights and
    activations. Prepared references lie in the host's memory.

    Attributes:
        prompts: by pipeline and prompt.
        prepared: by picture, mask, and what `preparation.reference_key` names besides.
        latents: posterior parameters, by pipeline and the prepared reference's key.
        adapters: by pipeline and version, of whom they belong to; everybody's are kept once. One that runs need stays
            with them when it makes room here.
    """

    def __init__(
        self, prompts: int = 256 * MIB, prepared: int = 256 * MIB, latents: int = 256 * MIB, adapters: int = 256 * MIB
    ) -> None:
        self.prompts: Cache[PromptEmbeds] = Cache(prompts)
        self.prepared: Cache[PreparedReference] = Cache(prepared)
        self.latents: Cache[EncodedReference] = Cache(latents)
        self.adapters: Cache[LoadedAdapter] = Cache(adapters)

    def purge(self, tenant: str, artifact: str) -> int:
        """Drop what was derived from a stored picture (its sha256) of a tenant; how many values that were."""
        return self.prepared.purge(tenant, artifact) + self.latents.purge(tenant, artifact)

    def clear(self) -> None:
        """Drop everything: the model has changed, and nothing kept will be asked for again."""
        for cache in (self.prompts, self.prepared, self.latents, self.adapters):
            cache.clear()

    def counts(self) -> dict[str, Counts]:
        """By cache: `prompts`, `prepared`, `latents`, `adapters`."""
        return {
            "prompts": self.prompts.counts(),
            "prepared": self.prepared.counts(),
            "latents": self.latents.counts(),
            "adapters": self.adapters.counts(),
        }


def nbytes_of(value: object) -> int:
    """Bytes of the tensors, arrays and byte strings in a value: itself, a dataclass or a tuple of such."""
    if is_dataclass(value) and not isinstance(value, type):
        return sum(nbytes_of(getattr(value, each.name)) for each in fields(value))
    if isinstance(value, tuple):
        return sum(map(nbytes_of, cast("tuple[Any, ...]", value)))
    if isinstance(value, bytes):
        return len(value)
    return int(getattr(value, "nbytes", 0))
