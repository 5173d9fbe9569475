"""Redis or the disk going away is a 503 that mends itself; a fault of our own is a 500 that says nothing."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient
from structlog.contextvars import merge_contextvars
from structlog.testing import capture_logs

from service.app import create_app
from tests.service.conftest import Bench, picture, reference, settings
from tests.waiting import stop_child
from workers.redis_process import RedisProcess, start_redis

BODY = {"prompt": "a toy"}


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[list[RedisProcess]]:
    """A Redis to be killed; the last of the list is stopped at the end."""
    servers = [start_redis(tmp_path)]
    yield servers
    servers[-1].stop()


def test_killed_redis_is_a_503_and_recovers(own_redis: list[RedisProcess], model_dir: Path, tmp_path: Path) -> None:
    """After kill -9 every route answers 503; after a restart the same gateway accepts again, nothing lost."""
    with TestClient(create_app(settings(own_redis[0].url, tmp_path, model_dir))) as client:
        before = client.post("/v1/customize", json=BODY).json()["id"]
        own_redis[0].process.kill()
        own_redis[0].process.wait()
        for method, path in (
            ("POST", "/v1/customize"),
            ("GET", "/readyz"),
            ("GET", "/v1/jobs"),
            ("GET", f"/v1/jobs/{before}"),
            ("POST", f"/v1/jobs/{before}/cancel"),
            ("GET", "/v1/models"),
        ):
            answer = client.request(method, path, json=BODY if path == "/v1/customize" else None)
            assert (answer.status_code, answer.json()["code"]) == (503, "queue_unavailable"), path
            assert answer.json()["retryable"] is True
            assert int(answer.headers["retry-after"]) >= 1
        assert client.get("/livez").status_code == 200
        own_redis[0].stop()
        own_redis.append(start_redis(tmp_path))
        assert client.post("/v1/customize", json=BODY).status_code == 202
        assert client.get(f"/v1/jobs/{before}").json()["status"] == "queued"


def test_silent_redis_is_a_503(own_redis: list[RedisProcess], model_dir: Path, tmp_path: Path) -> None:
    """A Redis that holds connections open without answering must not hold callers for ever."""
    chosen = settings(own_redis[0].url, tmp_path, model_dir).model_copy(update={"redis_timeout_s": 0.2})
    with TestClient(create_app(chosen)) as client:
        assert client.get("/readyz").status_code == 200
        stop_child(own_redis[0].process.pid)
        try:
            answer = client.post("/v1/customize", json=BODY)
        finally:
            os.kill(own_redis[0].process.pid, signal.SIGCONT)
        assert (answer.status_code, answer.json()["code"]) == (503, "queue_unavailable")
        assert client.post("/v1/customize", json=BODY).status_code == 202


def test_full_redis_is_a_503(own_redis: list[RedisProcess], model_dir: Path, tmp_path: Path) -> None:
    """A Redis that refuses to write has no capacity: also a 503, not a fault of ours."""
    app = create_app(settings(own_redis[0].url, tmp_path, model_dir))
    with TestClient(app) as client:
        app.state.gateway.redis.config_set("maxmemory", "1")
        answer = client.post("/v1/customize", json=BODY)
        assert (answer.status_code, answer.json()["code"]) == (503, "queue_unavailable")
        app.state.gateway.redis.config_set("maxmemory", "0")
        assert client.post("/v1/customize", json=BODY).status_code == 202


def test_unwritable_store_is_a_503(redis_server: RedisProcess, model_dir: Path, tmp_path: Path) -> None:
    """A disk that takes no references: nothing is accepted, and the answer names no path."""
    blocked = tmp_path / "file"
    blocked.write_text("a file where a folder is wanted")
    app = create_app(settings(redis_server.url, blocked / "state", model_dir))
    with TestClient(app) as client:
        jobs = len(app.state.gateway.ledger.list(None, None, 100)[0])
        answer = client.post("/v1/customize", json={**BODY, "references": [reference()]})
        assert (answer.status_code, answer.json()["code"]) == (503, "storage_unavailable")
        assert str(tmp_path) not in answer.text
        assert client.get("/readyz").json()["code"] == "storage_unavailable"
        assert len(app.state.gateway.ledger.list(None, None, 100)[0]) == jobs
        blocked.unlink()
        assert client.post("/v1/customize", json={**BODY, "references": [reference()]}).status_code == 202


@pytest.mark.parametrize("reserve_mib", [2**42, pytest.param(0, id="control")])
def test_a_nearly_full_store_is_a_503(
    redis_server: RedisProcess, model_dir: Path, tmp_path: Path, reserve_mib: int
) -> None:
    """With less than the reserve free no upload and no job with pictures is taken, and neither leaves a file, a record
    or a job behind; a worker's picture still finds room. Control: without a reserve both are taken.
    """
    app = create_app(settings(redis_server.url, tmp_path, model_dir, store_reserve_mib=reserve_mib))
    gateway = app.state.gateway
    with TestClient(app) as client:
        gateway.redis.flushdb()
        answers = [
            client.post("/v1/references", content=picture(), headers={"Content-Type": "image/png"}),
            client.post("/v1/customize", json={**BODY, "references": [reference()]}),
        ]
        jobs = len(gateway.ledger.list(None, None, 100)[0])
        files = [path for path in gateway.store.root.rglob("*") if path.is_file()]
        references = gateway.redis.keys("dreamserve:reference:*")
        gateway.store.publish("job_1.1.0.png", b"picture")
        gateway.redis.flushdb()
    if reserve_mib:
        assert [(answer.status_code, answer.json()["code"]) for answer in answers] == [(503, "storage_unavailable")] * 2
        assert all("try again later" in answer.json()["detail"] for answer in answers)
        assert (jobs, files, references) == (0, [], [])
    else:
        assert [answer.status_code for answer in answers] == [201, 202]
        assert (jobs, len(files), len(references)) == (1, 1, 1)


def test_fault_of_ours_says_nothing(bench: Bench) -> None:
    """A damaged record is a 500 without its content, in the answer as in the log; others stay readable."""
    bench.redis.hset("dreamserve:job:job_x", mapping={"status": "queued", "job": "c4nary"})
    with capture_logs([merge_contextvars]) as lines:
        answer = bench.client.get("/v1/jobs/job_x", headers={"X-Request-ID": "abc"})
    assert (answer.status_code, answer.json()["code"]) == (500, "internal")
    assert answer.json()["request_id"] == answer.headers["x-request-id"] == "abc"
    assert "c4nary" not in answer.text + str(lines)
    told = [(line["event"], line.get("exception"), line["request_id"]) for line in lines]
    assert told == [("request failed", "DamagedRecordError", "abc"), ("request", None, "abc")]
    assert bench.client.get("/v1/jobs").status_code == 200
