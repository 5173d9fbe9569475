"""A worker that loses a claim and gets the same job again: the old claim's end is not the new one's."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import redis
from numpy.typing import NDArray

from tests.waiting import wait_for
from tests.workers.conftest import MakeJob
from tests.workers.inference.conftest import Make
from tests.workers.standin import StandinPipeline
from workers.caretaker import Claim
from workers.inference.runner import JobRunner
from workers.jobs import CUSTOMIZE, JobStatus
from workers.ledger import Ledger


class HeldOnce(StandinPipeline):
    """Its first picture is decoded once it is let go, and all others' steps wait for that too, if they are told to."""

    def __init__(self) -> None:
        super().__init__(num_lanes=2)
        self.decoding, self.decoded = threading.Event(), threading.Event()
        self.steps = threading.Event()
        self.steps.set()

    def step(self, runs: Any) -> Any:
        assert self.steps.wait(60)
        return super().step(runs)

    def decode(self, run: Any) -> NDArray[np.uint8]:
        if not self.decoding.is_set():
            self.steps.clear()
            self.decoding.set()
            assert self.decoded.wait(60)
        return super().decode(run)


def lapse(client: redis.Redis, runner: JobRunner) -> None:
    """Another worker's caretaker finds the job's lease lapsed."""
    Ledger(client, CUSTOMIZE, lease_s=0.0).beat("job_1", runner.claims[0].token)
    assert wait_for(runner.ledger.reap, "the lease to lapse") == ["job_1"]


def test_an_old_claim_that_ends_leaves_the_new_one_alone(
    make_runner: Make, client: redis.Redis, make_job: MakeJob
) -> None:
    """While the picture of the old claim is decoded the job is claimed again, by the same worker: the old picture is
    dropped, and the new claim goes on to its commit. One picture each: the engine, which ends what is lost as soon as
    it sees it, has nothing left of the old claim."""
    pipeline = HeldOnce()
    runner = make_runner(pipeline)
    runner.ledger.accept(make_job("job_1", steps=3))
    runner.run("job_1")
    assert pipeline.decoding.wait(60)
    lapse(client, runner)
    runner.run("job_1")
    wait_for(lambda: pipeline.starts == 2, "the new claim's run")
    assert sorted(claim.token for claim in runner.claims) == [1, 2]
    pipeline.decoded.set()
    wait_for(lambda: [claim.token for claim in runner.claims] == [2], "the old claim's end")
    pipeline.steps.set()
    assert runner.wait(60)
    record = runner.ledger.get("job_1")
    assert record is not None and record.result is not None
    assert (record.status, record.attempt) == (JobStatus.SUCCEEDED, 2)
    assert [image.name for image in record.result.images] == ["job_1.2.0.png"]
    assert all(runner.store.path(image.name).is_file() for image in record.result.images)


def test_what_is_heard_of_an_old_claim_is_not_said_of_the_new_one(make_runner: Make, make_job: MakeJob) -> None:
    """A beat of the old claim may be answered after the job was claimed again: that claim is lost, not this one."""
    pipeline = HeldOnce()
    pipeline.steps.clear()
    runner = make_runner(pipeline)
    runner.ledger.accept(make_job("job_1"))
    runner.run("job_1")
    wait_for(lambda: pipeline.starts == 1, "its run")
    (claim,) = runner.claims
    runner.hear(Claim("job_1", claim.token - 1, time.monotonic()), "lost")
    pipeline.decoded.set()
    pipeline.steps.set()
    assert runner.wait(60)
    record = runner.ledger.get("job_1")
    assert record is not None and record.status is JobStatus.SUCCEEDED


def test_steps_of_an_old_claim_are_not_counted_for_the_new_one(
    make_runner: Make, client: redis.Redis, make_job: MakeJob
) -> None:
    """Runs of both claims may be in one forward: progress and pictures of each are its own."""
    pipeline = HeldOnce()
    pipeline.decoded.set()
    pipeline.steps.clear()
    runner = make_runner(pipeline)
    runner.ledger.accept(make_job("job_1", steps=4))
    runner.run("job_1")
    wait_for(lambda: pipeline.starts == 1, "the old claim's run")
    lapse(client, runner)
    runner.run("job_1")
    wait_for(lambda: pipeline.starts == 2, "the new claim's run")
    pipeline.steps.set()
    wait_for(pipeline.decoding.is_set, "the first picture")
    pipeline.steps.set()
    assert runner.wait(60)
    record = runner.ledger.get("job_1")
    assert record is not None and record.progress is not None and record.result is not None
    assert (record.status, record.progress.step, record.progress.total) == (JobStatus.SUCCEEDED, 4, 4)
    assert [image.name for image in record.result.images] == ["job_1.2.0.png"]
