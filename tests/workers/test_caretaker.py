"""The caretaker's round: whose lease is renewed, whose job is taken back."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from tests.waiting import wait_for
from tests.workers.conftest import MakeJob
from tests.workers.ledgers import running
from workers import queues
from workers.caretaker import Caretaker, Claim, IdleWatch, to_hand_over
from workers.jobs import CUSTOMIZE, JobStatus
from workers.ledger import Ledger


@dataclass
class Hands:
    """Holds claims, and notes what it is told."""

    claims: list[Claim] = field(default_factory=list[Claim])
    heard: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    gave: int = 0
    tidied: int = 0

    def hear(self, claim: Claim, reason: str) -> None:
        self.heard.append((claim.job_id, reason))

    def hand_over(self) -> None:
        self.gave += 1

    def tidy(self) -> None:
        self.tidied += 1


def nothing() -> None:
    """A sweep that finds nothing."""


def caretaker_of(client: redis.Redis, hands: Hands | None, sweep: Callable[[], None] = nothing) -> Caretaker:
    ledger = Ledger(client, CUSTOMIZE, lease_s=30.0)
    return Caretaker(
        client,
        CUSTOMIZE,
        ledger,
        "w",
        card=lambda: {"state": "ready"},
        holder=lambda: hands,
        stall_s=600.0,
        sweep=sweep,
        sweep_s=0.0,
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
    hands = Hands([Claim("job_1", token, time.monotonic() - idle_s)])
    caretaker_of(client, hands).round()
    assert hands.tidied == 1
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


def test_a_round_that_fails_is_not_the_last(client: redis.Redis, make_job: MakeJob) -> None:
    """A disk that fails ends a round early; the next ones come and renew leases. No words of the error are logged."""
    ledger = Ledger(client, CUSTOMIZE, lease_s=1.0)
    token = running(ledger, make_job)
    renewed: list[float | None] = []

    def sweep() -> None:
        renewed.append(client.zscore(f"{CUSTOMIZE.root}leases", "job_1"))  # pyright: ignore[reportArgumentType]  # sync client
        if len(renewed) == 1:
            raise OSError(5, "canary")

    caretaker = caretaker_of(client, Hands([Claim("job_1", token, time.monotonic())]), sweep)
    caretaker.ledger = ledger
    with capture_logs() as lines:
        caretaker.start()
        wait_for(lambda: len(renewed) >= 3, "more rounds")
        caretaker.halt()
    assert len(set(renewed)) == len(renewed) and None not in renewed
    assert [line.get("exception") for line in lines] == ["OSError"] and "canary" not in str(lines)


def test_an_expired_job_leaves_rq(client: redis.Redis, make_job: MakeJob) -> None:
    """Its place in the window is free for the next, so its delivery may not stay before other tenants'."""
    ledger = Ledger(client, CUSTOMIZE)
    for job_id, within_s in (("job_late", 0.0), ("job_fine", 3600.0)):
        queues.ring_accepted(ledger, ledger.accept(make_job(job_id), start_within_s=within_s))
    assert queues.queue(client, CUSTOMIZE).get_job_ids() == ["job_late", "job_fine"]
    caretaker_of(client, None).round()
    assert queues.queue(client, CUSTOMIZE).get_job_ids() == ["job_fine"]
    assert client.keys("rq:job:*") == [b"rq:job:job_fine"]


def test_a_claim_hears_what_its_beats_are_answered(client: redis.Redis, make_job: MakeJob) -> None:
    """A job that makes no step for long: its cancel, deadline or loss is heard by the round."""
    ledger = Ledger(client, CUSTOMIZE)
    hands = Hands()
    for job_id, within_s in (("job_fine", 3600.0), ("job_late", 0.5), ("job_canceled", None), ("job_lost", None)):
        ledger.accept(make_job(job_id), start_within_s=within_s)
        token = ledger.claim(job_id, "w")
        assert token is not None
        hands.claims.append(Claim(job_id, token, time.monotonic()))
    ledger.cancel("job_canceled")
    ledger.hand_back("job_lost", hands.claims[-1].token)
    wait_for(lambda: ledger.beat("job_late", hands.claims[1].token) == "expired", "the deadline")
    caretaker_of(client, hands).round()
    assert sorted(hands.heard) == [("job_canceled", "canceled"), ("job_late", "expired"), ("job_lost", "lost")]


@pytest.mark.parametrize("ended", [False, True])
def test_a_worker_killed_between_pop_and_acknowledge(client: redis.Redis, make_job: MakeJob, *, ended: bool) -> None:
    """What it leaves in RQ goes at the second search, not before; a job that still waits is delivered again."""
    ledger = Ledger(client, CUSTOMIZE, lease_s=0.0)
    queues.ring_accepted(ledger, ledger.accept(make_job("job_1")))
    line = queues.queue(client, CUSTOMIZE)
    assert client.lmove(line.key, line.intermediate_queue_key) == b"job_1", "as RQ's worker pops"
    if ended:
        ledger.cancel("job_1")
    caretaker = caretaker_of(client, None)
    caretaker.ledger = ledger if ended else Ledger(client, CUSTOMIZE, lease_s=3600.0)
    caretaker.search()
    assert queues.popped(client, CUSTOMIZE) == ["job_1"], "its worker may be about to acknowledge it"
    caretaker.ledger = ledger
    caretaker.search()
    assert queues.popped(client, CUSTOMIZE) == []
    assert line.get_job_ids() == ([] if ended else ["job_1"])
    assert client.exists("rq:job:job_1") == int(not ended)


@pytest.mark.parametrize(("lease_s", "found"), [(0.0, True), (3600.0, False)])
def test_a_new_worker_finds_what_one_before_it_popped(
    client: redis.Redis, make_job: MakeJob, *, lease_s: float, found: bool
) -> None:
    """Where workers die faster than leases lapse none lives until a second search: one is enough for a job that has
    waited for long. The control has not.
    """
    ledger = Ledger(client, CUSTOMIZE, lease_s=lease_s)
    queues.ring_accepted(ledger, ledger.accept(make_job("job_1")))
    line = queues.queue(client, CUSTOMIZE)
    client.lmove(line.key, line.intermediate_queue_key)
    newcomer = caretaker_of(client, None)
    newcomer.ledger = ledger
    newcomer.round()
    assert (line.get_job_ids(), queues.popped(client, CUSTOMIZE)) == ((["job_1"], []) if found else ([], ["job_1"]))


def test_deliveries_that_go_on_are_left_alone(client: redis.Redis) -> None:
    """The control: what is popped anew between two searches is never cleared."""
    caretaker = caretaker_of(client, None)
    line = queues.queue(client, CUSTOMIZE)
    for job_id in ("job_1", "job_2", "job_3"):
        queues.ring(client, CUSTOMIZE, job_id)
        client.lmove(line.key, line.intermediate_queue_key)
        caretaker.search()
        assert queues.popped(client, CUSTOMIZE) == [job_id]
        queues.acknowledge(client, CUSTOMIZE, job_id)


@pytest.mark.parametrize(
    ("jobs", "peer", "waiting", "gives"),
    [(3, "ready", 0, 1), (1, "ready", 0, 0), (3, "busy", 0, 0), (3, None, 0, 0), (3, "ready", 1, 0)],
)
def test_when_to_hand_over(client: redis.Redis, jobs: int, peer: str | None, waiting: int, gives: int) -> None:
    """Once, when another has been ready for a second and the queue has nothing for it; and not the last job."""
    hands = Hands([Claim(f"job_{number}", number, time.monotonic()) for number in range(jobs)])
    caretaker = caretaker_of(client, hands)
    for number in range(waiting):
        queues.ring(client, CUSTOMIZE, f"job_waiting_{number}")
    began = time.monotonic()
    while time.monotonic() - began < 1.5 and not hands.gave:
        if peer is not None:
            queues.announce(client, CUSTOMIZE, "peer", {"state": peer}, ttl_s=60)
        caretaker.round()
    assert hands.gave == gives
    assert not gives or time.monotonic() - began >= 1.0


@given(in_hand=st.integers(0, 64), data=st.data())
def test_how_many_to_hand_over(in_hand: int, data: st.DataObject) -> None:
    """At most half of what waits, rounded up, at least one if that leaves one; never the last one in hand."""
    waiting = data.draw(st.integers(0, in_hand))
    given_away = to_hand_over(waiting, in_hand)
    assert 0 <= given_away <= (waiting + 1) // 2
    assert in_hand == 0 or given_away < in_hand
    assert given_away > 0 or waiting == 0 or in_hand == 1


def test_idle_means_ready_at_every_look() -> None:
    """A worker that was busy in between, or oneself, is not idle."""
    watch = IdleWatch("me")
    cards = [{"name": name, "state": "ready"} for name in ("me", "a", "b")]
    assert watch.look(cards, 10.0) == []
    assert watch.look([cards[0], cards[1], {"name": "b", "state": "busy"}], 10.6) == []
    assert watch.look(cards, 11.0) == ["a"]
    assert sorted(watch.look(cards, 12.0)) == ["a", "b"]
    watch.forget()
    assert watch.look(cards, 12.1) == []
