"""The REST surface of training: submit, follow, cancel; what there is to train by, and what came of it."""

from __future__ import annotations

from functools import partial
from typing import Annotated

from anyio import to_thread
from fastapi import APIRouter, Depends, Query, Request, Response, status
from fastapi.responses import StreamingResponse

from service.callers.auth import TenantDependency, tenant_of
from service.gateway import Gateway, GatewayDependency
from service.headers import EACH_ONCE, SubmitHeadersDependency
from service.intake import body_bytes, parse_json, read_body
from service.openapi import TRAINING_BODY, problems
from service.reading import SeenTraining
from service.records import PageDependency, RecordId, cancel, found, place_in_queue
from service.routes.streams import STREAM_RESPONSES, FollowerDependency
from service.submissions import Submitted, Terms, accepted, point_to, replayed
from service.training_schemas import AdapterList, RecipeList, TrainingBody, TrainingList
from service.trainings import adapter_view, training_body, validate_training
from workers import queues
from workers.jobs import TRAINING, TrainingJob, TrainingProgress, TrainingRecord, TrainingResult
from workers.ledger import Once
from workers.registry import NAME
from workers.telemetry.tracing import traceparent_of

router = APIRouter(dependencies=[Depends(tenant_of)], responses=problems(401))

MAX_BODY_BYTES = 256 * 1024
POLL_AFTER_S = 5


@router.post(
    "/v1/trainings",
    dependencies=[EACH_ONCE],
    status_code=status.HTTP_202_ACCEPTED,
    responses={202: accepted("training"), **problems(400, 408, 410, 413, 415, 422, 429, 503)},
    openapi_extra={"requestBody": TRAINING_BODY},
    summary="Train an adapter by a recipe",
)
async def submit_training(
    request: Request,
    response: Response,
    gateway: GatewayDependency,
    tenant: TenantDependency,
    headers: SubmitHeadersDependency,
) -> TrainingBody:
    """Accept a training. Its result is a version of an adapter, listed at `/v1/adapters`."""
    most = body_bytes(request, max_bytes=MAX_BODY_BYTES)
    with gateway.submissions.take(tenant), gateway.bodies.take(tenant, most):
        raw = await read_body(request, max_bytes=most, timeout_s=gateway.settings.body_timeout_s)
        submitted = await to_thread.run_sync(_admit, request, gateway, tenant, headers.once(tenant, raw), raw)
    body = await to_thread.run_sync(_body, gateway, submitted.record)
    point_to(response, body.urls, POLL_AFTER_S, replayed=submitted.replayed)
    return body


def _admit(
    request: Request, gateway: Gateway, tenant: str, once: Once | None, raw: bytes
) -> Submitted[TrainingJob, TrainingProgress, TrainingResult]:
    with gateway.tracing.span("accept", request.state.traceparent) as span:
        terms = Terms(
            tenant,
            once=once,
            share_s=gateway.door.share(tenant, gateway.settings.share_s),
            pace=gateway.pace(tenant),
            request_id=request.state.request_id,
            traceparent=traceparent_of(span),
        )
        first = replayed(gateway.trainings.ledger, terms)
        submitted = first or gateway.trainings.train(validate_training(parse_json(raw)), terms)
    gateway.metrics.submitted(TRAINING.queue, replayed=submitted.replayed)
    return submitted


@router.get(
    "/v1/trainings", dependencies=[EACH_ONCE], responses=problems(422, 503), summary="List trainings, newest first"
)
def list_trainings(gateway: GatewayDependency, tenant: TenantDependency, page: PageDependency) -> TrainingList:
    records, following = page.read(gateway.trainings.ledger, tenant)
    return TrainingList(trainings=[_body(gateway, record) for record in records], next_cursor=following)


@router.get("/v1/trainings/{id}", responses=problems(404, 410, 503), summary="A training's state, progress and result")
def get_training(gateway: GatewayDependency, tenant: TenantDependency, id: RecordId) -> TrainingBody:
    return _body(gateway, found(gateway.trainings.ledger, id, tenant))


@router.get(
    "/v1/trainings/{id}/events",
    response_class=StreamingResponse,
    responses=STREAM_RESPONSES,
    summary="What happens to a training, as it happens",
)
async def follow_training(gateway: GatewayDependency, follower: FollowerDependency, id: RecordId) -> Response:
    """Server-sent events up to the one that ends the training. `reset`, whose data is all of it: some are missing."""
    return await follower.follow(gateway.training_watcher, gateway.training_reader, id, partial(_seen_body, gateway))


@router.post(
    "/v1/trainings/{id}/cancel",
    responses={202: {"model": TrainingBody, "description": "Running: ends after its step."}, **problems(404, 410, 503)},
    summary="Cancel a training",
)
def cancel_training(
    gateway: GatewayDependency, tenant: TenantDependency, id: RecordId, response: Response
) -> TrainingBody:
    """A queued training is canceled at once, a running one after its step; a finished one stays as it is."""
    return _body(gateway, cancel(gateway.trainings.ledger, id, tenant, response))


@router.get("/v1/recipes", responses=problems(503), summary="What trainings can be asked for")
def list_recipes(gateway: GatewayDependency) -> RecipeList:
    return RecipeList(
        recipes=gateway.trainings.offers(),
        datasets=gateway.trainings.datasets(),
        workers=queues.workers(gateway.redis, TRAINING),
    )


@router.get(
    "/v1/adapters",
    dependencies=[EACH_ONCE],
    responses=problems(422, 503),
    summary="Trained and registered adapters, newest first",
)
def list_adapters(
    gateway: GatewayDependency,
    tenant: TenantDependency,
    name: Annotated[str | None, Query(pattern=f"^{NAME.pattern}$", description="Only versions of this one.")] = None,
) -> AdapterList:
    return AdapterList(adapters=[adapter_view(adapter) for adapter in gateway.registry.of(tenant).versions(name)])


def _seen_body(gateway: Gateway, seen: SeenTraining) -> TrainingBody:
    return training_body(seen.record, queue=seen.queue, ttl_s=gateway.settings.job_ttl_s)


def _body(gateway: Gateway, record: TrainingRecord) -> TrainingBody:
    queue = place_in_queue(gateway.trainings.ledger, record, gateway.training_gauge)
    return training_body(record, queue=queue, ttl_s=gateway.settings.job_ttl_s)
