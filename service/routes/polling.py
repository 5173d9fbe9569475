"""How a job is: what is asked most of all, so it is answered in as few steps as there can be."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Coroutine
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response, status
from fastapi.routing import APIRoute

from service.auth import TenantDependency, tenant_of
from service.gateway import Gateway, GatewayDependency
from service.headers import MAX_WAIT_S, names
from service.openapi import problems
from service.reading import Seen
from service.records import RECORD_ID, RecordId
from service.schemas import JobBody
from service.views import job_body, job_etag
from workers.jobs import CustomizeRecord

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
    wait: Annotated[int, Query(ge=0, le=MAX_WAIT_S, description="Seconds to wait for its end; see below.")] = 0,
) -> Response:
    """With `wait`, the answer comes when the job has ended; with If-None-Match too, when anything happens to it."""
    return await _answer(request, gateway, id, tenant, wait)


def add_job(router: APIRouter) -> None:
    """The route of a job."""
    router.add_api_route(
        "/v1/jobs/{id}",
        get_job,
        responses={
            304: {"description": "Nothing happened to it: If-None-Match names its ETag."},
            **problems(404, 410, 422, 503),
        },
        response_model=JobBody,
        summary="A job's state, progress and result",
        route_class_override=PlainRoute,
    )


async def awaited(gateway: Gateway, seen: Seen, seconds: float, enough: Callable[[CustomizeRecord], bool]) -> Seen:
    """The job once it is enough, or as it is when the time is up."""
    if not seconds or enough(seen.record):
        return seen
    deadline = time.monotonic() + seconds
    job = seen.record.job
    with gateway.watcher.watch(job.id) as watch:
        while not enough(seen.record) and (left := deadline - time.monotonic()) > 0 and not gateway.watcher.leaving:
            if await watch.next(left):
                seen = await gateway.reader.read(job.id, job.tenant)
    return seen


async def _answer(request: Request, gateway: Gateway, job_id: str, tenant: str, wait: int) -> Response:
    known = request.headers.get("if-none-match")

    def enough(now: CustomizeRecord) -> bool:
        return now.status.terminal or (known is not None and not names(known, job_etag(now)))

    seen = await awaited(gateway, await gateway.reader.read(job_id, tenant), wait, enough)
    headers = {"ETag": job_etag(seen.record)}
    if known is not None and names(known, headers["ETag"]):
        return Response(status_code=status.HTTP_304_NOT_MODIFIED, headers=headers)
    body = job_body(seen.record, queue=seen.queue, ttl_s=gateway.settings.job_ttl_s)
    return Response(body.model_dump_json(), headers=headers, media_type="application/json")
