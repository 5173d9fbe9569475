"""A job's events: complete while they are kept, and honest about what is not."""

from __future__ import annotations

import json
import threading

import pytest
import redis
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.workers.conftest import MakeJob
from tests.workers.ledgers import RESULT, STEP, running
from workers.jobs import CUSTOMIZE, Progress
from workers.ledger import MAX_PREVIEW_BYTES, CustomizeLedger, Event, Ledger

KEPT, LAST = 200, 252
"""Events that are kept, and that happen in the long story."""


@pytest.fixture
def ledger(client: redis.Redis) -> CustomizeLedger:
    return Ledger(client, CUSTOMIZE)


def steps(ledger: CustomizeLedger, token: int, count: int) -> None:
    for step in range(count):
        assert ledger.beat("job_1", token, Progress("denoise", step, count)) == "ok"


def test_a_whole_story(ledger: CustomizeLedger, make_job: MakeJob) -> None:
    """What happened is told in order, a progress once however often it is heard, a bare renewal not at all."""
    token = running(ledger, make_job)
    for _ in range(2):
        ledger.beat("job_1", token, STEP)
    ledger.beat("job_1", token)
    ledger.beat("job_1", token, STEP, preview=b"\x89PNG")
    ledger.commit("job_1", token, RESULT)
    events, gap = ledger.events("job_1")
    assert not gap
    assert [(event.id, event.kind) for event in events] == [
        ("1", "status"),
        ("2", "status"),
        ("3", "progress"),
        ("4", "preview"),
        ("5", "status"),
    ]
    told = [json.loads(event.data) for event in events]
    assert told[0] == {"status": "queued", "attempt": 1}
    assert told[2] == told[3] == {"phase": "denoise", "step": 1, "total": 2}
    assert told[4] == {"status": "succeeded", "attempt": 1}


@settings(max_examples=100)
@given(after=st.integers(0, 260), limit=st.integers(1, 260))
def test_replay_is_complete_or_says_so(ledger: CustomizeLedger, make_job: MakeJob, after: int, limit: int) -> None:
    """From wherever one resumes: the next events without a hole, or, exactly if some are no longer kept, a gap."""
    if ledger.get("job_1") is None:
        steps(ledger, running(ledger, make_job), LAST - 2)
    events, gap = ledger.events("job_1", str(after), limit)
    oldest = LAST - KEPT + 1
    assert gap == (after + 1 < oldest or after > LAST)
    first = oldest if gap else after + 1
    assert [int(event.id) for event in events] == list(range(first, min(LAST, first + limit - 1) + 1))


@pytest.mark.parametrize("forged", ["", "-1", "1-1", "x", "²", "9" * 30])
def test_an_id_that_never_was(ledger: CustomizeLedger, make_job: MakeJob, forged: str) -> None:
    """A Last-Event-ID is a stranger's text: one that we never gave out is a gap, and no error."""
    running(ledger, make_job)
    events, gap = ledger.events("job_1", forged)
    assert gap and [event.id for event in events] == ["1", "2"]


def test_following_many_jobs_at_once(ledger: CustomizeLedger, make_job: MakeJob) -> None:
    """One call waits for whatever happens next to any of them, and tells of each what is new to the caller."""
    token = running(ledger, make_job)
    ledger.accept(make_job("job_2"))
    assert ledger.follow({}, 0.1) == {}
    assert ledger.follow({"job_1": "1", "job_2": "1", "job_3": "0"}, 0.1) == {
        "job_1": [Event("2", "status", '{"status":"running","attempt":1}')]
    }
    answers: list[dict[str, list[Event]]] = []
    waiting = threading.Thread(target=lambda: answers.append(ledger.follow({"job_1": "2", "job_2": "1"}, 4.0)))
    waiting.start()
    ledger.beat("job_1", token, STEP)
    waiting.join(60)
    assert [event.kind for event in answers[0]["job_1"]] == ["progress"]
    assert ledger.follow({"job_1": "3", "job_2": "1"}, 0.01) == {}


def test_only_the_newest_preview(ledger: CustomizeLedger, client: redis.Redis, make_job: MakeJob) -> None:
    """Each replaces the one before; a zombie's is not taken; a lost worker's goes; the last goes soon after the end."""
    token = running(ledger, make_job)
    assert ledger.preview("job_1") is None
    for picture in (b"first", b"second"):
        ledger.beat("job_1", token, STEP, picture)
    assert ledger.beat("job_1", token + 1, STEP, b"zombie's") == "lost"
    assert ledger.preview("job_1") == b"second"
    ledger.hand_back("job_1", token)
    assert ledger.preview("job_1") is None
    token = ledger.claim("job_1", "w")
    assert token is not None
    ledger.beat("job_1", token, STEP, b"third")
    ledger.commit("job_1", token, RESULT)
    assert 0 < client.ttl(f"{CUSTOMIZE.root}preview:job_1") <= 60  # pyright: ignore[reportOperatorIssue]  # sync client
    with pytest.raises(ValueError, match="64 KiB"):
        ledger.beat("job_1", token, STEP, b"x" * (MAX_PREVIEW_BYTES + 1))


def test_events_go_with_their_record(client: redis.Redis, make_job: MakeJob) -> None:
    """While a job is open its events stay; once it has ended they expire with it."""
    ledger = Ledger(client, CUSTOMIZE, job_ttl_s=500)
    token = running(ledger, make_job)
    key = f"{CUSTOMIZE.root}events:job_1"
    assert client.ttl(key) == -1
    ledger.commit("job_1", token, RESULT)
    assert client.ttl(key) == client.ttl(f"{CUSTOMIZE.root}job:job_1")
