"""How jobs end while other threads still work on them, and what an end that goes wrong leaves behind."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import pytest
import redis
from numpy.typing import NDArray

from tests.waiting import wait_for
from tests.workers.conftest import MakeJob
from tests.workers.inference.conftest import Make
from tests.workers.inference.test_runner import run, stored
from tests.workers.standin import StandinPipeline
from workers import failpoints
from workers.artifacts import ArtifactStore
from workers.inference.runner import JobRunner
from workers.jobs import CUSTOMIZE, CustomizeJob, JobResult, JobStatus, Progress
from workers.ledger import Ledger
from workers.settings import WorkerSettings


class SecondHeld(StandinPipeline):
    """Its second picture is decoded once it is let go; the steps of the third wait until a cancel is heard."""

    def __init__(self) -> None:
        super().__init__()
        self.decodes = 0
        self.reached, self.let_go, self.heard = threading.Event(), threading.Event(), threading.Event()

    def step(self, runs: Sequence[Any]) -> Sequence[Any]:
        if runs[0].seed == 9:
            assert self.heard.wait(60)
        return super().step(runs)

    def decode(self, run: Any) -> NDArray[np.uint8]:
        self.decodes += 1
        if self.decodes == 2:
            self.reached.set()
            assert self.let_go.wait(60)
        return super().decode(run)


class PublishesMeanwhile(ArtifactStore):
    """While a picture is discarded the next one is published."""

    pipeline: SecondHeld
    published: threading.Event

    def publish(self, name: str, data: bytes) -> str:
        digest = super().publish(name, data)
        if self.pipeline.reached.is_set():
            self.published.set()
        return digest

    def discard(self, name: str) -> None:
        self.pipeline.let_go.set()
        assert self.published.wait(60)
        threading.Event().wait(0.2)
        super().discard(name)


def test_pictures_published_while_a_job_ends_are_taken_away_too(
    client: redis.Redis, store: ArtifactStore, make_job: MakeJob
) -> None:
    """A cancel is heard while a picture is decoded: the job is let go of, all of its pictures are gone, and the next
    one is decoded by the same thread."""
    busy = PublishesMeanwhile(store.root)
    busy.pipeline, busy.published = SecondHeld(), threading.Event()
    settings = WorkerSettings(commit_patience_s=5.0, grace_s=0.0, forward_runs=1)
    runner = JobRunner(busy.pipeline, Ledger(client, CUSTOMIZE), busy, settings, "w")
    runner.ledger.accept(make_job("job_1", num_images=3, steps=3))
    runner.run("job_1")
    assert busy.pipeline.reached.wait(60)
    runner.ledger.cancel("job_1")
    runner.hear(runner.claims[0], "canceled")
    busy.pipeline.heard.set()
    assert runner.wait(60)
    record = runner.ledger.get("job_1")
    assert record is not None and record.status is JobStatus.CANCELED
    wait_for(lambda: busy.published.is_set() and not stored(store), "its pictures to go")
    assert run(runner, make_job("job_2")).status is JobStatus.SUCCEEDED
    runner.close()


@pytest.mark.parametrize("point", ["before_commit", "committed"])
def test_an_end_that_raises_leaves_the_worker_fit(make_runner: Make, make_job: MakeJob, point: str) -> None:
    """Whatever happens around the commit, the job is not in hand any more and the next one is brought to its end."""
    runner = make_runner()
    runner.ledger.accept(make_job("job_1"))
    failpoints.arm(f"{point}=raise")
    runner.run("job_1")
    assert runner.wait(20)
    record = runner.ledger.get("job_1")
    assert record is not None
    assert record.status is (JobStatus.RUNNING if point == "before_commit" else JobStatus.SUCCEEDED)
    if record.result is not None:
        assert stored(runner.store) == {record.result.images[0].name}, "what is committed stays"
    assert run(runner, make_job("job_2")).status is JobStatus.SUCCEEDED


class AwayLedger(Ledger[CustomizeJob, Progress, JobResult]):
    """Whose Redis is away while `away` is set."""

    away: threading.Event

    def _call(self, script: Any, *arguments: str | float | bytes) -> Any:
        if self.away.is_set():
            raise redis.ConnectionError
        return super()._call(script, *arguments)


def away_runner(pipeline: StandinPipeline, store: ArtifactStore, client: redis.Redis, patience_s: float) -> JobRunner:
    ledger = AwayLedger(client, CUSTOMIZE, lease_s=60.0)
    ledger.away = threading.Event()
    settings = WorkerSettings(commit_patience_s=patience_s, grace_s=0.0)
    return JobRunner(pipeline, ledger, store, settings, "w")


class DeafLedger(Ledger[CustomizeJob, Progress, JobResult]):
    """Whose commits are taken, while their answers are lost."""

    def commit(self, job_id: str, token: int, result: JobResult) -> bool:
        super().commit(job_id, token, result)
        raise redis.ConnectionError


def test_a_commit_whose_answer_is_lost_keeps_its_pictures(
    client: redis.Redis, store: ArtifactStore, make_job: MakeJob
) -> None:
    """For the ledger the job has succeeded, so its pictures must be there, though this worker cannot know it."""
    settings = WorkerSettings(commit_patience_s=0.3, grace_s=0.0)
    runner = JobRunner(StandinPipeline(), DeafLedger(client, CUSTOMIZE, lease_s=60.0), store, settings, "w")
    record = run(runner, make_job("job_1"))
    assert record.status is JobStatus.SUCCEEDED and record.result is not None
    assert stored(store) == {image.name for image in record.result.images}
    runner.close()


class Watched(StandinPipeline):
    """Steps of the prompt `bad` fail; Redis is sent away just before."""

    away: threading.Event
    done: threading.Event

    def step(self, runs: Sequence[Any]) -> Sequence[Any]:
        if any(run.request.prompt == "bad" and run.step == 1 for run in runs):
            self.away.set()
            raise KeyError("bad")
        moved = super().step(runs)
        if any(run.done for run in moved):
            self.done.set()
        return moved


def test_an_end_that_waits_for_redis_holds_up_no_forward(
    client: redis.Redis, store: ArtifactStore, make_job: MakeJob
) -> None:
    """While Redis is away one job fails: another one is denoised to its end all the same, both are told of later."""
    pipeline = Watched()
    runner = away_runner(pipeline, store, client, patience_s=60.0)
    pipeline.away, pipeline.done = cast("AwayLedger", runner.ledger).away, threading.Event()
    runner.ledger.accept(make_job("good", steps=8))
    runner.ledger.accept(make_job("bad", steps=9, prompt="bad"))
    runner.run("good")
    runner.run("bad")
    assert pipeline.away.wait(60)
    assert pipeline.done.wait(20), "all steps of the good one, without Redis"
    pipeline.away.clear()
    assert runner.wait(60)
    runner.close()
    records = [runner.ledger.get(name) for name in ("good", "bad")]
    assert [record and record.status for record in records] == [JobStatus.SUCCEEDED, JobStatus.FAILED]


def test_leaving_without_redis_is_patient_once_and_not_for_each_job(
    client: redis.Redis, store: ArtifactStore, make_job: MakeJob
) -> None:
    """The caretaker's thread that hands jobs over is not held up, and who leaves waits for all jobs at once."""
    held = threading.Event()
    runner = away_runner(StandinPipeline(lambda _: held.wait(60)), store, client, patience_s=2.0)
    for number in range(40):
        runner.ledger.accept(make_job(f"job_{number}"))
        runner.run(f"job_{number}")
    cast("AwayLedger", runner.ledger).away.set()
    leaving = [threading.Thread(target=runner.hand_over), threading.Thread(target=runner.close)]
    leaving[0].start()
    leaving[0].join(20)
    assert not leaving[0].is_alive()
    held.set()
    leaving[1].start()
    leaving[1].join(40)
    assert not leaving[1].is_alive()
    assert runner.claims == []
