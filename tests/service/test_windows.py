"""A tenant's window bounds what it has in RQ, whatever it cancels and whatever expires."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import redis
from fastapi import Response
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rq import Queue
from rq.serializers import JSONSerializer

from service.records import cancel
from tests.service.conftest import Bench
from workers import queues
from workers.books.values import Accepted
from workers.caretaker import Caretaker
from workers.jobs import CUSTOMIZE, TRAINING, AnyKind, CustomizeJob, JobStatus, Sampling
from workers.ledger import CustomizeLedger, Ledger
from workers.redis_process import RedisProcess

TENANTS, WINDOW = "ab", 2
JOB = CustomizeJob("job", "m", "a toy", "", (), Sampling(16, 32, 2, 4.5, 4.5, 7))


@pytest.fixture
def client(redis_server: RedisProcess) -> Iterator[redis.Redis]:
    """A client on an empty Redis."""
    with queues.connect(redis_server.url) as connected:
        connected.flushall()
        yield connected


@pytest.fixture
def ledger(client: redis.Redis) -> CustomizeLedger:
    return Ledger(client, CUSTOMIZE, tenant_window=WINDOW, lease_s=30.0)


def texts(members: Any) -> list[str]:
    return [member.decode() for member in members]


def held(client: redis.Redis, kind: AnyKind = CUSTOMIZE) -> list[str]:
    """The ids in RQ's list, each of which has its hash, and no other has."""
    ids = queues.queue(client, kind).get_job_ids()
    assert sorted(texts(client.keys("rq:job:*"))) == sorted(f"rq:job:{job_id}" for job_id in ids)
    return ids


def accept(ledger: CustomizeLedger, job_id: str, tenant: str = "a", *, hurry: bool = False) -> Accepted:
    return ledger.accept(replace(JOB, id=job_id, tenant=tenant), start_within_s=0.0 if hurry else None)


def by_the_service(ledger: CustomizeLedger, job_id: str) -> None:
    cancel(ledger, job_id, "a", Response())


def by_the_ledger(ledger: CustomizeLedger, job_id: str) -> None:
    ledger.cancel(job_id)


@pytest.mark.parametrize(("end", "left"), [(by_the_service, 0), (by_the_ledger, 10)])
def test_submit_and_cancel_in_a_loop(
    ledger: CustomizeLedger, end: Callable[[CustomizeLedger, str], None], left: int
) -> None:
    """The loop leaves nothing before another tenant's job; the control, which takes nothing back, fills RQ."""
    for number in range(10):
        queues.ring_accepted(ledger, accept(ledger, f"job_{number}"))
        end(ledger, f"job_{number}")
    queues.ring_accepted(ledger, accept(ledger, "job_other", "b"))
    assert held(ledger.redis).index("job_other") == left


@pytest.mark.parametrize(
    ("route", "body", "kind"),
    [("/v1/jobs", {"prompt": "a toy"}, CUSTOMIZE), ("/v1/trainings", {"recipe": "sticker-adapter"}, TRAINING)],
)
def test_over_http(bench: Bench, route: str, body: dict[str, Any], kind: AnyKind) -> None:
    """Jobs and trainings alike."""
    for _ in range(3):
        accepted = bench.client.post("/v1/customize" if kind is CUSTOMIZE else route, json=body)
        assert held(bench.redis, kind) == [accepted.json()["id"]], accepted.text
        answer = bench.client.post(f"{route}/{accepted.json()['id']}/cancel")
        assert (answer.status_code, answer.json()["status"]) == (200, "canceled")
        assert held(bench.redis, kind) == []


class Crowd:
    """Gateways and a caretaker, of which some ring late or never; no worker pops."""

    def __init__(self, ledger: CustomizeLedger) -> None:
        self.ledger = ledger
        self.accepted: list[tuple[str, Accepted]] = []

    def accept(self, choice: int) -> None:
        """Without a ring: its gateway is slow, or dead."""
        tenant = TENANTS[choice % 2]
        job_id = f"job_{len(self.accepted)}"
        self.accepted.append((tenant, accept(self.ledger, job_id, tenant, hurry=choice % 5 == 0)))

    def submit(self, choice: int) -> None:
        self.accept(choice)
        queues.ring_accepted(self.ledger, self.accepted[-1][1])

    def ring_late(self, choice: int) -> None:
        """A gateway comes to it at last; the job may have ended."""
        if self.accepted:
            queues.ring_accepted(self.ledger, self.accepted[choice % len(self.accepted)][1])

    def cancel(self, choice: int) -> None:
        if self.accepted:
            tenant, accepted = self.accepted[choice % len(self.accepted)]
            cancel(self.ledger, accepted.job_id, tenant, Response())

    def go_round(self, choice: int) -> None:
        """A caretaker's round, which ends what is late; at times the leases of those who were to ring are over."""
        if choice % 3 == 0:
            for job_id in texts(self.ledger.redis.zrange(f"{CUSTOMIZE.root}to_ring", 0, -1)):
                self.ledger.redis.zadd(f"{CUSTOMIZE.root}to_ring", {job_id: 0})
        client = self.ledger.redis
        Caretaker(
            client, CUSTOMIZE, self.ledger, "w", card=dict, holder=lambda: None, stall_s=600.0, sweep=lambda: None
        ).round()

    def check(self) -> set[str]:
        """RQ holds at most what is called for, which windows bound; returns what is called for."""
        called = set(texts(self.ledger.redis.zrange(f"{CUSTOMIZE.root}calling", 0, -1)))
        ids = held(self.ledger.redis)
        assert len(ids) == len(set(ids)) and set(ids) <= called
        assert len(called) <= len(TENANTS) * WINDOW
        return called


ACTS = (Crowd.submit,) * 3 + (Crowd.accept, Crowd.ring_late, Crowd.cancel, Crowd.cancel, Crowd.go_round)


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(acts=st.lists(st.tuples(st.sampled_from(ACTS), st.integers(0, 50)), min_size=10, max_size=40))
def test_any_mix_of_accept_ring_cancel_and_expire(
    client: redis.Redis, ledger: CustomizeLedger, acts: list[tuple[Callable[[Crowd, int], None], int]]
) -> None:
    """Without a worker RQ never holds more than the windows, and in the end all that is called for: nothing is lost."""
    client.flushall()
    client.config_set("appendfsync", "no")  # no crash is part of this story
    crowd = Crowd(ledger)
    for act, choice in acts:
        act(crowd, choice)
        crowd.check()
    crowd.go_round(0)
    assert set(held(client)) == crowd.check()
    client.config_set("appendfsync", "always")


@pytest.mark.parametrize(("checked", "left"), [(True, []), (False, ["job_1"])])
def test_a_ring_that_comes_after_the_cancel(ledger: CustomizeLedger, *, checked: bool, left: list[str]) -> None:
    """Who accepted a job may be slower than who cancels it. The control rings without another look."""
    accepted = accept(ledger, "job_1")
    by_the_service(ledger, "job_1")
    if checked:
        queues.ring_accepted(ledger, accepted)
    else:
        queues.ring(ledger.redis, CUSTOMIZE, "job_1")
    assert held(ledger.redis) == left


def test_what_is_called_for_is_not_taken_back(ledger: CustomizeLedger) -> None:
    """A job that came back to the queue meanwhile keeps its delivery."""
    queues.ring_accepted(ledger, accept(ledger, "job_1"))
    queues.recall(ledger.redis, CUSTOMIZE, ["job_1", "job_unknown"])
    assert held(ledger.redis) == ["job_1"]


def test_a_popped_delivery_is_its_workers(ledger: CustomizeLedger) -> None:
    """The worker still finds the call, its claim is refused, and its acknowledgement leaves nothing behind."""
    queues.ring_accepted(ledger, accept(ledger, "job_1"))
    line = queues.queue(ledger.redis, CUSTOMIZE)
    ledger.redis.lmove(line.key, line.intermediate_queue_key)
    by_the_service(ledger, "job_1")
    assert line.fetch_job("job_1") is not None
    assert ledger.claim("job_1", "w") is None
    queues.acknowledge(ledger.redis, CUSTOMIZE, "job_1")
    assert held(ledger.redis) == [] == queues.popped(ledger.redis, CUSTOMIZE)


def test_a_cancel_stands_though_rq_cannot_be_told(ledger: CustomizeLedger) -> None:
    """RQ's list is of another type here, so that taking back fails as it does in an outage."""
    queues.ring_accepted(ledger, accept(ledger, "job_1"))
    ledger.redis.set(queues.queue(ledger.redis, CUSTOMIZE).key, "no list")
    with pytest.raises(redis.ResponseError):
        queues.recall(ledger.redis, CUSTOMIZE, ["job_unknown"])
    assert cancel(ledger, "job_1", "a", Response()).status is JobStatus.CANCELED


def test_cancels_race_with_pops(redis_server: RedisProcess, client: redis.Redis) -> None:
    """Each job that nobody cancels is delivered, whole, though others are taken from around it as a worker pops."""
    ledger = Ledger(client, CUSTOMIZE, tenant_window=400)
    client.config_set("appendfsync", "no")  # no crash is part of this story
    ids = [f"job_{number}" for number in range(300)]
    for job_id in ids:
        queues.ring_accepted(ledger, accept(ledger, job_id))
    kept = set(ids[::2])
    doomed = random.Random(7).sample(ids[1::2], 150)
    claimed: set[str] = set()

    def pop() -> None:
        with queues.connect(redis_server.url) as own:
            books, line = Ledger(own, CUSTOMIZE), queues.queue(own, CUSTOMIZE)
            while taken := Queue.dequeue_any([line], None, own, queues.DreamJob, JSONSerializer):
                queues.acknowledge(own, CUSTOMIZE, taken[0].id)
                if books.claim(taken[0].id, "w") is not None:
                    claimed.add(taken[0].id)

    popper = threading.Thread(target=pop)
    popper.start()
    for job_id in doomed:
        by_the_service(ledger, job_id)
    popper.join()
    assert kept <= claimed
    assert held(client) == [] == queues.popped(client, CUSTOMIZE)
    assert {record.status for record in map(ledger.get, set(doomed) - claimed) if record} <= {JobStatus.CANCELED}
    client.config_set("appendfsync", "always")
