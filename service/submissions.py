"""From a job to an accepted one: idempotency keys, shares, the ledger, the delivery, and what the answer points to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic

from fastapi import Response

from service.callers.limits import retry_after_s
from service.problems import Fault, Problem
from service.records import DrainGauge, found
from service.schemas import RecordUrls, WebhookBody
from workers import queues
from workers.courier.addresses import Rules, UrlForbiddenError, check_url
from workers.jobs import JobRecord, JobT, ProgressT, ResultT, Webhook
from workers.ledger import Accepted, Ledger, Once
from workers.tenants import SOLE_TENANT


@dataclass(frozen=True, slots=True)
class Terms:
    """Under what something is submitted.

    Attributes:
        once: the idempotency key it came with.
        start_within_s: it expires if no step is made within this time.
        share_s, bound_s: estimated GPU-seconds that the tenant's open jobs, and all, may take together.
        pace: how many of the tenant's are accepted within an hour; None: any number.
        request_id, traceparent: of the request.
    """

    tenant: str = SOLE_TENANT
    once: Once | None = None
    start_within_s: float | None = None
    share_s: float | None = None
    bound_s: float | None = None
    pace: int | None = None
    request_id: str = ""
    traceparent: str | None = None


@dataclass(frozen=True, slots=True)
class Submitted(Generic[JobT, ProgressT, ResultT]):
    """What a submission came to. `replayed`: an earlier one with the same idempotency key."""

    record: JobRecord[JobT, ProgressT, ResultT]
    replayed: bool = False


def webhook_of(body: WebhookBody | None, rules: Rules | None, faults: list[Fault]) -> Webhook | None:
    """A webhook as the job carries it; what is wrong goes to `faults`. `rules`: None where none is signed."""
    if body is None:
        return None
    if rules is None:
        detail = "This server signs no webhooks: poll the job or follow its events."
        faults.append(Fault("/webhook", "not_enabled", detail))
        return None
    try:
        check_url(body.url, rules)
    except UrlForbiddenError as error:
        faults.append(Fault("/webhook/url", error.code, error.message))
    if not body.events:
        faults.append(Fault("/webhook/events", "invalid_value", "Name at least one."))
    return Webhook(body.url, tuple(dict.fromkeys(body.events)))


def submit(
    ledger: Ledger[JobT, ProgressT, ResultT], job: JobT, terms: Terms, cost_s: float = 0.0
) -> Submitted[JobT, ProgressT, ResultT]:
    """Record a job and ring for it.

    Args:
        cost_s: estimated GPU-seconds.

    Raises:
        Problem: 410 or 422, as `replayed`; 429 or 503, too much is waiting or came this hour; 503, it cannot be read
            back.
        redis.exceptions.RedisError: Redis is away.
    """
    accepted = ledger.accept(
        job,
        start_within_s=terms.start_within_s,
        once=terms.once,
        cost_s=cost_s,
        share_s=terms.share_s,
        bound_s=terms.bound_s,
        pace=terms.pace,
    )
    if accepted.outcome == "over_share" and terms.share_s is not None:
        excess = ledger.load(terms.tenant) + cost_s - terms.share_s
        raise _too_much("tenant_over_share", ledger, excess / cost_s)
    if accepted.outcome == "over_bound" and terms.bound_s is not None:
        raise _too_much("over_capacity", ledger, (ledger.load() + cost_s - terms.bound_s) / cost_s)
    if accepted.outcome == "over_pace":
        raise Problem("too_many_requests", headers={"Retry-After": str(accepted.wait_s)})
    if accepted.outcome in ("replayed", "conflict"):
        return _first(ledger, accepted, terms.tenant)
    queues.ring_accepted(ledger, accepted)
    record = ledger.get(job.id)
    if record is None:  # only with a time to live of nothing, or a Redis that forgets
        raise Problem("queue_unavailable", "What was accepted could not be read back: try again.")
    return Submitted(record)


def replayed(ledger: Ledger[JobT, ProgressT, ResultT], terms: Terms) -> Submitted[JobT, ProgressT, ResultT] | None:
    """What came with the same idempotency key before; None without one, or if nothing did.

    Raises:
        Problem: 422, it came with another body; 410, what it stands for is deleted or expired.
    """
    seen = ledger.seen(terms.once) if terms.once else None
    return _first(ledger, seen, terms.tenant) if seen else None


def _first(
    ledger: Ledger[JobT, ProgressT, ResultT], seen: Accepted, tenant: str
) -> Submitted[JobT, ProgressT, ResultT]:
    if seen.outcome == "conflict":
        detail = "This key came with another body before: take a new key for a new request."
        raise Problem.of_faults([Fault("Idempotency-Key:", "idempotency_conflict", detail)])
    return Submitted(found(ledger, seen.job_id, tenant), replayed=True)


def _too_much(code: str, ledger: Ledger[Any, Any, Any], jobs: float) -> Problem:
    """`jobs`: of this one's size, that have to end before there is room."""
    return Problem(code, headers={"Retry-After": str(retry_after_s(jobs, DrainGauge(ledger).rate()))})


def accepted(what: str) -> dict[str, Any]:
    """OpenAPI's 202 of a route that accepts; `point_to` sets its headers."""
    return {
        "description": f"Accepted: follow the {what} at Location.",
        "headers": {
            "Location": {"description": f"The {what}.", "schema": {"type": "string"}},
            "Retry-After": {"description": "Seconds until polling makes sense.", "schema": {"type": "integer"}},
            "Idempotent-Replayed": {
                "description": "`true`: an earlier one that came with the same Idempotency-Key.",
                "schema": {"type": "string"},
            },
        },
    }


def point_to(response: Response, urls: RecordUrls, poll_after_s: int | None, *, replayed: bool) -> None:
    """Say where to follow what was accepted, when to begin if it goes on, and whether it is an earlier one."""
    response.headers["Location"] = urls.self
    if poll_after_s is not None:
        response.headers["Retry-After"] = str(poll_after_s)
    if replayed:
        response.headers["Idempotent-Replayed"] = "true"
