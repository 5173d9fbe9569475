"""What a change of state wants done elsewhere is done, whoever dies in between."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import redis

from model.roles import Role
from tests.workers.conftest import MakeJob
from tests.workers.ledgers import ERROR, RESULT, STEP, boxed, make_due, record, running
from workers import queues
from workers.caretaker import Caretaker
from workers.jobs import CUSTOMIZE, CustomizeJob, JobStatus, ReferenceInput, Webhook
from workers.ledger import CustomizeLedger, Ledger

HOOK = Webhook("https://x.example/hook")
UNFETCHED = ReferenceInput(1, Role.SUBJECT, "", url="https://x.example/toy.png")


@pytest.fixture
def ledger(client: redis.Redis) -> CustomizeLedger:
    return Ledger(client, CUSTOMIZE, tenant_window=1, lease_s=30.0)


def lapse_rings(ledger: CustomizeLedger) -> None:
    """Who was to ring has not done so in time."""
    ids: Any = ledger.redis.zrange(f"{CUSTOMIZE.root}to_ring", 0, -1)
    ledger.redis.zadd(f"{CUSTOMIZE.root}to_ring", dict.fromkeys(ids, 0))


def go_round(ledger: CustomizeLedger) -> None:
    """A round of some worker's caretaker."""
    caretaker = Caretaker(
        ledger.redis, CUSTOMIZE, ledger, "w", card=dict, holder=lambda: None, stall_s=600.0, sweep=lambda: None
    )
    caretaker.round()


def deliveries(ledger: CustomizeLedger) -> list[str]:
    return queues.queue(ledger.redis, CUSTOMIZE).get_job_ids()


@pytest.mark.parametrize("rang", [False, True])
def test_a_gateway_that_dies_after_accepting(ledger: CustomizeLedger, make_job: MakeJob, *, rang: bool) -> None:
    """Before it rang or before it said so: the job is rung for by a caretaker, and delivered once."""
    assert ledger.accept(make_job("job_1")).called
    if rang:
        queues.ring(ledger.redis, CUSTOMIZE, "job_1")
    go_round(ledger)
    assert deliveries(ledger) == (["job_1"] if rang else []), "the gateway still has its time"
    lapse_rings(ledger)
    go_round(ledger)
    go_round(ledger)
    assert deliveries(ledger) == ["job_1"]
    assert ledger.to_ring() == []


def test_a_worker_that_dies_after_an_end(ledger: CustomizeLedger, make_job: MakeJob) -> None:
    """It has ended a job and not rung for the next of the line: a caretaker does."""
    token = running(ledger, make_job)
    assert not ledger.accept(make_job("job_2")).called, "the window holds one"
    ledger.commit("job_1", token, RESULT)
    assert deliveries(ledger) == []
    go_round(ledger)
    assert deliveries(ledger) == ["job_2"]


def test_whoever_took_the_bell_and_died(ledger: CustomizeLedger, make_job: MakeJob) -> None:
    """Ids that were taken to be rung for are taken by another after a while, not at once."""
    token = running(ledger, make_job)
    ledger.accept(make_job("job_2"))
    ledger.commit("job_1", token, RESULT)
    assert ledger.to_ring() == ["job_2"]
    assert ledger.to_ring() == []
    lapse_rings(ledger)
    assert ledger.to_ring() == ["job_2"]


def test_a_webhook_is_told_until_it_is_settled(ledger: CustomizeLedger, make_job: MakeJob) -> None:
    """The same message under the same id at each attempt, to one courier at a time, until done or given up."""
    ledger.accept(make_job("job_1", webhook=HOOK, tenant="a"))
    assert ledger.due_webhooks() == [], "only the end was asked for"
    ledger.cancel("job_1")
    (first,) = ledger.due_webhooks()
    assert (first.job_id, first.tenant, first.attempt, first.url, first.event) == (
        "job_1",
        "a",
        1,
        HOOK.url,
        "terminal",
    )
    assert json.loads(first.data) == {"status": "canceled", "attempt": 1}
    assert first.id.startswith("msg_")
    assert ledger.due_webhooks() == [], "it is leased"
    make_due(ledger, "webhooks")
    assert ledger.due_webhooks() == [replace(first, attempt=2)], "that courier was lost"
    ledger.webhook_retry(first.id, 3600.0)
    assert ledger.due_webhooks() == []
    ledger.webhook_retry(first.id, 0.0)
    assert ledger.due_webhooks() == [replace(first, attempt=3)]
    ledger.webhook_done(first.id)
    ledger.webhook_retry(first.id, 0.0)  # of a courier that was thought lost
    make_due(ledger, "webhooks")
    assert ledger.due_webhooks() == []


def test_every_change_if_asked_for(ledger: CustomizeLedger, make_job: MakeJob) -> None:
    """A webhook for `status` hears of each change, of those by a lost worker too; each has an id of its own."""
    ledger.accept(make_job("job_1", webhook=Webhook("https://x.example", ("status", "terminal"))))
    token = ledger.claim("job_1", "w")
    assert token is not None
    ledger.beat("job_1", token, STEP)
    ledger.redis.zadd(f"{CUSTOMIZE.root}leases", {"job_1": 0})
    ledger.reap()
    token = ledger.claim("job_1", "w")
    assert token is not None
    ledger.fail("job_1", token, ERROR)
    told = ledger.due_webhooks()
    assert [[*json.loads(one.data).values()] for one in told] == [
        ["queued", 1],
        ["running", 1],
        ["queued", 2],
        ["running", 2],
        ["failed", 2],
    ]
    assert [one.event for one in told] == ["status"] * 4 + ["terminal"]
    assert len({one.id for one in told}) == 5
    ledger.webhook_dead(told[0].id)
    make_due(ledger, "webhooks")
    assert len(ledger.due_webhooks()) == 4


def test_of_a_deleted_job_nothing_is_told(ledger: CustomizeLedger, make_job: MakeJob) -> None:
    """Its message goes with it, without an error and for good."""
    ledger.accept(make_job("job_1", webhook=HOOK))
    ledger.cancel("job_1")
    ledger.delete("job_1")
    assert ledger.due_webhooks() == []
    assert boxed(ledger, "webhooks") == {}


def unfetched(make_job: MakeJob, job_id: str = "job_1") -> CustomizeJob:
    return make_job(job_id, references=(UNFETCHED,))


def fetched(job: CustomizeJob) -> CustomizeJob:
    return replace(job, references=(replace(UNFETCHED, image="0" * 64),))


def test_a_job_waits_for_its_references(ledger: CustomizeLedger, make_job: MakeJob) -> None:
    """Nobody can claim it before they are there, others go first, and then it takes its old place in the line."""
    job = unfetched(make_job)
    assert not ledger.accept(job).called
    for job_id in ("job_2", "job_3"):
        ledger.accept(make_job(job_id))
    assert record(ledger).status is JobStatus.QUEUED
    assert ledger.claim("job_1", "w") is None
    (fetch,) = ledger.due_fetches()
    assert ledger.due_fetches() == [], "it is leased"
    assert ledger.resolve("job_1", fetch.token, fetched(job)) and ledger.resolve("job_1", fetch.token, fetched(job))
    assert record(ledger).job == fetched(job)
    assert ledger.waiting(0.0) == ["job_2"], "the window is full"
    ledger.cancel("job_2")
    assert ledger.waiting(0.0) == ["job_1"], "it was accepted before the third"
    assert ledger.claim("job_1", "w") is not None
    assert ledger.resolve("job_1", fetch.token, fetched(job)), "a courier's reply may have been lost for long"
    assert ledger.position("job_3") == 0, "it did not enter the line again"


def test_a_fetched_job_is_called_for(ledger: CustomizeLedger, make_job: MakeJob) -> None:
    """With room in its tenant's window it enters at once, and a caretaker rings for it."""
    job = unfetched(make_job)
    ledger.accept(job)
    (fetch,) = ledger.due_fetches()
    assert ledger.resolve("job_1", fetch.token, fetched(job))
    go_round(ledger)
    assert deliveries(ledger) == ["job_1"]


def test_one_courier_at_a_time(ledger: CustomizeLedger, make_job: MakeJob) -> None:
    """A courier that was lost and comes back changes nothing; what all couriers are lost over fails."""
    job = unfetched(make_job)
    ledger.accept(job)
    (old,) = ledger.due_fetches()
    make_due(ledger, "fetches")
    (new,) = ledger.due_fetches()
    assert not ledger.resolve("job_1", old.token, fetched(job)) and not ledger.fail_fetch("job_1", old.token, ERROR)
    assert ledger.fail_fetch("job_1", new.token, ERROR) and ledger.fail_fetch("job_1", new.token, ERROR)
    assert (record(ledger).status, record(ledger).error) == (JobStatus.FAILED, ERROR)
    assert not ledger.resolve("job_1", new.token, fetched(job))

    ledger.accept(unfetched(make_job, "job_2"))
    for _ in range(3):
        assert len(ledger.due_fetches()) == 1
        make_due(ledger, "fetches")
    assert ledger.due_fetches() == []
    error = record(ledger, "job_2").error
    assert error is not None and error.code == "worker_lost"


def test_a_canceled_job_is_not_fetched(ledger: CustomizeLedger, make_job: MakeJob) -> None:
    """Nor does it come back to life when its references arrive."""
    job = unfetched(make_job)
    ledger.accept(job)
    (fetch,) = ledger.due_fetches()
    ledger.cancel("job_1")
    assert not ledger.resolve("job_1", fetch.token, fetched(job))
    make_due(ledger, "fetches")
    assert ledger.due_fetches() == []
    assert record(ledger).status is JobStatus.CANCELED
