"""The REST surface: each route reads, asks one neighbour, and answers."""

from __future__ import annotations

from functools import partial
from math import ceil

from anyio import to_thread
from fastapi import APIRouter, Depends, Request, Response, status
from fastapi.responses import StreamingResponse

from service.callers.auth import TenantDependency, tenant_of
from service.gateway import Gateway, GatewayDependency
from service.headers import EACH_ONCE, JobHeaders, JobHeadersDependency
from service.intake import body_bytes, parse_json, read_body, validate
from service.openapi import CUSTOMIZE_BODY, problems
from service.problems import Problem
from service.reading import Seen
from service.records import PageDependency, RecordId, cancel, found, place_in_queue
from service.routes.polling import add_job, awaited, body_of
from service.routes.streams import STREAM_RESPONSES, FollowerDependency
from service.schemas import JobBody, JobList, Liveness, ModelList, Readiness
from service.submissions import Submitted, Terms, accepted, point_to, replayed
from service.views import job_body, model_body
from workers import queues
from workers.jobs import CUSTOMIZE, CustomizeJob, CustomizeRecord, JobResult, Progress
from workers.telemetry.tracing import traceparent_of

router = APIRouter(dependencies=[Depends(tenant_of)], responses=problems(401))
open_router = APIRouter()
"""What whoever watches over the service asks, without a key."""

POLL_AFTER_S = 1
MAX_POLL_AFTER_S = 30


@router.post(
    "/v1/customize",
    dependencies=[EACH_ONCE],
    status_code=status.HTTP_202_ACCEPTED,
    responses={
        200: {"model": JobBody, "description": "Ended within the time that `Prefer: wait` names."},
        202: accepted("job"),
        **problems(400, 408, 410, 413, 415, 422, 429, 503),
    },
    openapi_extra={"requestBody": CUSTOMIZE_BODY},
    summary="Make an image from a prompt and references",
)
async def customize(
    request: Request,
    response: Response,
    gateway: GatewayDependency,
    tenant: TenantDependency,
    headers: JobHeadersDependency,
) -> JobBody:
    """Accept a job. The pictures are checked before the answer; the result is awaited at `Location`."""
    submitted = await _submit(request, gateway, tenant, headers)
    record = submitted.record
    waited = await awaited(gateway, Seen(record), headers.wait_s, lambda now: now.status.terminal)
    if headers.wait_s and waited:
        record = waited.record
        response.headers["Preference-Applied"] = f"wait={headers.wait_s}"
        if record.status.terminal:
            response.status_code = status.HTTP_200_OK
    body = await to_thread.run_sync(_body, gateway, record)
    point_to(response, body.urls, None if record.status.terminal else _poll_after_s(body), replayed=submitted.replayed)
    return body


async def _submit(
    request: Request, gateway: Gateway, tenant: str, headers: JobHeaders
) -> Submitted[CustomizeJob, Progress, JobResult]:
    """Apart from the route, which may wait for the job: nobody has the body in hand any more when this is over."""
    settings = gateway.settings
    most = body_bytes(request, max_bytes=settings.max_body_bytes)
    with gateway.submissions.take(tenant), gateway.bodies.take(tenant, most):
        raw = await read_body(request, max_bytes=most, timeout_s=settings.body_timeout_s)
        return await gateway.decoding.run(tenant, partial(_admit, request, gateway, tenant, headers, raw))


def _admit(
    request: Request, gateway: Gateway, tenant: str, headers: JobHeaders, raw: bytes
) -> Submitted[CustomizeJob, Progress, JobResult]:
    with gateway.tracing.span("accept", request.state.traceparent) as span:
        terms = Terms(
            tenant,
            once=headers.once(tenant, raw),
            start_within_s=headers.start_within_s,
            share_s=gateway.door.share(tenant, gateway.settings.share_s),
            bound_s=gateway.settings.bound_s,
            pace=gateway.pace(tenant),
            request_id=request.state.request_id,
            traceparent=traceparent_of(span),
        )
        first = replayed(gateway.ledger, terms)
        submitted = first or gateway.admission.customize(validate(parse_json(raw)), terms)
    gateway.metrics.submitted(CUSTOMIZE.queue, replayed=submitted.replayed)
    return submitted


add_job(router)  # routes are tried in turn, and this one is asked most of all


@router.get("/v1/jobs", dependencies=[EACH_ONCE], responses=problems(422, 503), summary="List jobs, newest first")
def list_jobs(gateway: GatewayDependency, tenant: TenantDependency, page: PageDependency) -> JobList:
    records, following = page.read(gateway.ledger, tenant)
    return JobList(jobs=[_body(gateway, record) for record in records], next_cursor=following)


@router.get(
    "/v1/jobs/{id}/events",
    response_class=StreamingResponse,
    responses=STREAM_RESPONSES,
    summary="What happens to a job, as it happens",
)
async def follow_job(gateway: GatewayDependency, follower: FollowerDependency, id: RecordId) -> Response:
    """Server-sent events up to the one that ends the job. `reset`, whose data is the whole job: some are missing."""
    return await follower.follow(gateway.watcher, gateway.reader, id, partial(body_of, gateway))


@router.post(
    "/v1/jobs/{id}/cancel",
    responses={
        202: {"model": JobBody, "description": "Running: ends at the next step."},
        **problems(404, 410, 503),
    },
    summary="Cancel a job",
)
def cancel_job(gateway: GatewayDependency, tenant: TenantDependency, id: RecordId, response: Response) -> JobBody:
    """A queued job is canceled at once, a running one at its next step; a finished one stays as it is."""
    return _body(gateway, cancel(gateway.ledger, id, tenant, response))


@router.delete(
    "/v1/jobs/{id}",
    status_code=status.HTTP_204_NO_CONTENT,
    response_class=Response,
    responses=problems(404, 409, 410, 503),
    summary="Delete a job that has ended, and its pictures",
)
def delete_job(gateway: GatewayDependency, tenant: TenantDependency, id: RecordId) -> None:
    """From then on it answers 410. Uploaded references are deleted by themselves, others after their time."""
    record = found(gateway.ledger, id, tenant)
    if not gateway.ledger.delete(id):
        raise Problem("job_not_finished")
    for image in record.result.images if record.result else ():
        gateway.store.discard(image.name)


@router.get("/v1/models", responses=problems(503), summary="The model's limits and defaults, and who serves it")
def list_models(gateway: GatewayDependency) -> ModelList:
    return ModelList(models=[model_body(gateway.spec)], workers=queues.workers(gateway.redis, CUSTOMIZE))


@open_router.head("/livez", include_in_schema=False)
@open_router.get("/livez", responses=problems(), summary="The process answers")
async def livez() -> Liveness:
    return Liveness()


@open_router.head("/readyz", include_in_schema=False)
@open_router.get("/readyz", responses=problems(503), summary="Jobs can be accepted")
def readyz(gateway: GatewayDependency) -> Readiness:
    """Redis takes writes, the store has room, and the process is not about to end."""
    gateway.readiness.require()
    cards = queues.workers(gateway.redis, CUSTOMIZE)
    return Readiness(workers_ready=sum(card.get("state") in ("ready", "busy") for card in cards))


def _body(gateway: Gateway, record: CustomizeRecord) -> JobBody:
    queue = place_in_queue(gateway.ledger, record, gateway.gauge)
    return job_body(record, queue=queue, ttl_s=gateway.settings.job_ttl_s)


def _poll_after_s(body: JobBody) -> int:
    eta_s = body.queue.eta_s if body.queue else None
    return max(POLL_AFTER_S, min(MAX_POLL_AFTER_S, ceil(eta_s or 0)))
