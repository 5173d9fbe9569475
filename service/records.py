"""What jobs and trainings share between HTTP and their ledgers: acceptance, ids, pages, cancelling, common fields."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Path, Query, Response, status

from service.problems import Fault, Problem
from service.schemas import JobErrorView, JobUrls, QueueView
from workers import queues
from workers.jobs import JobRecord, JobStatus, JobT, ProgressT, ResultT
from workers.ledger import Ledger, Page

T = TypeVar("T")

RecordId = Annotated[
    str, Path(pattern=r"^[A-Za-z0-9_-]{1,64}$", description="The `id` of the answer that accepted it.")
]


@dataclass(frozen=True, slots=True)
class PageQuery:
    """Query parameters of a listing."""

    status: Annotated[JobStatus | None, Query(description="Only those in this state.")] = None
    cursor: Annotated[str | None, Query(max_length=256, description="`next_cursor` of the page before.")] = None
    limit: Annotated[int, Query(ge=1, le=100)] = 20

    def read(self, ledger: Ledger[JobT, ProgressT, ResultT]) -> Page[JobT, ProgressT, ResultT]:
        """The records, newest first, and the cursor of the next page.

        Raises:
            Problem: 422, the cursor is none of this listing.
        """
        try:
            return ledger.list(self.cursor, self.limit, self.status)
        except ValueError:
            detail = "Use a next_cursor of this listing, or none to start anew."
            raise Problem.of_faults([Fault("?cursor", "cursor_invalid", detail)]) from None


PageDependency = Annotated[PageQuery, Depends()]


def accept(ledger: Ledger[JobT, ProgressT, ResultT], job: JobT) -> JobRecord[JobT, ProgressT, ResultT]:
    """Record a job and ring for it.

    Raises:
        Problem: 503, it cannot be read back.
        redis.exceptions.RedisError: Redis is away.
    """
    ledger.accept(job)
    queues.ring(ledger.redis, ledger.kind, job.id)
    record = ledger.get(job.id)
    if record is None:  # only with a time to live of nothing, or a Redis that forgets
        raise Problem("queue_unavailable", "What was accepted could not be read back: try again.")
    return record


def accepted(what: str) -> dict[str, Any]:
    """OpenAPI's 202 of a route that accepts; `point_to` sets its headers."""
    return {
        "description": f"Accepted: follow the {what} at Location.",
        "headers": {
            "Location": {"description": f"The {what}.", "schema": {"type": "string"}},
            "Retry-After": {"description": "Seconds until polling makes sense.", "schema": {"type": "integer"}},
        },
    }


def point_to(response: Response, urls: JobUrls, poll_after_s: int) -> None:
    """Say where to follow what was accepted, and when to begin."""
    response.headers["Location"] = urls.self
    response.headers["Retry-After"] = str(poll_after_s)


def found(value: T | None) -> T:
    """What was looked for.

    Raises:
        Problem: 404, there is none.
    """
    if value is None:
        raise Problem("not_found")
    return value


def cancel(
    ledger: Ledger[JobT, ProgressT, ResultT], record_id: str, response: Response
) -> JobRecord[JobT, ProgressT, ResultT]:
    """The record afterwards; the answer becomes 202 while a running job has still to stop.

    Raises:
        Problem: 404, there is none.
    """
    record = found(ledger.cancel(record_id))
    if record.status is JobStatus.RUNNING:
        response.status_code = status.HTTP_202_ACCEPTED
    return record


def queue_position(ledger: Ledger[JobT, ProgressT, ResultT], record: JobRecord[JobT, ProgressT, ResultT]) -> int | None:
    """How many are ahead of a queued one; None for others."""
    return ledger.position(record.job.id) if record.status is JobStatus.QUEUED else None


def common_fields(record: JobRecord[Any, Any, Any], url: str, *, position: int | None, ttl_s: float) -> dict[str, Any]:
    """Fields that every record's body has. `url`: its own; `ttl_s`: life of a terminal record."""
    finished = record.finished_at
    return {
        "id": record.job.id,
        "status": record.status,
        "queue": None if position is None else QueueView(position=position),
        "attempt": record.attempt,
        "cancel_requested": record.cancel_requested,
        "created_at": time_text(record.created_at),
        "started_at": None if record.started_at is None else time_text(record.started_at),
        "finished_at": None if finished is None else time_text(finished),
        "expires_at": None if finished is None else time_text(finished + ttl_s),
        "error": JobErrorView(**asdict(record.error)) if record.error else None,
        "urls": JobUrls(self=url, cancel=f"{url}/cancel"),
        "metadata": record.job.metadata,
    }


def time_text(seconds: float) -> str:
    """ISO 8601 in UTC, to the millisecond."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
