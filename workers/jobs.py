"""The frozen values that pass along the line: what was asked, how far it is, what came out.

    queued ──claim──▶ running ──commit──▶ succeeded
      │                 │ ├────fail─────▶ failed
      │                 │ └──(lease lost)─▶ queued again, attempt + 1
      └────cancel───────┴───────────────▶ canceled        expired: not started by its deadline

Everything here crosses a process boundary as JSON (`encode` / `decode`) and is validated on the way in. A job
carries artifact keys, never pixels: its record stays under 4 KiB apart from the prompt. No torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal, TypeVar

from pydantic import TypeAdapter

from model.roles import Role

T = TypeVar("T")


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
    """One occupied slot. `image` and `mask` are artifact keys (sha256 hex); `slot` is 1-based, never compacted."""

    slot: int
    role: Role
    image: str
    mask: str | None = None
    resolution: int | None = None
    on_no_face: Literal["fail", "subject"] = "fail"


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
class CustomizeJob:
    """One accepted request, complete: the worker needs nothing else but the artifacts it names."""

    id: str
    model: str
    prompt: str
    negative_prompt: str
    references: tuple[ReferenceInput, ...]
    sampling: Sampling
    num_images: int = 1
    output_format: Literal["png", "jpeg", "webp"] = "png"
    metadata: dict[str, str] = field(default_factory=dict[str, str])


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
    """What a worker commits: pictures and seconds by phase (`preprocess_s`, `encode_s`, `denoise_s`, `decode_s`)."""

    images: tuple[ImageArtifact, ...]
    timings: dict[str, float]


@dataclass(frozen=True, slots=True)
class JobRecord:
    """The ledger's whole knowledge of a job at one moment. Times are Unix seconds by Redis' clock."""

    job: CustomizeJob
    status: JobStatus
    attempt: int
    created_at: float
    started_at: float | None = None
    finished_at: float | None = None
    progress: Progress | None = None
    cancel_requested: bool = False
    result: JobResult | None = None
    error: JobError | None = None


_ADAPTERS: dict[type[Any], TypeAdapter[Any]] = {
    kind: TypeAdapter(kind) for kind in (CustomizeJob, Progress, JobError, JobResult)
}


def encode(value: CustomizeJob | Progress | JobError | JobResult) -> str:
    """The value as compact JSON."""
    return _ADAPTERS[type(value)].dump_json(value).decode()


def decode(kind: type[T], text: str | bytes) -> T:
    """The value back from JSON.

    Raises:
        pydantic.ValidationError: the text is not such a value (a forged or damaged record).
    """
    return _ADAPTERS[kind].validate_json(text)
