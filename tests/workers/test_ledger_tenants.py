"""Who is accepted, listed and forgotten: idempotency keys, shares, lines and windows, deletion."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import redis

from tests.workers.conftest import MakeJob
from tests.workers.ledgers import RESULT, record, running, settled_hour
from workers import queues
from workers.jobs import CUSTOMIZE, JobStatus, Progress
from workers.ledger import Accepted, CustomizeLedger, Ledger, Once

DIGEST, OTHER = "a" * 64, "b" * 64


@pytest.fixture
def ledger(client: redis.Redis) -> CustomizeLedger:
    return Ledger(client, CUSTOMIZE, tenant_window=2)


def test_a_key_is_answered_with_its_first_job(ledger: CustomizeLedger, make_job: MakeJob) -> None:
    """The same key and content: the first job, even if it has ended. Other content: conflict. Another tenant: new."""
    once = Once("a", "order 42", DIGEST)
    assert ledger.seen(once) is None
    assert ledger.accept(make_job("job_1", tenant="a"), once=once).outcome == "new"
    assert ledger.accept(make_job("job_2", tenant="a"), once=once) == Accepted("replayed", "job_1")
    ledger.cancel("job_1")
    assert ledger.accept(make_job("job_3", tenant="a"), once=once) == Accepted("replayed", "job_1")
    assert ledger.accept(make_job("job_4", tenant="a"), once=Once("a", "order 42", OTHER)).outcome == "conflict"
    assert ledger.seen(once) == Accepted("replayed", "job_1")
    assert ledger.seen(Once("a", "order 42", OTHER)) == Accepted("conflict", "job_1")
    assert ledger.accept(make_job("job_5", tenant="b"), once=Once("b", "order 42", OTHER)).outcome == "new"
    assert [one.job.id for one in ledger.list()[0]] == ["job_5", "job_1"], "nothing else was recorded"


def test_keys_last_a_day_and_say_nothing(ledger: CustomizeLedger, client: redis.Redis, make_job: MakeJob) -> None:
    """A key is forgotten after 24 hours, and neither it nor the content it came with lies in Redis."""
    ledger.accept(make_job("job_1"), once=Once("default", "canary-key", DIGEST))
    (name,) = client.keys(f"{CUSTOMIZE.root}once:*")  # pyright: ignore[reportGeneralTypeIssues]  # sync client
    assert client.ttl(name) == pytest.approx(86_400, abs=60)
    assert all(b"canary" not in key for key in client.keys("*"))  # pyright: ignore[reportGeneralTypeIssues]  # sync client


def test_of_many_at_once_one_is_new(ledger: CustomizeLedger, make_job: MakeJob) -> None:
    """Requests with one key that come at the same moment are one job."""
    once = Once("a", "k", DIGEST)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda n: ledger.accept(make_job(f"job_{n}", tenant="a"), once=once), range(24)))
    (first,) = [answer.job_id for answer in answers if answer.outcome == "new"]
    assert {answer.job_id for answer in answers} == {first}


def test_shares_and_the_bound(ledger: CustomizeLedger, make_job: MakeJob) -> None:
    """A tenant may have its share of the device waiting, all together the bound; one job alone may be of any size.

    What is refused leaves nothing behind, a key neither; what ends makes room again.
    """

    def send(job_id: str, tenant: str, cost_s: float, **limits: float) -> str:
        once = Once(tenant, job_id, DIGEST)
        return ledger.accept(make_job(job_id, tenant=tenant), cost_s=cost_s, once=once, **limits).outcome

    assert send("job_1", "a", 50.0, share_s=10.0) == "new"
    assert send("job_2", "a", 1.0, share_s=10.0) == "over_share"
    assert send("job_3", "b", 9.0, share_s=10.0) == "new"
    assert send("job_4", "b", 1.0, share_s=10.0, bound_s=60.0) == "new"
    assert send("job_5", "c", 1.0, share_s=10.0, bound_s=60.0) == "over_bound"
    assert (ledger.load("a"), ledger.load("b"), ledger.load("c"), ledger.load()) == (50.0, 10.0, 0.0, 60.0)
    assert ledger.get("job_2") is None and ledger.get("job_5") is None
    ledger.cancel("job_1")
    assert send("job_2", "a", 1.0, share_s=10.0) == "new"
    assert send("job_3", "b", 9.0, share_s=1.0) == "known", "who sends again is not refused"
    for job_id in ("job_2", "job_3", "job_4"):
        ledger.cancel(job_id)
    assert (ledger.load("b"), ledger.load()) == (0.0, 0.0)


def test_a_pace(ledger: CustomizeLedger, client: redis.Redis, make_job: MakeJob) -> None:
    """So many acceptances an hour by Redis' clock, counted in the script that accepts: who resends after a lost reply,
    replays or is refused by a share counts no more, and the count itself is forgotten."""
    settled_hour(client)

    def send(job_id: str, key: str = "", **limits: float) -> Accepted:
        once = Once("a", key, DIGEST) if key else None
        return ledger.accept(make_job(job_id, tenant="a"), once=once, cost_s=1.0, pace=2, **limits)

    assert send("job_1", "k").outcome == "new"
    assert send("job_1").outcome == "known"
    assert send("job_2", "k") == Accepted("replayed", "job_1")
    assert send("job_2", share_s=1.5).outcome == "over_share"
    assert send("job_2").outcome == "new"
    refused = send("job_3", "other")
    assert (refused.outcome, refused.called) == ("over_pace", False)
    assert refused.wait_s == pytest.approx(3600 - client.time()[0] % 3600, abs=5)  # pyright: ignore[reportIndexIssue]  # sync client
    assert ledger.get("job_3") is None and ledger.seen(Once("a", "other", DIGEST)) is None
    assert send("job_3", "k") == Accepted("replayed", "job_1")
    assert ledger.accept(make_job("job_4", tenant="b"), pace=2).outcome == "new"
    counters = [key for tenant in "ab" for key in client.scan_iter(f"{CUSTOMIZE.root}accepted:{tenant}:*")]
    assert [client.get(key) for key in counters] == [b"2", b"1"]
    assert all(3600 < client.ttl(key) <= 7200 for key in counters), "longer than its hour, not for ever"  # pyright: ignore[reportOperatorIssue]  # sync client


def test_a_pace_holds_against_many_at_once(ledger: CustomizeLedger, client: redis.Redis, make_job: MakeJob) -> None:
    """Gateways that accept at the same moment do not let more in together."""
    settled_hour(client)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda n: ledger.accept(make_job(f"job_{n}", tenant="a"), pace=5), range(24)))
    assert sorted(answer.outcome for answer in answers) == ["new"] * 5 + ["over_pace"] * 19


def test_a_flood_waits_in_its_own_line(ledger: CustomizeLedger, client: redis.Redis, make_job: MakeJob) -> None:
    """A tenant with a hundred jobs has two in RQ; another's job is right behind them, not behind the hundred."""
    for number in range(100):
        queues.ring_accepted(ledger, ledger.accept(make_job(f"job_{number}", tenant="flood")))
    queues.ring_accepted(ledger, ledger.accept(make_job("job_other", tenant="small")))
    deliveries = queues.queue(client, CUSTOMIZE)
    assert deliveries.get_job_ids() == ["job_0", "job_1", "job_other"]
    assert ledger.position("job_other") == 2
    assert ledger.position("job_99") == 3 + 97, "all that is called for, and its own line before it"
    assert ledger.claim("job_50", "w") is None, "a delivery for one in the line, forged or stray, is refused"
    token = ledger.claim("job_0", "w")
    assert token is not None
    assert ledger.commit("job_0", token, RESULT)
    queues.ring_due(ledger)
    assert deliveries.get_job_ids()[-1] == "job_2", "the first of the line"


def test_a_handed_back_job_keeps_its_place(ledger: CustomizeLedger, make_job: MakeJob) -> None:
    """What comes back from a worker goes before the line, and does not let another in."""
    for number in range(4):
        ledger.accept(make_job(f"job_{number}"))
    token = ledger.claim("job_0", "w")
    assert token is not None
    assert ledger.hand_back("job_0", token)
    assert [ledger.position(f"job_{number}") for number in range(4)] == [0, 1, 2, 3]
    assert ledger.waiting(0.0) == ["job_0", "job_1"]


def test_lists_are_a_tenants_own(ledger: CustomizeLedger, make_job: MakeJob) -> None:
    """One sees one's own jobs, page by page and by status; only an operator sees all."""
    for number in range(6):
        ledger.accept(make_job(f"job_{number}", tenant="ab"[number % 2]))
    ledger.cancel("job_2")
    page, cursor = ledger.list("a", None, 2)
    rest, end = ledger.list("a", cursor, 2)
    assert [one.job.id for one in page + rest] == ["job_4", "job_2", "job_0"] and end is None
    assert [one.job.id for one in ledger.list("a", None, 5, JobStatus.CANCELED)[0]] == ["job_2"]
    assert ledger.list("b", None, 5, JobStatus.CANCELED)[0] == []
    assert ledger.list("nobody")[0] == []
    assert len(ledger.list(None)[0]) == 6


def test_deleting(ledger: CustomizeLedger, client: redis.Redis, make_job: MakeJob) -> None:
    """Only what has ended can be deleted, and it leaves a tombstone alone; asked again, the answer is the same."""
    token = running(ledger, make_job)
    assert not ledger.delete("job_1") and not ledger.delete("job_unknown")
    ledger.commit("job_1", token, RESULT)
    assert ledger.gone("job_1") is None, "not yet"
    assert ledger.delete("job_1") and ledger.delete("job_1")
    assert ledger.get("job_1") is None and ledger.cancel("job_1") is None
    assert ledger.gone("job_1") == "default" and ledger.gone("job_unknown") is None
    assert client.keys(f"{CUSTOMIZE.root}*job_1*") == [f"{CUSTOMIZE.root}gone:job_1".encode()]
    assert ledger.list()[0] == [] and ledger.list("default", None, 5, JobStatus.SUCCEEDED)[0] == []
    assert ledger.accept(make_job("job_1")).outcome == "known", "an id is never used again"
    assert not ledger.commit("job_1", token, RESULT) and ledger.get("job_1") is None


def test_what_ended_lately_is_counted(ledger: CustomizeLedger, make_job: MakeJob) -> None:
    """The drain rate counts ends of any kind, and open jobs not."""
    for number in range(3):
        ledger.accept(make_job(f"job_{number}"))
    ledger.cancel("job_0")
    ledger.cancel("job_1")
    assert ledger.ended(60.0) == 2
    assert ledger.ended(0.0) == 0


def test_a_start_deadline(ledger: CustomizeLedger, make_job: MakeJob) -> None:
    """Not begun in time: expired, by whoever looks first, and its place in the window is free."""
    for job_id in ("job_swept", "job_claimed"):
        ledger.accept(make_job(job_id), start_within_s=0.0)
    ledger.accept(make_job("job_next"), start_within_s=3600.0)
    assert ledger.claim("job_claimed", "w") is None
    assert record(ledger, "job_claimed").status is JobStatus.EXPIRED
    assert ledger.expire() == ["job_swept"] and ledger.expire() == []
    assert record(ledger, "job_swept").status is JobStatus.EXPIRED
    start_by = record(ledger, "job_next").start_by
    assert start_by is not None and start_by - record(ledger, "job_next").created_at == pytest.approx(3600.0)
    assert ledger.claim("job_next", "w") is not None


def test_a_start_deadline_means_a_step(ledger: CustomizeLedger, client: redis.Redis, make_job: MakeJob) -> None:
    """Whoever runs hears of it; it expires as soon as it is queued again. With a step made in time it has no limit."""
    tokens: dict[str, int] = {}
    for job_id, steps in (("job_slow", 0), ("job_begun", 1)):
        ledger.accept(make_job(job_id), start_within_s=3600.0)
        tokens[job_id] = ledger.claim(job_id, "w") or 0
        assert ledger.beat(job_id, tokens[job_id], Progress("denoise", steps, 2)) == "ok"
        assert not ledger.release_expired(job_id, tokens[job_id]), "there is time"
        client.hset(f"{CUSTOMIZE.root}job:{job_id}", "start_by", "1")
        client.zadd(f"{CUSTOMIZE.root}deadlines", {job_id: 1}, xx=True)
    assert ledger.expire() == [], "what runs is its worker's affair"
    assert ledger.beat("job_slow", tokens["job_slow"]) == "expired"
    assert ledger.beat("job_begun", tokens["job_begun"]) == "ok"
    assert not ledger.release_expired("job_begun", tokens["job_begun"])
    for job_id, token in tokens.items():
        assert ledger.hand_back(job_id, token)
    assert ledger.expire() == ["job_slow"]
    assert ledger.claim("job_begun", "w") is not None
