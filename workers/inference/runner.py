"""Customize jobs from claim to commit, many at once, on one hot pipeline.

    RQ's thread   delivery ─▶ claim, read
    `prepare`     preprocess, encode, small jobs first ─▶ one run an image; a thread for each lane
    `engine`      forward after forward, each over the runs that the planner chooses ─▶ runs that have ended
    `finish`      decode, encode, publish, small jobs first ─▶ commit after a job's last image; a thread for each lane
    `scribe`      beats: progress out, cancellation in
    `end`         commits, failures and all other ends, written into the ledger

Running is at-least-once, its effect exactly-once: all that leaves this file carries the claim's token. A job is ended
by whoever takes its end first (`Work.take_end`): the last image, a failure, a cancel, or the process that leaves.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import structlog
from structlog.contextvars import bound_contextvars

from workers.artifacts import ArtifactStore
from workers.caretaker import Claim, to_hand_over
from workers.claims import ClaimedJob, Stop, StoppedError
from workers.engine import BrokenDeviceError, Engine, Forward, is_broken_device
from workers.failpoints import reach
from workers.inference.caches import MIB, Caches
from workers.inference.ends import Ends
from workers.inference.finishing import Decoder, publish_image, seed_of, show_image, wants_preview
from workers.inference.hands import Hands, survive
from workers.inference.metrics import InHand, WorkerMetrics
from workers.inference.preparation import Encoder, prepare
from workers.inference.room import Room
from workers.inference.scribe import Scribe
from workers.inference.seats import Sizes, image_of, seat_of, work_of
from workers.inference.turns import Turns
from workers.inference.works import Work
from workers.ledger import CustomizeLedger
from workers.pictures import PictureLimits
from workers.references import Purges
from workers.registry import Registry
from workers.settings import WorkerSettings
from workers.telemetry.tracing import JobTrace, Tracing

if TYPE_CHECKING:
    from model.pipeline import EncodedRequest

_LOG = structlog.stdlib.get_logger("workers.inference.runner")
_PICTURES_AHEAD = 8
"""Prepared beyond those of a full forward."""
_HEARD_S = 0.05
"""The engine waits so long for its beats to be heard. A Redis that answers is faster; one that is away costs this."""
_LOST = "the device is lost: this worker ends"
_YIELD_S = 2.0
"""What was handed over is left to idle workers for so long."""


class HotPipeline(Encoder, Decoder, Sizes, Protocol):
    """`model.pipeline.Pipeline` as a worker drives it. What passes between its phases is its own affair."""

    @property
    def num_lanes(self) -> int: ...
    def describe(self) -> dict[str, str | int | None]: ...
    def warm(self) -> None: ...
    def settle_thread(self) -> None: ...
    def start(self, encoded: EncodedRequest, seed: int, *, beside: Any = None) -> Any: ...
    def step(self, runs: Sequence[Any]) -> Sequence[Any]: ...
    def release_memory(self) -> None: ...


class JobRunner:
    """Brings claimed jobs to their ends. Its threads live from `open` to `close`."""

    def __init__(
        self,
        pipeline: HotPipeline,
        ledger: CustomizeLedger,
        store: ArtifactStore,
        settings: WorkerSettings,
        worker: str,
        metrics: WorkerMetrics | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        self.pipeline = pipeline
        self.ledger = ledger
        self.store = store
        self.settings = settings
        self.worker = worker
        self.metrics = metrics or WorkerMetrics.fresh()
        self._tracing = tracing or Tracing.off()
        self.caches = Caches(*[settings.cache_mib * MIB] * 3, adapters=settings.adapter_mib * MIB)
        self._registry = Registry(settings.adapter_root)
        self._purges = Purges(ledger.redis)
        self.broken = False
        """The device is lost: the process is to end."""
        budget = settings.budget(pipeline.num_lanes)
        self._engine = Engine(pipeline, budget)
        self._room = Room(pipeline.release_memory)
        self._works: dict[str, Work] = {}
        self._turns = Turns(_PICTURES_AHEAD + budget.runs)
        self._ready: deque[tuple[Work, int, Any]] = deque()
        self._changed = threading.Condition()
        self._leaving = self._closed = False
        self._yields_until = 0.0
        self._finishing = Hands(pipeline.num_lanes, "finish", pipeline.settle_thread)
        self._ends = Ends(store, self.metrics, self._let_go)
        self._scribe = Scribe(self.hear)
        self.metrics.watch(self._in_hand)
        self._threads = [
            *(
                threading.Thread(target=self._prepare_jobs, name="prepare", daemon=True)
                for _ in range(pipeline.num_lanes)
            ),
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
        """Whether another job may be claimed: none while one is to be alone, or idle workers are to take theirs."""
        works = list(self._works.values())
        if self._leaving or self.broken or time.monotonic() < self._yields_until:
            return False
        return len(works) < self.settings.jobs_in_hand and not any(work.alone for work in works)

    def run(self, job_id: str) -> None:
        """Claim a job and begin with it; a refused claim means that there is nothing to do.

        Raises:
            redis.exceptions.RedisError: Redis is away.
        """
        token = self.ledger.claim(job_id, self.worker, waits=True)
        if token is None:
            _LOG.info("delivery of a job that is not queued", job_id=job_id)
            return
        reach("claimed")
        claimed = ClaimedJob(self.ledger, Claim(job_id, token, time.monotonic()), self.settings.commit_patience_s)
        work = Work(claimed, self._scribe, JobTrace(self._tracing))
        with self._changed:
            for other in self._works.values():
                if other.claimed.claim.job_id == job_id:
                    other.stopped = "lost"
            self._works[work.key] = work
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

    def hear(self, claim: Claim, reason: Stop) -> None:
        """A job is not to go on, as a beat was answered: it is ended before its preparation or the next forward."""
        work = self._works.get(claim.key)
        if work is not None:
            with self._changed:
                work.stopped = reason
                self._changed.notify_all()

    def hand_over(self) -> None:
        """Other workers are idle: give them half of the jobs of which no step is made, and take none for a moment."""
        works = [work for work in list(self._works.values()) if not work.ended]
        waiting = [work for work in works if not work.begun]
        given = waiting[len(waiting) - to_hand_over(len(waiting), len(works)) :]
        if given:
            self._yields_until = time.monotonic() + _YIELD_S
            _LOG.info("jobs handed over", jobs=len(given))
            self.metrics.handed_over(len(given))
        for work in reversed(given):
            self._ends.stop(work, "leaving")

    def tidy(self) -> None:
        """Drop what was made of references that were deleted meanwhile.

        Raises:
            redis.exceptions.RedisError: Redis is away.
        """
        self._purges.pass_on(self.caches.purge)

    def close(self) -> None:
        """End what has begun within the grace, hand the rest back, end the threads."""
        self._leaving = True
        if not self.broken:
            for work in [work for work in list(self._works.values()) if not work.begun]:
                self._ends.stop(work, "leaving")
            if not self.wait(self.settings.grace_s):
                for work in list(self._works.values()):
                    self._ends.stop(work, "leaving")
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._finishing.close(wait=not self.broken)
        self._scribe.halt()
        for thread in self._threads:
            if not self.broken:
                thread.join()
        self._ends.close()

    def _let_go(self, work: Work) -> None:
        with self._changed:
            self._works.pop(work.key, None)
            self._changed.notify_all()

    def _in_hand(self) -> InHand:
        works = list(self._works.values())
        waiting = sum(not work.at_work for work in works)
        return InHand(waiting, len(works) - waiting, len(self._engine), self._engine.sheds, self.caches.counts())

    def _read(self, work: Work) -> None:
        work.accept(work.claimed.read(), self.ledger.max_attempts)
        with self._changed:
            self._turns.add(work)
            self._changed.notify_all()

    # In the threads `prepare`.

    def _prepare_jobs(self) -> None:
        self.pipeline.settle_thread()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self.broken or self._next_work())
                work = self._next_work()
                if self._closed or self.broken or work is None:
                    return
                self._turns.take(work)
            survive(partial(self._guarded, work, self._prepare))

    def _next_work(self) -> Work | None:
        return self._turns.next([work for work in self._works.values() if work.at_work])

    def _prepare(self, work: Work) -> None:
        work.check()
        work.claimed.begin()
        job = work.job
        prepared = self._room.try_twice(
            lambda: prepare(
                job, self.pipeline, self.store, self.caches, PictureLimits(), work.tell_phase, self._registry
            )
        )
        work.timings |= prepared.timings
        work.cache |= prepared.used
        work.tell_phase("denoise")
        self._scribe.settle(_HEARD_S)
        work.check()
        run = None
        for number in range(job.num_images):
            seed = seed_of(work, number)
            run = self._room.try_twice(partial(self.pipeline.start, prepared.encoded, seed, beside=run))
            with self._changed:
                work.ready = True
                self._ready.append((work, number, run))
                self._changed.notify_all()

    # In the thread `engine`.

    def _run(self) -> None:
        try:
            while self._wait_for_runs():
                self._account(self._forward())
                self._scribe.settle(_HEARD_S)
        except BrokenDeviceError as error:
            self._break(_LOST, str(error))
        except Exception as error:  # noqa: BLE001 - without this thread the process would hold jobs for nothing
            self._break("the engine has failed: this worker ends", type(error).__name__)

    def _forward(self) -> Forward:
        with self._room.forward():
            return self._engine.forward(brief=self._somebody_is_coming())

    def _wait_for_runs(self) -> bool:
        """Let in what is ready and drop what has ended; False when closed, or the device is lost."""
        with self._changed:
            self._changed.wait_for(lambda: self._ready or len(self._engine) or self._closed or self.broken)
            ready, self._ready = list(self._ready), deque()
            closed = self._closed or self.broken
        for work, number, run in ready:
            if not work.ended:
                self._engine.add(seat_of(work, number, run, self.pipeline), run)
        for key in self._engine.running():
            work = self._works.get(work_of(key))
            if work is None or work.ended:
                self._engine.drop(key)
            elif work.stop is not None:
                self._ends.stop(work, work.stop)
                self._engine.drop(key)
        return not closed

    def _somebody_is_coming(self) -> bool:
        """Whether a job that goes before all in the engine is being prepared, and not for longer than waiting pays.

        A long forward would hold it up as it begins; while it is awaited short ones do, and waste little.
        """
        works = list(self._works.values())
        first = min((work.place for work in works if work.ready), default=None)
        since = time.monotonic() - 2 * self._engine.usual_s
        coming = (work for work in works if work.at_work and not work.ready and not work.ended)
        return first is not None and any(work.place < first and work.turn_at > since for work in coming)

    def _account(self, forward: Forward) -> None:
        """Progress, images that have all their steps, and failures."""
        self.metrics.forward(forward)
        now = time.monotonic()
        for claim in self.claims:
            claim.moved_at = now  # Who waits for a turn is as alive as who has it.
        moved = Counter(work_of(key) for key in forward.moved)
        for key, steps in moved.items():
            if (work := self._works.get(key)) is not None and not work.ended:
                work.step(steps, forward.seconds)
        for key, run in forward.moved.items():
            work = self._works.get(work_of(key))
            if work is None:
                continue
            act: Callable[[Work], None] | None = None
            if run.done:
                act = partial(self._finish, key=key, run=run)
            elif wants_preview(work, image_of(key), run):
                act = partial(self._show, run=run)
            if act is not None:
                self._finishing.put(work.place, partial(self._guarded, work, act))
        for key, error in forward.failed.items():
            work = self._works.get(work_of(key))
            if work is not None:
                self._give_up(work, error)

    # In the threads `finish`.

    def _finish(self, work: Work, key: str, run: Any) -> None:
        """Decode and publish an image, and commit after the last one."""
        if work.denoised:
            work.tell_phase("decode")
        self._room.try_twice(lambda: publish_image(work, image_of(key), run, self.pipeline, self.store))
        if len(work.published()) == work.job.num_images:
            self._scribe.settle(_HEARD_S)
            work.check()
            self._ends.succeed(work)

    def _show(self, work: Work, run: Any) -> None:
        self._room.try_twice(lambda: show_image(work, run, self.pipeline))

    # In any thread.

    def _guarded(self, work: Work, act: Callable[[Work], None]) -> None:
        """The outermost shell of what the pools do for a job: nothing may pass it unrecorded."""
        with bound_contextvars(**work.ids):
            try:
                if not work.ended:
                    act(work)
            except StoppedError as stopped:
                self._ends.stop(work, stopped.reason)
            except Exception as error:  # noqa: BLE001
                self._give_up(work, error)

    def _give_up(self, work: Work, error: Exception) -> None:
        """A job fails by an error, but for a device that is lost: that is no job's failure, so leases lapse."""
        if is_broken_device(error):
            self._break(_LOST, type(error).__name__)
        elif not self.broken:  # what fails after that may have failed by that
            self._ends.fail(work, error)

    def _break(self, event: str, exception: str) -> None:
        """This process can make nothing any more; said once."""
        with self._changed:
            if not self.broken:
                _LOG.critical(event, exception=exception)
            self.broken = True
            self._changed.notify_all()
