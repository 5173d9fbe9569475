"""What jobs and trainings share between HTTP and their ledgers: ids, pages, cancelling, places in line, fields."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, Final

from fastapi import Depends, Path, Query, Response, status
from redis.exceptions import RedisError

from service.callers.limits import WINDOWS_S, drain_rate
from service.headers import IN_DIGITS
from service.problems import Fault, Problem
from service.schemas import JobErrorView, QueueView
from workers import queues
from workers.books.values import DamagedRecordError, Look
from workers.jobs import JobRecord, JobStatus, JobT, ProgressT, ResultT
from workers.ledger import Ledger, Page

RECORD_ID: Final = r"^[A-Za-z0-9_-]{1,64}$"
RecordId = Annotated[str, Path(pattern=RECORD_ID, description="The `id` of the answer that accepted it.")]


@dataclass(frozen=True, slots=True)
class PageQuery:
    """Query parameters of a listing."""

    status: Annotated[JobStatus | None, Query(description="Only those in this state.")] = None
    cursor: Annotated[str | None, Query(max_length=256, description="`next_cursor` of the page before.")] = None
    limit: Annotated[int, Query(ge=1, le=100), IN_DIGITS] = 20

    def read(self, ledger: Ledger[JobT, ProgressT, ResultT], tenant: str) -> Page[JobT, ProgressT, ResultT]:
        """The tenant's records, newest first, and the cursor of the next page.

        Raises:
            Problem: 422, the cursor is none of this listing.
        """
        try:
            return ledger.list(tenant, self.cursor, self.limit, self.status)
        except ValueError:
            detail = "Use a next_cursor of this listing, or none to start anew."
            raise Problem.of_faults([Fault("?cursor", "cursor_invalid", detail)]) from None


PageDependency = Annotated[PageQuery, Depends()]


class DrainGauge:
    """How fast jobs end lately; asked once a second at most."""

    def __init__(self, ledger: Ledger[Any, Any, Any]) -> None:
        self.ledger = ledger
        self._known: tuple[float, float | None] = (float("-inf"), None)

    def rate(self) -> float | None:
        """Jobs per second; None if none ended lately."""
        until, rate = self._known
        now = time.monotonic()
        if now >= until:
            rate = drain_rate({window: self.ledger.ended(window) for window in WINDOWS_S})
            self._known = (now + 1.0, rate)
        return rate


def found(ledger: Ledger[JobT, ProgressT, ResultT], record_id: str, tenant: str) -> JobRecord[JobT, ProgressT, ResultT]:
    """The tenant's record of this id.

    Raises:
        Problem: 404, there is none, or it is another tenant's: nobody can tell which; 410, it was the tenant's.
        DamagedRecordError: what Redis holds is not a record.
    """
    (look,) = ledger.look([record_id])
    if isinstance(look, DamagedRecordError):
        raise look
    return own(look, tenant)


def own(look: Look[JobT, ProgressT, ResultT], tenant: str) -> JobRecord[JobT, ProgressT, ResultT]:
    """The record, if it is the tenant's.

    Raises:
        Problem: as `found`.
    """
    if look.record is not None and look.record.job.tenant == tenant:
        return look.record
    raise Problem("job_gone" if look.gone == tenant else "not_found")


def cancel(
    ledger: Ledger[JobT, ProgressT, ResultT], record_id: str, tenant: str, response: Response
) -> JobRecord[JobT, ProgressT, ResultT]:
    """The record afterwards; the answer becomes 202 while a running job has still to stop.

    Raises:
        Problem: 404 or 410, as `found`.
    """
    found(ledger, record_id, tenant)
    record = ledger.cancel(record_id)
    if record is None:  # it ended long ago, and was forgotten between the two
        raise Problem("job_gone")
    if record.status.terminal:
        with suppress(RedisError):  # the cancel stands, and what is left of it in RQ will be refused
            queues.recall(ledger.redis, ledger.kind, [record_id])
    if record.status is JobStatus.RUNNING:
        response.status_code = status.HTTP_202_ACCEPTED
    return record


def place_in_queue(
    ledger: Ledger[JobT, ProgressT, ResultT], record: JobRecord[JobT, ProgressT, ResultT], gauge: DrainGauge
) -> QueueView | None:
    """Where a queued one stands, and when it may start; None for others."""
    position = ledger.position(record.job.id) if record.status is JobStatus.QUEUED else None
    return None if position is None else queue_view(position, gauge.rate())


def queue_view(position: int, rate: float | None) -> QueueView:
    """Where one stands, and when it may start if so many jobs end per second."""
    return QueueView(position=position, eta_s=None if rate is None else round(position / rate, 1))


def common_fields(record: JobRecord[Any, Any, Any], *, queue: QueueView | None, ttl_s: float) -> dict[str, Any]:
    """Fields that every record's body has. `ttl_s`: life of a terminal record."""
    finished = record.finished_at
    return {
        "id": record.job.id,
        "status": record.status,
        "queue": queue,
        "attempt": record.attempt,
        "cancel_requested": record.cancel_requested,
        "created_at": time_text(record.created_at),
        "started_at": None if record.started_at is None else time_text(record.started_at),
        "finished_at": None if finished is None else time_text(finished),
        "expires_at": None if finished is None else time_text(finished + ttl_s),
        "error": JobErrorView(**asdict(record.error)) if record.error else None,
        "metadata": record.job.metadata,
    }


def time_text(seconds: float) -> str:
    """ISO 8601 in UTC, to the millisecond."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
