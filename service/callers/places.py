"""How much one tenant may have in hand at a time, so that it cannot take all that a gateway has for everybody.

A share bounds what waits for the devices; this bounds what costs a gateway itself: sockets, memory, questions to Redis.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from typing import Final

from service.problems import Problem
from workers.tenants import SOLE_TENANT

RETRY_AFTER_S: Final = 1


class Places:
    """Requests of one sort, in this process. Belongs to one event loop.

    Args:
        most: of each tenant at a time; the operator's own, `default`, has no such limit, as it has no share.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._taken: Counter[str] = Counter()

    def taken(self, tenant: str) -> int:
        """How many the tenant has."""
        return self._taken[tenant]

    def full(self, tenant: str) -> bool:
        """Whether the tenant has as many as it may."""
        return tenant != SOLE_TENANT and self.taken(tenant) >= self.most

    @contextmanager
    def take(self, tenant: str) -> Generator[None]:
        """A place, as long as the context lasts.

        Raises:
            Problem: 429 `too_many_requests`.
        """
        if self.full(tenant):
            raise Problem("too_many_requests", headers={"Retry-After": str(RETRY_AFTER_S)})
        self._taken[tenant] += 1
        try:
            yield
        finally:
            self._taken[tenant] -= 1
            if not self._taken[tenant]:
                del self._taken[tenant]
