"""Each thing that can be asked of the service: what is sent for it, and what its answer says. Sends nothing itself."""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Any, Final, Generic, Literal, TypedDict, TypeVar
from urllib.parse import quote

import httpx2
from pydantic import TypeAdapter, ValidationError

from service.client.errors import DamagedImageError, Fault, InvalidRequestError, unexpected
from service.client.references import AdapterUse, OutputFormat, Reference, Webhook, filled, media_type
from service.client.values import (
    Adapter,
    AdapterList,
    ImageState,
    JobPage,
    JobState,
    Model,
    ModelList,
    TrainingPage,
    TrainingState,
    UploadedReference,
)

T = TypeVar("T")

REQUEST_ID: Final = "X-Request-ID"
WORD: Final = re.compile(r"[!-~]+")
"""What a header can hold whoever reads it: printable ASCII without spaces."""
PAGE: Final = 100

_JOB: Final = TypeAdapter(JobState[ImageState])
_JOBS: Final = TypeAdapter(JobPage)
_TRAINING: Final = TypeAdapter(TrainingState)
_TRAININGS: Final = TypeAdapter(TrainingPage)
_UPLOADED: Final = TypeAdapter(UploadedReference)
_MODELS: Final = TypeAdapter(ModelList)
_ADAPTERS: Final = TypeAdapter(AdapterList)


class CustomizeOptions(TypedDict, total=False):
    """All of a request but its prompt and references; what is left out or None is the model's default.

    Width and height are pixels. `seed` is below 2**64; image n is drawn with `seed + n`. `previews`: a small picture
    every so many steps. `adapter`: a name, or `AdapterUse`. `webhook`: an https URL, or `Webhook`.
    """

    width: int | None
    height: int | None
    num_inference_steps: int | None
    guidance: float | None
    first_step_guidance: float | None
    true_cfg_scale: float | None
    true_cfg_start: int | None
    true_cfg_end: int | None
    negative_prompt: str | None
    negative_guidance: float | None
    seed: int | None
    num_images: int | None
    format: OutputFormat | None
    priority: Literal["interactive", "batch"] | None
    adapter: str | AdapterUse | None
    previews: int | None
    webhook: str | Webhook | None
    metadata: Mapping[str, str] | None


class TrainingOptions(TypedDict, total=False):
    """All of a training but its recipe. `adapter`: the name to publish under; `overrides`: changes to the recipe."""

    adapter: str | None
    dataset: str | None
    overrides: Mapping[str, Any] | None
    webhook: str | Webhook | None
    metadata: Mapping[str, str] | None


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """One thing to be asked; asking it again does nothing twice.

    Attributes:
        read: what a successful answer says; raises `DreamserveError` if it says nothing of the kind.
        wait_s: the answer may take so much longer than others.
        undone: HTTP statuses that mean "done before", if an earlier answer was lost.
    """

    method: str
    path: str
    read: Callable[[httpx2.Response], T]
    params: Mapping[str, str | int] = field(default_factory=dict[str, "str | int"])
    headers: Mapping[str, str] = field(default_factory=dict[str, str])
    content: bytes | None = None
    wait_s: float = 0.0
    undone: tuple[int, ...] = ()


def customize(
    prompt: str,
    references: Sequence[Reference | None],
    options: CustomizeOptions,
    *,
    idempotency_key: str | None,
    wait: float | None,
    start_within: float | None,
) -> Call[JobState[ImageState]]:
    """`wait`, `start_within`: seconds."""
    body = dict(options)
    output = body.pop("format", None)
    body |= {
        "prompt": prompt,
        "references": [reference and reference.body() for reference in references],
        "output": output and {"format": output},
        "adapter": _named(options.get("adapter"), AdapterUse),
        "webhook": _named(options.get("webhook"), Webhook),
    }
    headers = filled(
        Prefer=f"wait={ceil(wait)}" if wait else None,
        **{"Cancel-After": None if start_within is None else f"{ceil(start_within)}s"},
    )
    return _submission("/v1/customize", body, _reader(_JOB), idempotency_key, headers, wait or 0.0)


def train(recipe: str, options: TrainingOptions, *, idempotency_key: str | None) -> Call[TrainingState]:
    body = {**options, "recipe": recipe, "webhook": _named(options.get("webhook"), Webhook)}
    return _submission("/v1/trainings", body, _reader(_TRAINING), idempotency_key, {}, 0.0)


def job(job_id: str, wait_s: int = 0) -> Call[JobState[ImageState]]:
    """`wait_s`: how long the answer may wait for the job's end."""
    params = {"wait": wait_s} if wait_s else {}
    return Call("GET", _path("jobs", job_id), _reader(_JOB), params, wait_s=wait_s)


def cancel(job_id: str) -> Call[JobState[ImageState]]:
    return Call("POST", _path("jobs", job_id, "cancel"), _reader(_JOB))


def delete(job_id: str) -> Call[None]:
    return Call("DELETE", _path("jobs", job_id), _nothing, undone=(404, 410))


def jobs(status: str | None, cursor: str | None) -> Call[JobPage]:
    return Call("GET", "/v1/jobs", _reader(_JOBS), filled(status=status, cursor=cursor, limit=PAGE))


def events_path(job_id: str) -> str:
    return _path("jobs", job_id, "events")


def training_events_path(training_id: str) -> str:
    return _path("trainings", training_id, "events")


def image(job_id: str, index: int, sha256: str) -> Call[bytes]:
    """The picture's file, which has this digest."""

    def checked(response: httpx2.Response) -> bytes:
        if hashlib.sha256(response.content).hexdigest() != sha256:
            detail = "the picture's bytes are not those that its job names"
            raise DamagedImageError("image_damaged", detail, retryable=True, request_id=request_id(response))
        return response.content

    return Call("GET", _path("jobs", job_id, "images", str(index)), checked)


def preview(job_id: str) -> Call[bytes]:
    return Call("GET", _path("jobs", job_id, "preview"), _content)


def upload(data: bytes) -> Call[UploadedReference]:
    headers = {"Content-Type": media_type(data)}
    return Call("POST", "/v1/references", _reader(_UPLOADED), headers=headers, content=data)


def reference(reference_id: str) -> Call[UploadedReference]:
    return Call("GET", _path("references", reference_id), _reader(_UPLOADED))


def delete_reference(reference_id: str) -> Call[None]:
    return Call("DELETE", _path("references", reference_id), _nothing, undone=(404,))


def training(training_id: str) -> Call[TrainingState]:
    return Call("GET", _path("trainings", training_id), _reader(_TRAINING))


def cancel_training(training_id: str) -> Call[TrainingState]:
    return Call("POST", _path("trainings", training_id, "cancel"), _reader(_TRAINING))


def trainings(status: str | None, cursor: str | None) -> Call[TrainingPage]:
    return Call("GET", "/v1/trainings", _reader(_TRAININGS), filled(status=status, cursor=cursor, limit=PAGE))


def models() -> Call[tuple[Model, ...]]:
    return Call("GET", "/v1/models", lambda response: _reader(_MODELS)(response).models)


def adapters(name: str | None) -> Call[tuple[Adapter, ...]]:
    return Call("GET", "/v1/adapters", lambda response: _reader(_ADAPTERS)(response).adapters, filled(name=name))


def request_id(response: httpx2.Response) -> str:
    """The id under which the service's operator finds a call."""
    return response.headers.get(REQUEST_ID) or response.request.headers.get(REQUEST_ID, "")


def _submission(
    path: str,
    body: Mapping[str, Any],
    read: Callable[[httpx2.Response], T],
    key: str | None,
    headers: Mapping[str, str],
    wait_s: float,
) -> Call[T]:
    """A body under a key: without one of the caller's a fresh one, the same however often it is sent.

    Raises:
        InvalidRequestError: a number that is not finite, a text that is not Unicode, or no key.
    """
    if key is not None and not WORD.fullmatch(key):
        raise _slip("Idempotency-Key:", "invalid_value", "an idempotency key is one word of ASCII")
    said = filled(**body)
    try:
        content = _json(said)
    except ValueError:
        slip = next((name for name, value in said.items() if not _is_json(value)), "")
        raise _slip(f"/{slip}", "malformed_json", "JSON holds finite numbers and valid Unicode only") from None
    all_headers = {
        **headers,
        "Content-Type": "application/json",
        "Idempotency-Key": secrets.token_hex(16) if key is None else key,
    }
    return Call("POST", path, read, headers=all_headers, content=content, wait_s=wait_s)


def _json(value: object) -> bytes:
    """
    Raises:
        ValueError: a number that is not finite, or a text that is not Unicode.
    """
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode()


def _is_json(value: object) -> bool:
    try:
        _json(value)
    except ValueError:
        return False
    return True


def _slip(pointer: str, code: str, detail: str) -> InvalidRequestError:
    """What the service would say of a request, had it been possible to send it."""
    return InvalidRequestError(code, detail, faults=[Fault(pointer, code, detail)])


def _reader(kind: TypeAdapter[T]) -> Callable[[httpx2.Response], T]:
    def read(response: httpx2.Response) -> T:
        try:
            return kind.validate_json(response.content)
        except ValidationError:
            raise unexpected(response, request_id(response)) from None

    return read


def _content(response: httpx2.Response) -> bytes:
    return response.content


def _nothing(_: httpx2.Response) -> None:
    return None


def _named(value: str | AdapterUse | Webhook | None, kind: type[AdapterUse] | type[Webhook]) -> dict[str, Any] | None:
    """An adapter or webhook as the request has it; a text alone is its name or URL."""
    if value is None:
        return None
    return (kind(value) if isinstance(value, str) else value).body()


def _path(*parts: str) -> str:
    return "/".join(["", "v1", *(quote(part, safe="") for part in parts)])
