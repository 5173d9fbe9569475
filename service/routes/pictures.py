"""Pictures on their way out: finished ones, whole or in ranges, and previews of those to come.

A finished picture never changes, so its sha256 is its ETag and caches may keep it for good. The bytes that are checked
against it are those that are sent, also of a range: a server of files, which opens them anew, could not promise that.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Request, Response, status

from service.callers.auth import TenantDependency, tenant_of
from service.gateway import GatewayDependency
from service.headers import IN_DIGITS, known_tags, names
from service.openapi import problems
from service.problems import Problem
from service.records import RecordId, found

router = APIRouter(dependencies=[Depends(tenant_of)], responses=problems(401))

ImageIndex = Annotated[int, Path(ge=0, le=99, description="Counted from 0."), IN_DIGITS]

_RANGE = re.compile(r"bytes *= *([0-9]{0,18})-([0-9]{0,18})", re.IGNORECASE)
_PICTURE: dict[str, Any] = {
    kind: {"schema": {"type": "string", "format": "binary"}} for kind in ("image/png", "image/jpeg", "image/webp")
}


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes from `start` to before `stop`."""

    start: int
    stop: int


@router.head("/v1/jobs/{id}/images/{index}", include_in_schema=False)
@router.get(
    "/v1/jobs/{id}/images/{index}",
    response_class=Response,
    responses={
        200: {"description": "The picture.", "content": _PICTURE},
        206: {"description": "The range of it that was asked for.", "content": _PICTURE},
        304: {"description": "Unchanged: If-None-Match names its digest."},
        **problems(404, 410, 416, 500, 503),
    },
    summary="A finished picture",
)
def get_image(
    gateway: GatewayDependency, tenant: TenantDependency, id: RecordId, index: ImageIndex, request: Request
) -> Response:
    """The picture's bytes, checked against the digest in the job's record; that digest is the ETag."""
    record = found(gateway.ledger, id, tenant)
    images = record.result.images if record.result else ()
    if index >= len(images):
        raise Problem("not_found")
    image = images[index]
    etag = f'"{image.sha256}"'
    headers = {
        "ETag": etag,
        "Cache-Control": "private, max-age=31536000, immutable",
        "Accept-Ranges": "bytes",
        "Content-Disposition": f'inline; filename="{id}-{index}.{record.job.output_format}"',
    }
    if names(known_tags(request.headers), etag):
        return Response(status_code=status.HTTP_304_NOT_MODIFIED, headers=headers)
    data = gateway.store.read_picture(image.name, image.sha256)
    if request.method == "HEAD":
        headers["Content-Length"] = str(len(data))
        return Response(media_type=image.media_type, headers=headers)
    span = _span_of(request, etag, len(data))
    if span is None:
        return Response(data, media_type=image.media_type, headers=headers)
    headers["Content-Range"] = f"bytes {span.start}-{span.stop - 1}/{len(data)}"
    return Response(
        data[span.start : span.stop],
        status_code=status.HTTP_206_PARTIAL_CONTENT,
        media_type=image.media_type,
        headers=headers,
    )


@router.get(
    "/v1/jobs/{id}/preview",
    response_class=Response,
    responses={200: {"description": "The newest preview.", "content": _PICTURE}, **problems(404, 503)},
    summary="How far a running job's picture is",
)
def get_preview(gateway: GatewayDependency, tenant: TenantDependency, id: RecordId) -> Response:
    """A small picture, of a job that was asked for previews and has made the first; gone soon after its end."""
    found(gateway.ledger, id, tenant)
    data = gateway.ledger.preview(id)
    if not data:
        raise Problem("not_found")
    kind = "image/png" if data.startswith(b"\x89PNG") else "image/jpeg"
    return Response(data, media_type=kind, headers={"Cache-Control": "no-store"})


def _span_of(request: Request, etag: str, size: int) -> Span | None:
    """What of `size` bytes is asked for (RFC 9110 §14.2); None: all of it.

    Several ranges at once, other units and malformed headers are answered with the whole, as a server may.

    Raises:
        Problem: 416, none of it exists.
    """
    match = _RANGE.fullmatch(request.headers.get("range", "").strip())
    if match is None or request.headers.get("if-range", etag).strip() != etag:
        return None
    first, last = match.groups()
    if first:
        span = Span(int(first), min(int(last), size - 1) + 1 if last else size)
        if last and int(last) < int(first):
            return None
    elif last:
        span = Span(max(size - int(last), 0), size)
    else:
        return None
    if span.start >= size:
        raise Problem("range_not_satisfiable", headers={"Content-Range": f"bytes */{size}"})
    return span
