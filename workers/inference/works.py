"""A claimed customize job on its way through the worker's threads."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import Literal, cast

from workers.claims import ClaimedJob, Stop, StoppedError
from workers.inference.scribe import Scribe
from workers.jobs import CustomizeJob, CustomizeRecord, ImageArtifact, JobResult, Outcome, Progress
from workers.telemetry.tracing import JobTrace, Tracing


@dataclass(slots=True, eq=False)
class Work:
    """What is known of a job in hand.

    Attributes:
        images: published, by number. timings: seconds by phase. cache: what had been kept.
        stopped: why it is not to go on, once that has been heard.
        number: in the order of arrival.
        at_work: it has had its turn to be prepared; see `turns`.
        turn_at: monotonic second of that. ready: it is prepared.
        suspect: it has lost a worker. alone: it has no attempt left to lose.
        ended: its end is taken; nothing is to be done for it any more.
    """

    claimed: ClaimedJob[CustomizeJob, Progress, JobResult]
    scribe: Scribe
    trace: JobTrace = field(default_factory=lambda: JobTrace(Tracing.off()))
    images: dict[int, ImageArtifact] = field(default_factory=dict[int, ImageArtifact])
    timings: dict[str, float] = field(default_factory=dict[str, float])
    cache: dict[str, Outcome] = field(default_factory=dict[str, Outcome])
    number: int = 0
    stopped: Stop | None = None
    ended: bool = False
    at_work: bool = False
    turn_at: float = 0.0
    ready: bool = False
    suspect: bool = False
    alone: bool = False
    steps: int = 0
    _job: CustomizeJob | None = None
    _began: float = field(default_factory=time.monotonic)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def job(self) -> CustomizeJob:
        """The job itself, once it is read."""
        return cast("CustomizeJob", self._job)

    @property
    def key(self) -> str:
        """Names it in this worker; see `Claim.key`."""
        return self.claimed.claim.key

    @property
    def ids(self) -> dict[str, str]:
        """What each line of the log says of it."""
        request = {"request_id": self._job.request_id} if self._job and self._job.request_id else {}
        return {"job_id": self.claimed.claim.job_id, **request}

    @property
    def place(self) -> tuple[bool, int, int]:
        """In the line to be prepared: interactive ones first, then by pixels times steps, then by arrival."""
        job, sampling = self.job, self.job.sampling
        pixels = sampling.height * sampling.width + sum(one.resolution**2 for one in job.references if one.resolution)
        return job.priority != "interactive", pixels * sampling.num_inference_steps * job.num_images, self.number

    @property
    def begun(self) -> bool:
        """Whether a step has been made, so that ending it costs less than beginning anew."""
        return self.steps > 0

    @property
    def denoised(self) -> bool:
        """Whether all steps of all images have been made."""
        return self.steps == self._total

    @property
    def stop(self) -> Stop | None:
        """Why it is not to go on. A deadline means nothing once a step is made."""
        return None if self.stopped == "expired" and self.begun else self.stopped

    def accept(self, record: CustomizeRecord, max_attempts: int) -> None:
        """The job has been read."""
        self._job = record.job
        self.trace.begin(record)
        self.suspect = record.attempt > 1
        self.alone = self.suspect and record.attempt >= max_attempts

    def tell_phase(self, phase: Literal["load", "preprocess", "encode", "denoise", "decode"]) -> None:
        """A phase begins.

        Raises:
            StoppedError: the job is not to go on.
        """
        self.claimed.claim.moved_at = time.monotonic()
        self.trace.phase(phase)
        self.scribe.tell(self.claimed, Progress(phase, self.steps, self._total))
        self.check()

    def check(self) -> None:
        """Go on?

        Raises:
            StoppedError: no, as has been heard.
        """
        if self.stop is not None:
            raise StoppedError(self.stop)

    def step(self, steps: int, seconds: float) -> None:
        """A forward has moved `steps` of its images one step further."""
        self.steps += steps
        self.spend("denoise_s", seconds)
        self.trace.note(steps=self.steps, device_s=round(self.timings["denoise_s"], 4))
        self.scribe.tell(self.claimed, Progress("denoise", self.steps, self._total))

    def show(self, preview: bytes) -> None:
        """A small picture of how far it is."""
        self.scribe.tell(self.claimed, Progress("denoise", self.steps, self._total), preview)

    def spend(self, phase: str, seconds: float) -> None:
        """Count time for a phase."""
        with self._lock:
            self.timings[phase] = self.timings.get(phase, 0.0) + seconds

    def take_end(self) -> bool:
        """Whether the caller is the one who ends it."""
        with self._lock:
            first, self.ended = not self.ended, True
        return first

    def keep(self, number: int, image: ImageArtifact) -> bool:
        """Note a published picture; False if the job has ended meanwhile, so that nobody wants it."""
        with self._lock:
            if not self.ended:
                self.images[number] = image
            return not self.ended

    def published(self) -> list[ImageArtifact]:
        """The pictures noted so far, in order; none is added once the end is taken."""
        with self._lock:
            return [image for _, image in sorted(self.images.items())]

    def result(self) -> JobResult:
        """What is committed."""
        return JobResult(
            images=tuple(self.published()),
            timings={name: round(seconds, 4) for name, seconds in self.timings.items()},
            cache=dict(self.cache),
        )

    def seconds(self) -> float:
        """Since the claim."""
        return round(time.monotonic() - self._began, 3)

    @property
    def _total(self) -> int:
        return self.job.sampling.num_inference_steps * self.job.num_images
