"""The frozen values that pass along the line: what was asked, how far it is, what came out.

    queued ──claim──▶ running ──commit──▶ succeeded
      │                 │ ├────fail─────▶ failed
      │                 │ └──(lease lost)─▶ queued again, attempt + 1
      ├────cancel───────┼───────────────▶ canceled
      └──(deadline)─────┴───────────────▶ expired: not one step made in time

Two kinds of job go this way: customizing and training. Everything here crosses a process boundary as JSON (`encode`
/ `decode`) and is validated on the way in. A job carries artifact keys, never pixels: its record stays under 4 KiB
apart from a prompt or a recipe. No torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Generic, Literal, Protocol, TypeVar

from pydantic import TypeAdapter

from model.roles import Role

Outcome = Literal["hit", "miss"]
"""Whether something was kept from before or had to be computed."""


Priority = Literal["interactive", "batch"]


@dataclass(frozen=True, slots=True)
class Webhook:
    """Where to tell of a job's changes: of each (`status`), or of its end (`terminal`)."""

    url: str
    events: tuple[Literal["status", "terminal"], ...] = ("terminal",)


class Identified(Protocol):
    """Any kind of job, of one tenant. `fetching`: not all that it needs is in the artifact store yet."""

    @property
    def id(self) -> str: ...

    @property
    def tenant(self) -> str: ...

    @property
    def webhook(self) -> Webhook | None: ...

    @property
    def fetching(self) -> bool: ...


class Steps(Protocol):
    """Any kind of progress."""

    @property
    def step(self) -> int: ...


T = TypeVar("T")
JobT = TypeVar("JobT", bound=Identified)
ProgressT = TypeVar("ProgressT", bound=Steps)
ResultT = TypeVar("ResultT")


class JobStatus(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELED = "canceled"
    EXPIRED = "expired"

    @property
    def terminal(self) -> bool:
        """Whether the state can never change again."""
        return self not in (JobStatus.QUEUED, JobStatus.RUNNING)


@dataclass(frozen=True, slots=True)
class ReferenceInput:
    """One occupied slot. `image` and `mask` are artifact keys (sha256 hex); `slot` is 1-based, never compacted.

    `url`: whence the image is still to be fetched; until then `image` is empty.
    """

    slot: int
    role: Role
    image: str
    mask: str | None = None
    resolution: int | None = None
    on_no_face: Literal["fail", "subject"] = "fail"
    url: str | None = None


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to sample; every field is resolved (no `None` means "the default" by now).

    `true_cfg_start <= step < true_cfg_end` is the window in which true CFG runs, if `true_cfg_scale` > 1.
    Image n of a job is drawn with seed `(seed + n) mod 2**64`.
    """

    width: int
    height: int
    num_inference_steps: int
    guidance: float
    first_step_guidance: float
    seed: int
    true_cfg_scale: float = 1.0
    true_cfg_start: int = 0
    true_cfg_end: int = 0
    negative_guidance: float = 3.5


@dataclass(frozen=True, slots=True)
class AdapterUse:
    """A published adapter, its version pinned, and how much of it: 0 is the served model, 1 the adapter itself."""

    name: str
    version: str
    scale: float


@dataclass(frozen=True, slots=True)
class CustomizeJob:
    """One accepted request, complete: the worker needs nothing else but the artifacts it names.

    Attributes:
        tenant: whose job it is; what a worker keeps of it serves that tenant alone.
        priority: somebody waits for it, or nobody; see `planner`.
        previews: a small picture of how far it is every so many steps; 0: none.
        request_id, traceparent: of the request that brought it, the latter as W3C has it.
    """

    id: str
    model: str
    prompt: str
    negative_prompt: str
    references: tuple[ReferenceInput, ...]
    sampling: Sampling
    num_images: int = 1
    output_format: Literal["png", "jpeg", "webp"] = "png"
    metadata: dict[str, str] = field(default_factory=dict[str, str])
    tenant: str = "default"
    priority: Priority = "interactive"
    webhook: Webhook | None = None
    adapter: AdapterUse | None = None
    previews: int = 0
    request_id: str = ""
    traceparent: str | None = None

    @property
    def fetching(self) -> bool:
        """Whether a reference is still to be fetched."""
        return any(not reference.image for reference in self.references)


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a running job is. `step` counts finished denoise steps over all images of the job."""

    phase: Literal["load", "preprocess", "encode", "denoise", "decode"]
    step: int
    total: int


@dataclass(frozen=True, slots=True)
class JobError:
    """Why a job failed. `code` is stable; `message` names the remedy and holds no user content."""

    code: str
    message: str
    retryable: bool = False


@dataclass(frozen=True, slots=True)
class ImageArtifact:
    """One finished picture in the artifact store."""

    name: str
    sha256: str
    media_type: str
    width: int
    height: int
    size: int
    seed: int


@dataclass(frozen=True, slots=True)
class JobResult:
    """What a worker commits: pictures and seconds by phase (`adapt_s` if it names an adapter, `preprocess_s`,
    `encode_s`, `denoise_s`, `decode_s`).

    Attributes:
        cache: what of the request the worker had kept: `prompt`, `negative` (if it was read), `reference_<slot>`,
            `adapter` (if it named one).
    """

    images: tuple[ImageArtifact, ...]
    timings: dict[str, float]
    cache: dict[str, Outcome] = field(default_factory=dict[str, Outcome])


@dataclass(frozen=True, slots=True)
class TrainingJob:
    """One accepted training, complete: `recipe` is the whole recipe as JSON, its overrides applied.

    Attributes:
        adapter: name under which the result is published.
        dataset: name of a directory among the server's datasets; None trains on the recipe's own records.
        request_id, traceparent: as a `CustomizeJob`'s.
    """

    id: str
    adapter: str
    recipe: dict[str, Any]
    dataset: str | None = None
    metadata: dict[str, str] = field(default_factory=dict[str, str])
    tenant: str = "default"
    webhook: Webhook | None = None
    request_id: str = ""
    traceparent: str | None = None

    @property
    def fetching(self) -> bool:
        """Never: its dataset lies where the worker is."""
        return False


@dataclass(frozen=True, slots=True)
class TrainingProgress:
    """Where a running training is. `losses`: of the last step, without those that had nothing to measure; the speed
    is a moving average, 0 while it is unknown.
    """

    stage: str
    step: int
    total: int
    losses: dict[str, float]
    samples_per_second: float
    seconds_per_step: float


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """The published adapter: `version` is the sha256 of its released-format file. `losses`: of the last step."""

    adapter: str
    version: str
    steps: int
    losses: dict[str, float]


@dataclass(frozen=True, slots=True)
class JobRecord(Generic[JobT, ProgressT, ResultT]):
    """The ledger's whole knowledge of a job at one moment. Times are Unix seconds by Redis' clock.

    `start_by`: it expires if no step is made by then.
    """

    job: JobT
    status: JobStatus
    attempt: int
    created_at: float
    started_at: float | None = None
    finished_at: float | None = None
    progress: ProgressT | None = None
    cancel_requested: bool = False
    result: ResultT | None = None
    error: JobError | None = None
    start_by: float | None = None


@dataclass(frozen=True, slots=True)
class Kind(Generic[JobT, ProgressT, ResultT]):
    """One kind of job, and where its things lie in Redis.

    Attributes:
        root: prefix of its records' keys.
        queue: RQ's queue by which its deliveries travel.
        function: all that such a delivery can make a worker call.
        cards: key of its live workers.
    """

    root: str
    queue: str
    function: str
    cards: str
    job: type[JobT]
    progress: type[ProgressT]
    result: type[ResultT]


CUSTOMIZE = Kind(
    "dreamserve:",
    "customize",
    "workers.inference.worker.customize",
    "dreamserve:workers",
    CustomizeJob,
    Progress,
    JobResult,
)
TRAINING = Kind(
    "dreamserve:training:",
    "training",
    "workers.training.worker.train",
    "dreamserve:training-workers",
    TrainingJob,
    TrainingProgress,
    TrainingResult,
)
AnyKind = Kind[Any, Any, Any]

CustomizeRecord = JobRecord[CustomizeJob, Progress, JobResult]
TrainingRecord = JobRecord[TrainingJob, TrainingProgress, TrainingResult]

_ADAPTERS: dict[type[Any], TypeAdapter[Any]] = {
    kind: TypeAdapter(kind)
    for kind in (CustomizeJob, Progress, JobError, JobResult, TrainingJob, TrainingProgress, TrainingResult)
}


def encode(value: object) -> str:
    """One of the values above as compact JSON."""
    return _ADAPTERS[type(value)].dump_json(value).decode()


def decode(kind: type[T], text: str | bytes) -> T:
    """The value back from JSON.

    Raises:
        pydantic.ValidationError: the text is not such a value (a forged or damaged record).
    """
    return _ADAPTERS[kind].validate_json(text)
