"""What one tenant wants fetched or told does not stand before what the others want: tenants take turns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from random import Random

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model.roles import Role
from tests.workers.conftest import MakeJob
from tests.workers.ledgers import RESULT, boxed, make_due, record
from workers.jobs import CUSTOMIZE, CustomizeJob, JobStatus, ReferenceInput, Webhook
from workers.ledger import CustomizeLedger, Ledger

FLOOD = 1000
HOOK = Webhook("https://x.example/hook")
UNFETCHED = ReferenceInput(1, Role.SUBJECT, "", url="https://x.example/toy.png")
BOXES = ("fetches", "webhooks")


@pytest.fixture
def ledger(client: redis.Redis) -> Iterator[CustomizeLedger]:
    client.config_set("appendfsync", "no")  # no crash is part of this story
    yield Ledger(client, CUSTOMIZE)
    client.config_set("appendfsync", "always")


def want(ledger: CustomizeLedger, make_job: MakeJob, box: str, job_id: str, tenant: str) -> None:
    """Something of a tenant comes into an outbox: a job to be fetched for, or an end to be told of."""
    job: CustomizeJob = make_job(job_id, tenant=tenant)
    if box == "fetches":
        ledger.accept(replace(job, references=(UNFETCHED,)))
    else:
        ledger.accept(replace(job, webhook=HOOK))
        ledger.cancel(job_id)


def taker(ledger: CustomizeLedger, box: str) -> Callable[..., list[tuple[str, str]]]:
    """Takes what is due of an outbox: (job, tenant) of each."""
    take = ledger.due_fetches if box == "fetches" else ledger.due_webhooks
    return lambda *room: [(one.job_id, one.tenant) for one in take(*room)]


@pytest.mark.parametrize("box", BOXES)
def test_a_flood_is_one_entry_ahead(ledger: CustomizeLedger, make_job: MakeJob, box: str) -> None:
    """Of a thousand entries that came before it, one other goes first. Control: within one tenant all of them do."""
    for number in range(FLOOD):
        want(ledger, make_job, box, f"job_{number}", "a")
    want(ledger, make_job, box, "job_b", "b")
    want(ledger, make_job, box, "job_last", "a")
    take = taker(ledger, box)
    assert take(2) == [("job_0", "a"), ("job_b", "b")]
    order = [job_id for _ in range(FLOOD // 64 + 1) for job_id, _ in take(64)]
    assert order == [*(f"job_{number}" for number in range(1, FLOOD)), "job_last"]


@pytest.mark.parametrize("box", BOXES)
def test_nobody_has_more_than_a_part(ledger: CustomizeLedger, make_job: MakeJob, box: str) -> None:
    """A courier keeps places free of those who fill their part, and takes from the others meanwhile. Control: without
    parts a flood gets all of them.
    """
    for number in range(20):
        want(ledger, make_job, box, f"job_{number}", "a")
    take = taker(ledger, box)
    assert [tenant for _, tenant in take(8, 4)] == ["a"] * 4
    assert take(4, 4, {"a": 4}) == []
    want(ledger, make_job, box, "job_b", "b")
    assert take(4, 4, {"a": 4}) == [("job_b", "b")]
    assert [tenant for _, tenant in take(4, 4, {"a": 3, "b": 1})] == ["a"]
    assert [tenant for _, tenant in take(8)] == ["a"] * 8


def test_what_is_told_again_takes_its_turn_too(ledger: CustomizeLedger, make_job: MakeJob) -> None:
    """A pause lasts although the tenant's other messages go on, and an earlier one brings the turn forward."""
    for number in range(2):
        want(ledger, make_job, "webhooks", f"job_{number}", "a")
    first, second = ledger.due_webhooks()
    ledger.webhook_retry(first.id, 3600.0)
    ledger.webhook_retry(second.id, 0.0)
    assert [one.id for one in ledger.due_webhooks()] == [second.id]
    ledger.webhook_done(second.id)
    assert ledger.due_webhooks() == []
    ledger.webhook_retry(first.id, 0.0)
    assert ledger.due_webhooks() == [replace(first, attempt=2)]


def test_a_message_is_settled_after_its_job_is_gone(ledger: CustomizeLedger, make_job: MakeJob) -> None:
    """A courier that has one in hand while the job is deleted leaves nothing behind."""
    want(ledger, make_job, "webhooks", "job_1", "a")
    (message,) = ledger.due_webhooks()
    ledger.delete("job_1")
    assert boxed(ledger, "webhooks") != {}
    ledger.webhook_retry(message.id, 0.0)
    ledger.webhook_done(message.id)
    assert boxed(ledger, "webhooks") == {}


def test_what_an_older_version_left_is_taken_over(ledger: CustomizeLedger, make_job: MakeJob) -> None:
    """Outboxes were one line for all: what lies in such a one is neither lost nor, if it is leased, taken early."""
    for box in BOXES:
        for number, tenant in enumerate("aab"):
            want(ledger, make_job, box, f"{box}_{number}", tenant)
        for tenant, entries in boxed(ledger, box).items():
            ledger.redis.zadd(f"{CUSTOMIZE.root}{box}", entries)  # pyright: ignore[reportArgumentType]  # sync client
            ledger.redis.delete(f"{CUSTOMIZE.root}{box}:{tenant}")
        ledger.redis.delete(f"{CUSTOMIZE.root}turns:{box}")
        take = taker(ledger, box)
        assert sorted(take()) == [(f"{box}_0", "a"), (f"{box}_1", "a"), (f"{box}_2", "b")]
        assert not ledger.redis.exists(f"{CUSTOMIZE.root}{box}")
        assert take() == [], "they are leased"
        make_due(ledger, box)
        assert len(take()) == 3


def test_what_nobody_takes_for_long_is_forgotten(ledger: CustomizeLedger, make_job: MakeJob) -> None:
    """Without a courier messages do not pile up for ever: those of records that have long expired go."""
    for number, tenant in enumerate("aab"):
        want(ledger, make_job, "webhooks", f"job_{number}", tenant)
    fresh = {f"msg_job_{number}_2" for number in (1, 2)}
    ledger.redis.zadd(f"{CUSTOMIZE.root}webhooks:a", {"msg_job_0_2": 1})
    ledger.redis.zadd(f"{CUSTOMIZE.root}turns:webhooks", {"a": 1})
    ledger.reap()
    assert {entry for line in boxed(ledger, "webhooks").values() for entry in line} == fresh
    assert {one.id for one in ledger.due_webhooks()} == fresh


def test_a_job_that_couriers_are_lost_over_does_not_stop_its_tenant(ledger: CustomizeLedger, make_job: MakeJob) -> None:
    """It fails while others of its tenant are handed out by the same look."""
    want(ledger, make_job, "fetches", "job_1", "a")
    for _ in range(3):
        assert len(ledger.due_fetches()) == 1
        make_due(ledger, "fetches")
    want(ledger, make_job, "fetches", "job_2", "a")
    assert [fetch.job_id for fetch in ledger.due_fetches()] == ["job_2"]
    assert record(ledger).status is JobStatus.FAILED
    assert [*boxed(ledger, "fetches")["a"]] == ["job_2"]


ACTS = st.one_of(
    st.tuples(st.just("want"), st.sampled_from("abc"), st.integers(1, 4)),
    st.tuples(st.just("take"), st.integers(1, 5), st.integers(1, 3)),
    st.tuples(st.just("settle"), st.sampled_from("abc"), st.integers(1, 3)),
)


@settings(max_examples=40, suppress_health_check=list(HealthCheck))
@given(acts=st.lists(ACTS, min_size=5, max_size=30))
def test_turns_are_fair_whatever_happens(
    ledger: CustomizeLedger, make_job: MakeJob, acts: list[tuple[str, str | int, int]]
) -> None:
    """No place stays free that somebody may have, nobody has more than a part, a tenant's own come in order, and
    whoever waits and may be served is served before anybody else is served twice.
    """
    ledger.redis.flushall()
    waiting: dict[str, list[str]] = {"a": [], "b": [], "c": []}
    held: Counter[str] = Counter()
    since: dict[str, Counter[str]] = {tenant: Counter() for tenant in waiting}
    number = 0
    for act, who, many in acts:
        if act == "want":
            for _ in range(many):
                number += 1
                want(ledger, make_job, "fetches", f"job_{number}", str(who))
                waiting[str(who)].append(f"job_{number}")
        elif act == "settle":
            held[str(who)] = max(0, held[str(who)] - many)
        else:
            room, part = int(who), many
            free = {tenant: min(len(jobs), max(0, part - held[tenant])) for tenant, jobs in waiting.items()}
            taken = ledger.due_fetches(room, part, held)
            assert len(taken) == min(room, sum(free.values()))
            for fetch in taken:
                for tenant, jobs in waiting.items():
                    if tenant != fetch.tenant and jobs and held[tenant] < part:
                        since[tenant][fetch.tenant] += 1
                        assert since[tenant][fetch.tenant] == 1
                since[fetch.tenant].clear()
                assert fetch.job_id == waiting[fetch.tenant].pop(0)
                held[fetch.tenant] += 1
                assert held[fetch.tenant] <= part


@settings(max_examples=25, suppress_health_check=list(HealthCheck))
@given(waiting=st.lists(st.integers(0, 25), min_size=2, max_size=4), shuffled=st.randoms(use_true_random=False))
def test_the_place_in_line_counts_the_others(
    client: redis.Redis, make_job: MakeJob, waiting: list[int], shuffled: Random
) -> None:
    """What is told at first is what comes true, give or take a window of each tenant: by a worker that takes what RQ
    would hand out.
    """
    client.flushall()
    client.config_set("appendfsync", "no")
    window = 2
    ledger: CustomizeLedger = Ledger(client, CUSTOMIZE, tenant_window=window)
    jobs = [(f"job_{tenant}_{number}", f"t{tenant}") for tenant, many in enumerate(waiting) for number in range(many)]
    shuffled.shuffle(jobs)
    handed: list[str] = []
    for job_id, tenant in jobs:
        if ledger.accept(make_job(job_id, tenant=tenant)).called:
            handed.append(job_id)
            ledger.rung([job_id])
    told = {job_id: ledger.position(job_id) for job_id, _ in jobs}
    for place in range(len(jobs)):
        job_id = handed.pop(0)
        guess = told[job_id]
        assert guess is not None and abs(guess - place) <= window * len(waiting)
        now = ledger.position(job_id)
        assert now is not None and now <= window * len(waiting), "and at the end that it is about to begin"
        token = ledger.claim(job_id, "w")
        assert token is not None and ledger.commit(job_id, token, RESULT)
        handed += ledger.to_ring()
        ledger.rung(handed)
    assert not client.exists(f"{CUSTOMIZE.root}lines")
    client.config_set("appendfsync", "always")


def test_a_small_tenants_place_does_not_grow_with_anothers_flood(ledger: CustomizeLedger, make_job: MakeJob) -> None:
    """Its second job comes in the second round, however long the other's line is; the flood's last waits for all."""
    ledger = Ledger(ledger.redis, CUSTOMIZE, tenant_window=1)
    for number in range(100):
        ledger.accept(make_job(f"job_{number}", tenant="a"))
    for job_id in ("job_first", "job_second", "job_third"):
        ledger.accept(make_job(job_id, tenant="b"))
    assert [ledger.position(job_id) for job_id in ("job_first", "job_second", "job_third")] == [1, 2, 4]
    assert ledger.position("job_99") == 2 + 98 + 2
