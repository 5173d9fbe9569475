"""Customize jobs from claim to commit, many at once, on one hot pipeline.

    RQ's thread   delivery ─▶ claim, read
    `prepare`     preprocess, encode, small jobs first ─▶ one run an image
    `engine`      forward after forward, each over the runs that the planner chooses ─▶ runs that have ended
    `finish`      decode, encode, publish ─▶ commit after a job's last image
    `scribe`      beats: progress out, cancellation in

Running is at-least-once, its effect exactly-once: all that leaves this file carries the claim's token. A job is ended
by whoever takes its end first (`Work.take_end`): the last image, a failure, a cancel, or the process that leaves.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from heapq import heappop, heappush
from itertools import count
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import structlog
from numpy.typing import NDArray
from redis.exceptions import RedisError

from workers import pictures, queues
from workers.artifacts import ArtifactStore
from workers.caretaker import Claim
from workers.claims import ClaimedJob, End, Stop, StoppedError
from workers.engine import BrokenDeviceError, Engine, Forward
from workers.failpoints import reach
from workers.inference.caches import MIB, Caches
from workers.inference.failures import job_error
from workers.inference.preparation import Encoder, prepare
from workers.inference.scribe import Scribe
from workers.inference.works import Work
from workers.jobs import CUSTOMIZE, ImageArtifact
from workers.ledger import CustomizeLedger
from workers.pictures import PictureLimits
from workers.planner import Budget, Seat
from workers.settings import WorkerSettings

if TYPE_CHECKING:
    from model.pipeline import EncodedRequest

SEEDS = 2**64
_LOG = structlog.stdlib.get_logger("workers.inference.runner")
_FORWARDS_AHEAD = 2
_HEARD_S = 0.05
"""The engine waits so long for its beats to be heard. A Redis that answers is faster; one that is away costs this."""


class HotPipeline(Encoder, Protocol):
    """`model.pipeline.Pipeline` as a worker drives it. What passes between its phases is its own affair."""

    def describe(self) -> dict[str, str | int]: ...
    def warm(self) -> None: ...
    def start(self, encoded: EncodedRequest, seed: int) -> Any: ...
    def num_tokens(self, run: Any) -> int: ...
    def step(self, runs: Sequence[Any]) -> Sequence[Any]: ...
    def release_memory(self) -> None: ...
    def decode(self, run: Any) -> NDArray[np.uint8]: ...


class JobRunner:
    """Brings claimed jobs to their ends. Its threads live from `open` to `close`."""

    def __init__(
        self,
        pipeline: HotPipeline,
        ledger: CustomizeLedger,
        store: ArtifactStore,
        settings: WorkerSettings,
        worker: str,
    ) -> None:
        self.pipeline = pipeline
        self.ledger = ledger
        self.store = store
        self.settings = settings
        self.worker = worker
        self.caches = Caches(*[settings.cache_mib * MIB] * 3)
        self.broken = False
        """The device is lost: the process is to end."""
        budget = Budget(settings.forward_tokens, settings.forward_runs, settings.interactive_share)
        self._engine = Engine(pipeline, budget)
        self._works: dict[str, Work] = {}
        self._unprepared: list[Work] = []
        self._ready: deque[tuple[Work, int, Any]] = deque()
        self._numbers = count()
        self._changed = threading.Condition()
        self._leaving = self._closed = False
        self._finishing = ThreadPoolExecutor(1, "finish")
        self._scribe = Scribe(self._stop_later)
        self._threads = [
            threading.Thread(target=self._prepare_jobs, name="prepare", daemon=True),
            threading.Thread(target=self._run, name="engine", daemon=True),
            self._scribe,
        ]
        for thread in self._threads:
            thread.start()

    # For the process.

    @property
    def claims(self) -> list[Claim]:
        """The jobs in hand."""
        return [work.claimed.claim for work in list(self._works.values())]

    @property
    def has_room(self) -> bool:
        """Whether another job may be claimed."""
        return not (self._leaving or self.broken) and len(self._works) < self.settings.jobs_in_hand

    def run(self, job_id: str) -> None:
        """Claim a job and begin with it; a refused claim means that there is nothing to do.

        Raises:
            redis.exceptions.RedisError: Redis is away.
        """
        token = self.ledger.claim(job_id, self.worker)
        if token is None:
            _LOG.info("delivery of a job that is not queued", job_id=job_id)
            return
        reach("claimed")
        claimed = ClaimedJob(self.ledger, Claim(job_id, token, time.monotonic()), self.settings.commit_patience_s)
        work = Work(claimed, self._scribe)
        with self._changed:
            self._works[job_id] = work
        self._guarded(work, self._read)

    def stop(self) -> None:
        """No job is claimed any more. For a signal handler: it takes no lock."""
        self._leaving = True

    def wait_for_room(self, timeout_s: float) -> bool:
        """Whether another job may be claimed, now or within this time."""
        with self._changed:
            return self._changed.wait_for(lambda: self.has_room, timeout_s)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Until no job is in hand; False if that takes longer, or the device breaks."""
        with self._changed:
            self._changed.wait_for(lambda: not self._works or self.broken, timeout_s)
            return not self._works

    def close(self) -> None:
        """End what has begun within the grace, hand the rest back, end the threads."""
        self._leaving = True
        if not self.broken:
            for work in [work for work in list(self._works.values()) if not work.begun]:
                self._end_early(work, "leaving")
            if not self.wait(self.settings.grace_s):
                for work in list(self._works.values()):
                    self._end_early(work, "leaving")
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._finishing.shutdown(wait=not self.broken, cancel_futures=True)
        self._scribe.halt()
        for thread in self._threads:
            if not self.broken:
                thread.join()

    def _read(self, work: Work) -> None:
        job = work.claimed.read()
        with self._changed:
            work.accept(job, next(self._numbers))
            heappush(self._unprepared, work)
            self._changed.notify_all()

    # In the thread `prepare`.

    def _prepare_jobs(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._is_wanted())
                if self._closed:
                    return
                work = heappop(self._unprepared)
                work.prepared = True
            self._guarded(work, self._prepare)

    def _is_wanted(self) -> bool:
        """Whether to prepare a job now: if there is little for the next forwards, or one that goes before some of it.

        What is prepared too early only takes memory, and the device from those who are being denoised.
        """
        if not self._unprepared:
            return False
        prepared = [work.place for work in self._works.values() if work.prepared]
        return len(prepared) < _FORWARDS_AHEAD * self.settings.forward_runs or self._unprepared[0].place < max(prepared)

    def _prepare(self, work: Work) -> None:
        job = work.job
        prepared = prepare(job, self.pipeline, self.store, self.caches, PictureLimits(), work.tell_phase)
        work.timings |= prepared.timings
        work.cache |= prepared.used
        work.tell_phase("denoise")
        self._scribe.settle(_HEARD_S)
        work.check()
        for number in range(job.num_images):
            run = self.pipeline.start(prepared.encoded, (job.sampling.seed + number) % SEEDS)
            with self._changed:
                self._ready.append((work, number, run))
                self._changed.notify_all()

    # In the thread `engine`.

    def _run(self) -> None:
        try:
            while self._wait_for_runs():
                self._account(self._engine.forward())
                self._scribe.settle(_HEARD_S)
        except BrokenDeviceError as error:
            _LOG.critical("the device is lost: this worker ends", exception=str(error))
            self._break()
        except Exception as error:  # noqa: BLE001 - without this thread the process would hold jobs for nothing
            _LOG.critical("the engine has failed: this worker ends", exception=type(error).__name__)
            self._break()

    def _break(self) -> None:
        with self._changed:
            self.broken = True
            self._changed.notify_all()

    def _wait_for_runs(self) -> bool:
        """Let in what is ready and drop what has ended; False when closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._ready or len(self._engine) or self._closed)
            ready, self._ready = list(self._ready), deque()
            closed = self._closed
        for work, number, run in ready:
            if not work.ended:
                self._engine.add(self._seat(work, number, run), run)
        for key in self._engine.running():
            work = self._works.get(job_of(key))
            if work is None or work.ended:
                self._engine.drop(key)
            elif work.stopped is not None:
                self._end_early(work, work.stopped)
                self._engine.drop(key)
        return not closed

    def _seat(self, work: Work, number: int, run: Any) -> Seat:
        return Seat(
            key=f"{work.job.id}/{number}",
            tokens=self.pipeline.num_tokens(run),
            steps=run.num_steps - run.step,
            waiting_since=time.monotonic(),
            tenant=work.job.tenant,
            interactive=work.job.priority == "interactive",
            size=self.pipeline.num_tokens(run) * run.num_steps,
        )

    def _account(self, forward: Forward) -> None:
        """Progress, images that have all their steps, and failures."""
        now = time.monotonic()
        for claim in self.claims:
            claim.moved_at = now  # Who waits for a turn is as alive as who has it.
        moved = Counter(job_of(key) for key in forward.moved)
        for job_id, steps in moved.items():
            if (work := self._works.get(job_id)) is not None and not work.ended:
                work.step(steps, forward.seconds)
        for key, run in forward.moved.items():
            work = self._works.get(job_of(key))
            if run.done and work is not None:
                self._finishing.submit(self._guarded, work, partial(self._finish, key=key, run=run))
        for key, error in forward.failed.items():
            work = self._works.get(job_of(key))
            if work is not None:
                self._fail(work, error)

    # In the thread `finish`.

    def _finish(self, work: Work, key: str, run: Any) -> None:
        """Decode and publish an image, and commit after the last one."""
        job, number = work.job, int(key.rpartition("/")[2])
        if work.denoised:
            work.tell_phase("decode")
        began = time.perf_counter()
        pixels = self.pipeline.decode(run)
        data = pictures.encode(pixels, job.output_format)
        name = f"{job.id}.{work.claimed.claim.token}.{number}.{job.output_format}"
        height, width, _ = pixels.shape
        work.images[number] = ImageArtifact(
            name=name,
            sha256=self.store.publish(name, data),
            media_type=pictures.media_type(job.output_format),
            width=width,
            height=height,
            size=len(data),
            seed=(job.sampling.seed + number) % SEEDS,
        )
        work.spend("decode_s", time.perf_counter() - began)
        if len(work.images) == job.num_images:
            self._scribe.settle(_HEARD_S)
            work.check()
            self._end(work, lambda: work.claimed.succeed(work.result()))

    # Ends, in any thread.

    def _guarded(self, work: Work, act: Callable[[Work], None]) -> None:
        """The outermost shell of what the pools do for a job: nothing may pass it unrecorded."""
        try:
            if not work.ended:
                act(work)
        except StoppedError as stopped:
            self._end_early(work, stopped.reason)
        except Exception as error:  # noqa: BLE001
            self._fail(work, error)

    def _fail(self, work: Work, error: Exception) -> None:
        self._end(work, lambda: work.claimed.fail(error, job_error))

    def _end_early(self, work: Work, reason: Stop) -> None:
        end = self._end(work, lambda: work.claimed.stop(reason))
        if end == "leaving":
            with suppress(RedisError):  # Another worker's caretaker finds a job that waits without a delivery.
                queues.ring_again(self.ledger.redis, CUSTOMIZE, work.claimed.claim.job_id)

    def _stop_later(self, job_id: str, reason: Stop) -> None:
        """The scribe has heard that a job is not to go on: the engine ends it before the next forward."""
        work = self._works.get(job_id)
        if work is not None:
            work.stopped = reason

    def _end(self, work: Work, write: Callable[[], End]) -> End | None:
        """End a job once; only one that succeeds keeps its pictures. None if it had ended or could not be written."""
        if not work.take_end():
            return None
        end: End | None = None
        job_id = work.claimed.claim.job_id
        try:
            end = write()
        except RedisError as error:  # The lease lapses, and the job is run again.
            _LOG.warning("redis was away for too long", job_id=job_id, exception=type(error).__name__)
        if end != "succeeded":
            for image in work.images.values():
                self.store.discard(image.name)
        with self._changed:
            self._works.pop(job_id, None)
            self._changed.notify_all()
        if end is not None:
            _LOG.info("job ended", job_id=job_id, state=end, seconds=work.seconds())
        return end


def job_of(key: str) -> str:
    """The job of a seat's key."""
    return key.rpartition("/")[0]
