"""The caretaker's round: whose lease is renewed, whose job is taken back."""

from __future__ import annotations

import time

import pytest
import redis

from tests.workers.conftest import MakeJob
from workers import queues
from workers.caretaker import Caretaker, Claim
from workers.jobs import CUSTOMIZE, JobStatus
from workers.ledger import Ledger


def caretaker_of(client: redis.Redis, claim: Claim | None) -> Caretaker:
    ledger = Ledger(client, CUSTOMIZE, lease_s=30.0)
    return Caretaker(
        client,
        CUSTOMIZE,
        ledger,
        "w",
        card=lambda: {"state": "ready"},
        claims=lambda: [claim] if claim else [],
        stall_s=600.0,
        sweep=lambda: None,
    )


def lapsed(client: redis.Redis, make_job: MakeJob) -> int:
    """A running job whose lease has just lapsed; returns its token."""
    ledger = Ledger(client, CUSTOMIZE, lease_s=0.0)
    ledger.accept(make_job("job_1"))
    token = ledger.claim("job_1", "w")
    assert token is not None
    return token


@pytest.mark.parametrize(
    ("idle_s", "status"), [(0.0, JobStatus.RUNNING), (500.0, JobStatus.RUNNING), (700.0, JobStatus.QUEUED)]
)
def test_own_lease_comes_first_unless_stalled(
    client: redis.Redis, make_job: MakeJob, idle_s: float, status: JobStatus
) -> None:
    """After an outage a living worker keeps its job; one whose forward hangs gives it up."""
    token = lapsed(client, make_job)
    caretaker_of(client, Claim("job_1", token, time.monotonic() - idle_s)).round()
    record = Ledger(client, CUSTOMIZE).get("job_1")
    assert record is not None and record.status is status
    assert queues.queue(client, CUSTOMIZE).get_job_ids() == ([] if status is JobStatus.RUNNING else ["job_1"])


def test_jobs_of_others_are_taken_back(client: redis.Redis, make_job: MakeJob) -> None:
    """A lapsed lease of another worker: queued again and rung for; the round announces this worker as well."""
    lapsed(client, make_job)
    caretaker_of(client, None).round()
    assert queues.queue(client, CUSTOMIZE).get_job_ids() == ["job_1"]
    assert client.zcard(f"{CUSTOMIZE.root}leases") == 0
    assert queues.workers(client, CUSTOMIZE) == [{"state": "ready", "name": "w"}]


def test_halt_ends_the_thread_and_takes_the_card(client: redis.Redis) -> None:
    """A worker that leaves is not shown as alive until its card lapses."""
    caretaker = caretaker_of(client, None)
    caretaker.start()
    deadline = time.monotonic() + 10
    while not queues.workers(client, CUSTOMIZE) and time.monotonic() < deadline:
        time.sleep(0.005)
    assert queues.workers(client, CUSTOMIZE)
    caretaker.halt()
    assert not caretaker.is_alive()
    assert queues.workers(client, CUSTOMIZE) == []
