"""A worker that leaves with jobs in hand: what has begun ends, the rest goes back, no attempt is charged."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import redis
import structlog

from tests.waiting import wait_for
from tests.workers.conftest import MakeJob
from tests.workers.faulty import FaultyPipeline
from tests.workers.standin import Run, StandinPipeline
from workers import queues
from workers.artifacts import ArtifactStore
from workers.inference.runner import JobRunner
from workers.jobs import CUSTOMIZE, JobStatus
from workers.ledger import CustomizeLedger, Ledger
from workers.settings import WorkerSettings


class Gate:
    """Holds each forward until it is opened."""

    def __init__(self) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()

    def __call__(self, _: Run) -> None:
        self.reached.set()
        assert self.opened.wait(60)


def hand(runner: JobRunner, make_job: MakeJob, names: list[str], steps: int) -> None:
    """Jobs that wait for the first one's first step."""
    for name in names:
        runner.ledger.accept(make_job(name, steps=steps))
        runner.run(name)


def states(ledger: CustomizeLedger, names: list[str]) -> list[tuple[JobStatus, int]]:
    records = [ledger.get(name) for name in names]
    return [(record.status, record.attempt) for record in records if record is not None]


def left(client: redis.Redis, store: ArtifactStore, make_job: MakeJob, grace_s: float) -> list[tuple[JobStatus, int]]:
    """Two jobs, one of them in its first step as the worker is told to leave; how they are afterwards."""
    gate = Gate()
    ledger = Ledger(client, CUSTOMIZE)
    settings = WorkerSettings(grace_s=grace_s, forward_runs=1)
    runner = JobRunner(StandinPipeline(gate), ledger, store, settings, "w")
    names = ["job_1", "job_2"]
    hand(runner, make_job, names, steps=3)
    assert gate.reached.wait(60)
    runner.stop()
    assert not runner.wait_for_room(0.0), "nothing is claimed any more"
    closing = threading.Thread(target=runner.close)
    closing.start()
    if not grace_s:
        wait_for(lambda: runner.claims == [], "both to go back")
    gate.opened.set()
    closing.join(60)
    assert not closing.is_alive()
    assert runner.claims == []
    return states(ledger, names)


def test_what_has_not_begun_goes_back(client: redis.Redis, store: ArtifactStore, make_job: MakeJob) -> None:
    """Everything in hand is ended or queued again with a delivery, and nobody is charged."""
    ends = left(client, store, make_job, grace_s=60.0)
    assert set(ends) <= {(JobStatus.SUCCEEDED, 1), (JobStatus.QUEUED, 1)}
    assert (JobStatus.QUEUED, 1) in ends, "the second had made no step"
    queued = queues.queue(client, CUSTOMIZE).get_job_ids()
    assert len(queued) == ends.count((JobStatus.QUEUED, 1))
    runner = JobRunner(StandinPipeline(), Ledger(client, CUSTOMIZE), store, WorkerSettings(), "w2")
    for job in queued:
        runner.run(job)
    assert runner.wait(60)
    runner.close()
    assert [state for state, _ in states(runner.ledger, ["job_1", "job_2"])] == [JobStatus.SUCCEEDED] * 2


def test_grace_ends(client: redis.Redis, store: ArtifactStore, make_job: MakeJob) -> None:
    """Without grace both go back, and the forward at hand is the last one."""
    ends = left(client, store, make_job, grace_s=0.0)
    assert ends == [(JobStatus.QUEUED, 1)] * 2


class LostDevice(StandinPipeline):
    """Its second forward finds the device lost."""

    def __init__(self) -> None:
        super().__init__(self._lose)

    @staticmethod
    def _lose(run: Run) -> None:
        if run.step == 1:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")


class Faulty(StandinPipeline):
    """An error where none belongs to a job: in the engine's own thread."""

    def num_tokens(self, run: Run) -> int:
        raise LookupError(run)


@pytest.mark.parametrize(
    ("pipeline", "event"),
    [(LostDevice, "the device is lost: this worker ends"), (Faulty, "the engine has failed: this worker ends")],
)
def test_a_broken_engine_ends_the_worker_and_not_the_job(
    client: redis.Redis, store: ArtifactStore, make_job: MakeJob, pipeline: type[StandinPipeline], event: str
) -> None:
    """The runner is broken, takes nothing more and writes nothing: the lease lapses and another worker runs the job."""
    ledger = Ledger(client, CUSTOMIZE, lease_s=0.2)
    runner = JobRunner(pipeline(), ledger, store, WorkerSettings(), "w")
    with structlog.testing.capture_logs() as logs:
        hand(runner, make_job, ["job_1"], steps=3)
        assert not runner.wait(60), "the job stays in hand"
    assert runner.broken and not runner.has_room
    assert event in {log["event"] for log in logs}
    runner.close()
    record = ledger.get("job_1")
    assert record is not None and record.status is JobStatus.RUNNING
    while not ledger.reap():
        pass
    other = JobRunner(StandinPipeline(), ledger, store, WorkerSettings(), "w2")
    other.run("job_1")
    assert other.wait(60)
    other.close()
    assert states(ledger, ["job_1"]) == [(JobStatus.SUCCEEDED, 2)]


class StickyDevice(FaultyPipeline):
    """Lost in one of its phases; from then on whatever is asked of it fails."""

    def __init__(self, phase: str) -> None:
        super().__init__()
        self.phase = phase
        self.lost = False

    def meet(self, phase: str) -> None:
        self.lost |= phase == self.phase
        if self.lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")


@pytest.mark.parametrize("phase", ["encode", "start", "preview", "decode"])
def test_a_device_lost_beside_the_forwards_ends_the_worker_too(
    client: redis.Redis, store: ArtifactStore, make_job: MakeJob, phase: str
) -> None:
    """Wherever it shows first, no job fails by it and no job after it: the worker ends, as if a forward had seen it."""
    ledger = Ledger(client, CUSTOMIZE)
    runner = JobRunner(StickyDevice(phase), ledger, store, WorkerSettings(), "w")
    names = [f"job_{number}" for number in range(4)]
    for name in names:
        ledger.accept(make_job(name, steps=2, previews=1))
    with structlog.testing.capture_logs() as logs:
        for name in names:
            runner.run(name)
        assert not runner.wait(60), "the jobs stay in hand"
        runner.close()
    assert runner.broken and not runner.has_room
    assert [log["event"] for log in logs].count("the device is lost: this worker ends") == 1
    assert states(ledger, names) == [(JobStatus.RUNNING, 1)] * 4, "until their leases lapse"


class LostMeanwhile(StandinPipeline):
    """One job's preparation loses the device while another one's fails by what that has left behind."""

    def __init__(self) -> None:
        super().__init__(num_lanes=2)
        self.lost = threading.Event()
        self.other = threading.Event()

    def encode_prompt(self, prompt: str, adaptation: Any = None) -> Any:  # noqa: ARG002
        if prompt == "first":
            assert self.other.wait(60)
            raise RuntimeError("CUDA error: unspecified launch failure")
        self.other.set()
        assert self.lost.wait(60)
        raise KeyError(prompt)


def test_what_fails_on_a_lost_device_is_no_jobs_failure(
    client: redis.Redis, store: ArtifactStore, make_job: MakeJob
) -> None:
    """Once the device is lost, an error of any kind may follow from that: its job is left to its lease as well."""
    ledger, pipeline = Ledger(client, CUSTOMIZE), LostMeanwhile()
    runner = JobRunner(pipeline, ledger, store, WorkerSettings(), "w")
    for name in ("first", "second"):
        ledger.accept(make_job(name, prompt=name))
        runner.run(name)
    assert not runner.wait(60)
    assert runner.broken
    preparing = [thread for thread in threading.enumerate() if thread.name == "prepare"]
    pipeline.lost.set()
    for thread in preparing:
        thread.join(60)
    runner.close()
    assert states(ledger, ["first", "second"]) == [(JobStatus.RUNNING, 1)] * 2
