"""The record of truth about jobs: every change of state is one atomic script, every terminal state is final.

RQ only carries deliveries. A worker that wants to run a job claims it here and gets a fencing token; all it
writes later must show the token that still holds, so a worker that was lost and comes back changes nothing.

    accept ─▶ fetching ─resolve─▶ the tenant's line ─▶ its window ─ring─▶ claim ─▶ begin ─▶ beat … ─▶ an end

What is to be done elsewhere after a change (ring, fetch, tell a webhook) waits in outboxes; see `outboxes`.
Redis being away surfaces as `redis.exceptions.RedisError`. No torch.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import redis

from workers.books import scripts
from workers.books.outboxes import WORKER_LOST, Outboxes
from workers.books.values import (
    Accepted,
    DamagedRecordError,
    Event,
    Look,
    Once,
    number_of,
    read_look,
    read_record,
    text_of,
)
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
    encode,
)
from workers.settings import QueueSettings

Beat = Literal["ok", "canceled", "expired", "lost"]
Ids = list[str]
Events = list[Event]
Looks = list[Look[JobT, ProgressT, ResultT] | DamagedRecordError]
Page = tuple[list[JobRecord[JobT, ProgressT, ResultT]], str | None]

MAX_PREVIEW_BYTES = 64 * 1024


class Ledger(Outboxes[JobT, ProgressT, ResultT]):
    """All jobs of one kind in one Redis.

    Args:
        redis: a client; see `queues.connect`.
        job_ttl_s: how long a record stays after its job has ended.
        lease_s: a claim lapses when nothing is heard for so long (by Redis' clock).
        max_attempts: lost workers a job may have before it fails with `worker_lost`.
        tenant_window: jobs of a tenant that may be in RQ or running; its others wait in its line.
    """

    def __init__(
        self,
        redis: redis.Redis,
        kind: Kind[JobT, ProgressT, ResultT],
        *,
        job_ttl_s: int = 86_400,
        lease_s: float = 10.0,
        max_attempts: int = 3,
        tenant_window: int = 64,
    ) -> None:
        super().__init__(redis, kind, job_ttl_s=job_ttl_s, max_attempts=max_attempts, tenant_window=tenant_window)
        self.lease_s = lease_s
        self._accept = redis.register_script(scripts.ACCEPT)
        self._claim = redis.register_script(scripts.CLAIM)
        self._begin = redis.register_script(scripts.BEGIN)
        self._beat = redis.register_script(scripts.BEAT)
        self._end = redis.register_script(scripts.END)
        self._hand_back = redis.register_script(scripts.HAND_BACK)
        self._cancel = redis.register_script(scripts.CANCEL)
        self._reap = redis.register_script(scripts.REAP)
        self._expire = redis.register_script(scripts.EXPIRE)
        self._delete = redis.register_script(scripts.DELETE)
        self._waiting = redis.register_script(scripts.WAITING)
        self._look = redis.register_script(scripts.LOOK)
        self._ended = redis.register_script(scripts.ENDED)

    # For the gateway.

    def accept(
        self,
        job: JobT,
        *,
        start_within_s: float | None = None,
        once: Once | None = None,
        cost_s: float = 0.0,
        share_s: float | None = None,
        bound_s: float | None = None,
        pace: int | None = None,
    ) -> Accepted:
        """Record a job as queued, unless it was accepted before or too much is accepted already.

        Args:
            start_within_s: it expires if no step is made within this time.
            once: an idempotency key, remembered for a day.
            cost_s: what it is estimated to take of the device.
            share_s, bound_s: open jobs of its tenant, and of all, may take no more than that together; one that is
                alone always may.
            pace: jobs of its tenant that are accepted within an hour by Redis' clock; None: any number, not counted.
        """
        hook = job.webhook
        answer = self._call(
            self._accept,
            job.id,
            encode(job),
            secrets.token_hex(8),
            job.tenant,
            "1" if job.fetching else "",
            once.name if once else "",
            once.digest if once else "",
            "" if start_within_s is None else start_within_s,
            hook.url if hook else "",
            ",".join(hook.events) if hook else "",
            round(cost_s * 1e6),
            "" if share_s is None else share_s * 1e6,
            "" if bound_s is None else bound_s * 1e6,
            "" if pace is None else pace,
        )
        outcome, job_id, called, *wait_s = map(text_of, answer)
        return Accepted(outcome, job_id, called == "1", *map(int, wait_s))  # pyright: ignore[reportArgumentType]  # the script answers one of them

    def seen(self, once: Once) -> Accepted | None:
        """What `accept` would answer to this key; None if the key is new."""
        kept: Any = self.redis.get(f"{self.root}once:{once.name}")
        if kept is None:
            return None
        digest, _, job_id = text_of(kept).rpartition(" ")
        return Accepted("replayed" if digest == once.digest else "conflict", job_id)

    def get(self, job_id: str) -> JobRecord[JobT, ProgressT, ResultT] | None:
        """The record as it is now; None if there never was one or it is gone.

        Raises:
            DamagedRecordError: what Redis holds is not a record.
        """
        fields: dict[Any, Any] = self.redis.hgetall(self._key(job_id))  # pyright: ignore[reportAssignmentType]  # the sync client never returns an awaitable
        return read_record(self.kind, fields.items()) if fields else None

    def look(self, job_ids: Ids) -> Looks[JobT, ProgressT, ResultT]:
        """What there is to know of these, in one question: each one's answer, or that its record is damaged."""
        answers: Any = self._look(keys=[self.root], args=job_ids) if job_ids else ()
        return [read_look(self.kind, answer) for answer in answers]

    def list(
        self, tenant: str | None = None, cursor: str | None = None, limit: int = 20, status: JobStatus | None = None
    ) -> Page[JobT, ProgressT, ResultT]:
        """Up to `limit` records, newest first, and the cursor of the next page (None at the end).

        Args:
            tenant: whose; None: everyone's.

        Raises:
            ValueError: the cursor is none that was handed out, or the limit is not positive.
        """
        if limit < 1 or (cursor is not None and not (cursor.isascii() and cursor.isdecimal())):
            raise ValueError("a cursor is a whole number and a limit at least 1")
        whose = "" if tenant is None else f":{tenant}"
        index = f"{self.root}{f'status:{status}' if status else 'jobs'}{whose}"
        found: list[JobRecord[JobT, ProgressT, ResultT]] = []
        below = f"({cursor}" if cursor else "+inf"
        while True:
            page: list[tuple[Any, float]] = self.redis.zrevrangebyscore(  # pyright: ignore[reportAssignmentType]  # sync client
                index, below, "-inf", start=0, num=limit, withscores=True
            )
            for (_, seq), record in zip(page, self._read(member for member, _ in page), strict=True):
                below = f"({int(seq)}"
                if record is not None and status in (None, record.status):
                    found.append(record)
                if len(found) == limit:
                    return found, str(int(seq))
            if len(page) < limit:
                return found, None

    def cancel(self, job_id: str) -> JobRecord[JobT, ProgressT, ResultT] | None:
        """The record afterwards: queued ends at once, running is asked to stop, terminal is unchanged."""
        flat = self._call(self._cancel, job_id)
        return read_record(self.kind, zip(flat[::2], flat[1::2], strict=True)) if flat else None

    def delete(self, job_id: str) -> bool:
        """Forget a job that has ended: True if it is gone now. Its artifacts are the caller's affair."""
        return self._call(self._delete, job_id) == 1

    def gone(self, job_id: str) -> str | None:
        """The tenant of a job that was deleted or has expired, for a week."""
        with self.redis.pipeline() as pipeline:
            pipeline.exists(self._key(job_id))
            pipeline.get(f"{self.root}gone:{job_id}")
            there, tenant = pipeline.execute()
        return None if there or tenant is None else text_of(tenant)

    def position(self, job_id: str) -> int | None:
        """How many queued jobs of all tenants are ahead of this queued one, by estimate.

        Counted are all in windows, and of each tenant's line as much as is before this one in its own: lines are let
        in by turns, as windows empty. Right to within a window of each tenant, but for what is accepted later.
        """
        (look,) = self.look([job_id])
        return None if isinstance(look, DamagedRecordError) else look.place

    def load(self, tenant: str | None = None) -> float:
        """Estimated seconds of the device that a tenant's open jobs, or all, will take."""
        key = f"{self.root}load"
        load: Any = self.redis.get(f"{key}_total") if tenant is None else self.redis.hget(key, tenant)
        return int(load or 0) / 1e6

    def ended(self, window_s: float) -> int:
        """Jobs that ended within the last seconds (up to `job_ttl_s`) and were not deleted since."""
        return self._call(self._ended, window_s)

    def events(self, job_id: str, after: str | None = None, limit: int = 100) -> tuple[Events, bool]:
        """What happened to a job, in order, and whether something in between is no longer kept.

        Args:
            after: the id of the last event known. One that never was counts as a gap, from the first one kept.
        """
        known = number_of(after)
        key = f"{self.root}events:{job_id}"
        with self.redis.pipeline() as pipeline:
            pipeline.hget(self._key(job_id), "events")
            pipeline.xrange(key, f"{known + 1}-0" if known >= 0 else "-", count=limit)
            last, entries = pipeline.execute()
        if known > int(last or 0):
            known, entries = -1, self.redis.xrange(key, count=limit) or ()
        found = [Event.of(entry) for entry in entries]
        return found, known < 0 or (bool(found) and int(found[0].id) > known + 1)

    def follow(self, cursors: Mapping[str, str], block_s: float) -> dict[str, Events]:
        """What happens next to each of some jobs; waits up to `block_s`, less than the client's own timeout.

        Args:
            cursors: the id of the last event known by job, `0` for none.
        """
        prefix = f"{self.root}events:"
        streams: Any = {f"{prefix}{job_id}": f"{max(0, number_of(known))}-0" for job_id, known in cursors.items()}
        if not streams:
            return {}
        answer: Any = self.redis.xread(streams, count=100, block=max(1, round(block_s * 1000)))
        pairs = answer.items() if isinstance(answer, dict) else answer or ()  # by the protocol's version
        return {text_of(key)[len(prefix) :]: [Event.of(entry) for entry in entries] for key, entries in pairs}

    def preview(self, job_id: str) -> bytes | None:
        """The newest small picture of a running job; for a minute after its end, the last one."""
        return self.redis.get(f"{self.root}preview:{job_id}")  # pyright: ignore[reportReturnType]  # sync client

    # For a worker.

    def claim(self, job_id: str, worker: str, *, waits: bool = False) -> int | None:
        """A fencing token greater than all before it, and a lease; None unless the job is queued and called for.

        Args:
            waits: the job only waits there: until `begin`, losing the worker costs it no attempt.
        """
        nonce = secrets.token_hex(8)
        return self._call(self._claim, job_id, worker, nonce, self.lease_s, "1" if waits else "") or None

    def begin(self, job_id: str, token: int) -> bool:
        """The work on a claimed job begins; False if the token no longer holds."""
        return self._call(self._begin, job_id, token) == 1

    def beat(self, job_id: str, token: int, progress: ProgressT | None = None, preview: bytes | None = None) -> Beat:
        """Renew the lease and, if given, publish progress and a small picture, of which only the newest is kept.

        Returns:
            `canceled`: stop and `release_canceled`. `expired`: no step was heard of by its deadline; stop and
            `release_expired`, unless one was made. `lost`: stop and leave the job alone, it is another's.

        Raises:
            ValueError: the picture exceeds `MAX_PREVIEW_BYTES`.
        """
        if preview is not None and len(preview) > MAX_PREVIEW_BYTES:
            raise ValueError("a preview of more than 64 KiB")
        said = encode(progress) if progress is not None else ""
        stepped = "1" if progress is not None and progress.step > 0 else ""
        return text_of(self._call(self._beat, job_id, token, said, self.lease_s, stepped, preview or b""))  # pyright: ignore[reportReturnType]  # the script answers one of the four

    def commit(self, job_id: str, token: int, result: ResultT) -> bool:
        """Running → succeeded; False if the token no longer holds. May be repeated after a lost reply."""
        return self._call(self._end, job_id, token, JobStatus.SUCCEEDED, "result", encode(result)) == 1

    def fail(self, job_id: str, token: int, error: JobError) -> bool:
        """Running → failed; False if the token no longer holds."""
        return self._call(self._end, job_id, token, JobStatus.FAILED, "error", encode(error)) == 1

    def release_canceled(self, job_id: str, token: int) -> bool:
        """Running → canceled, by the worker that saw the request; False if nobody asked or it is stale."""
        return self._call(self._end, job_id, token, JobStatus.CANCELED, "", "") == 1

    def release_expired(self, job_id: str, token: int) -> bool:
        """Running → expired, by a worker that has made no step; False if there is still time or it is stale."""
        return self._call(self._end, job_id, token, JobStatus.EXPIRED, "", "") == 1

    def hand_back(self, job_id: str, token: int) -> bool:
        """Running → queued, by a worker that leaves before the end; False if the token no longer holds. Ring for it.

        A job that was asked to be canceled ends so instead.
        """
        return self._call(self._hand_back, job_id, token) == 1

    # For the caretaker.

    def reap(self) -> Ids:
        """Take back the jobs whose lease has lapsed.

        Returns:
            Ids that are queued again, with one more attempt if they had begun: ring for them. The others were
            canceled, if that was asked for, or failed with `worker_lost` after `max_attempts`.
        """
        return [text_of(job) for job in self._call(self._reap, self.max_attempts, encode(WORKER_LOST))]

    def expire(self) -> Ids:
        """End the queued jobs that are past their deadline; at most 100 at a time."""
        return [text_of(job) for job in self._call(self._expire)]

    def waiting(self, age_s: float) -> Ids:
        """The oldest ids that have been called for, and not claimed, for at least `age_s`; at most 200."""
        return [text_of(job) for job in self._call(self._waiting, age_s)]

    def _read(self, job_ids: Iterable[Any]) -> Iterable[JobRecord[JobT, ProgressT, ResultT] | None]:
        """One damaged record must not hide the others from a list."""
        with self.redis.pipeline(transaction=False) as pipeline:
            for job_id in job_ids:
                pipeline.hgetall(self._key(text_of(job_id)))
            for fields in pipeline.execute():
                try:
                    yield read_record(self.kind, fields.items()) if fields else None
                except DamagedRecordError:
                    yield None


def open_ledger(
    client: redis.Redis,
    kind: Kind[JobT, ProgressT, ResultT],
    settings: QueueSettings,
    *,
    max_attempts: int = 3,
) -> Ledger[JobT, ProgressT, ResultT]:
    """A ledger as it is configured; everyone who shares a Redis must agree on that."""
    return Ledger(
        client,
        kind,
        job_ttl_s=settings.job_ttl_s,
        lease_s=settings.lease_s,
        max_attempts=max_attempts,
        tenant_window=settings.tenant_window,
    )


CustomizeLedger = Ledger[CustomizeJob, Progress, JobResult]
TrainingLedger = Ledger[TrainingJob, TrainingProgress, TrainingResult]
