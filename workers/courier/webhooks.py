"""Webhooks by Standard Webhooks: what a message says, how it is sent, when it is sent again.

The id stays the same over all attempts, the body too; timestamp and signature are the attempt's. A message says what a
job's body says at `GET`, but for prompt and pixels.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Final, Literal

from workers.books.values import Delivery
from workers.courier.egress import Caps, Egress, Reply
from workers.courier.signing import sign
from workers.jobs import JobRecord, JobResult, JobStatus, TrainingJob

RETRIES_S: Final = (5, 30, 120, 600, 1800, 3600, 7200, 14_400, 21_600, 28_800)
"""Pause after the first, second, … failed attempt: eleven attempts within 22 hours, while the record lives (a day)."""
JITTER: Final = 0.1
LONGEST_WISH_S: Final = 3600.0
"""A receiver's Retry-After counts up to this."""
CAPS: Final = Caps(open_s=5.0, total_s=15.0, max_bytes=0, redirects=0)

SecretsOf = Callable[[str], Sequence[str]]
"""The secrets that a tenant's messages are signed with, newest first."""
Told = Literal["done", "retry", "dead"]
"""What came of an attempt: taken, to be made again, or given up."""


@dataclass(frozen=True, slots=True)
class Settlement:
    """What becomes of a message after an attempt."""

    kind: Told
    after_s: float = 0.0


@dataclass(frozen=True, slots=True)
class WebhookSender:
    """Sends signed messages."""

    egress: Egress
    secrets_of: SecretsOf
    caps: Caps = CAPS

    async def send(self, delivery: Delivery, body: bytes) -> Reply:
        """One attempt.

        Raises:
            EgressError: nobody answered.
            SecretError: the tenant has no secret, or what is configured is none.
        """
        signed = sign(self.secrets_of(delivery.tenant), delivery.id, int(time.time()), body)
        headers = {"Content-Type": "application/json", **signed}
        return await self.egress.post(delivery.tenant, delivery.url, headers, body, self.caps)


def settle(attempt: int, reply: Reply | None, draw: float) -> Settlement:
    """What follows from an attempt.

    Args:
        attempt: counted from 1.
        reply: None if nobody answered.
        draw: uniform in [0, 1), for the jitter.
    """
    if reply is not None and 200 <= reply.status < 300:
        return Settlement("done")
    if (reply is not None and reply.status == 410) or attempt > len(RETRIES_S):
        return Settlement("dead")
    after = RETRIES_S[attempt - 1] * (1.0 - JITTER + 2.0 * JITTER * draw)
    wish = 0.0 if reply is None else min(reply.retry_after_s, LONGEST_WISH_S)
    return Settlement("retry", max(after, wish))


def message(delivery: Delivery, record: JobRecord[Any, Any, Any]) -> bytes:
    """The body: type, time of the change, and the job as its caller sees it; before its end only what is known of it.

    Raises:
        ValueError: the delivery's data are not those of a status event.
    """
    said = json.loads(delivery.data)
    status = JobStatus(said["status"])
    training = isinstance(record.job, TrainingJob)
    body = {
        "type": f"{'training' if training else 'job'}.{status}",
        "timestamp": _text(_moment(record, status)),
        "data": {
            "id": record.job.id,
            "status": status,
            "attempt": int(said["attempt"]),
            **(_end(record, training=training) if status.terminal else {}),
            "urls": {"self": _url(record)},
            "metadata": record.job.metadata,
        },
    }
    return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()


def _end(record: JobRecord[Any, Any, Any], *, training: bool) -> Mapping[str, Any]:
    """What is known of a job that has ended."""
    made: Mapping[str, Any] = {}
    if training:
        made = {"result": asdict(record.result) if record.result else None}
    elif record.result is not None:
        made = _made(record.result, _url(record))
    return {
        "created_at": _text(record.created_at),
        "started_at": None if record.started_at is None else _text(record.started_at),
        "finished_at": None if record.finished_at is None else _text(record.finished_at),
        "error": asdict(record.error) if record.error else None,
        **made,
    }


def _made(result: JobResult, url: str) -> Mapping[str, Any]:
    """Pictures by where they are to be had, never themselves."""
    told = ("sha256", "width", "height", "media_type", "seed")
    images = [
        {"url": f"{url}/images/{number}", **{name: getattr(image, name) for name in told}}
        for number, image in enumerate(result.images)
    ]
    return {"images": images, "timings": result.timings, "cache": result.cache}


def _moment(record: JobRecord[Any, Any, Any], status: JobStatus) -> float:
    """When the job came into this state."""
    known = record.finished_at if status.terminal else record.started_at if status is JobStatus.RUNNING else None
    return record.created_at if known is None else known


def _url(record: JobRecord[Any, Any, Any]) -> str:
    return f"/v1/{'trainings' if isinstance(record.job, TrainingJob) else 'jobs'}/{record.job.id}"


def _text(seconds: float) -> str:
    """ISO 8601 in UTC, to the millisecond."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
