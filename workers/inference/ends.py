"""How jobs end: each once, by whoever takes its end first, and written down in threads of their own.

Redis may be away when a job ends. Its end waits for as long as the patience lasts, from the moment it was taken; the
forwards of others and the caretaker's rounds do not wait with it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial

import structlog
from redis.exceptions import RedisError
from structlog.contextvars import bound_contextvars

from workers import queues
from workers.artifacts import ArtifactStore
from workers.claims import End, Stop
from workers.engine import without_frames
from workers.inference.failures import job_error
from workers.inference.hands import Hands, Place
from workers.inference.metrics import WorkerMetrics
from workers.inference.scribe import Told
from workers.inference.works import Work
from workers.jobs import CUSTOMIZE

_LOG = structlog.stdlib.get_logger("workers.inference.ends")
_THREADS = 8
"""Ends that wait for Redis at once."""
_PLACE: Place = (False, 0, 0)
"""Of all alike: ends are written as they come."""


class Ends:
    """Their threads live until `close`.

    Args:
        gone: called when a job is not in hand any more, however its end went.
    """

    def __init__(self, store: ArtifactStore, metrics: WorkerMetrics, gone: Callable[[Work], None]) -> None:
        self._store = store
        self._metrics = metrics
        self._gone = gone
        self._hands = Hands(_THREADS, "end", lambda: None)

    def succeed(self, work: Work) -> None:
        """All pictures are there. Of this and the other two, only the first for a job counts."""
        self._take(work, lambda claimed: claimed.succeed(work.result()))

    def fail(self, work: Work, error: Exception) -> None:
        """It failed by this."""
        error = without_frames(error)
        self._take(work, lambda claimed: claimed.fail(error, job_error))

    def stop(self, work: Work, reason: Stop) -> None:
        """It is not to go on, or not here."""
        self._take(work, lambda claimed: claimed.stop(reason))

    def close(self) -> None:
        """Wait until all ends that were taken are written, or given up."""
        self._hands.close(wait=True, forget=False)

    def _take(self, work: Work, write: Callable[[Told], End]) -> None:
        if work.take_end():
            work.trace.phase("commit")
            deadline = time.monotonic() + work.claimed.patience_s
            self._hands.put(_PLACE, partial(self._finish, work, write, deadline))

    def _finish(self, work: Work, write: Callable[[Told], End], deadline: float) -> None:
        """Bring an end into the ledger, and let go of the job whatever comes of that."""
        claimed = replace(work.claimed, patience_s=max(0.0, deadline - time.monotonic()))
        with bound_contextvars(**work.ids):
            end: End | None = None
            try:
                end = self._written(work, claimed, write)
            finally:
                work.trace.end(end or "lost")
                self._gone(work)

    def _written(self, work: Work, claimed: Told, write: Callable[[Told], End]) -> End | None:
        """The end that the ledger took; None if that is not known: it may be a success, so the pictures stay. Otherwise
        only a job that succeeds keeps them."""
        try:
            end = write(claimed)
        except RedisError as error:  # The lease lapses, and the job is run again.
            _LOG.warning("redis was away for too long", exception=type(error).__name__)
            return None
        if end != "succeeded":
            for image in work.published():
                self._store.discard(image.name)
        self._metrics.ended(end, work.seconds(), work.timings, len(work.published()))
        _LOG.info("job ended", job_id=work.claimed.claim.job_id, state=end, seconds=work.seconds())
        if end == "leaving":
            with suppress(RedisError):  # Another worker's caretaker finds a job that waits without a delivery.
                queues.ring_again(claimed.ledger.redis, CUSTOMIZE, claimed.claim.job_id)
        return end
