"""How a job is: what is asked most of all, so it is answered in as few steps as there can be."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Coroutine
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response, status
from fastapi.routing import APIRoute

from service.callers.auth import TenantDependency, tenant_of
from service.callers.places import RETRY_AFTER_S
from service.gateway import Gateway, GatewayDependency
from service.headers import EACH_ONCE, IN_DIGITS, MAX_WAIT_S, known_tags, names
from service.openapi import problems
from service.reading import SeenJob
from service.records import RECORD_ID, RecordId
from service.schemas import JobBody
from service.views import job_body, job_etag
from workers.jobs import CustomizeRecord

Wait = Annotated[int, Query(ge=0, le=MAX_WAIT_S, description="Seconds to wait for its end; see below."), IN_DIGITS]

_ID = re.compile(RECORD_ID)


class PlainRoute(APIRoute):
    """A route that answers the plain question, an id that is one and nothing else, without FastAPI's dependencies.

    They would take longer than all the rest of the answer. Whatever is to be refused or read more closely is theirs.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        solve = super().get_route_handler()

        async def handle(request: Request) -> Response:
            job_id: str = request.path_params["id"]
            if request.scope["query_string"] or not _ID.fullmatch(job_id):
                return await solve(request)
            tenant = await tenant_of(request)
            return await _answer(request, request.app.state.gateway, job_id, tenant, 0)

        return handle


async def get_job(
    gateway: GatewayDependency,
    tenant: TenantDependency,
    id: RecordId,
    request: Request,
    wait: Wait = 0,
) -> Response:
    """With `wait`, the answer comes when the job has ended; with If-None-Match too, when anything happens to it.

    It comes at once, with Retry-After, if you have as many waiting answers as this server gives to one.
    """
    return await _answer(request, gateway, id, tenant, wait)


def add_job(router: APIRouter) -> None:
    """The route of a job."""
    router.add_api_route(
        "/v1/jobs/{id}",
        get_job,
        dependencies=[EACH_ONCE],
        responses={
            304: {"description": "Nothing happened to it: If-None-Match names its ETag."},
            **problems(404, 410, 422, 503),
        },
        response_model=JobBody,
        summary="A job's state, progress and result",
        route_class_override=PlainRoute,
    )


def body_of(gateway: Gateway, seen: SeenJob) -> JobBody:
    """The job as its caller sees it."""
    return job_body(seen.record, queue=seen.queue, ttl_s=gateway.settings.job_ttl_s)


async def awaited(
    gateway: Gateway, seen: SeenJob, seconds: float, enough: Callable[[CustomizeRecord], bool]
) -> SeenJob | None:
    """The job once it is enough, or as it is when the time is up; None if its tenant may not wait for more."""
    if not seconds or enough(seen.record):
        return seen
    if gateway.waits.full(seen.record.job.tenant):
        return None
    deadline = time.monotonic() + seconds
    job = seen.record.job
    with gateway.waits.take(job.tenant), gateway.watcher.watch(job.id) as watch:
        while not enough(seen.record) and (left := deadline - time.monotonic()) > 0 and not gateway.watcher.leaving:
            if await watch.next(left):
                seen = await gateway.reader.read(job.id, job.tenant)
    return seen


async def _answer(request: Request, gateway: Gateway, job_id: str, tenant: str, wait: int) -> Response:
    known = known_tags(request.headers)

    def enough(now: CustomizeRecord) -> bool:
        return now.status.terminal or (bool(known) and not names(known, job_etag(now)))

    first = await gateway.reader.read(job_id, tenant)
    waited = await awaited(gateway, first, wait, enough)
    seen = waited or first
    headers = {"ETag": job_etag(seen.record)} | ({} if waited else {"Retry-After": str(RETRY_AFTER_S)})
    if names(known, headers["ETag"]):
        return Response(status_code=status.HTTP_304_NOT_MODIFIED, headers=headers)
    return Response(body_of(gateway, seen).model_dump_json(), headers=headers, media_type="application/json")
