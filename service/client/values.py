"""What the service answers, as frozen values. Fields that this version does not know are left out, not refused.

Times are aware datetimes in UTC. States are `queued`, `running` and, never changing again, `succeeded`, `failed`,
`canceled`, `expired`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final, Generic, TypeVar

ENDED: Final = frozenset({"succeeded", "failed", "canceled", "expired"})

ImageT = TypeVar("ImageT")


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Where a running job is: denoise steps done, over all its pictures."""

    phase: str
    step: int
    total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a queued one stands. `eta_s`: seconds until it may start; None if nobody knows."""

    position: int
    eta_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why it failed."""

    code: str
    message: str
    retryable: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordState:
    """A job or training at one moment.

    Attributes:
        queue: only while queued.
        attempt: counts from 1, and more where workers were lost.
        request: every parameter it runs with, defaults filled in.
        expires_at: when its record is dropped; known once it has ended.
    """

    id: str
    status: str
    queue: Place | None = None
    attempt: int = 1
    cancel_requested: bool = False
    created_at: datetime
    started_at: datetime | None = None
    finished_at: datetime | None = None
    expires_at: datetime | None = None
    request: dict[str, Any] = field(default_factory=dict[str, Any])
    error: Failure | None = None
    metadata: dict[str, str] = field(default_factory=dict[str, str])

    @property
    def ended(self) -> bool:
        """Whether nothing will happen to it any more."""
        return self.status in ENDED

    @property
    def succeeded(self) -> bool:
        return self.status == "succeeded"


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageState:
    """A finished picture. Width and height are pixels; `sha256` of its file, hex."""

    sha256: str
    width: int
    height: int
    media_type: str
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class JobState(RecordState, Generic[ImageT]):
    """A job at one moment.

    Attributes:
        start_by: it expires if no step is made by then.
        timings: seconds by phase: `queued_s`, `preprocess_s`, `encode_s`, …
        cache: `hit` or `miss`, by what the worker may have kept from earlier jobs.
    """

    progress: Progress | None = None
    start_by: datetime | None = None
    images: tuple[ImageT, ...] = ()
    timings: dict[str, float] = field(default_factory=dict[str, float])
    cache: dict[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingProgress:
    """Where a running training is: steps done, of all stages. `losses`: of the last step."""

    stage: str
    step: int
    total: int
    losses: dict[str, float] = field(default_factory=dict[str, float])
    samples_per_second: float = 0.0
    seconds_left: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingState(RecordState):
    """A training at one moment. `result`: adapter, version, steps and losses, once it has succeeded."""

    progress: TrainingProgress | None = None
    result: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class JobPage:
    """Newest first. `next_cursor`: None on the last page."""

    jobs: tuple[JobState[ImageState], ...]
    next_cursor: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingPage:
    """As `JobPage`."""

    trainings: tuple[TrainingState, ...]
    next_cursor: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadedReference:
    """An uploaded picture, upright. `expires_at`: later after each use."""

    id: str
    sha256: str
    media_type: str
    width: int
    height: int
    bytes: int
    created_at: datetime
    expires_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """Inclusive bounds, and what is taken if nothing is said."""

    minimum: float
    maximum: float
    step: float
    default: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What the served model accepts. Sizes are pixels, and multiples of `cell`."""

    name: str
    about: str = ""
    cell: int
    width: Range
    height: Range
    num_inference_steps: Range
    guidance: Range
    true_cfg_scale: Range
    reference_resolution: Range
    identity_resolution: int
    text_tokens: int
    max_references: int
    max_images: int
    max_prompt_characters: int
    roles: tuple[str, ...]
    exclusive_roles: tuple[str, ...] = ()
    style_trigger: str = ""
    placeholders: tuple[str, ...] = ()
    output_formats: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelList:
    models: tuple[Model, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """One published version of an adapter.

    `version` is the sha256 of its file, `kind` `dreamo` or `lora`, `base` a fingerprint of its base model
    (None: nobody knows).
    """

    name: str
    version: str
    kind: str
    published_at: datetime
    recipe: str | None = None
    steps: int | None = None
    base: str | None = None
    files: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterList:
    adapters: tuple[Adapter, ...]


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to a job or a training.

    `kind` is `status`, `progress`, `preview` (of jobs) or `reset` when some are no longer kept; its data is all of it.
    """

    id: str
    kind: str
    data: dict[str, Any]

    @property
    def ends(self) -> bool:
        """Whether it is the last one."""
        return self.kind == "status" and self.data.get("status") in ENDED
