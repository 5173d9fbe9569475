"""/readyz says no, and why, whenever a job could not be accepted; each failure is a real one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import redis
from starlette.testclient import TestClient

from service.app import create_app
from service.readiness import Readiness
from tests.service.conftest import settings
from tests.waiting import wait_for
from workers import queues
from workers.artifacts import ArtifactStore
from workers.redis_process import RedisProcess, start_redis


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisProcess]:
    """A Redis to be spoilt."""
    server = start_redis(tmp_path)
    yield server
    server.stop()


def out_of_memory(client: redis.Redis) -> None:
    client.config_set("maxmemory", "1")


def a_replica(client: redis.Redis) -> None:
    client.replicaof("127.0.0.1", "1")


def losing_its_disk(client: redis.Redis) -> None:
    """A background save that fails, after which Redis refuses writes."""
    client.config_set("save", "3600 1")
    (Path(client.config_get("dir")["dir"]) / "dump.rdb").mkdir()
    client.set("something", "changed")
    client.bgsave()
    wait_for(lambda: client.info("persistence")["rdb_last_bgsave_status"] == "err", "the failure")


@pytest.mark.parametrize(("spoil", "pings"), [(out_of_memory, True), (a_replica, True), (losing_its_disk, False)])
def test_a_redis_that_takes_no_writes(
    own_redis: RedisProcess, model_dir: Path, tmp_path: Path, spoil: Callable[[redis.Redis], None], pings: bool
) -> None:
    """Each says so, by the check's name. The control: PING, which is not what is asked, is mostly answered as ever."""
    application = create_app(settings(own_redis.url, tmp_path, model_dir))
    application.state.gateway.readiness.remember_s = 0.0
    with TestClient(application) as caller, redis.Redis.from_url(own_redis.url, decode_responses=True) as client:
        assert caller.get("/readyz").status_code == 200
        spoil(client)
        answer = caller.get("/readyz")
        assert (answer.status_code, answer.json()["code"]) == (503, "queue_unavailable")
        assert answer.json()["detail"] == "Failed checks: redis."
        assert caller.get("/livez").status_code == 200
        if pings:
            assert client.ping()
        else:
            client.config_set("save", "")  # it could not save as it ends, either


def test_a_redis_that_loads(tmp_path: Path) -> None:
    """While it reads its data after a start, it is away; afterwards it is there, without a new process here."""
    store, server = ArtifactStore(tmp_path / "artifacts"), start_redis(tmp_path)
    with queues.connect(server.url, timeout_s=2.0) as client:
        readiness = Readiness(client, store, 0, remember_s=0.0)
        assert readiness.failed() == {}
        client.config_set("rdbcompression", "no")
        client.execute_command("DEBUG", "POPULATE", 500, "key", 100_000)
        client.bgrewriteaof()
        wait_for(lambda: client.info("persistence")["aof_rewrite_in_progress"] == 0, "the rewrite")
        server.stop()
        command: Any = server.process.args
        slow = subprocess.Popen([*command, "--key-load-delay", "20000"], stdout=subprocess.DEVNULL)
        try:
            wait_for(lambda: loading(server.url), "the loading")
            assert readiness.failed() == {"redis": "queue_unavailable"}
        finally:
            slow.kill()
            slow.wait()
        server = start_redis(tmp_path)
        try:
            assert readiness.failed() == {}
        finally:
            server.stop()


def loading(url: str) -> bool:
    """What the server says of itself."""
    try:
        with redis.Redis.from_url(url) as client:
            return client.info("persistence")["loading"] == 1
    except redis.RedisError:
        return False


def test_a_store_that_is_full(redis_server: RedisProcess, tmp_path: Path) -> None:
    """Less free space than is to be kept counts as full, by what the file system says; with enough it is well."""
    with queues.connect(redis_server.url) as client:
        store = ArtifactStore(tmp_path / "artifacts")
        assert Readiness(client, store, 1, 0.0).failed() == {}
        assert Readiness(client, store, 2**62, 0.0).failed() == {"store": "storage_unavailable"}


def test_a_store_that_cannot_be_written(redis_server: RedisProcess, tmp_path: Path) -> None:
    """A file where the store's directory should be."""
    (tmp_path / "artifacts").write_text("")
    with queues.connect(redis_server.url) as client:
        readiness = Readiness(client, ArtifactStore(tmp_path / "artifacts"), 0, 0.0)
        assert readiness.failed() == {"store": "storage_unavailable"}


def test_asking_often_costs_little(redis_server: RedisProcess, tmp_path: Path) -> None:
    """A stranger who asks a thousand times makes Redis write once; an hour later it would be asked again."""
    with queues.connect(redis_server.url) as client:
        before = client.info("commandstats").get("cmdstat_set", {"calls": 0})["calls"]
        readiness = Readiness(client, ArtifactStore(tmp_path / "artifacts"), 0, 3600.0)
        for _ in range(1000):
            assert readiness.failed() == {}
        assert client.info("commandstats")["cmdstat_set"]["calls"] == before + 1


@pytest.mark.parametrize(("drain_s", "answers"), [("30", True), ("0", False)])
def test_draining(redis_server: RedisProcess, model_dir: Path, tmp_path: Path, drain_s: str, answers: bool) -> None:
    """After SIGTERM it answers on, and says at /readyz that it is about to go; without that time it ends at once."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DREAMSERVE_")} | {
        "DREAMSERVE_REDIS_URL": redis_server.url,
        "DREAMSERVE_STATE_DIR": str(tmp_path),
        "DREAMSERVE_BASE_MODEL": str(model_dir),
        "DREAMSERVE_DRAIN_S": drain_s,
        "DREAMSERVE_METRICS_PORT": "0",
    }
    command = [sys.executable, "-m", "service.cli", "gateway", "--port", str(port := free_port())]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: status(f"{url}/readyz") == 200, "the gateway")
        process.send_signal(signal.SIGTERM)
        if answers:
            wait_for(lambda: status(f"{url}/readyz") == 503, "the word that it leaves")
            problem = httpx2.get(f"{url}/readyz").json()
            assert (problem["code"], problem["detail"]) == ("draining", "Failed checks: draining.")
            assert status(f"{url}/v1/models") == 200, "who was sent here already is served"
            process.send_signal(signal.SIGINT)  # enough of it
        assert process.wait(240) is not None
    finally:
        process.kill()
        process.wait()


def free_port() -> int:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def status(url: str) -> int:
    try:
        return httpx2.get(url, timeout=60.0, trust_env=False).status_code
    except httpx2.HTTPError:
        return 0
