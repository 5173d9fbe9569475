"""The training worker process: takes trainings from the queue, one after the other, and publishes what they make.

    python -m workers.training.worker [--burst]

A training's checkpoints lie under its own id, so a training that lost its worker goes on where it was, on this
worker or another that shares the state directory. SIGTERM ends the step at hand, writes a checkpoint and gives the
training back to the queue. Exit codes: 0 stopped, or with `--burst` all done; 2 the configuration does not fit.
"""

from __future__ import annotations

import argparse
import gc
import math
import shutil
import sys
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, cast

import redis
import structlog
from pydantic import ValidationError
from structlog.contextvars import bound_contextvars

from model.errors import ModelError
from workers import queues
from workers.books.values import Look
from workers.caretaker import Claim
from workers.claims import ClaimedJob, End, Stop, StoppedError
from workers.jobs import TRAINING, JobError, TrainingJob, TrainingProgress, TrainingResult
from workers.ledger import DamagedRecordError, TrainingLedger, open_ledger
from workers.process import ConfigurationError, Station, WorkerProcess, find_url, refuse, run_delivered
from workers.registry import Registry, RegistryError
from workers.settings import TrainingSettings, describe_bad_settings
from workers.telemetry.logs import configure_logging
from workers.telemetry.tracing import JobTrace, Tracing, open_tracing
from workers.training.export import ExportError
from workers.training.failures import BrokenStepError, OtherRunError
from workers.training.metrics import TrainingMetrics
from workers.training.recipes import Recipe, RecipeError
from workers.training.reports import StepReport
from workers.training.snapshots import SnapshotError
from workers.training.start import prepare
from workers.training.storage import StorageError
from workers.training.trainer import Trainer

_LOG = structlog.stdlib.get_logger("workers.training")
_TELL_EVERY_S: Final = 0.5
"""Progress and cancellation travel this often, however short the steps."""
_ABANDONED_S: Final = 30 * 86_400.0


def train(job_id: str) -> None:
    """Run one training: the only function that a delivery can name."""
    run_delivered(job_id)


@dataclass(slots=True)
class TrainingRunner:
    """Runs claimed trainings. `claim` is the one in hand."""

    client: redis.Redis
    ledger: TrainingLedger
    registry: Registry
    settings: TrainingSettings
    worker: str
    metrics: TrainingMetrics = field(default_factory=TrainingMetrics.fresh)
    tracing: Tracing = field(default_factory=Tracing.off)
    claim: Claim | None = None
    leaving: bool = False

    def run(self, job_id: str) -> None:
        """Claim a training and bring it to an end, or back to the queue if the process is to leave.

        A refused claim means that there is nothing to do.

        Raises:
            redis.exceptions.RedisError: Redis was away for longer than a finished training may wait. The lease
                lapses, and the training goes on from its last checkpoint.
        """
        token = self.ledger.claim(job_id, self.worker)
        if token is None:
            _LOG.info("delivery of a training that is not queued", job_id=job_id)
            return
        began = time.monotonic()
        self.claim = Claim(job_id, token, began)
        self.metrics.began()
        end: End = "lost"
        try:
            claimed = ClaimedJob(self.ledger, self.claim, self.settings.commit_patience_s)
            end = _Attempt(self, claimed, JobTrace(self.tracing)).run()
        finally:
            self.claim = None
            self.metrics.ended(end)
            gc.collect()  # the trained model goes before the next is loaded
        _LOG.info("training ended", job_id=job_id, state=end, seconds=round(time.monotonic() - began, 3))

    @property
    def claims(self) -> list[Claim]:
        """The training in hand, if any."""
        return [] if self.claim is None else [self.claim]

    @property
    def broken(self) -> bool:
        """A training that fails takes nothing with it."""
        return False

    def wait_for_room(self, timeout_s: float) -> bool:  # noqa: ARG002
        """A delivery is taken only after the training before it has ended."""
        return True

    def wait(self) -> None:
        """Nothing goes on between deliveries."""

    def hear(self, claim: Claim, reason: Stop) -> None:
        """The training's own beats tell it soon enough."""

    def hand_over(self) -> None:
        """The training in hand has begun."""

    def tidy(self) -> None:
        """Nothing is kept between trainings."""

    def stop(self) -> None:
        """The step at hand is the last one here."""
        self.leaving = True

    def close(self) -> None:
        """The training has been handed back already."""


@dataclass(slots=True)
class _Attempt:
    """One claim's walk: prepare, resume, train, export, publish, commit."""

    runner: TrainingRunner
    claimed: ClaimedJob[TrainingJob, TrainingProgress, TrainingResult]
    trace: JobTrace
    trainer: Trainer | None = None
    stopped: Stop | None = None
    progress: TrainingProgress | None = None
    losses: dict[str, float] = field(default_factory=dict[str, float])
    told_at: float = 0.0
    stepped_at: float = 0.0
    pace: float = 0.0

    def run(self) -> End:
        """Train and write the end into the ledger; checkpoints stay where somebody may go on from them."""
        end: End = "lost"
        try:
            end = self.claimed.end(self._work, training_error)
        finally:
            self.trace.end(end)
        if end == "leaving":
            queues.ring_again(self.runner.client, TRAINING, self.claimed.claim.job_id)
        elif end != "lost":
            shutil.rmtree(self._directory, ignore_errors=True)
        return end

    def _work(self) -> TrainingResult:
        """What there is to do before the end is written, in its trace, its lines in the log under its request."""
        record = self.claimed.read()
        self.trace.begin(record)
        self.trace.phase("prepare")
        try:
            with bound_contextvars(job_id=record.job.id, request_id=record.job.request_id):
                return self._make(record.job)
        finally:
            self.trace.phase("commit")

    def _make(self, job: TrainingJob) -> TrainingResult:
        recipe = recipe_of(job, self.runner.settings)
        self.trainer = prepare(recipe, self._directory, self._on_step)
        if self.trainer.resume():
            _LOG.info("training goes on", step=self.trainer.step)
        if self.runner.leaving:
            self._stop("leaving")
        stage, _ = recipe.at(min(self.trainer.step, recipe.steps - 1))
        self.progress = TrainingProgress(stage.name, self.trainer.step, recipe.steps, {}, 0.0, 0.0)
        self._tell()
        self.trace.phase("train")
        whole = self.trainer.run()
        self.trace.note(steps=self.trainer.step)
        if not whole:
            raise StoppedError(self.stopped or "lost")
        self._refuse_if_stopped()
        self.trace.phase("publish")
        exported = self.trainer.export()
        self._tell()
        self._refuse_if_stopped()
        adapter = self.runner.registry.of(job.tenant).publish(job.adapter, exported.directory)
        return TrainingResult(adapter.name, adapter.version, self.trainer.step, self.losses)

    def _on_step(self, report: StepReport) -> None:
        now = time.monotonic()
        self.claimed.claim.moved_at = now
        seconds = now - self.stepped_at if self.stepped_at else None
        self.runner.metrics.step(report.samples, seconds)
        if seconds is not None:
            self.pace = seconds if self.pace == 0 else 0.9 * self.pace + 0.1 * seconds
        self.stepped_at = now
        self.losses = {name: value for name, value in report.losses.items() if not math.isnan(value)}
        if self.runner.leaving:
            self._stop("leaving")
        speed = report.samples / self.pace if self.pace else 0.0
        place = (report.stage, report.step, report.total_steps)
        self.progress = TrainingProgress(*place, self.losses, round(speed, 2), round(self.pace, 4))
        if now - self.told_at >= _TELL_EVERY_S:
            self._tell()

    def _tell(self) -> None:
        self.told_at = time.monotonic()
        answer = self.claimed.beat(cast("TrainingProgress", self.progress))
        if answer != "ok":
            self._stop(answer)

    def _refuse_if_stopped(self) -> None:
        """What ends a training does so after its last step too. A worker that leaves finishes what is trained."""
        if self.stopped not in (None, "leaving"):
            raise StoppedError(self.stopped)

    def _stop(self, reason: Stop) -> None:
        self.stopped = reason
        cast("Trainer", self.trainer).stop.set()

    @property
    def _directory(self) -> Path:
        return self.runner.settings.run_root / self.claimed.claim.job_id


def recipe_of(job: TrainingJob, settings: TrainingSettings) -> Recipe:
    """The job's recipe, on this worker's base model and, if it names one, its dataset.

    Raises:
        RecipeError: it is no recipe, or the dataset is not there.
    """
    try:
        recipe = Recipe.model_validate(job.recipe)
    except ValidationError:
        raise RecipeError("the recipe of this training is not one this version knows: submit it again") from None
    dataset = None if job.dataset is None else settings.dataset_root / job.dataset
    if dataset is not None and not dataset.is_dir():
        raise RecipeError(f"there is no dataset {job.dataset!r} on the training worker")
    return recipe.with_overrides(base=settings.base_model, data=dataset)


def training_error(error: Exception) -> JobError:
    """What the caller may know of a failure. Paths of the server stay in its log."""
    match error:
        case ModelError() | RegistryError():
            return JobError(error.code, error.message, retryable=error.code == "storage_unavailable")
        case BrokenStepError():
            return JobError("training_failed", f"{error.reason}: submit it with a lower learning rate or batch.")
        case RecipeError():
            _LOG.warning("recipe refused", reason=str(error))
        case _:
            pass
    return _KNOWN.get(type(error)) or JobError("internal", f"The worker failed with {type(error).__name__}.")


_STORAGE: Final = JobError(
    "storage_unavailable", "The training's files cannot be written or read: make room and try again.", retryable=True
)
_KNOWN: Mapping[type[Exception], JobError] = {
    RecipeError: JobError(
        "training_data",
        "The recipe does not fit the base model or the dataset: run `dreamserve dataset check` on the dataset, "
        "and `dreamserve train --dry-run` with the recipe.",
    ),
    SnapshotError: _STORAGE,
    StorageError: _STORAGE,
    ExportError: JobError(
        "training_targets", "The trained modules have no place in the released format: use lora.targets released."
    ),
    OtherRunError: JobError(
        "training_data",
        "The server's base model, dataset or version has changed since this training began: submit it again.",
    ),
    DamagedRecordError: JobError("internal", "The training's record is damaged: submit it again."),
}


def run_worker(settings: TrainingSettings, *, burst: bool = False) -> int:
    """Run a training worker until it is stopped.

    Returns:
        The exit code.
    """
    configure_logging(settings.log_level)
    metrics, tracing = TrainingMetrics.fresh(), open_tracing("training-worker")
    try:
        station = open_station(settings)
        WorkerProcess(station, {"base_model": Path(settings.base_model).name}, settings, metrics.registry).run(
            lambda name: _runner(settings, station, name, metrics, tracing), burst=burst
        )
    except ConfigurationError as error:
        return refuse(str(error), "training-worker")
    finally:
        tracing.flush()
    return 0


def open_station(settings: TrainingSettings) -> Station:
    """Where a training worker works.

    Raises:
        ConfigurationError: no Redis, or a URL that is none.
    """
    return Station(
        find_url(settings),
        TRAINING,
        lambda client: open_ledger(client, TRAINING, settings, max_attempts=settings.max_attempts),
        settings.stall_s,
        lambda ledger: sweep_runs(settings.run_root, ended_in(settings.run_root, ledger)),
    )


def ended_in(root: Path, ledger: TrainingLedger) -> set[str]:
    """Names of runs whose training the ledger knows to have ended, wherever it was: in the queue, by the caretaker.

    Raises:
        redis.exceptions.RedisError: Redis is away.
    """
    names = [run.name for run in root.glob("*")]
    looks = zip(names, ledger.look(names), strict=True)
    return {name for name, look in looks if not isinstance(look, DamagedRecordError) and _ended(look)}


def _ended(look: Look[TrainingJob, TrainingProgress, TrainingResult]) -> bool:
    return look.gone is not None if look.record is None else look.record.status.terminal


def sweep_runs(root: Path, ended: Collection[str] = (), max_age_s: float = _ABANDONED_S) -> None:
    """Remove the checkpoints of trainings that have ended, and of those that nobody has worked on for a month."""
    now = time.time()
    for run in root.glob("*"):
        if run.name in ended:
            shutil.rmtree(run, ignore_errors=True)
            continue
        try:
            worked_on = max(path.lstat().st_mtime for path in (run, *run.rglob("*")))
        except OSError:
            continue  # somebody works on it, or has swept it
        if now - worked_on > max_age_s:
            shutil.rmtree(run, ignore_errors=True)


def _runner(
    settings: TrainingSettings, station: Station, name: str, metrics: TrainingMetrics, tracing: Tracing
) -> tuple[TrainingRunner, dict[str, Any]]:
    client = station.connect()
    ledger = station.open_ledger(client)
    return TrainingRunner(client, ledger, Registry(settings.adapter_root), settings, name, metrics, tracing), {}


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m workers.training.worker", description="Run trainings.")
    parser.add_argument("--burst", action="store_true", help="end when no training is left")
    burst: bool = parser.parse_args(arguments).burst
    try:
        settings = TrainingSettings()
    except ValidationError as error:
        return refuse(describe_bad_settings(error), "training-worker")
    return run_worker(settings, burst=burst)


if __name__ == "__main__":
    # RQ imports this module by name to find `train`: what runs must be that module, not a second copy.
    from workers.training.worker import main as _main

    sys.exit(_main())
