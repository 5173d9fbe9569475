"""An event stream as an answer: who may have one, where it begins, what it says to who has missed something."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Annotated, Any

from anyio import to_thread
from fastapi import Depends, Header, Request, Response, status
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from service.callers.auth import TenantDependency, tenant_of
from service.events import Watcher, stream
from service.gateway import Gateway, GatewayDependency
from service.openapi import problems
from service.reading import Reader, Seen
from workers.jobs import JobT, ProgressT, ResultT

STREAM_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"description": "status, progress, preview and reset events.", "content": {"text/event-stream": {}}},
    204: {"description": "It has ended, and all of it was told: do not come back."},
    **problems(404, 410, 429, 503),
}


@dataclass(frozen=True, slots=True)
class Follower:
    """Who follows something. `after`: id of the last event that is known."""

    gateway: Gateway
    request: Request
    tenant: str
    after: str | None

    async def follow(
        self,
        watcher: Watcher,
        reader: Reader[JobT, ProgressT, ResultT],
        record_id: str,
        body_of: Callable[[Seen[JobT, ProgressT, ResultT]], BaseModel],
    ) -> Response:
        """What happens to a record of their ledger. `body_of`: it as its caller sees it.

        Raises:
            Problem: 404 or 410, as `records.found`.
        """

        async def current() -> Seen[JobT, ProgressT, ResultT]:
            await tenant_of(self.request)
            return await reader.read(record_id, self.tenant)

        async def body() -> str:
            return body_of(await current()).model_dump_json()

        record = (await reader.read(record_id, self.tenant)).record
        events, gap = await to_thread.run_sync(reader.ledger.events, record_id, self.after, 1)
        if not events and (record.status.terminal or gap):
            return Response(status_code=status.HTTP_204_NO_CONTENT)
        known = int(events[0].id) - 1 if events else int(self.after or 0)
        told = self.gateway.metrics.counted(stream(watcher, record_id, known, missed=gap, body=body, allowed=current))
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(told, media_type="text/event-stream", headers=headers)


async def _follower(
    gateway: GatewayDependency,
    request: Request,
    tenant: TenantDependency,
    last_event_id: Annotated[str | None, Header(description="Go on after this event.")] = None,
) -> AsyncGenerator[Follower]:
    """Its place is held until the last byte of the answer, or until its reader has gone."""
    with gateway.streams.take(tenant):
        yield Follower(gateway, request, tenant, last_event_id)


FollowerDependency = Annotated[Follower, Depends(_follower)]
