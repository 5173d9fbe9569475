"""One customize job from claim to commit; `claims` is the shell around everything that it can make go wrong.

    claim ─▶ read, decode, preprocess ─▶ encode ─▶ per image: start, step × N, decode, publish ─▶ commit
                                       each step: `beat` = progress out, cancellation in

Running is at-least-once, its effect exactly-once: all that leaves this file carries the claim's token.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from model.errors import ModelError
from model.spec import ModelSpec
from workers import pictures
from workers.artifacts import ArtifactError, ArtifactStore
from workers.caretaker import Claim
from workers.claims import ClaimedJob, End, StoppedError, run_claimed
from workers.jobs import CustomizeJob, ImageArtifact, JobError, JobResult, Progress
from workers.ledger import CustomizeLedger, DamagedRecordError
from workers.pictures import PictureError, PictureLimits
from workers.requests import compose_request
from workers.settings import WorkerSettings

if TYPE_CHECKING:
    from model.pipeline import ImageRequest

SEEDS = 2**64


class HotPipeline(Protocol):
    """`model.pipeline.Pipeline` as a worker drives it. What passes between its phases is its own affair."""

    @property
    def spec(self) -> ModelSpec: ...
    def describe(self) -> dict[str, str | int]: ...
    def warm(self) -> None: ...
    def preprocess(self, request: ImageRequest) -> Any: ...
    def encode(self, request: ImageRequest, prepared: Any) -> Any: ...
    def start(self, encoded: Any, seed: int) -> Any: ...
    def step(self, runs: Sequence[Any]) -> Sequence[Any]: ...
    def decode(self, run: Any) -> NDArray[np.uint8]: ...


@dataclass(slots=True)
class JobRunner:
    """Runs claimed jobs on one hot pipeline, one at a time. `claim` is the one in hand."""

    pipeline: HotPipeline
    ledger: CustomizeLedger
    store: ArtifactStore
    settings: WorkerSettings
    worker: str
    claim: Claim | None = None

    def run(self, job_id: str) -> None:
        """Claim a job and bring it to an end.

        Raises:
            redis.exceptions.RedisError: Redis was away for longer than a finished job may wait. The lease
                lapses and the job is run again.
        """
        patience_s = self.settings.commit_patience_s
        run_claimed(self, job_id, patience_s, lambda claimed: _Attempt(self, claimed).run())

    def stop(self) -> None:
        """The running job is finished first."""


@dataclass(slots=True)
class _Attempt:
    """One claim's walk: what it has published and how long its phases took."""

    runner: JobRunner
    claimed: ClaimedJob[CustomizeJob, Progress, JobResult]
    published: list[ImageArtifact] = field(default_factory=list[ImageArtifact])
    timings: dict[str, float] = field(default_factory=dict[str, float])

    def run(self) -> End:
        """Make the pictures and write the end into the ledger; only a job that succeeds keeps its pictures."""
        end = self.claimed.end(self._make, job_error)
        if end != "succeeded":
            for image in self.published:
                self.runner.store.discard(image.name)
        return end

    def _make(self) -> JobResult:
        job, pipeline = self.claimed.read(), self.runner.pipeline
        total = job.sampling.num_inference_steps * job.num_images
        self._beat(Progress("load", 0, total))
        request = self._timed("preprocess_s", lambda: self._compose(job))
        self._beat(Progress("preprocess", 0, total))
        prepared = self._timed("preprocess_s", lambda: pipeline.preprocess(request))
        self._beat(Progress("encode", 0, total))
        encoded = self._timed("encode_s", lambda: pipeline.encode(request, prepared))
        for number in range(job.num_images):
            self._image(job, encoded, number, total)
        return JobResult(
            images=tuple(self.published),
            timings={name: round(seconds, 4) for name, seconds in self.timings.items()},
        )

    def _compose(self, job: CustomizeJob) -> ImageRequest:
        return compose_request(job, self.runner.store, self.runner.pipeline.spec, PictureLimits())

    def _image(self, job: CustomizeJob, encoded: Any, number: int, total: int) -> None:
        """Denoise, decode and publish picture `number` of the job."""
        pipeline, seed = self.runner.pipeline, (job.sampling.seed + number) % SEEDS
        done = job.sampling.num_inference_steps * number
        run = self._timed("denoise_s", lambda: pipeline.start(encoded, seed))
        self._beat(Progress("denoise", done, total))
        while not run.done:
            (run,) = self._timed("denoise_s", lambda current=run: pipeline.step([current]))
            done += 1
            self._beat(Progress("denoise", done, total))
        self._beat(Progress("decode", done, total))
        pixels = self._timed("decode_s", lambda: pipeline.decode(run))
        data = self._timed("decode_s", lambda: pictures.encode(pixels, job.output_format))
        name = f"{job.id}.{self.claimed.claim.token}.{number}.{job.output_format}"
        height, width, _ = pixels.shape
        self.published.append(
            ImageArtifact(
                name=name,
                sha256=self.runner.store.publish(name, data),
                media_type=pictures.media_type(job.output_format),
                width=width,
                height=height,
                size=len(data),
                seed=seed,
            )
        )

    def _beat(self, progress: Progress) -> None:
        """Tell the ledger.

        Raises:
            StoppedError: canceled or lost.
        """
        self.claimed.claim.moved_at = time.monotonic()
        answer = self.claimed.beat(progress)
        if answer != "ok":
            raise StoppedError(answer)

    def _timed(self, phase: str, work: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        try:
            return work()
        finally:
            self.timings[phase] = self.timings.get(phase, 0.0) + time.perf_counter() - started


def job_error(error: Exception) -> JobError:
    """What the caller may know of a failure: a code and a remedy, nothing of the exception's own text."""
    match error:
        case ModelError():
            return JobError(error.code, error.message)
        case ArtifactError():
            return JobError(error.code, error.message, retryable=error.code == "storage_unavailable")
        case PictureError():
            return JobError(error.code, error.message)
        case DamagedRecordError():
            return JobError("internal", "The job's record is damaged: submit it again.")
        case _ if _is_out_of_memory(error):
            return JobError(
                "out_of_memory",
                "The worker ran out of memory: try again, or ask for a smaller size or fewer references.",
                retryable=True,
            )
        case _:
            return JobError("internal", f"The worker failed with {type(error).__name__}.")


def _is_out_of_memory(error: Exception) -> bool:
    """torch.OutOfMemoryError and its relatives are RuntimeErrors that say so."""
    if isinstance(error, MemoryError):
        return True
    text = str(error).lower() if isinstance(error, RuntimeError) else ""
    return "out of memory" in text or "can't allocate memory" in text or "cublas_status_alloc_failed" in text
