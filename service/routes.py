"""The REST surface: each route reads, asks one neighbour, and answers."""

from __future__ import annotations

from typing import Annotated, Any

from anyio import to_thread
from fastapi import APIRouter, Path, Query, Request, Response, status

from service.gateway import Gateway, GatewayDependency
from service.intake import parse_json, read_body, validate
from service.openapi import CUSTOMIZE_BODY, problems
from service.problems import Fault, Problem
from service.schemas import JobBody, JobList, Liveness, ModelList, Readiness
from service.views import job_body, model_body
from workers import queues
from workers.jobs import CUSTOMIZE, CustomizeRecord, JobStatus

router = APIRouter()

JobId = Annotated[str, Path(pattern=r"^[A-Za-z0-9_-]{1,64}$", description="A job's id.")]
ImageIndex = Annotated[int, Path(ge=0, le=99, description="Counted from 0.")]
POLL_AFTER_S = 1

_SUBMITTED: dict[str, Any] = {
    "description": "Accepted: follow the job at Location.",
    "headers": {
        "Location": {"description": "The job.", "schema": {"type": "string"}},
        "Retry-After": {"description": "Seconds until polling makes sense.", "schema": {"type": "integer"}},
    },
}
_CUSTOMIZE_PROBLEMS = problems(400, 408, 413, 415, 422, 503)


@router.post(
    "/v1/customize",
    status_code=status.HTTP_202_ACCEPTED,
    responses={202: _SUBMITTED, **_CUSTOMIZE_PROBLEMS},
    openapi_extra={"requestBody": CUSTOMIZE_BODY},
    summary="Make an image from a prompt and references",
)
async def customize(request: Request, response: Response, gateway: GatewayDependency) -> JobBody:
    """Accept a job. The pictures are checked before the answer; the result is awaited at `Location`."""
    settings = gateway.settings
    raw = await read_body(request, max_bytes=settings.max_body_bytes, timeout_s=settings.body_timeout_s)
    body = await to_thread.run_sync(_admit, gateway, raw, limiter=gateway.decoding)
    response.headers["Location"] = body.urls.self
    response.headers["Retry-After"] = str(POLL_AFTER_S)
    return body


def _admit(gateway: Gateway, raw: bytes) -> JobBody:
    return _body(gateway, gateway.admission.customize(validate(parse_json(raw))))


@router.get("/v1/jobs", responses=problems(422, 503), summary="List jobs, newest first")
def list_jobs(
    gateway: GatewayDependency,
    status: Annotated[JobStatus | None, Query(description="Only jobs in this state.")] = None,
    cursor: Annotated[str | None, Query(max_length=256, description="`next_cursor` of the page before.")] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> JobList:
    try:
        records, following = gateway.ledger.list(cursor, limit, status)
    except ValueError:
        detail = "Use a next_cursor of this listing, or none to start anew."
        raise Problem.of_faults([Fault("?cursor", "cursor_invalid", detail)]) from None
    return JobList(jobs=[_body(gateway, record) for record in records], next_cursor=following)


@router.get("/v1/jobs/{id}", responses=problems(404, 503), summary="A job's state, progress and result")
def get_job(gateway: GatewayDependency, id: JobId) -> JobBody:
    return _body(gateway, _found(gateway.ledger.get(id)))


@router.post(
    "/v1/jobs/{id}/cancel",
    responses={
        202: {"model": JobBody, "description": "Running: ends at the next step."},
        **problems(404, 503),
    },
    summary="Cancel a job",
)
def cancel_job(gateway: GatewayDependency, id: JobId, response: Response) -> JobBody:
    """A queued job is canceled at once, a running one at its next step; a finished one stays as it is."""
    record = _found(gateway.ledger.cancel(id))
    if record.status is JobStatus.RUNNING:
        response.status_code = status.HTTP_202_ACCEPTED
    return _body(gateway, record)


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
def get_image(gateway: GatewayDependency, id: JobId, index: ImageIndex, request: Request) -> Response:
    """The picture's bytes, checked against the digest in the job's record; that digest is the ETag."""
    record = _found(gateway.ledger.get(id))
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


def _found(record: CustomizeRecord | None) -> CustomizeRecord:
    if record is None:
        raise Problem("not_found")
    return record


def _body(gateway: Gateway, record: CustomizeRecord) -> JobBody:
    queued = record.status is JobStatus.QUEUED
    position = gateway.ledger.position(record.job.id) if queued else None
    return job_body(record, position=position, ttl_s=gateway.settings.job_ttl_s)


def _names(if_none_match: str, etag: str) -> bool:
    """RFC 9110 §13.1.2, weak comparison."""
    tags = [tag.strip().removeprefix("W/") for tag in if_none_match.split(",")]
    return "*" in tags or etag in tags
