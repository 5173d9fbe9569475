"""Working off an outbox of the ledger: as many entries at a time as there are places, half of them for one tenant.

An entry is leased to who takes it. Whatever keeps it from being settled here, a crash included, lets the lease lapse,
and it is taken again: nothing has to be handed back.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import structlog
from redis.exceptions import RedisError


class Owned(Protocol):
    """An entry, of one tenant."""

    @property
    def tenant(self) -> str: ...


T = TypeVar("T", bound=Owned)

LOOK_S = 0.25
"""Between two looks into an empty outbox."""
AWAY_S = 1.0
"""Before the next look while Redis is away."""
_LOG = structlog.stdlib.get_logger("workers.courier.outbox")


@dataclass(slots=True)
class Outbox(Generic[T]):
    """One of them.

    Attributes:
        take: up to so many entries that are due, of each tenant no more than a part with what is in hand, which is
            named by tenant; runs in a thread.
        handle: settles one.
        away: Redis did not answer the last look, or there was none yet.
        busy: those in hand, and whose they are.
    """

    name: str
    places: int
    take: Callable[[int, int, Mapping[str, int]], list[T]]
    handle: Callable[[T], Awaitable[None]]
    away: bool = True
    busy: dict[asyncio.Task[None], str] = field(default_factory=dict[asyncio.Task[None], str])
    _told: bool = False

    async def work_off(self, stop: asyncio.Event, grace_s: float) -> None:
        """Until `stop`; then what is in hand may end within the grace, and the rest is dropped."""
        stopped = asyncio.create_task(stop.wait())
        while not stop.is_set():
            room = self.places - len(self.busy)
            found = await self._due(room) if room else []
            self.busy |= {asyncio.create_task(self._shell(entry)): entry.tenant for entry in found}
            if not found:
                pause = (AWAY_S if self.away else LOOK_S) if room else None
                await asyncio.wait({stopped, *self.busy}, timeout=pause, return_when=asyncio.FIRST_COMPLETED)
            self.busy = {task: tenant for task, tenant in self.busy.items() if not task.done()}
        if self.busy:
            _, late = await asyncio.wait(self.busy, timeout=grace_s)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    async def _due(self, room: int) -> list[T]:
        try:
            found = await asyncio.to_thread(self.take, room, (self.places + 1) // 2, Counter(self.busy.values()))
        except RedisError as error:
            if not self._told:
                _LOG.warning("redis is away", outbox=self.name, exception=type(error).__name__)
            self.away = self._told = True
            return []
        self.away = False
        self._told = False
        return found

    async def _shell(self, entry: T) -> None:
        """The outermost task: one entry that cannot be settled keeps no other from it."""
        try:
            await self.handle(entry)
        except RedisError as error:
            _LOG.warning("redis is away, to be done again", outbox=self.name, exception=type(error).__name__)
        except Exception as error:  # noqa: BLE001 - as the docstring says
            _LOG.error("not settled, to be done again", outbox=self.name, exception=type(error).__name__)
