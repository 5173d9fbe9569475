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
_HALF_USED: Final = "Your requests in hand fill your half of the gateway's memory: let some end first."
_ALL_USED: Final = "The gateway's memory for requests is full: try again after Retry-After."


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


class Room:
    """Memory for the bodies of requests, in this process. Belongs to one event loop.

    Args:
        size: bytes of all together; a tenant may have half of them, the operator's own, `default`, all.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._taken: Counter[str] = Counter()

    def taken(self) -> int:
        """Bytes that somebody has."""
        return self._taken.total()

    @contextmanager
    def take(self, tenant: str, size: int) -> Generator[None]:
        """So many bytes, as long as the context lasts.

        Raises:
            Problem: 429 `too_many_requests`: beyond the tenant's half; 503 `over_capacity`: beyond what there is.
        """
        if tenant != SOLE_TENANT and self._taken[tenant] + size > self.size // 2:
            raise Problem("too_many_requests", _HALF_USED, headers={"Retry-After": str(RETRY_AFTER_S)})
        if self.taken() + size > self.size:
            raise Problem("over_capacity", _ALL_USED)
        self._taken[tenant] += size
        try:
            yield
        finally:
            self._taken[tenant] -= size
            if not self._taken[tenant]:
                del self._taken[tenant]
