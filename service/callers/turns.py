"""Places for work that is worth waiting for: tenants take turns, and who has least in hand goes first."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

from anyio import CapacityLimiter, to_thread

T = TypeVar("T")


class Turns:
    """Work of one sort, in this process. Belongs to one event loop.

    No place stays free while somebody waits, so who is alone may have them all. As soon as another tenant is in line,
    it gets each place that comes free until it has as many; nothing in hand is taken away.

    Args:
        places: pieces of work at a time.

    Attributes:
        free: places that nobody has.
    """

    def __init__(self, places: int) -> None:
        self.free = places
        self._busy: Counter[str] = Counter()
        self._lines: dict[str, deque[asyncio.Future[None]]] = {}
        """Of each tenant that waits, who was served longest ago first."""
        self._threads = CapacityLimiter(places)

    def waiting(self, tenant: str) -> int:
        """How many of the tenant are in line."""
        return sum(not place.done() for place in self._lines.get(tenant, ()))

    async def run(self, tenant: str, work: Callable[[], T]) -> T:
        """Let a thread do it when it is the tenant's turn. Once begun it is seen to its end, whoever has gone."""
        async with self.take(tenant):
            return await to_thread.run_sync(work, limiter=self._threads)

    @asynccontextmanager
    async def take(self, tenant: str) -> AsyncGenerator[None]:
        """A place, as long as the context lasts."""
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._lines.setdefault(tenant, deque()).append(place)
        self._let_in()
        try:
            await place
            yield
        finally:
            place.cancel()  # without effect if it was given; otherwise the line passes over it
            if not place.cancelled():
                self._give_back(tenant)

    def _let_in(self) -> None:
        while self.free and self._lines:
            tenant = min(self._lines, key=self._busy.__getitem__)
            line = self._lines[tenant]
            place = line.popleft()
            if not place.cancelled():
                self.free -= 1
                self._busy[tenant] += 1
                self._lines[tenant] = self._lines.pop(tenant)  # behind the others
                place.set_result(None)
            if not line:
                del self._lines[tenant]

    def _give_back(self, tenant: str) -> None:
        self.free += 1
        self._busy[tenant] -= 1
        if not self._busy[tenant]:
            del self._busy[tenant]
        self._let_in()
