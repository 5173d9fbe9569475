"""A claimed job from claim to end: the outermost shell around the work, the same for every kind of job.

    claim ─▶ work, its progress told by `beat` ─▶ commit, fail, release or hand back ─▶ ring for who comes next

All that is written here carries the claim's token.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

import structlog
from redis.exceptions import RedisError

from workers import queues
from workers.caretaker import Claim
from workers.failpoints import reach
from workers.jobs import JobError, JobRecord, JobT, ProgressT, ResultT
from workers.ledger import Beat, Ledger

_LOG = structlog.stdlib.get_logger("workers.claims")

T = TypeVar("T")
Stop = Literal["canceled", "expired", "lost", "leaving"]
End = Literal["succeeded", "failed", "canceled", "expired", "lost", "leaving"]


class StoppedError(Exception):
    """The work ends early: the ledger answered a beat with something else than ok, or the process is to leave."""

    def __init__(self, reason: Stop) -> None:
        super().__init__(reason)
        self.reason: Stop = reason


@dataclass(frozen=True, slots=True)
class ClaimedJob(Generic[JobT, ProgressT, ResultT]):
    """A job in hand, and what may be written about it. `patience_s`: how long its end waits for Redis."""

    ledger: Ledger[JobT, ProgressT, ResultT]
    claim: Claim
    patience_s: float

    def read(self) -> JobRecord[JobT, ProgressT, ResultT]:
        """The job's record. A Redis that is away must not end the job, so this waits as its end does.

        Raises:
            StoppedError: its record is gone.
            DamagedRecordError: what Redis holds is not a record.
            redis.exceptions.RedisError: Redis was away for longer than the patience.
        """
        record = self._patiently(lambda: self.ledger.get(self.claim.job_id))
        if record is None:
            raise StoppedError("lost")
        return record

    def begin(self) -> None:
        """From here on a lost worker costs the job an attempt; for claims that waited.

        Raises:
            StoppedError: it is another's by now.
            redis.exceptions.RedisError: Redis was away for longer than the patience.
        """
        if not self._patiently(lambda: self.ledger.begin(self.claim.job_id, self.claim.token)):
            raise StoppedError("lost")

    def beat(self, progress: ProgressT, preview: bytes | None = None) -> Beat:
        """Tell the ledger; a Redis that is away for a moment stops no work."""
        try:
            return self.ledger.beat(self.claim.job_id, self.claim.token, progress, preview)
        except RedisError as error:
            _LOG.warning("beat not heard", job_id=self.claim.job_id, exception=type(error).__name__)
            return "ok"

    def end(self, work: Callable[[], ResultT], explain: Callable[[Exception], JobError]) -> End:
        """Do the work and write its end into the ledger.

        Args:
            work: makes the result; `StoppedError` ends it early, any other exception is a failure.
            explain: what the caller may know of a failure.

        Returns:
            What the ledger took; `lost` when it took nothing. Who is `leaving` rings for the job himself.

        Raises:
            redis.exceptions.RedisError: Redis was away for longer than the patience.
        """
        try:
            result = work()
        except StoppedError as stopped:
            return self.stop(stopped.reason)
        except Exception as error:  # noqa: BLE001 - the outermost task shell: nothing may pass it unrecorded
            return self.fail(error, explain)
        return self.succeed(result)

    def succeed(self, result: ResultT) -> End:
        """Commit; results and errors of the three ways to end are those of `end`."""
        reach("before_commit")
        end = self._insist(lambda: self.ledger.commit(self.claim.job_id, self.claim.token, result), "succeeded")
        reach("committed")
        return end

    def fail(self, error: Exception, explain: Callable[[Exception], JobError]) -> End:
        """Record a failure, whose own words stay here."""
        reason = explain(error)
        _LOG.warning("job failed", job_id=self.claim.job_id, code=reason.code, exception=type(error).__name__)
        return self._insist(lambda: self.ledger.fail(self.claim.job_id, self.claim.token, reason), "failed")

    def stop(self, reason: Stop) -> End:
        """End early: acknowledge a cancel or a deadline, or hand the job back."""
        match reason:
            case "lost":
                return "lost"
            case "canceled":
                write = self.ledger.release_canceled
            case "expired":
                write = self.ledger.release_expired
            case "leaving":
                write = self.ledger.hand_back
        return self._insist(lambda: write(self.claim.job_id, self.claim.token), reason)

    def _insist(self, write: Callable[[], bool], end: End) -> End:
        """Write an end; the ledger's scripts bear repetition."""
        if not self._patiently(write):
            return "lost"
        if end != "leaving":
            with suppress(RedisError):  # any caretaker rings for what enters the window now
                queues.ring_due(self.ledger)
        return end

    def _patiently(self, act: Callable[[], T]) -> T:
        """Try for as long as the patience lasts."""
        deadline = time.monotonic() + self.patience_s
        while True:
            try:
                return act()
            except RedisError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)
