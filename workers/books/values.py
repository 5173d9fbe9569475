"""What the ledger answers beside records, and how records are read back from Redis."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final, Generic, Literal, TypeVar

from pydantic import ValidationError

from workers.jobs import JobError, JobRecord, JobStatus, JobT, Kind, ProgressT, ResultT, decode

T = TypeVar("T")

FIELDS: Final = (
    *("job", "attempt", "created_at", "started_at", "finished_at", "progress", "cancel_requested", "result", "error"),
    "start_by",
)
"""Of a record's hash, those that `read_record` reads beside `status`."""


class DamagedRecordError(Exception):
    """A record in Redis is not one that this ledger writes. The message holds nothing of its content."""


@dataclass(frozen=True, slots=True)
class Once:
    """An idempotency key of a tenant. `digest`: sha256 hex of the request that came with it."""

    tenant: str
    key: str
    digest: str

    @property
    def name(self) -> str:
        """Under what it is remembered: of the caller's own words nothing lies in Redis."""
        return hashlib.sha256(f"{self.tenant}\0{self.key}".encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Accepted:
    """What became of a job.

    Attributes:
        outcome: `known`: this id was accepted before. `replayed`: its key was, with the same digest. `conflict`: with
            another one. `over_share`, `over_bound`: its tenant, or all, have too much waiting. `over_pace`: as
            many of its tenant were accepted within this hour as may be. Of these three nothing is recorded.
        job_id: the job that is meant; of a key, the one it came with first.
        called: it is to be rung for, by whoever accepted it: see `queues.ring_accepted`.
        wait_s: over its pace, whole seconds until the next hour begins.
    """

    outcome: Literal["new", "known", "replayed", "conflict", "over_share", "over_bound", "over_pace"]
    job_id: str
    called: bool = False
    wait_s: int = 0


@dataclass(frozen=True, slots=True)
class Look(Generic[JobT, ProgressT, ResultT]):
    """A job as it is now.

    Attributes:
        record: None if there is none.
        place: of a queued one, how many are ahead of it; see `Ledger.position`.
        gone: whose it was, if it was deleted or has expired; for a week.
    """

    record: JobRecord[JobT, ProgressT, ResultT] | None
    place: int | None = None
    gone: str | None = None


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to a job. `id` counts from 1; `data` is JSON: of a status `{"status":…,"attempt":…}`,
    of the others the progress at that time.
    """

    id: str
    kind: Literal["status", "progress", "preview"]
    data: str

    @classmethod
    def of(cls, entry: Any) -> Event:
        """From a stream's entry."""
        number, fields = entry
        ((kind, data),) = fields.items()
        return cls(text_of(number).partition("-")[0], text_of(kind), text_of(data))  # pyright: ignore[reportArgumentType]  # written by our scripts


@dataclass(frozen=True, slots=True)
class Fetch:
    """A job whose references are to be fetched. `token`: resolves or fails it, if none was given out since."""

    job_id: str
    token: int
    tenant: str

    @classmethod
    def of(cls, entry: Any) -> Fetch:
        """From what the script answers."""
        job_id, token, tenant = map(text_of, entry)
        return cls(job_id, int(token), tenant)


@dataclass(frozen=True, slots=True)
class Delivery:
    """A message that a webhook is to get.

    Attributes:
        id: the same at each attempt.
        attempt: counted from 1.
        event: `terminal` or, if the caller asked for all, `status`.
        data: JSON as of the event of that change: `{"status":…,"attempt":…}`.
    """

    id: str
    job_id: str
    tenant: str
    attempt: int
    url: str
    event: Literal["status", "terminal"]
    data: str

    @classmethod
    def of(cls, entry: Any) -> Delivery:
        """From what the script answers."""
        message, job_id, tenant, attempt, url, event, data = map(text_of, entry)
        return cls(message, job_id, tenant, int(attempt), url, event, data)  # pyright: ignore[reportArgumentType]  # written by our scripts


def read_record(
    kind: Kind[JobT, ProgressT, ResultT], fields: Iterable[tuple[Any, Any]]
) -> JobRecord[JobT, ProgressT, ResultT]:
    """A record from its hash.

    Raises:
        DamagedRecordError: it is none.
    """
    try:
        values = {text_of(name): text_of(value) for name, value in fields if value is not None}
        return JobRecord(
            job=decode(kind.job, values["job"]),
            status=JobStatus(values["status"]),
            attempt=int(values["attempt"]),
            created_at=float(values["created_at"]),
            started_at=_seconds(values.get("started_at")),
            finished_at=_seconds(values.get("finished_at")),
            progress=_part(kind.progress, values.get("progress")),
            cancel_requested=values.get("cancel_requested") == "1",
            result=_part(kind.result, values.get("result")),
            error=_part(JobError, values.get("error")),
            start_by=_seconds(values.get("start_by")),
        )
    except (ValidationError, KeyError, ValueError):  # from None: a validation error quotes its input
        raise DamagedRecordError("a job record in Redis is damaged") from None


def read_look(kind: Kind[JobT, ProgressT, ResultT], answer: Any) -> Look[JobT, ProgressT, ResultT] | DamagedRecordError:
    """From what the script answers; a damaged record must not hide the others."""
    place, gone, (status, _tenant, *values) = answer
    if status is None:
        return Look(None, gone=None if gone is None else text_of(gone))
    try:
        record = read_record(kind, (("status", status), *zip(FIELDS, values, strict=True)))
    except DamagedRecordError as error:
        return error
    return Look(record, place)


def number_of(event_id: str | None) -> int:
    """The number in an event's id, 0 for none; -1 if a stranger wrote it."""
    if event_id is None:
        return 0
    return int(event_id) if event_id.isascii() and event_id.isdecimal() and len(event_id) < 16 else -1


def text_of(value: Any) -> str:
    """Redis answers bytes or text, as its client was told to."""
    return value.decode() if isinstance(value, bytes) else str(value)


def _part(kind: type[T], text: str | None) -> T | None:
    return decode(kind, text) if text else None


def _seconds(text: str | None) -> float | None:
    return float(text) if text else None
