"""A job in hand whose start deadline passes: ended if no step is made, left alone if one is."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import redis

from tests.waiting import wait_for
from tests.workers.conftest import MakeJob
from tests.workers.standin import Run, StandinPipeline
from workers.artifacts import ArtifactStore
from workers.caretaker import Caretaker
from workers.inference.runner import JobRunner
from workers.jobs import CUSTOMIZE, JobStatus
from workers.ledger import CustomizeLedger, Ledger
from workers.settings import WorkerSettings


class Gate:
    """Holds each forward until it is opened, and notes the steps."""

    def __init__(self) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()
        self.prompts: list[str] = []

    def __call__(self, run: Run) -> None:
        self.prompts.append(run.request.prompt)
        self.reached.set()
        assert self.opened.wait(60)


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def runner(client: redis.Redis, store: ArtifactStore, gate: Gate) -> Iterator[JobRunner]:
    runner = JobRunner(
        StandinPipeline(gate), Ledger(client, CUSTOMIZE), store, WorkerSettings(forward_runs=1, grace_s=5.0), "w"
    )
    yield runner
    gate.opened.set()
    runner.close()


def status(ledger: CustomizeLedger, job_id: str) -> JobStatus:
    record = ledger.get(job_id)
    assert record is not None
    return record.status


def test_a_deadline_while_others_have_the_device(
    client: redis.Redis, runner: JobRunner, gate: Gate, make_job: MakeJob
) -> None:
    """One job is in its first step as both deadlines pass. The other, in hand but without a step, expires; it does not,
    though its deadline has passed before anybody heard of its step.
    """
    ledger = runner.ledger
    caretaker = Caretaker(
        client, CUSTOMIZE, ledger, "w", card=dict, holder=lambda: runner, stall_s=600.0, sweep=lambda: None
    )
    for job_id in ("job_begun", "job_waits"):
        ledger.accept(make_job(job_id, steps=3, prompt=job_id), start_within_s=5.0)
        runner.run(job_id)
        assert gate.reached.wait(60)
    tokens = {claim.job_id: claim.token for claim in runner.claims}
    wait_for(lambda: ledger.beat("job_waits", tokens["job_waits"]) == "expired", "the deadline")
    caretaker.round()
    gate.opened.set()
    wait_for(lambda: status(ledger, "job_begun") is JobStatus.SUCCEEDED, "the end of what has begun")
    wait_for(lambda: status(ledger, "job_waits") is JobStatus.EXPIRED, "the end of what has not")
    assert "job_waits" not in gate.prompts, "not one step of it"


def test_a_cancel_while_others_have_the_device(
    client: redis.Redis, runner: JobRunner, gate: Gate, make_job: MakeJob
) -> None:
    """A job in hand that makes no step hears its cancel by the caretaker's round, and ends before the next forward."""
    caretaker = Caretaker(
        client, CUSTOMIZE, runner.ledger, "w", card=dict, holder=lambda: runner, stall_s=600.0, sweep=lambda: None
    )
    for job_id in ("job_begun", "job_waits"):
        runner.ledger.accept(make_job(job_id, steps=3, prompt=job_id))
        runner.run(job_id)
        assert gate.reached.wait(60)
    runner.ledger.cancel("job_waits")
    caretaker.round()
    gate.opened.set()
    wait_for(lambda: status(runner.ledger, "job_waits") is JobStatus.CANCELED, "the cancel")
    assert "job_waits" not in gate.prompts
