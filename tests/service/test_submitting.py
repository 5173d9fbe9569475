"""What comes with a submission: an idempotency key, patience, a deadline, a trace, a webhook, a URL to fetch."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rq import Queue
from starlette.datastructures import Headers
from starlette.testclient import TestClient

from service.app import create_app
from service.headers import JobHeaders, known_tags, names
from tests.service.conftest import Bench, picture, settings
from tests.waiting import wait_for
from workers.jobs import JobStatus, Webhook
from workers.redis_process import RedisProcess

BODY = {"prompt": "a toy"}
TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def post(bench: Bench, key: str | None = None, body: Any = BODY, **headers: str) -> Any:
    if key is not None:
        headers["Idempotency-Key"] = key
    return bench.client.post("/v1/customize", json=body, headers=headers)


def test_the_same_key_and_body_are_one_job(bench: Bench) -> None:
    """A caller who lost the answer and asks again gets the job it has, seed and all, and is told so."""
    first, again = post(bench, "k-1"), post(bench, "k-1")
    assert (first.status_code, again.status_code) == (202, 202)
    assert again.json() == first.json()
    assert again.headers["location"] == first.headers["location"]
    assert "idempotent-replayed" not in first.headers
    assert again.headers["idempotent-replayed"] == "true"
    assert len(bench.ledger.list()[0]) == 1
    assert post(bench, "k-2").json()["id"] != first.json()["id"]
    assert post(bench).json()["id"] != first.json()["id"]


def test_a_replay_shows_the_job_as_it_is_now(bench: Bench) -> None:
    """The answer is the job, not a copy of what was said of it first."""
    job = post(bench, "k").json()["id"]
    bench.finish(job, picture())
    assert post(bench, "k").json()["status"] == "succeeded"


def test_many_at_once_are_one_job(bench: Bench) -> None:
    """Retries that overtake each other: one wins, the others are its replays, and there is one delivery."""
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: post(bench, "k"), range(16)))
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert Counter(answer.headers.get("idempotent-replayed") for answer in answers) == {"true": 15, None: 1}
    assert len(Queue("customize", connection=bench.redis).get_job_ids()) == 1


def test_a_key_with_another_body_is_a_mistake(bench: Bench) -> None:
    """Rather than one of the two being lost in silence; the control is the same key with the same bytes."""
    post(bench, "k")
    answer = post(bench, "k", {"prompt": "another toy"})
    assert (answer.status_code, answer.json()["code"]) == (422, "idempotency_conflict")
    assert answer.json()["errors"][0]["pointer"] == "Idempotency-Key:"
    assert post(bench, "k").status_code == 202
    assert len(bench.ledger.list()[0]) == 1


def test_a_refused_request_uses_up_no_key(bench: Bench) -> None:
    """A slip can be mended under the same key."""
    assert post(bench, "k", {"prompt": ""}).status_code == 422
    assert post(bench, "k").status_code == 202


def test_a_replay_of_a_deleted_job_is_gone(bench: Bench) -> None:
    """It is not run a second time because its record is no longer there."""
    job = post(bench, "k").json()["id"]
    bench.client.post(f"/v1/jobs/{job}/cancel")
    assert bench.client.delete(f"/v1/jobs/{job}").status_code == 204
    answer = post(bench, "k")
    assert (answer.status_code, answer.json()["code"]) == (410, "job_gone")
    assert "new Idempotency-Key" in answer.json()["detail"]  # with the old one it is gone for a day


@pytest.mark.parametrize("key", ["", "a b", "x" * 256])
def test_a_key_is_a_word(bench: Bench, key: str) -> None:
    """Whatever is no key is refused instead of being taken for none."""
    answer = post(bench, key)
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_value")
    assert answer.json()["errors"][0]["pointer"] == "Idempotency-Key:"
    assert "visible ASCII" in answer.json()["errors"][0]["detail"]


@pytest.mark.parametrize("path", ["/v1/customize", "/v1/trainings"])
def test_a_header_that_is_given_twice_is_refused(bench: Bench, path: str) -> None:
    """A proxy may read the first and we the last: one job for the one, another for the other."""
    headers = [("Idempotency-Key", "a"), ("Idempotency-Key", "b"), ("Cancel-After", "1s"), ("Cancel-After", "1h")]
    answer = bench.client.post(path, json=BODY, headers=headers)
    assert answer.status_code == 422
    assert [fault["pointer"] for fault in answer.json()["errors"]] == ["Idempotency-Key:", "Cancel-After:"]
    assert bench.ledger.list()[0] == []


def test_trainings_have_keys_too(bench: Bench) -> None:
    """An hour of training must not run twice for a lost answer; keys of the two kinds do not meet."""
    post(bench, "k")
    first, again = (
        bench.client.post("/v1/trainings", json={"recipe": "sticker-adapter"}, headers={"Idempotency-Key": "k"})
        for _ in range(2)
    )
    assert (first.status_code, again.json()["id"]) == (202, first.json()["id"])
    assert again.headers["idempotent-replayed"] == "true"


def test_waiting_for_the_finished_job(bench: Bench) -> None:
    """`Prefer: wait` answers 200 with the pictures as soon as the job has ended, well before the time is up."""

    def work() -> None:
        job = wait_for(lambda: bench.ledger.list()[0], "the job")[0].job
        bench.finish(job.id, picture())

    worker = threading.Thread(target=work)
    worker.start()
    answer = post(bench, Prefer="respond-async, wait=50")
    worker.join()
    assert (answer.status_code, answer.json()["status"]) == (200, "succeeded")
    assert answer.headers["preference-applied"] == "wait=50"
    assert answer.json()["images"]


def test_waiting_in_vain(bench: Bench) -> None:
    """When the time is up it is an ordinary 202."""
    began = time.monotonic()
    answer = post(bench, Prefer="wait=1")
    assert (answer.status_code, answer.json()["status"]) == (202, "queued")
    assert time.monotonic() - began >= 1
    assert answer.headers["location"] == answer.json()["urls"]["self"]


@pytest.mark.parametrize(
    ("said", "wait_s"),
    [
        (None, 0),
        ("", 0),
        (["wait=20"], 20),
        (["respond-async, wait=20"], 20),
        (["respond-async", "wait=20"], 20),
        (["wait=20", "respond-async"], 20),
        (["wait=20; foo, bar"], 20),
        (['WAIT = "7"'], 7),
        (["wait=100000"], 60),
        (["wait=-1"], 0),
        (["wait=2.5"], 0),
        (["wait=x"], 0),
        (["await=20"], 0),
    ],
)
def test_the_preference_is_read_as_rfc_7240_has_it(said: list[str] | None, wait_s: int) -> None:
    """Other preferences and malformed ones are ignored; the longest wait is a minute."""
    assert JobHeaders(prefer=said).wait_s == wait_s


@pytest.mark.parametrize(("said", "seconds"), [("30s", 30), ("45", 45), ("2m", 120), ("1h", 3600)])
def test_a_deadline_reaches_the_ledger(bench: Bench, said: str, seconds: float) -> None:
    """`Cancel-After` counts from acceptance, by Redis' clock."""
    body = post(bench, **{"Cancel-After": said}).json()
    record = bench.ledger.get(body["id"])
    assert record is not None and record.start_by is not None
    assert record.start_by - record.created_at == pytest.approx(seconds, abs=0.01)
    assert body["start_by"] is not None


@pytest.mark.parametrize("said", ["0s", "soon", "-5", "1d", "1.5s", "99999999"])
def test_a_deadline_that_is_none_is_refused(bench: Bench, said: str) -> None:
    """Running a job that nobody wants any more is worse than an error."""
    answer = post(bench, **{"Cancel-After": said})
    assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (422, "Cancel-After:")
    assert "30s" in answer.json()["errors"][0]["detail"]


def test_a_job_that_nobody_starts_expires(bench: Bench) -> None:
    """Its caller reads `expired`, and no worker gets it any more."""
    job = post(bench, **{"Cancel-After": "1s"}).json()["id"]
    assert wait_for(bench.ledger.expire, "the deadline") == [job]
    assert bench.client.get(f"/v1/jobs/{job}").json()["status"] == JobStatus.EXPIRED
    assert bench.ledger.claim(job, "w") is None


def test_the_request_id_and_the_trace_go_with_the_job(bench: Bench) -> None:
    """A worker's log and a webhook can be found by what the caller knows."""
    job = post(bench, traceparent=TRACE, **{"X-Request-ID": "order-42"}).json()["id"]
    record = bench.ledger.get(job)
    assert record is not None
    assert (record.job.request_id, record.job.traceparent) == ("order-42", TRACE)


@pytest.mark.parametrize(
    "trace", ["", "x", TRACE.upper(), TRACE + "-00", TRACE.replace("4bf9", "    "), "ff" + TRACE[2:]]
)
def test_a_broken_trace_is_ignored(bench: Bench, trace: str) -> None:
    """As the standard wants; it must not end up in logs and headers either."""
    record = bench.ledger.get(post(bench, traceparent=trace).json()["id"])
    assert record is not None
    assert record.job.traceparent is None


@given(
    st.lists(st.text(alphabet="abc0", min_size=1, max_size=4), min_size=1, max_size=4),
    st.integers(0, 3),
    st.integers(0, 4),
)
def test_if_none_match_names_tags(tags: list[str], chosen: int, cut: int) -> None:
    """Weak comparison against each tag of the list, written in one line or two, and against nothing else."""
    written = [f'{"W/" if index % 2 else ""}"{tag}"' for index, tag in enumerate(tags)]
    lines = [", ".join(part).encode() for part in (written[:cut], written[cut:]) if part]
    known = known_tags(Headers(raw=[(b"if-none-match", line) for line in lines]))
    tag = tags[chosen % len(tags)]
    assert names(known, f'"{tag}"') and names(known, f'W/"{tag}"')
    assert not names(known, '"none of them"')
    assert names(["*"], '"anything"')


@pytest.fixture
def signing(redis_server: RedisProcess, model_dir: Path, tmp_path: Path, bench: Bench) -> Iterator[TestClient]:
    """A gateway whose webhooks somebody signs."""
    secrets = ("whsec_" + "A" * 32,)
    chosen = settings(redis_server.url, tmp_path, model_dir).model_copy(update={"webhook_secrets": secrets})
    with TestClient(create_app(chosen)) as caller:
        yield caller


def test_a_webhook_goes_with_the_job(signing: TestClient, bench: Bench) -> None:
    """Its URL is checked before the job is accepted; what it asks for is shown with the job."""
    hook = {"url": "https://example.com/hook?a=b", "events": ["status", "terminal", "status"]}
    body = signing.post("/v1/customize", json={**BODY, "webhook": hook}).json()
    record = bench.ledger.get(body["id"])
    assert record is not None
    assert record.job.webhook == Webhook(hook["url"], ("status", "terminal"))
    assert body["request"]["webhook"] == {"url": hook["url"], "events": ["status", "terminal"]}


def test_a_webhook_goes_with_a_training(signing: TestClient, bench: Bench) -> None:
    """Nobody polls for hours; the rules are those of jobs."""
    body = {"recipe": "sticker-adapter", "webhook": {"url": "https://example.com/hook"}}
    record = bench.trainings.get(signing.post("/v1/trainings", json=body).json()["id"])
    assert record is not None
    assert record.job.webhook == Webhook("https://example.com/hook")
    body["webhook"] = {"url": "https://[::1]/"}
    assert signing.post("/v1/trainings", json=body).json()["code"] == "url_forbidden"
    assert bench.client.post("/v1/trainings", json=body).json()["code"] == "not_enabled"


@pytest.mark.parametrize(
    ("hook", "code", "pointer"),
    [
        ({"url": "http://example.com/"}, "url_forbidden", "/webhook/url"),
        ({"url": "https://127.0.0.1/"}, "url_forbidden", "/webhook/url"),
        ({"url": "https://user@example.com/"}, "url_forbidden", "/webhook/url"),
        ({"url": "https://example.com/", "events": []}, "invalid_value", "/webhook/events"),
        ({"url": "https://example.com/", "secret": "x"}, "unknown_field", "/webhook/secret"),
    ],
)
def test_a_webhook_that_will_not_do(signing: TestClient, hook: dict[str, Any], code: str, pointer: str) -> None:
    """Refused at once, where somebody reads the answer."""
    answer = signing.post("/v1/customize", json={**BODY, "webhook": hook})
    assert (answer.status_code, answer.json()["code"]) == (422, code)
    assert answer.json()["errors"][0]["pointer"] == pointer


def test_a_picture_by_url_is_fetched_before_the_job_is_rung_for(bench: Bench) -> None:
    """The gateway itself speaks to nobody: the job is accepted and waits for the courier."""
    url = "https://example.com/mug.jpg"
    body = bench.submit(references=[{"image": url, "role": "subject"}], previews=3)
    assert body["request"]["references"][0]["url"] == url
    assert body["request"]["references"][0]["sha256"] is None
    assert body["request"]["previews"] == 3
    assert [fetch.job_id for fetch in bench.ledger.due_fetches(10)] == [body["id"]]
    assert Queue("customize", connection=bench.redis).get_job_ids() == []
