"""The REST surface: each route reads, asks one neighbour, and answers."""

from __future__ import annotations

from typing import Annotated

from anyio import to_thread
from fastapi import APIRouter, Path, Request, Response, status

from service.gateway import Gateway, GatewayDependency
from service.intake import parse_json, read_body, validate
from service.openapi import CUSTOMIZE_BODY, problems
from service.problems import Problem
from service.records import PageDependency, RecordId, accepted, cancel, found, point_to, queue_position
from service.schemas import JobBody, JobList, Liveness, ModelList, Readiness
from service.views import job_body, model_body
from workers import queues
from workers.jobs import CUSTOMIZE, CustomizeRecord

router = APIRouter()

ImageIndex = Annotated[int, Path(ge=0, le=99, description="Counted from 0.")]
POLL_AFTER_S = 1


@router.post(
    "/v1/customize",
    status_code=status.HTTP_202_ACCEPTED,
    responses={202: accepted("job"), **problems(400, 408, 413, 415, 422, 503)},
    openapi_extra={"requestBody": CUSTOMIZE_BODY},
    summary="Make an image from a prompt and references",
)
async def customize(request: Request, response: Response, gateway: GatewayDependency) -> JobBody:
    """Accept a job. The pictures are checked before the answer; the result is awaited at `Location`."""
    settings = gateway.settings
    raw = await read_body(request, max_bytes=settings.max_body_bytes, timeout_s=settings.body_timeout_s)
    body = await to_thread.run_sync(_admit, gateway, raw, limiter=gateway.decoding)
    point_to(response, body.urls, POLL_AFTER_S)
    return body


def _admit(gateway: Gateway, raw: bytes) -> JobBody:
    return _body(gateway, gateway.admission.customize(validate(parse_json(raw))))


@router.get("/v1/jobs", responses=problems(422, 503), summary="List jobs, newest first")
def list_jobs(gateway: GatewayDependency, page: PageDependency) -> JobList:
    records, following = page.read(gateway.ledger)
    return JobList(jobs=[_body(gateway, record) for record in records], next_cursor=following)


@router.get("/v1/jobs/{id}", responses=problems(404, 503), summary="A job's state, progress and result")
def get_job(gateway: GatewayDependency, id: RecordId) -> JobBody:
    return _body(gateway, found(gateway.ledger.get(id)))


@router.post(
    "/v1/jobs/{id}/cancel",
    responses={
        202: {"model": JobBody, "description": "Running: ends at the next step."},
        **problems(404, 503),
    },
    summary="Cancel a job",
)
def cancel_job(gateway: GatewayDependency, id: RecordId, response: Response) -> JobBody:
    """A queued job is canceled at once, a running one at its next step; a finished one stays as it is."""
    return _body(gateway, cancel(gateway.ledger, id, response))


@router.get(
    "/v1/jobs/{id}/images/{index}",
    response_class=Response,
    responses={
        200: {
            "description": "The picture.",
            "content": {
                kind: {"schema": {"type": "string", "format": "binary"}}
                for kind in ("image/png", "image/jpeg", "image/webp")
            },
        },
        304: {"description": "Unchanged: If-None-Match names its digest."},
        **problems(404, 410, 500, 503),
    },
    summary="A finished picture",
)
def get_image(gateway: GatewayDependency, id: RecordId, index: ImageIndex, request: Request) -> Response:
    """The picture's bytes, checked against the digest in the job's record; that digest is the ETag."""
    record = found(gateway.ledger.get(id))
    images = record.result.images if record.result else ()
    if index >= len(images):
        raise Problem("not_found")
    image = images[index]
    headers = {"ETag": f'"{image.sha256}"', "Cache-Control": "private, max-age=31536000, immutable"}
    if _names(request.headers.get("if-none-match", ""), headers["ETag"]):
        return Response(status_code=status.HTTP_304_NOT_MODIFIED, headers=headers)
    return Response(gateway.store.read_picture(image.name, image.sha256), media_type=image.media_type, headers=headers)


@router.get("/v1/models", responses=problems(503), summary="The model's limits and defaults, and who serves it")
def list_models(gateway: GatewayDependency) -> ModelList:
    return ModelList(models=[model_body(gateway.spec)], workers=queues.workers(gateway.redis, CUSTOMIZE))


@router.get("/livez", responses=problems(), summary="The process answers")
async def livez() -> Liveness:
    return Liveness()


@router.get("/readyz", responses=problems(503), summary="Jobs can be accepted")
def readyz(gateway: GatewayDependency) -> Readiness:
    cards = queues.workers(gateway.redis, CUSTOMIZE)
    gateway.store.check_writable()
    return Readiness(workers_ready=sum(card.get("state") in ("ready", "busy") for card in cards))


def _body(gateway: Gateway, record: CustomizeRecord) -> JobBody:
    return job_body(record, position=queue_position(gateway.ledger, record), ttl_s=gateway.settings.job_ttl_s)


def _names(if_none_match: str, etag: str) -> bool:
    """RFC 9110 §13.1.2, weak comparison."""
    tags = [tag.strip().removeprefix("W/") for tag in if_none_match.split(",")]
    return "*" in tags or etag in tags
