"""Following a job without asking all the time: long polls with ETags, and server-sent events."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
import redis
from fastapi import FastAPI

from service.app import create_app
from service.callers.auth import REMEMBER_S
from service.events import CHECK_S
from tests.service.conftest import Bench, picture, settings
from tests.service.gates import Gate, serve
from tests.waiting import wait_for
from workers.jobs import Progress
from workers.redis_process import RedisProcess
from workers.tenants import TenantBook


@dataclass(frozen=True)
class Told:
    """One event of a stream."""

    id: str
    kind: str
    data: Any


def read(lines: Iterator[str]) -> Iterator[Told]:
    """Server-sent events, parsed by the rules of the HTML standard as far as they are used."""
    fields: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        if line == "":
            if "data" in fields:
                yield Told(fields["id"], fields["event"], json.loads(fields["data"]))
            fields = {}
        elif name:
            fields[name] = value.removeprefix(" ")


def events(bench: Bench, job: str, after: str | None = None) -> list[Told]:
    """All that is told of a job that has ended."""
    headers = {} if after is None else {"Last-Event-ID": after}
    answer = bench.client.get(f"/v1/jobs/{job}/events", headers=headers)
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/event-stream")
    return list(read(iter(answer.text.split("\n"))))


def run(bench: Bench, steps: int = 3) -> str:
    """A job that has gone through all its states."""
    job = bench.submit()["id"]
    token = bench.ledger.claim(job, "w")
    assert token is not None
    for step in range(1, steps + 1):
        bench.ledger.beat(job, token, Progress("denoise", step, steps))
    bench.ledger.cancel(job)
    assert bench.ledger.release_canceled(job, token)
    return job


def test_the_etag_changes_with_the_job(bench: Bench) -> None:
    """304 while nothing has happened, another tag as soon as something has."""
    job = bench.submit()["id"]
    url = f"/v1/jobs/{job}"
    tags: list[str] = []
    token = None
    for step in range(4):
        if step == 1:
            token = bench.ledger.claim(job, "w")
        elif step > 1 and token:
            bench.ledger.beat(job, token, Progress("denoise", step, 4))
        tag = bench.client.get(url).headers["etag"]
        assert bench.client.get(url, headers={"If-None-Match": tag}).status_code == 304
        assert all(bench.client.get(url, headers={"If-None-Match": old}).status_code == 200 for old in tags)
        tags.append(tag)
    assert len(set(tags)) == 4


def test_a_long_poll_ends_with_the_job(bench: Bench) -> None:
    """`wait` alone: steps do not matter, the end does."""
    job = bench.submit()["id"]
    answers: list[Any] = []
    caller = threading.Thread(target=lambda: answers.append(bench.client.get(f"/v1/jobs/{job}?wait=50").json()))
    caller.start()
    token = bench.ledger.claim(job, "w")
    assert token is not None
    bench.ledger.beat(job, token, Progress("denoise", 1, 4))
    bench.ledger.cancel(job)
    bench.ledger.release_canceled(job, token)
    caller.join(30)
    assert answers[0]["status"] == "canceled"


def test_a_long_poll_with_a_tag_ends_with_the_next_change(bench: Bench) -> None:
    """Whoever shows progress gets every step without asking in between."""
    job = bench.submit()["id"]
    url = f"/v1/jobs/{job}?wait=50"
    tag = bench.client.get(f"/v1/jobs/{job}").headers["etag"]
    answers: list[Any] = []
    caller = threading.Thread(
        target=lambda: answers.append(bench.client.get(url, headers={"If-None-Match": tag}).json())
    )
    caller.start()
    assert bench.ledger.claim(job, "w")
    caller.join(30)
    assert answers[0]["status"] == "running"


def test_a_long_poll_that_waits_in_vain(bench: Bench) -> None:
    """The job as it is, or 304 if that is known; never an error."""
    job = bench.submit()["id"]
    began = time.monotonic()
    answer = bench.client.get(f"/v1/jobs/{job}?wait=1")
    assert (answer.status_code, answer.json()["status"]) == (200, "queued")
    assert time.monotonic() - began >= 1
    again = bench.client.get(f"/v1/jobs/{job}?wait=1", headers={"If-None-Match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["etag"] == answer.headers["etag"]


def test_a_finished_job_is_not_waited_for(bench: Bench) -> None:
    """Nothing will ever happen to it; also when its tag is known."""
    job = run(bench)
    began = time.monotonic()
    answer = bench.client.get(f"/v1/jobs/{job}?wait=50")
    assert answer.json()["status"] == "canceled"
    tag = answer.headers["etag"]
    assert bench.client.get(f"/v1/jobs/{job}?wait=50", headers={"If-None-Match": tag}).status_code == 304
    assert time.monotonic() - began < 25
    assert bench.client.get(f"/v1/jobs/{job}?wait=61").status_code == 422


def test_a_stream_tells_everything_in_order_and_ends(bench: Bench) -> None:
    """States and steps as the ledger wrote them, numbered without a gap, up to the end."""
    told = events(bench, run(bench))
    assert [event.id for event in told] == [str(number) for number in range(1, len(told) + 1)]
    assert [event.data["status"] for event in told if event.kind == "status"] == ["queued", "running", "canceled"]
    assert [event.data["step"] for event in told if event.kind == "progress"] == [1, 2, 3]


def test_a_stream_goes_on_where_it_was(bench: Bench) -> None:
    """`Last-Event-ID` leaves out what is known, nothing else; after the last one there is nothing to come back for."""
    job = run(bench)
    told = events(bench, job)
    for number in range(len(told) - 1):
        assert events(bench, job, str(number)) == told[number:]
    answer = bench.client.get(f"/v1/jobs/{job}/events", headers={"Last-Event-ID": told[-1].id})
    assert answer.status_code == 204


def test_a_preview_is_told_and_can_be_fetched(bench: Bench) -> None:
    """The event says that there is one; the picture itself has its own address."""
    job = bench.submit(previews=1)["id"]
    bench.finish(job, picture())
    assert [event.data for event in events(bench, job) if event.kind == "preview"] == [
        {"phase": "denoise", "step": 1, "total": 4}
    ]
    assert bench.client.get(f"/v1/jobs/{job}/preview").content == picture()


def test_a_gap_is_said(bench: Bench) -> None:
    """Of a job with more events than are kept, and of an id that never was, a reset brings the whole job first."""
    job = run(bench, steps=210)
    for after in (None, "3", "999", "x", "-1", "1-0", "9" * 40):
        first, *rest = events(bench, job, after)
        assert first.kind == "reset"
        assert first.data["id"] == job and first.data["status"] == "canceled"
        assert [event.kind for event in rest if event.kind == "reset"] == []
        assert [int(event.id) for event in rest] == list(range(int(first.id) + 1, int(first.id) + 1 + len(rest)))
        assert rest[-1].data["status"] == "canceled"


def test_nobody_follows_what_is_not_theirs(bench: Bench) -> None:
    """An id that is none is a 404, not a stream that never says anything."""
    assert bench.client.get("/v1/jobs/job_unknown/events").status_code == 404


@pytest.fixture
def app(redis_server: RedisProcess, model_dir: Path, tmp_path: Path, bench: Bench) -> FastAPI:
    return create_app(settings(redis_server.url, tmp_path, model_dir, auth="keys"))


@pytest.fixture
def gate(app: FastAPI) -> Iterator[Gate]:
    """A gateway on a real socket that asks for keys."""
    yield from serve(app)


def test_a_revoked_key_ends_its_stream(gate: Gate, bench: Bench) -> None:
    """Who may not ask any more may not go on listening either; another key's stream stays."""
    book = TenantBook(bench.redis)
    keys = [book.create_key("acme"), book.create_key("acme")]
    headers = [{"Authorization": f"Bearer {key}"} for key in keys]
    ended = [threading.Event(), threading.Event()]
    job = httpx2.post(f"{gate.url}/v1/customize", json={"prompt": "a"}, headers=headers[0]).json()["id"]

    def follow(number: int) -> None:
        with httpx2.stream("GET", f"{gate.url}/v1/jobs/{job}/events", headers=headers[number], timeout=240) as answer:
            for _ in answer.iter_lines():
                pass
        ended[number].set()

    threads = [threading.Thread(target=follow, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    assert REMEMBER_S + CHECK_S < 5
    book.revoke(keys[0].split("_")[1])
    wait_for(ended[0].is_set, "the end of the stream")
    assert not ended[1].is_set()
    bench.ledger.cancel(job)
    for thread in threads:
        thread.join(30)
    assert ended[1].is_set()


def test_waiting_takes_no_thread(gate: Gate, app: FastAPI, bench: Bench) -> None:
    """A hundred long polls and streams, more than the pool has threads, and others are answered as ever."""
    key = {"Authorization": f"Bearer {TenantBook(bench.redis).create_key('acme')}"}
    job = httpx2.post(f"{gate.url}/v1/customize", json={"prompt": "a"}, headers=key).json()["id"]
    answers: list[int] = []

    def wait(number: int) -> None:
        url = f"{gate.url}/v1/jobs/{job}" + ("?wait=60" if number % 2 else "/events")
        answers.append(httpx2.get(url, headers=key, timeout=240).status_code)

    threads = [threading.Thread(target=wait, args=(number,)) for number in range(100)]
    for thread in threads:
        thread.start()
    watcher = app.state.gateway.watcher
    wait_for(lambda: watcher.watching == 100, "a hundred watches")
    assert httpx2.get(f"{gate.url}/v1/jobs", headers=key, timeout=10).status_code == 200
    bench.ledger.cancel(job)
    for thread in threads:
        thread.join(60)
    assert answers == [200] * 100
    assert watcher.watching == 0


def test_a_stream_outlives_an_outage_of_redis(model_dir: Path, tmp_path: Path) -> None:
    """While Redis is away nothing is told; when it is back the stream goes on without a gap."""
    from workers.redis_process import start_redis

    server = start_redis(tmp_path)
    app = create_app(settings(server.url, tmp_path, model_dir))
    gateway = app.state.gateway
    told: list[Told] = []
    gates = serve(app)
    gate = next(gates)
    try:
        job = httpx2.post(f"{gate.url}/v1/customize", json={"prompt": "a"}).json()["id"]

        def follow() -> None:
            with httpx2.stream("GET", f"{gate.url}/v1/jobs/{job}/events", timeout=240) as answer:
                told.extend(read(answer.iter_lines()))

        caller = threading.Thread(target=follow)
        caller.start()
        wait_for(lambda: gateway.watcher.watching, "the watch")
        server.process.kill()
        server.process.wait()
        with pytest.raises(redis.ConnectionError):
            gateway.ledger.get(job)
        server.stop()
        server = start_redis(tmp_path)
        wait_for(lambda: _works(lambda: gateway.ledger.cancel(job)), "Redis")
        caller.join(30)
    finally:
        next(gates, None)
        server.stop()
    assert [(event.id, event.data["status"]) for event in told] == [("1", "queued"), ("2", "canceled")]


def _works(call: Any) -> bool:
    try:
        return bool(call())
    except redis.RedisError:
        return False
