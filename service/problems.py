"""Every answer that is not a success: one table of codes, and RFC 9457 bodies made from it.

A problem names what went wrong (`code`), where (`errors[].pointer`) and what to do about it (`detail`). It
repeats nothing of the caller's input. `docs/errors.md` lists the same codes; a test compares the two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import Match

MEDIA_TYPE = "application/problem+json"
MAX_FAULTS = 20
"""Faults listed in one answer; a body with a thousand slips gets the first twenty."""


@dataclass(frozen=True, slots=True)
class ProblemType:
    """One row of the table. `meaning` says when it comes up and what helps."""

    status: int
    title: str
    meaning: str
    retryable: bool = False


def _meaning(title: str, meaning: str) -> ProblemType:
    return ProblemType(422, title, meaning)


TABLE: Mapping[str, ProblemType] = MappingProxyType(
    {
        "malformed_json": ProblemType(
            400,
            "Not JSON",
            "The body is not JSON as RFC 8259 has it: finite numbers, valid Unicode.",
        ),
        "json_too_complex": ProblemType(
            400, "JSON too complex", "The body is nested deeper than 32 levels or holds far too many values."
        ),
        "malformed_form": ProblemType(
            400, "Not a form with one file", "Send multipart/form-data with one part, a file, or the bare picture."
        ),
        "malformed_request": ProblemType(
            400, "Not HTTP", "The request is not HTTP/1.1 as RFC 9112 has it, or its body is framed in two ways."
        ),
        "unauthenticated": ProblemType(
            401, "Key wanted", "Send `Authorization: Bearer KEY` with a key of this service that is not revoked."
        ),
        "not_found": ProblemType(404, "Not found", "There is no such route, job, reference or picture."),
        "method_not_allowed": ProblemType(
            405, "Method not allowed", "The route exists, not with this method: see the Allow header."
        ),
        "request_timeout": ProblemType(
            408, "Request timed out", "The request did not arrive in time: send it again.", retryable=True
        ),
        "job_not_finished": ProblemType(
            409, "Job not finished", "Only what has ended can be deleted: cancel it, wait for its end, then delete it."
        ),
        "job_gone": ProblemType(
            410,
            "Job gone",
            "It was deleted, or its record has expired: to have it again, submit it with a new Idempotency-Key.",
        ),
        "artifact_missing": ProblemType(
            410,
            "Picture gone",
            "The picture's file is no longer there: submit the job again with a new Idempotency-Key.",
        ),
        "payload_too_large": ProblemType(
            413, "Body too large", "The body exceeds the byte limit: send fewer or smaller references."
        ),
        "unsupported_media_type": ProblemType(
            415, "Unsupported media type", "Send the body in a type that the route takes, without a content encoding."
        ),
        "range_not_satisfiable": ProblemType(
            416, "Range not satisfiable", "The picture is shorter: its length is in Content-Range."
        ),
        "invalid_request": _meaning("Invalid request", "Several different faults: see `errors`."),
        "missing_field": _meaning("Field missing", "A required field is absent."),
        "unknown_field": _meaning("Unknown field", "This field does not exist: check its spelling."),
        "invalid_type": _meaning("Wrong type", "The JSON type is not the declared one; nothing is coerced."),
        "invalid_value": _meaning("Invalid value", "The value is none of those that the field allows."),
        "not_enabled": _meaning("Not enabled", "A field or kind of value that this server does not offer yet."),
        "prompt_empty": _meaning("Prompt empty", "The prompt has no visible character."),
        "prompt_too_long": _meaning("Prompt too long", "More characters than `max_prompt_characters`."),
        "prompt_characters": _meaning(
            "Forbidden characters", "Control characters or bidirectional overrides: remove them."
        ),
        "placeholder_without_reference": _meaning(
            "Placeholder without reference",
            "The prompt names `[ref#i]`, but slot i is empty: fill that slot or drop the placeholder.",
        ),
        "too_many_references": _meaning("Too many references", "More slots than the model's `max_references`."),
        "role_not_supported": _meaning("Role not supported", "The model does not know this role."),
        "role_exclusive": _meaning(
            "Role cannot be mixed",
            "These weights cannot mix this role with others: use one kind per request.",
        ),
        "resolution_out_of_range": _meaning(
            "Reference resolution",
            "Outside the model's `reference_resolution`, or given for an identity reference.",
        ),
        "size_out_of_range": _meaning("Size out of range", "Width or height outside the model's limits."),
        "size_off_grid": _meaning("Size off the grid", "Width or height is not a multiple of the model's cell."),
        "steps_out_of_range": _meaning("Steps out of range", "Outside the model's `num_inference_steps`."),
        "guidance_out_of_range": _meaning(
            "Guidance out of range", "A guidance value outside the limits published at /v1/models."
        ),
        "true_cfg_window": _meaning(
            "True CFG window", "Needs 0 <= true_cfg_start <= true_cfg_end <= num_inference_steps."
        ),
        "seed_out_of_range": _meaning("Seed out of range", "A seed is an integer from 0 to 2**64 - 1."),
        "num_images_out_of_range": _meaning("Number of images", "From 1 to the model's `max_images`."),
        "adapter_unknown": _meaning(
            "Adapter unknown", "There is no adapter of this name, or none of this version: see /v1/adapters."
        ),
        "adapter_mismatch": _meaning(
            "Adapter of another base",
            "No worker serves the base model that it is made for: name a version trained on the served base, see "
            "/v1/adapters and /v1/models.",
        ),
        "adapter_scale_out_of_range": _meaning("Adapter scale", "The scale of an adapter is from -2 to 2."),
        "metadata_too_large": _meaning(
            "Metadata too large", "At most 16 entries and 2048 bytes of keys and values together."
        ),
        "reference_unknown": _meaning(
            "Reference unknown", "No uploaded reference has this id, or none any more: upload the picture again."
        ),
        "image_url_invalid": _meaning(
            "No picture named",
            "Write `data:image/png;base64,` (or jpeg, webp) and strict base64 with padding, the id of an uploaded "
            "reference, or, but for masks, an https URL.",
        ),
        "image_type_mismatch": _meaning(
            "Declared type differs", "The picture's content is not what its data URL declares."
        ),
        "image_undecodable": _meaning("Picture undecodable", "Damaged or cut short: export it again."),
        "image_too_large": _meaning("Picture too large", "Too many bytes or pixels: scale it down."),
        "image_unsupported": _meaning("Picture format unsupported", "Use a still PNG, JPEG or WebP."),
        "mask_size_mismatch": _meaning("Mask size differs", "A mask is exactly as large as its picture."),
        "idempotency_conflict": _meaning(
            "Idempotency key used before", "The key came with another body within 24 hours: take a new key."
        ),
        "url_forbidden": _meaning(
            "URL not allowed", "Only https URLs that lead to public addresses, on the ports of this server's rules."
        ),
        "cursor_invalid": _meaning("Cursor invalid", "Use a `next_cursor` of the same listing, or none."),
        "recipe_unknown": _meaning("Recipe unknown", "The server has no recipe of this name: see /v1/recipes."),
        "recipe_unusable": _meaning(
            "Recipe not served", "The recipe trains a base model, or is faulty: name another of /v1/recipes."
        ),
        "override_invalid": _meaning(
            "Override does not fit",
            "The recipe has no such field, the value does not fit it or is beyond what a worker holds, or there are no "
            "such records.",
        ),
        "dataset_missing": _meaning("Dataset missing", "The recipe trains on a dataset: name one of /v1/recipes."),
        "dataset_unknown": _meaning("Dataset unknown", "The server has no dataset of this name: see /v1/recipes."),
        "tenant_over_share": ProblemType(
            429,
            "Share used up",
            "Your waiting and running jobs fill your share of the service: try again after Retry-After.",
            retryable=True,
        ),
        "too_many_requests": ProblemType(
            429,
            "Too many requests",
            "As many of this kind are in hand, or were accepted this hour, as one caller may have: try again after "
            "Retry-After.",
            retryable=True,
        ),
        "head_too_large": ProblemType(431, "Headers too large", "The request line and headers exceed 16 KiB."),
        "internal": ProblemType(
            500,
            "Internal error",
            "A fault of the server: quote the request id to its operator.",
            retryable=True,
        ),
        "artifact_corrupt": ProblemType(
            500, "Picture damaged", "The stored file no longer has its recorded digest; it is never served."
        ),
        "queue_unavailable": ProblemType(
            503, "Queue unavailable", "Redis does not answer: try again after Retry-After.", retryable=True
        ),
        "over_capacity": ProblemType(
            503,
            "Service full",
            "More waits than the service takes on at a time: try again after Retry-After.",
            retryable=True,
        ),
        "draining": ProblemType(
            503, "Leaving", "This gateway is about to end: ask another, or again in a moment.", retryable=True
        ),
        "storage_unavailable": ProblemType(
            503,
            "Storage unavailable",
            "The artifact store cannot be written, or is nearly full: try again later.",
            retryable=True,
        ),
    }
)

RETRY_AFTER_S = 2
"""Told to callers when Redis or the disk is away: both usually come back within seconds."""

_BY_STATUS = {404: "not_found", 405: "method_not_allowed"}
_METHODS = ("DELETE", "GET", "HEAD", "POST")


@dataclass(frozen=True, slots=True)
class Fault:
    """One slip in a request. `pointer`: JSON pointer into the body, or `?name` for a query parameter."""

    pointer: str
    code: str
    detail: str


@dataclass(frozen=True, slots=True)
class ProblemDetails:
    """What a `Problem` carries."""

    code: str
    detail: str
    faults: tuple[Fault, ...] = ()
    headers: Mapping[str, str] = field(default_factory=dict[str, str])


class Problem(Exception):  # noqa: N818 - RFC 9457's own word
    """Raised anywhere below a route; becomes one problem+json answer. `code` is a key of `TABLE`."""

    def __init__(
        self,
        code: str,
        detail: str = "",
        *,
        faults: Sequence[Fault] = (),
        headers: Mapping[str, str] | None = None,
    ) -> None:
        kind = TABLE[code]
        super().__init__(code)
        extra = dict(headers or {})
        if kind.status == 503:
            extra.setdefault("Retry-After", str(RETRY_AFTER_S))
        self.details = ProblemDetails(code, detail or kind.meaning, tuple(faults), extra)

    @staticmethod
    def of_faults(faults: Sequence[Fault]) -> Problem:
        """One answer for all faults of a request; its code is theirs where they agree."""
        codes = {fault.code for fault in faults}
        code = codes.pop() if len(codes) == 1 else "invalid_request"
        detail = faults[0].detail if len(faults) == 1 else f"{len(faults)} faults: see errors."
        return Problem(code, detail, faults=faults[:MAX_FAULTS])


def problem_body(details: ProblemDetails, request_id: str) -> dict[str, Any]:
    """The RFC 9457 object."""
    kind = TABLE[details.code]
    return {
        "type": f"urn:dreamserve:problem:{details.code}",
        "title": kind.title,
        "status": kind.status,
        "detail": details.detail,
        "instance": f"urn:dreamserve:request:{request_id}",
        "code": details.code,
        "retryable": kind.retryable,
        "request_id": request_id,
        "errors": [{"pointer": fault.pointer, "code": fault.code, "detail": fault.detail} for fault in details.faults],
    }


def problem_response(details: ProblemDetails, request_id: str) -> JSONResponse:
    """The whole answer."""
    return JSONResponse(
        problem_body(details, request_id),
        status_code=TABLE[details.code].status,
        headers=dict(details.headers),
        media_type=MEDIA_TYPE,
    )


async def answer_problem(request: Request, error: Problem) -> JSONResponse:
    """Exception handler for `Problem`. Like all of them it is a coroutine: a plain function is given a thread."""
    request.state.problem = error.details.code
    return problem_response(error.details, request.state.request_id)


async def answer_http(request: Request, error: HTTPException) -> JSONResponse:
    """Exception handler for what the framework itself refuses: unknown routes and methods."""
    code = _BY_STATUS.get(error.status_code, "internal")
    request.state.problem = code
    headers = {"Allow": ", ".join(_allowed(request))} if error.status_code == 405 else dict(error.headers or {})
    details = ProblemDetails(code, TABLE[code].meaning, headers=headers)
    return problem_response(details, request.state.request_id)


def _allowed(request: Request) -> list[str]:
    """The methods of all routes of this path; the framework names those of the first."""
    routes = request.app.routes
    scopes = {method: {**request.scope, "method": method} for method in _METHODS}
    return [
        method for method, scope in scopes.items() if any(route.matches(scope)[0] == Match.FULL for route in routes)
    ]
