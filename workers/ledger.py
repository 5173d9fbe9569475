"""The record of truth about jobs: every change of state is one atomic script, every terminal state is final.

RQ only carries deliveries. A worker that wants to run a job claims it here and gets a fencing token; all it
writes later must show the token that still holds, so a worker that was lost and comes back changes nothing.
Redis being away surfaces as `redis.exceptions.RedisError`. No torch.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from typing import Any, Generic, Literal, TypeVar

import redis
from pydantic import ValidationError

from workers import ledger_scripts as scripts
from workers.jobs import (
    CustomizeJob,
    JobError,
    JobRecord,
    JobResult,
    JobStatus,
    JobT,
    Kind,
    Progress,
    ProgressT,
    ResultT,
    TrainingJob,
    TrainingProgress,
    TrainingResult,
    decode,
    encode,
)

T = TypeVar("T")

Beat = Literal["ok", "canceled", "lost"]
Ids = list[str]
Page = tuple[list[JobRecord[JobT, ProgressT, ResultT]], str | None]

WORKER_LOST = JobError(
    "worker_lost", "Each worker that took this job was lost before it ended: submit it again.", retryable=True
)


class DamagedRecordError(Exception):
    """A record in Redis is not one that this ledger writes. The message holds nothing of its content."""


class Ledger(Generic[JobT, ProgressT, ResultT]):
    """All jobs of one kind in one Redis.

    Args:
        redis: a client; see `queues.connect`.
        job_ttl_s: how long a record stays after its job has ended.
        lease_s: a claim lapses when nothing is heard for so long (by Redis' clock).
        max_attempts: lost workers a job may have before it fails with `worker_lost`.
    """

    def __init__(
        self,
        redis: redis.Redis,
        kind: Kind[JobT, ProgressT, ResultT],
        *,
        job_ttl_s: int = 86_400,
        lease_s: float = 10.0,
        max_attempts: int = 3,
    ) -> None:
        self.redis = redis
        self.kind = kind
        self.job_ttl_s = job_ttl_s
        self.lease_s = lease_s
        self.max_attempts = max_attempts
        self._accept = redis.register_script(scripts.ACCEPT)
        self._claim = redis.register_script(scripts.CLAIM)
        self._beat = redis.register_script(scripts.BEAT)
        self._end = redis.register_script(scripts.END)
        self._hand_back = redis.register_script(scripts.HAND_BACK)
        self._cancel = redis.register_script(scripts.CANCEL)
        self._reap = redis.register_script(scripts.REAP)
        self._waiting = redis.register_script(scripts.WAITING)

    def accept(self, job: JobT) -> bool:
        """Record a job as queued; False, and nothing changed, if its id was already accepted."""
        return self._call(self._accept, job.id, encode(job), secrets.token_hex(8)) == 1

    def get(self, job_id: str) -> JobRecord[JobT, ProgressT, ResultT] | None:
        """The record as it is now; None if there never was one or it has expired.

        Raises:
            DamagedRecordError: what Redis holds is not a record.
        """
        fields: dict[Any, Any] = self.redis.hgetall(f"{self.kind.root}job:{job_id}")  # pyright: ignore[reportAssignmentType]  # the sync client never returns an awaitable
        return self._record(fields.items()) if fields else None

    def list(
        self, cursor: str | None = None, limit: int = 20, status: JobStatus | None = None
    ) -> Page[JobT, ProgressT, ResultT]:
        """Up to `limit` records, newest first, and the cursor of the next page (None at the end).

        Raises:
            ValueError: the cursor is none that was handed out, or the limit is not positive.
        """
        if limit < 1 or (cursor is not None and not (cursor.isascii() and cursor.isdecimal())):
            raise ValueError("a cursor is a whole number and a limit at least 1")
        index = f"{self.kind.root}status:{status}" if status else f"{self.kind.root}jobs"
        found: list[JobRecord[JobT, ProgressT, ResultT]] = []
        below = f"({cursor}" if cursor else "+inf"
        while True:
            page: list[tuple[Any, float]] = self.redis.zrevrangebyscore(  # pyright: ignore[reportAssignmentType]  # sync client
                index, below, "-inf", start=0, num=limit, withscores=True
            )
            for member, seq in page:
                below = f"({int(seq)}"
                record = self._readable(_text(member))
                if record is not None and status in (None, record.status):
                    found.append(record)
                if len(found) == limit:
                    return found, str(int(seq))
            if len(page) < limit:
                return found, None

    def claim(self, job_id: str, worker: str) -> int | None:
        """A fencing token greater than all before it, and a lease; None unless the job is queued."""
        return self._call(self._claim, job_id, worker, secrets.token_hex(8), self.lease_s) or None

    def beat(self, job_id: str, token: int, progress: ProgressT | None = None) -> Beat:
        """Renew the lease and, if given, publish progress.

        Returns:
            `canceled`: stop and `release_canceled`. `lost`: stop and leave the job alone, it is another's.
        """
        return _text(self._call(self._beat, job_id, token, encode(progress) if progress else "", self.lease_s))  # pyright: ignore[reportReturnType]  # the script answers one of the three

    def commit(self, job_id: str, token: int, result: ResultT) -> bool:
        """Running → succeeded; False if the token no longer holds. May be repeated after a lost reply."""
        return self._call(self._end, job_id, token, JobStatus.SUCCEEDED, "result", encode(result)) == 1

    def fail(self, job_id: str, token: int, error: JobError) -> bool:
        """Running → failed; False if the token no longer holds."""
        return self._call(self._end, job_id, token, JobStatus.FAILED, "error", encode(error)) == 1

    def release_canceled(self, job_id: str, token: int) -> bool:
        """Running → canceled, by the worker that saw the request; False if nobody asked or it is stale."""
        return self._call(self._end, job_id, token, JobStatus.CANCELED, "", "") == 1

    def hand_back(self, job_id: str, token: int) -> bool:
        """Running → queued, by a worker that leaves before the end; False if the token no longer holds. Ring for it.

        A job that was asked to be canceled ends so instead.
        """
        return self._call(self._hand_back, job_id, token) == 1

    def cancel(self, job_id: str) -> JobRecord[JobT, ProgressT, ResultT] | None:
        """The record afterwards: queued ends at once, running is asked to stop, terminal is unchanged."""
        flat = self._call(self._cancel, job_id)
        return self._record(zip(flat[::2], flat[1::2], strict=True)) if flat else None

    def position(self, job_id: str) -> int | None:
        """How many queued jobs are ahead of this queued one."""
        return self.redis.zrank(f"{self.kind.root}status:queued", job_id)  # pyright: ignore[reportReturnType]  # sync client

    def reap(self) -> Ids:
        """Take back the jobs whose lease has lapsed.

        Returns:
            Ids that are queued again with one more attempt: ring for them. The others were canceled, if that
            was asked for, or failed with `worker_lost` after `max_attempts`.
        """
        return [_text(job) for job in self._call(self._reap, self.max_attempts, encode(WORKER_LOST))]

    def waiting(self, age_s: float) -> Ids:
        """The oldest ids that have been queued for at least `age_s`; at most 200."""
        return [_text(job) for job in self._call(self._waiting, age_s)]

    def _call(self, script: Any, *arguments: str | float) -> Any:
        return script(keys=[self.kind.root], args=[self.job_ttl_s, *arguments])

    def _readable(self, job_id: str) -> JobRecord[JobT, ProgressT, ResultT] | None:
        """One damaged record must not hide the others from a list."""
        try:
            return self.get(job_id)
        except DamagedRecordError:
            return None

    def _record(self, fields: Iterable[tuple[Any, Any]]) -> JobRecord[JobT, ProgressT, ResultT]:
        try:
            values = {_text(name): _text(value) for name, value in fields}
            return JobRecord(
                job=decode(self.kind.job, values["job"]),
                status=JobStatus(values["status"]),
                attempt=int(values["attempt"]),
                created_at=float(values["created_at"]),
                started_at=_seconds(values.get("started_at")),
                finished_at=_seconds(values.get("finished_at")),
                progress=_part(self.kind.progress, values.get("progress")),
                cancel_requested=values.get("cancel_requested") == "1",
                result=_part(self.kind.result, values.get("result")),
                error=_part(JobError, values.get("error")),
            )
        except (ValidationError, KeyError, ValueError):  # from None: a validation error quotes its input
            raise DamagedRecordError("a job record in Redis is damaged") from None


CustomizeLedger = Ledger[CustomizeJob, Progress, JobResult]
TrainingLedger = Ledger[TrainingJob, TrainingProgress, TrainingResult]


def _part(kind: type[T], text: str | None) -> T | None:
    return decode(kind, text) if text else None


def _seconds(text: str | None) -> float | None:
    return float(text) if text else None


def _text(value: Any) -> str:
    """Redis answers bytes or text, as its client was told to."""
    return value.decode() if isinstance(value, bytes) else str(value)
