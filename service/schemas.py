"""What crosses HTTP: the request as the caller writes it, and the bodies of the answers.

Types only; what a loaded model allows is checked in `admission`, where the limits are known. `None` in a
request means "the model's default", which the job's `request` then shows.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from model.roles import Role
from workers.jobs import JobStatus, Outcome, Priority

OutputFormat = Literal["png", "jpeg", "webp"]
WebhookEvent = Literal["status", "terminal"]

# A plain string here: an unknown role gets its own code in `admission`, which knows the model's roles.
RoleName = Annotated[str, WithJsonSchema({"type": "string", "enum": [role.value for role in Role]})]


def _within_64_bits(value: object) -> object:
    if isinstance(value, float) and abs(value) >= 2**63:  # what JSON's reader makes of longer integers
        raise PydanticCustomError("seed_out_of_range", "Use an integer from 0 to 2**64 - 1, or leave it out")
    return value


Seed = Annotated[int, BeforeValidator(_within_64_bits)]


class InputBody(BaseModel):
    """Nothing is coerced, nothing unknown is let through, no NaN."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class ReferenceBody(InputBody):
    """One picture the result shall take something from."""

    image: str = Field(
        description="Data URL of a PNG, JPEG or WebP, the id of an uploaded reference, or an https URL.",
        examples=["data:image/png;base64,iVBORw0KGgo=", "ref_0123456789abcdef0123456789abcdef"],
    )
    role: RoleName = Field(description="What to take from the picture.")
    resolution: int | None = Field(
        None, description="Side of the square whose area the picture has inside the model; more keeps more detail."
    )
    mask: str | None = Field(
        None,
        description="Data URL or id of an uploaded reference, of the picture's size: what to keep (alpha, or else "
        "brightness).",
    )
    on_no_face: Literal["fail", "subject"] = Field(
        "fail", description="Identity without a face: fail the job, or treat the picture as a subject."
    )


class OutputFormatBody(InputBody):
    """How the pictures are written."""

    format: OutputFormat = "png"


class WebhookBody(InputBody):
    """Where to tell of a job, and of what."""

    url: str = Field(description="https, to a public address.", examples=["https://example.com/hook"])
    events: list[WebhookEvent] = Field(
        default_factory=lambda: ["terminal"], description="`terminal`: its end; `status`: each change."
    )


class AdapterBody(InputBody):
    """A published adapter, and how much of it."""

    name: str = Field(description="One of `/v1/adapters`.", examples=["house-style"])
    scale: float = Field(1.0, description="0: the model as it is served, 1: the adapter itself; from -2 to 2.")
    version: str | None = Field(None, description="Default: the newest, which the job's `request` then shows.")


class CustomizeRequest(InputBody):
    """Body of `POST /v1/customize`."""

    prompt: str = Field(description="`[ref#i]` binds a word to the reference in slot i, counted from 1.")
    references: list[ReferenceBody | None] = Field(
        default_factory=list[ReferenceBody | None], description="One entry per slot; null keeps a slot empty."
    )
    width: int | None = Field(None, description="Pixels; a multiple of the model's cell.")
    height: int | None = Field(None, description="Pixels; a multiple of the model's cell.")
    num_inference_steps: int | None = None
    guidance: float | None = Field(None, description="Distilled guidance.")
    first_step_guidance: float | None = Field(None, description="Guidance of the first step; default: guidance.")
    true_cfg_scale: float | None = Field(None, description="Above 1: a second pass with the negative prompt.")
    true_cfg_start: int | None = Field(None, description="First step of the true CFG window.")
    true_cfg_end: int | None = Field(None, description="First step after the true CFG window.")
    negative_prompt: str | None = None
    negative_guidance: float | None = Field(None, description="Distilled guidance of the negative pass.")
    seed: Seed | None = Field(
        None, description="0 to 2**64 - 1; default: random. Image n is drawn with seed + n (mod 2**64)."
    )
    num_images: int = 1
    output: OutputFormatBody = Field(default_factory=OutputFormatBody)
    priority: Priority = Field(
        "interactive", description="`batch` leaves most of the device to interactive jobs while there are any."
    )
    adapter: AdapterBody | None = Field(None, description="Draw with an adapter.")
    previews: int = Field(0, description="A small picture of how far it is, every so many steps; 0: none.")
    webhook: WebhookBody | None = Field(None, description="Told of the job, signed as Standard Webhooks has it.")
    metadata: dict[str, str] = Field(
        default_factory=dict[str, str], description="Returned with the job; at most 16 entries, 2048 bytes."
    )


class OutputBody(BaseModel):
    """What is answered."""

    model_config = ConfigDict(frozen=True)


class OutputView(OutputBody):
    format: OutputFormat


class ReferenceView(OutputBody):
    """A reference as the job keeps it: by digest."""

    slot: int
    role: Role
    sha256: str | None = Field(description="Null while it is fetched from `url`.")
    url: str | None
    mask_sha256: str | None
    resolution: int | None
    on_no_face: Literal["fail", "subject"]


class AdapterUseView(OutputBody):
    """The adapter a job is drawn with, its version pinned."""

    name: str
    version: str
    scale: float


class WebhookView(OutputBody):
    url: str
    events: list[WebhookEvent]


class EffectiveRequest(OutputBody):
    """Every parameter the job runs with, defaults filled in."""

    model: str
    prompt: str
    negative_prompt: str
    references: list[ReferenceView]
    width: int
    height: int
    num_inference_steps: int
    guidance: float
    first_step_guidance: float
    true_cfg_scale: float
    true_cfg_start: int
    true_cfg_end: int
    negative_guidance: float
    seed: int
    num_images: int
    output: OutputView
    priority: Priority
    adapter: AdapterUseView | None
    previews: int
    webhook: WebhookView | None


class ProgressView(OutputBody):
    phase: Literal["load", "preprocess", "encode", "denoise", "decode"]
    step: int
    total: int


class QueueView(OutputBody):
    position: int = Field(description="Jobs of all tenants ahead of this one, by estimate.")
    eta_s: float | None = Field(description="Seconds until it may start, by how fast jobs end now; null: unknown.")


class ImageView(OutputBody):
    url: str
    sha256: str
    width: int
    height: int
    media_type: str
    seed: int


class JobErrorView(OutputBody):
    code: str
    message: str
    retryable: bool


class RecordUrls(OutputBody):
    self: str
    cancel: str
    events: str = Field(description="As they happen: server-sent events.")


class JobBody(OutputBody):
    """A job at one moment. Times are ISO 8601 in UTC."""

    id: str
    status: JobStatus
    progress: ProgressView | None
    queue: QueueView | None = Field(description="Only while queued.")
    attempt: int
    cancel_requested: bool
    created_at: str
    started_at: str | None
    finished_at: str | None
    start_by: str | None = Field(description="It expires if no step is made by then.")
    expires_at: str | None = Field(description="When the record is dropped; known once the job is terminal.")
    request: EffectiveRequest
    images: list[ImageView]
    error: JobErrorView | None
    timings: dict[str, float] = Field(description="Seconds by phase: queued_s, preprocess_s, encode_s, ...")
    cache: dict[str, Outcome] = Field(
        description="What the worker had kept before: prompt, negative, reference_<slot>, adapter; once succeeded."
    )
    urls: RecordUrls
    metadata: dict[str, str]


class JobList(OutputBody):
    """Newest first."""

    jobs: list[JobBody]
    next_cursor: str | None


class UploadedReferenceBody(OutputBody):
    """An uploaded picture. Width and height are pixels, upright. Times are ISO 8601 in UTC."""

    id: str = Field(description="To be named as a reference's `image` or `mask`.")
    sha256: str
    media_type: str
    width: int
    height: int
    bytes: int
    created_at: str
    expires_at: str = Field(description="Later after each use.")


class FaultView(OutputBody):
    pointer: str = Field(description="JSON pointer into the body, or `?name` for a query parameter.")
    code: str
    detail: str


class ProblemBody(OutputBody):
    """RFC 9457 problem; `docs/errors.md` lists the codes."""

    type: str
    title: str
    status: int
    detail: str
    instance: str
    code: str
    retryable: bool
    request_id: str
    errors: list[FaultView]


class RangeView(OutputBody):
    """Inclusive bounds; a value lies on `step` if that is a whole number."""

    minimum: float
    maximum: float
    step: float
    default: float


class ModelBody(OutputBody):
    """What the model accepts and what it does when nothing is said."""

    name: str
    about: str
    cell: int = Field(description="Width and height are multiples of this many pixels.")
    width: RangeView
    height: RangeView
    num_inference_steps: RangeView
    guidance: RangeView
    true_cfg_scale: RangeView
    reference_resolution: RangeView
    identity_resolution: int
    text_tokens: int
    max_references: int
    max_images: int
    max_prompt_characters: int
    roles: list[Role]
    exclusive_roles: list[Role]
    style_trigger: str
    placeholders: list[str]
    output_formats: list[OutputFormat]


class ModelList(OutputBody):
    models: list[ModelBody]
    workers: list[dict[str, Any]] = Field(description="Cards of the live workers: device, versions, base, state.")


class Liveness(OutputBody):
    status: Literal["live"] = "live"


class Readiness(OutputBody):
    """Redis and the artifact store answer. Jobs are accepted even while `workers_ready` is 0."""

    status: Literal["ready"] = "ready"
    workers_ready: int = Field(description="Workers with the model loaded, idle or at work.")
