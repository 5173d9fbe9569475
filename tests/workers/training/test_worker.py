"""The training worker: what it trains survives kills, signals and cancellation, and is published exactly once."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import redis
import torch
from safetensors.torch import load_file

from model.weights.checkpoints import SHIPPED
from model.weights.fingerprints import fingerprint_of
from tests.churning import churning, plain_walk_fails
from tests.waiting import wait_for
from workers import queues
from workers.jobs import TRAINING, JobStatus, TrainingJob, TrainingProgress, TrainingRecord
from workers.ledger import Ledger, TrainingLedger
from workers.redis_process import RedisProcess
from workers.registry import Registry
from workers.settings import TrainingSettings
from workers.training import worker
from workers.training.recipes import load_recipe
from workers.training.trainer import Trainer
from workers.training.worker import TrainingRunner, open_station, sweep_runs

LEASE_S = 2.5
SMALL = {
    "save_every": 1,
    "lora": {"rank": 2},
    "stages": {
        "warm-up": {"steps": 4, "batch": 1},
        "all-tasks": {"steps": 4, "batch": 1},
        "quality": {"steps": 2, "batch": 1},
    },
}
STEPS = 10


@dataclass(frozen=True)
class Yard:
    """One Redis and one state directory, and the hands to submit and to work."""

    url: str
    home: Path
    client: redis.Redis
    ledger: TrainingLedger

    @property
    def registry(self) -> Registry:
        return Registry(self.home / "adapters")

    def submit(self, name: str = "one", **overrides: Any) -> str:
        recipe = load_recipe("sticker-adapter").changed(SMALL | overrides)
        job = TrainingJob(f"train_{name}", "stickers", recipe.model_dump(mode="json"))
        assert self.ledger.accept(job).outcome == "new"
        queues.ring(self.client, TRAINING, job.id)
        return job.id

    def record(self, job_id: str) -> TrainingRecord:
        record = self.ledger.get(job_id)
        assert record is not None
        return record

    def runner(self, **changes: Any) -> TrainingRunner:
        settings = TrainingSettings(redis_url=self.url, state_dir=self.home, lease_s=60.0, **changes)
        return TrainingRunner(self.client, self.ledger, self.registry, settings, "in-process")

    def step(self, job_id: str) -> int:
        progress = self.record(job_id).progress
        return progress.step if progress else 0

    def saved(self, job_id: str) -> int:
        """The newest checkpoint's step; 0 without one."""
        names = [path.name for path in (self.home / "trainings" / job_id / "checkpoints").glob("step-*")]
        return max((int(name.partition("-")[2]) for name in names), default=0)


@pytest.fixture
def yard(server: RedisProcess, client: redis.Redis, tmp_path: Path) -> Yard:
    return Yard(server.url, tmp_path, client, Ledger(client, TRAINING, lease_s=60.0, max_attempts=10))


@pytest.fixture
def spawn(yard: Yard) -> Iterator[Callable[[], subprocess.Popen[bytes]]]:
    """Start worker processes with a short lease; none survives the test."""
    processes: list[subprocess.Popen[bytes]] = []

    def start() -> subprocess.Popen[bytes]:
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("DREAMSERVE_")},
            "DREAMSERVE_REDIS_URL": yard.url,
            "DREAMSERVE_STATE_DIR": str(yard.home),
            "DREAMSERVE_LEASE_S": str(LEASE_S),
            "OMP_NUM_THREADS": "1",
        }
        with (yard.home / "worker.log").open("ab") as log:
            command = [sys.executable, "-m", "workers.training.worker"]
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Sums depend on how they are split: as many threads here as in the processes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_five_kills_change_nothing(yard: Yard, spawn: Callable[[], subprocess.Popen[bytes]]) -> None:
    """Killed at five random steps, the training ends with the losses and the very file of an undisturbed one."""
    calm = yard.submit("calm")
    yard.runner().run(calm)
    wanted = yard.record(calm).result
    assert wanted is not None and wanted.steps == STEPS
    queues.acknowledge(yard.client, TRAINING, calm)
    version = yard.registry.find("stickers").version
    job = yard.submit("stormy")
    random.seed(2024)
    for kill_at in sorted(random.sample(range(1, STEPS), 5)):
        process = spawn()
        wait_for(lambda at=kill_at: yard.saved(job) >= at, f"step {kill_at}")
        process.kill()
        process.wait()
    spawn()
    wait_for(lambda: yard.record(job).status.terminal, "the end")
    record = yard.record(job)
    assert record.status is JobStatus.SUCCEEDED, record.error
    assert record.attempt == 6, "each kill is one attempt"
    assert record.result == wanted
    assert [adapter.version for adapter in yard.registry.versions()] == [version], "the same bytes, published once"
    wait_for(lambda: not (yard.home / "trainings" / job).exists(), "its checkpoints to be cleared away")


def test_sigterm_hands_the_training_on(yard: Yard, spawn: Callable[[], subprocess.Popen[bytes]]) -> None:
    """A worker that is asked to leave gives the training back with a checkpoint; no attempt is charged."""
    job = yard.submit(stages={**SMALL["stages"], "all-tasks": {"steps": 400, "batch": 1}})  # type: ignore[dict-item]  # a test's literal
    process = spawn()
    wait_for(lambda: yard.step(job) >= 2, "some steps")
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 0
    record = yard.record(job)
    assert (record.status, record.attempt) == (JobStatus.QUEUED, 1)
    assert queues.queue(yard.client, TRAINING).get_job_ids() == [job]
    assert yard.saved(job) >= 2
    spawn()
    before = yard.saved(job)
    wait_for(lambda: yard.step(job) > before, "more steps")
    yard.ledger.cancel(job)
    wait_for(lambda: yard.record(job).status.terminal, "the end")
    assert yard.record(job).status is JobStatus.CANCELED
    wait_for(lambda: not (yard.home / "trainings" / job).exists(), "its checkpoints to be cleared away")
    assert yard.registry.versions() == []


def test_a_lost_worker_publishes_but_commits_nothing(yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker whose lease lapsed finds out at its next word, stops, and leaves the training to others."""
    job = yard.submit()
    runner = yard.runner()
    taken: list[str] = []

    def lapse_and_beat(*arguments: Any) -> Any:
        hasty = Ledger(yard.client, TRAINING, lease_s=0.0, max_attempts=10)
        answer = hasty.beat(*arguments)
        taken.extend(hasty.reap())
        return answer if not taken else "lost"

    monkeypatch.setattr(runner.ledger, "beat", lapse_and_beat)
    runner.run(job)
    assert taken == [job]
    record = yard.record(job)
    assert (record.status, record.attempt, record.result) == (JobStatus.QUEUED, 2, None)


@pytest.mark.parametrize("late", ["last step", "export"])
@pytest.mark.parametrize("heard", ["canceled", "lost"])
def test_what_ends_a_training_does_so_after_its_last_step_too(
    yard: Yard, monkeypatch: pytest.MonkeyPatch, late: str, heard: str
) -> None:
    """A cancel, or a lease that lapsed, which is heard of at the last step or while the adapter is written: nothing
    is published."""
    monkeypatch.setattr(worker, "_TELL_EVERY_S", 0.0)
    job = yard.submit()
    runner = yard.runner()
    beat, export = runner.ledger.beat, Trainer.export
    exported: list[str] = []

    def beat_late(job_id: str, token: int, progress: TrainingProgress, preview: bytes | None = None) -> Any:
        due = progress.step == STEPS and (late == "last step" or exported)
        if due and heard == "canceled":
            yard.ledger.cancel(job)
        return "lost" if due and heard == "lost" else beat(job_id, token, progress, preview)

    def export_and_note(trainer: Trainer) -> Any:
        exported.append("done")
        return export(trainer)

    monkeypatch.setattr(runner.ledger, "beat", beat_late)
    monkeypatch.setattr(Trainer, "export", export_and_note)
    runner.run(job)
    assert bool(exported) == (late == "export")
    assert yard.registry.versions() == []
    assert yard.record(job).status is (JobStatus.CANCELED if heard == "canceled" else JobStatus.RUNNING)


def test_a_worker_that_leaves_at_the_last_step_publishes(yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    """All is trained: another worker would load the model for nothing."""
    job = yard.submit()
    runner = yard.runner()
    beat = runner.ledger.beat

    def leave(job_id: str, token: int, progress: TrainingProgress, preview: bytes | None = None) -> Any:
        if progress.step == STEPS - 1:
            runner.stop()
        return beat(job_id, token, progress, preview)

    monkeypatch.setattr(worker, "_TELL_EVERY_S", 0.0)
    monkeypatch.setattr(runner.ledger, "beat", leave)
    runner.run(job)
    assert yard.record(job).status is JobStatus.SUCCEEDED


@pytest.mark.parametrize(
    ("recipe", "code"),
    [
        ({"stages": {"warm-up": {"optimizer": {"lr": 1e30, "clip": None}}}}, "training_failed"),
        ({"stages": {"warm-up": {"settings": {"size": 76}}}}, "training_data"),
        ({"lora": {"targets": "all"}}, "training_targets"),
    ],
)
def test_failures_are_named(yard: Yard, recipe: dict[str, Any], code: str) -> None:
    """What goes wrong in a training ends as a code and a remedy, and never as a stuck job."""
    stages = {name: SMALL["stages"][name] | recipe.get("stages", {}).get(name, {}) for name in SMALL["stages"]}  # type: ignore[index]  # as above
    job = yard.submit(**{**recipe, "stages": stages})
    yard.runner().run(job)
    record = yard.record(job)
    assert record.status is JobStatus.FAILED and record.error is not None
    assert record.error.code == code
    assert str(yard.home) not in record.error.message
    assert not (yard.home / "trainings" / job).exists(), "nobody can go on from what it left"


def test_an_unknown_recipe_or_dataset_is_refused(yard: Yard) -> None:
    """A record of another version, or a dataset that was removed: failed with a code, not retried for ever."""
    yard.ledger.accept(TrainingJob("train_old", "a", {"name": "old", "stages": [], "unheard_of": 1}))
    yard.ledger.accept(TrainingJob("train_gone", "a", load_recipe("sticker-adapter").model_dump(mode="json"), "gone"))
    runner = yard.runner()
    for job in ("train_old", "train_gone"):
        runner.run(job)
        error = yard.record(job).error
        assert error is not None and error.code == "training_data"


def test_a_training_whose_base_has_moved_is_refused_without_its_place(yard: Yard, tmp_path: Path) -> None:
    """Between two attempts the operator named another base: the checkpoint is of another recipe, and who asked hears
    that, a remedy, and no directory of the server."""
    job = yard.submit()
    runner = yard.runner()
    runner.leaving = True
    runner.run(job)
    assert yard.record(job).status is JobStatus.QUEUED
    base = tmp_path / "base"
    shutil.copytree(SHIPPED, base)
    yard.runner(base_model=str(base)).run(job)
    error = yard.record(job).error
    assert error is not None and error.code == "training_data"
    assert "submit it again" in error.message and "/" not in error.message


def test_a_published_adapter_is_what_was_trained(yard: Yard) -> None:
    """The registry's file holds the trained change in released keys, and its digest is the result's version."""
    job = yard.submit()
    yard.runner().run(job)
    result = yard.record(job).result
    assert result is not None
    adapter = yard.registry.find("stickers", result.version)
    tensors = load_file(adapter.directory / "dreamo.safetensors")
    ups = [tensor for name, tensor in tensors.items() if name.endswith("up.weight")]
    assert ups and all(tensor.abs().max() > 0 for tensor in ups)
    assert adapter.base == fingerprint_of(SHIPPED / "transformer"), "on what it was trained"
    assert adapter.card["steps"] == STEPS and set(result.losses) >= {"flow"}


def test_forgotten_runs_are_swept(tmp_path: Path) -> None:
    """Checkpoints of a training that was never taken up again do not fill the disk; fresh ones stay."""
    for name in ("old", "new"):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
    long_ago = time.time() - 40 * 86_400
    for path in (tmp_path / "old" / "checkpoints", tmp_path / "old"):
        os.utime(path, (long_ago, long_ago))
    sweep_runs(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_runs_that_ended_elsewhere_are_swept(yard: Yard) -> None:
    """Canceled in the queue after a worker had handed it back, failed by the caretaker, or deleted since: their files
    go at once. Those of a training that waits or runs stay, and of one that this Redis has never heard of."""
    runs = yard.home / "trainings"
    jobs = [yard.submit(name) for name in ("canceled", "failed", "deleted", "queued", "running")]
    for name in (*jobs, "train_of_another_redis"):
        (runs / name / "checkpoints").mkdir(parents=True)
    canceled, failed, deleted, queued, running = jobs
    for job in (canceled, deleted):
        yard.ledger.cancel(job)
    yard.ledger.delete(deleted)
    assert yard.ledger.claim(running, "w") is not None
    hasty = Ledger(yard.client, TRAINING, lease_s=0.0, max_attempts=1)
    assert hasty.claim(failed, "w") is not None and hasty.reap() == []
    assert yard.record(failed).status is JobStatus.FAILED
    settings = yard.runner().settings
    open_station(settings).sweep(yard.ledger)
    assert {run.name for run in runs.iterdir()} == {queued, running, "train_of_another_redis"}


def test_the_sweep_beside_a_trainer_at_work(tmp_path: Path) -> None:
    """Checkpoints that are renamed and removed meanwhile end neither the sweep nor the run; what lies beside goes."""
    busy, old = tmp_path / "busy", tmp_path / "old"
    busy.mkdir()
    falls = 0
    with churning(busy):
        while falls < 20:
            old.mkdir()
            os.utime(old, (0, 0))
            sweep_runs(tmp_path)
            assert not old.exists()
            falls += plain_walk_fails(tmp_path)
    assert busy.is_dir()
