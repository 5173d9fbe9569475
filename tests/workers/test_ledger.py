"""The ledger against real Redis: who may change what, and that nothing else ever happens."""

from __future__ import annotations

import time

import pytest
import redis

from tests.workers.conftest import MakeJob
from tests.workers.ledgers import ERROR, RESULT, STEP, lapse, record, running
from workers.books.values import Accepted
from workers.jobs import (
    CUSTOMIZE,
    TRAINING,
    JobResult,
    JobStatus,
    TrainingJob,
)
from workers.ledger import CustomizeLedger, DamagedRecordError, Ledger


@pytest.fixture
def ledger(client: redis.Redis) -> CustomizeLedger:
    return Ledger(client, CUSTOMIZE)


def test_record_comes_back_as_it_went_in(ledger: CustomizeLedger, make_job: MakeJob) -> None:
    """Everything of a job survives Redis: text of any script, metadata, 64-bit seeds."""
    job = make_job("job_1", seed=2**64 - 1, prompt='кот "猫" 🐈\n\\', metadata={"order": "42"})
    assert ledger.accept(job) == Accepted("new", "job_1", called=True)
    before = time.time()
    found = record(ledger)
    assert (found.job, found.status, found.attempt) == (job, JobStatus.QUEUED, 1)
    assert abs(found.created_at - before) < 60
    assert found.started_at is None and found.result is None


def test_accept_twice_changes_nothing(ledger: CustomizeLedger, make_job: MakeJob) -> None:
    """An id is accepted once; a second content under it does not replace the first, nor revive an ended job."""
    assert ledger.accept(make_job("job_1")).outcome == "new"
    assert ledger.accept(make_job("job_1")).outcome == "known"
    assert ledger.accept(make_job("job_1", prompt="another")).outcome == "known"
    assert record(ledger).job.prompt == "a toy"
    ledger.cancel("job_1")
    assert ledger.accept(make_job("job_1")).outcome == "known"
    assert record(ledger).status is JobStatus.CANCELED


def test_lost_replies_of_accept_and_claim(client: redis.Redis, make_job: MakeJob) -> None:
    """A client that resends after a lost reply gets the answer it missed, not a refusal."""
    for name, first in (("accept", Accepted("new", "job_1", called=True)), ("claim", 1)):
        client.flushall()
        ledger = Ledger(client, CUSTOMIZE)
        script = getattr(ledger, f"_{name}")

        def twice(*, keys: list[str], args: list[str], script: object = script) -> object:
            script(keys=keys, args=args)  # pyright: ignore[reportCallIssue]  # the reply that got lost
            return script(keys=keys, args=args)  # pyright: ignore[reportCallIssue]

        setattr(ledger, f"_{name}", twice)
        answers = {"accept": ledger.accept(make_job("job_1")), "claim": ledger.claim("job_1", "w")}
        assert answers[name] == first


def test_walk_to_success(ledger: CustomizeLedger, make_job: MakeJob) -> None:
    """The whole way: progress is seen, the result stays, a repeated commit is still one's own."""
    token = running(ledger, make_job)
    assert ledger.position("job_1") is None
    assert ledger.beat("job_1", token, STEP) == "ok"
    assert record(ledger).progress == STEP
    assert ledger.beat("job_1", token) == "ok"
    assert record(ledger).progress == STEP, "a bare renewal leaves the progress"
    assert [ledger.commit("job_1", token, RESULT) for _ in range(2)] == [True, True], "a reply may have been lost"
    ended = record(ledger)
    assert (ended.status, ended.result) == (JobStatus.SUCCEEDED, RESULT)
    assert ended.started_at is not None and ended.finished_at is not None
    assert ended.created_at <= ended.started_at <= ended.finished_at
    assert not ledger.fail("job_1", token, ERROR)
    assert ledger.beat("job_1", token) == "lost"


def test_only_queued_jobs_are_claimed(ledger: CustomizeLedger, make_job: MakeJob) -> None:
    """A second delivery, an unknown id and an ended job all get a no."""
    token = running(ledger, make_job)
    assert ledger.claim("job_1", "other") is None
    assert ledger.claim("job_unknown", "w") is None
    ledger.fail("job_1", token, ERROR)
    assert ledger.claim("job_1", "w") is None
    assert record(ledger).error == ERROR


def test_a_lost_worker_changes_nothing(ledger: CustomizeLedger, make_job: MakeJob) -> None:
    """The fence: after its lease lapsed, the old token is refused by every call, before and after the next claim."""
    old = running(ledger, make_job)
    lapse(ledger, "job_1", old)
    assert ledger.reap() == ["job_1"]
    assert record(ledger).status is JobStatus.QUEUED
    new = None
    for claimed_again in (False, True):
        if claimed_again:
            new = ledger.claim("job_1", "w2")
        assert not ledger.commit("job_1", old, RESULT)
        assert not ledger.fail("job_1", old, ERROR)
        assert not ledger.release_canceled("job_1", old)
        assert ledger.beat("job_1", old, STEP) == "lost"
    assert new is not None and new > old
    assert ledger.commit("job_1", new, RESULT)
    assert record(ledger).attempt == 2


def test_reaping(ledger: CustomizeLedger, make_job: MakeJob) -> None:
    """A live lease is left alone; three lost workers are the end; a wish to cancel is honoured instead."""
    running(ledger, make_job)
    assert ledger.reap() == []
    for attempt in (1, 2, 3):
        assert record(ledger).attempt == attempt
        token = 1 if attempt == 1 else ledger.claim("job_1", "w")
        assert token is not None
        lapse(ledger, "job_1", token)
        assert ledger.reap() == (["job_1"] if attempt < 3 else [])
    ended = record(ledger)
    assert ended.status is JobStatus.FAILED
    assert ended.error is not None and (ended.error.code, ended.error.retryable) == ("worker_lost", True)
    assert not ledger.fail("job_1", token, ERROR), "the last of them has no say any more either"

    token = running(ledger, make_job, "job_2")
    ledger.cancel("job_2")
    lapse(ledger, "job_2", token)
    assert ledger.reap() == []
    assert record(ledger, "job_2").status is JobStatus.CANCELED


def test_lease_is_measured_by_redis(client: redis.Redis, make_job: MakeJob) -> None:
    """The lease is real seconds on Redis' clock: what it says is due is due, whatever this machine's clock says."""
    ledger = Ledger(client, CUSTOMIZE, lease_s=30.0)
    running(ledger, make_job)
    seconds, micros = client.time()  # pyright: ignore[reportGeneralTypeIssues]  # sync client
    due = client.zscore(f"{CUSTOMIZE.root}leases", "job_1")
    assert due == pytest.approx(seconds + micros / 1e6 + 30.0, abs=2.0)


def test_handing_back_charges_nothing(ledger: CustomizeLedger, make_job: MakeJob) -> None:
    """A worker that leaves puts its job back in its old place in the line; only the holder of the lease can."""
    token = running(ledger, make_job)
    ledger.accept(make_job("job_2"))
    assert not ledger.hand_back("job_1", token + 1)
    assert ledger.hand_back("job_1", token)
    assert (record(ledger).status, record(ledger).attempt, record(ledger).started_at) == (JobStatus.QUEUED, 1, None)
    assert ledger.position("job_1") == 0
    assert ledger.hand_back("job_1", token), "the reply may have been lost"
    assert not ledger.commit("job_1", token, JobResult((), {}))
    assert ledger.reap() == []
    assert ledger.claim("job_1", "another") == token + 1


def test_kinds_do_not_mix(client: redis.Redis, ledger: CustomizeLedger, make_job: MakeJob) -> None:
    """Trainings are another ledger in the same Redis: one's ids, lines and leases mean nothing to the other."""
    trainings = Ledger(client, TRAINING, lease_s=0.0)
    ledger.accept(make_job("job_1"))
    trainings.accept(TrainingJob("job_1", "a", {}))
    assert trainings.claim("job_1", "w") == 1
    assert ledger.reap() == [] and record(ledger).status is JobStatus.QUEUED
    assert trainings.reap() == ["job_1"]
    assert ledger.list()[0] == [record(ledger)]


def test_cancel(ledger: CustomizeLedger, make_job: MakeJob) -> None:
    """Queued ends at once; running hears it at the next beat; ended and unknown stay what they are."""
    assert ledger.cancel("job_1") is None
    ledger.accept(make_job("job_1"))
    canceled = ledger.cancel("job_1")
    assert canceled is not None and canceled.status is JobStatus.CANCELED
    assert ledger.claim("job_1", "w") is None

    token = running(ledger, make_job, "job_2")
    assert not ledger.release_canceled("job_2", token), "nobody has asked yet"
    asked = ledger.cancel("job_2")
    assert asked is not None and (asked.status, asked.cancel_requested) == (JobStatus.RUNNING, True)
    assert ledger.beat("job_2", token, STEP) == "canceled"
    assert ledger.release_canceled("job_2", token)
    ended = ledger.cancel("job_2")
    assert ended is not None and ended.status is JobStatus.CANCELED
    assert ended == record(ledger, "job_2")


def test_position_is_the_order_of_acceptance(ledger: CustomizeLedger, make_job: MakeJob) -> None:
    """One moves up as those ahead are taken; a job whose worker was lost gets its old place back."""
    for number in range(4):
        ledger.accept(make_job(f"job_{number}"))
    assert [ledger.position(f"job_{number}") for number in range(4)] == [0, 1, 2, 3]
    token = ledger.claim("job_0", "w")
    ledger.cancel("job_2")
    assert [ledger.position(f"job_{number}") for number in range(4)] == [None, 0, None, 1]
    assert token is not None
    lapse(ledger, "job_0", token)
    ledger.reap()
    assert [ledger.position(f"job_{number}") for number in range(4)] == [0, 1, None, 2]


def test_list_pages_newest_first(ledger: CustomizeLedger, make_job: MakeJob) -> None:
    """Pages together are the whole list, once each, even as new jobs arrive; a status filters."""
    for number in range(7):
        ledger.accept(make_job(f"job_{number}"))
    for number in (1, 4):
        ledger.cancel(f"job_{number}")
    seen: list[str] = []
    cursor = None
    while True:
        page, cursor = ledger.list(None, cursor, 3)
        seen += [found.job.id for found in page]
        ledger.accept(make_job(f"job_late_{len(seen)}"))
        if cursor is None:
            break
    assert seen == [f"job_{number}" for number in reversed(range(7))]
    canceled, _ = ledger.list(None, None, 10, JobStatus.CANCELED)
    assert [found.job.id for found in canceled] == ["job_4", "job_1"]
    assert ledger.list(None, None, 10, JobStatus.SUCCEEDED) == ([], None)
    for wrong in ("-1", "x", "", "1e3", "²"):
        with pytest.raises(ValueError, match="cursor"):
            ledger.list(None, wrong, 3)


def test_damaged_records_are_named_not_quoted(ledger: CustomizeLedger, client: redis.Redis, make_job: MakeJob) -> None:
    """A forged record never becomes a job, its content never an error message, and lists do without it."""
    ledger.accept(make_job("job_1"))
    ledger.accept(make_job("job_2"))
    client.hset(f"{CUSTOMIZE.root}job:job_1", "job", '{"id": "secret prompt"}')
    with pytest.raises(DamagedRecordError) as caught:
        ledger.get("job_1")
    assert "secret" not in repr(caught.value) and caught.value.__cause__ is None
    client.hset(f"{CUSTOMIZE.root}job:job_1", "job", b"\xff\xfe")
    with pytest.raises(DamagedRecordError):
        ledger.get("job_1")
    assert [found.job.id for found in ledger.list(None, None, 10)[0]] == ["job_2"]


def test_ended_records_are_forgotten(client: redis.Redis, make_job: MakeJob) -> None:
    """After its time an ended job leaves a tombstone for a week and no index entry; a queued one stays for ever."""
    ledger = Ledger(client, CUSTOMIZE, job_ttl_s=1)
    for job_id in ("job_old", "job_queued"):
        ledger.accept(make_job(job_id))
    ledger.cancel("job_old")
    assert client.ttl(f"{CUSTOMIZE.root}job:job_queued") == -1
    deadline = time.monotonic() + 60
    while ledger.get("job_old") is not None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert ledger.get("job_old") is None, "the record goes by itself, without anyone's reaping"
    assert ledger.list(None, None, 10)[0] == [ledger.get("job_queued")]
    ledger.reap()
    assert client.keys(f"{CUSTOMIZE.root}*old*") == [f"{CUSTOMIZE.root}gone:job_old".encode()]
    assert ledger.gone("job_old") == "default"
    assert client.ttl(f"{CUSTOMIZE.root}gone:job_old") == pytest.approx(7 * 86_400, abs=60)
    for index in ("jobs", "jobs:default", "status:canceled", "status:canceled:default", "expiring", "leases"):
        assert client.zscore(f"{CUSTOMIZE.root}{index}", "job_old") is None
    assert ledger.get("job_queued") is not None


def test_waiting_finds_only_the_patient(ledger: CustomizeLedger, make_job: MakeJob) -> None:
    """The search for lost deliveries looks at jobs that have been queued for a while, and at no others."""
    for number in range(3):
        ledger.accept(make_job(f"job_{number}"))
    ledger.cancel("job_1")
    assert ledger.waiting(3600.0) == []
    assert ledger.waiting(0.0) == ["job_0", "job_2"]


def test_what_waits_with_a_worker_is_canceled_at_once(ledger: CustomizeLedger, make_job: MakeJob) -> None:
    """Nothing has begun that would have to be stopped; the worker learns of it as it begins, and its claim is void."""
    ledger.accept(make_job("job_1"))
    token = ledger.claim("job_1", "w", waits=True)
    assert token is not None
    record = ledger.cancel("job_1")
    assert record is not None and record.status is JobStatus.CANCELED
    assert not ledger.begin("job_1", token)
    assert ledger.beat("job_1", token) == "lost"
    assert not ledger.hand_back("job_1", token)
    assert ledger.reap() == []
