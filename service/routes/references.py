"""The REST surface of uploaded references: pictures sent once and named in many requests."""

from __future__ import annotations

from functools import partial
from typing import Annotated

from fastapi import APIRouter, Depends, Path, Request, Response, status

from service.callers.auth import TenantDependency, tenant_of
from service.gateway import Gateway, GatewayDependency
from service.openapi import REFERENCE_BODY, problems
from service.problems import Problem
from service.records import time_text
from service.schemas import UploadedReferenceBody
from service.uploads import admit, in_threads, receive, wrapping_of
from workers import pictures
from workers.artifacts import Incoming
from workers.picture_headers import Format
from workers.references import UploadedReference

router = APIRouter(dependencies=[Depends(tenant_of)], responses=problems(401))

ReferenceId = Annotated[str, Path(pattern=r"^ref_[0-9a-f]{32}$", description="The `id` that the upload was given.")]


@router.post(
    "/v1/references",
    status_code=status.HTTP_201_CREATED,
    responses={
        200: {"model": UploadedReferenceBody, "description": "It was there already, and stays as long again."},
        201: {
            "description": "Kept: name it by its id.",
            "headers": {"Location": {"description": "The reference.", "schema": {"type": "string"}}},
        },
        **problems(400, 408, 413, 415, 422, 429, 503),
    },
    openapi_extra={"requestBody": REFERENCE_BODY},
    summary="Upload a picture to be named in requests",
)
async def upload_reference(
    request: Request, response: Response, gateway: GatewayDependency, tenant: TenantDependency
) -> UploadedReferenceBody:
    """The same picture of a tenant has one id. It stays for a time after its last use, or until it is deleted."""
    wrapping = wrapping_of(request)
    most = gateway.admission.prover.limits.max_bytes
    with gateway.submissions.take(tenant):
        async with in_threads(gateway.store.receive(tenant)) as incoming:
            await receive(request, wrapping, incoming, max_bytes=most, timeout_s=gateway.settings.body_timeout_s)
            admitting = partial(_admit, gateway, tenant, incoming, wrapping.declared)
            reference, new = await gateway.decoding.run(tenant, admitting)
    response.status_code = status.HTTP_201_CREATED if new else status.HTTP_200_OK
    response.headers["Location"] = f"/v1/references/{reference.id}"
    return _body(reference)


def _admit(
    gateway: Gateway, tenant: str, incoming: Incoming, declared: Format | None
) -> tuple[UploadedReference, bool]:
    return admit(gateway.references, tenant, incoming, declared, gateway.admission.prover)


@router.get("/v1/references/{id}", responses=problems(404, 503), summary="What is known of an uploaded reference")
def get_reference(gateway: GatewayDependency, tenant: TenantDependency, id: ReferenceId) -> UploadedReferenceBody:
    """Asking does not make it stay longer; using it does."""
    reference = gateway.references.find(tenant, id)
    if reference is None:
        raise Problem("not_found")
    return _body(reference)


@router.delete(
    "/v1/references/{id}",
    status_code=status.HTTP_204_NO_CONTENT,
    response_class=Response,
    responses=problems(404, 503),
    summary="Delete an uploaded reference and all that was made of it",
)
def delete_reference(gateway: GatewayDependency, tenant: TenantDependency, id: ReferenceId) -> None:
    """Its file goes, and what workers keep of it. Jobs that have read it go on; those still queued will fail.

    It is the picture that goes: also for your queued jobs that sent the same bytes themselves or by a URL.
    """
    if not gateway.references.delete(tenant, id):
        raise Problem("not_found")


def _body(reference: UploadedReference) -> UploadedReferenceBody:
    return UploadedReferenceBody(
        id=reference.id,
        sha256=reference.sha256,
        media_type=pictures.media_type(reference.format),
        width=reference.width,
        height=reference.height,
        bytes=reference.size,
        created_at=time_text(reference.created_at),
        expires_at=time_text(reference.expires_at),
    )
