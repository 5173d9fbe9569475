"""Whether this gateway can accept jobs: each check asks for what an acceptance needs, not for a sign of life."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Mapping

import redis
from redis.exceptions import RedisError

from service.problems import Problem
from workers.artifacts import ArtifactError, ArtifactStore

PROBE = "dreamserve:probe"
"""Written by who asks whether Redis takes writes; it lapses."""
REMEMBER_S = 1.0
"""How long an answer counts: whoever asks more often makes no more work."""


class Readiness:
    """The checks of one process.

    Args:
        reserve_bytes: free space below which the store counts as full.
    """

    def __init__(
        self, client: redis.Redis, store: ArtifactStore, reserve_bytes: int, remember_s: float = REMEMBER_S
    ) -> None:
        self.client = client
        self.store = store
        self.reserve_bytes = reserve_bytes
        self.remember_s = remember_s
        self.draining = False
        """The process was asked to end: it still answers, and is to get nothing new."""
        self._lock = threading.Lock()
        self._known: tuple[float, Mapping[str, str]] = (float("-inf"), {})

    def failed(self) -> Mapping[str, str]:
        """Problem codes by the check that failed: `draining`, `redis`, `store`."""
        return {**({"draining": "draining"} if self.draining else {}), **self._asked()}

    def require(self) -> None:
        """Nothing, if all is well.

        Raises:
            Problem: the code of the first check that failed; its detail names them all.
        """
        failed = self.failed()
        if failed:
            raise Problem(next(iter(failed.values())), f"Failed checks: {', '.join(failed)}.")

    def _asked(self) -> Mapping[str, str]:
        with self._lock:
            until, known = self._known
            if time.monotonic() >= until:
                checks: Mapping[str, Callable[[], str | None]] = {"redis": self._redis, "store": self._store}
                known = {name: code for name, check in checks.items() if (code := check()) is not None}
                self._known = (time.monotonic() + self.remember_s, known)
            return known

    def _redis(self) -> str | None:
        """A write, since a replica, a server that loads, or one without memory or disk answers PING as ever."""
        try:
            self.client.set(PROBE, "1", ex=60)
        except RedisError:
            return "queue_unavailable"
        return None

    def _store(self) -> str | None:
        try:
            self.store.check_writable()
            free = shutil.disk_usage(self.store.root).free
        except (ArtifactError, OSError):
            return "storage_unavailable"
        return "storage_unavailable" if free < self.reserve_bytes else None
