"""A worker's own port: /readyz says what keeps jobs away, /livez what a new process mends, /metrics what it did."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.waiting import stop_child, wait_for
from tests.workers.conftest import MakeJob
from workers import queues
from workers.jobs import CUSTOMIZE
from workers.ledger import CustomizeLedger, Ledger
from workers.redis_process import RedisProcess, start_redis
from workers.telemetry.exposition import Exposition
from workers.telemetry.metrics import counter, fresh_registry


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisProcess]:
    server = start_redis(tmp_path)
    yield server
    server.process.send_signal(signal.SIGCONT)
    server.stop()


@dataclass
class Worker:
    """A process with the stand-in for a model, and its port."""

    process: subprocess.Popen[str]
    home: Path
    log: str = ""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def listen(self) -> None:
        """Read the log up to where it says its port."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log += line
            if '"event": "metrics"' in line:
                self.port = json.loads(line)["port"]
                return
        raise AssertionError(self.log)

    def failed(self, path: str = "/readyz") -> dict[str, str]:
        answer = httpx2.get(f"{self.url}{path}", timeout=10.0, trust_env=False)
        body: Any = answer.json()
        assert (answer.status_code == 503) == ("failed" in body)
        return body.get("failed", {})

    def metrics(self) -> dict[str, float]:
        text = httpx2.get(f"{self.url}/metrics", timeout=10.0, trust_env=False).text
        return {name: float(value) for name, value in re.findall(r"^([^#\s]\S*) (\S+)$", text, re.MULTILINE)}


def environment(home: Path, **changes: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("DREAMSERVE_")}
    return kept | {
        "DREAMSERVE_STATE_DIR": str(home),
        "DREAMSERVE_METRICS_PORT": "0",
        "DREAMSERVE_LEASE_S": "1",
        "DREAMSERVE_GRACE_S": "60",
        "STANDIN_DIR": str(home),
        **changes,
    }


COMMAND = [sys.executable, "-m", "tests.workers.standin"]


@pytest.fixture
def worker(own_redis: RedisProcess, tmp_path: Path) -> Iterator[Worker]:
    settings = environment(tmp_path, DREAMSERVE_BASE_MODEL="slow")
    process = subprocess.Popen(COMMAND, env=settings, stderr=subprocess.PIPE, text=True)
    running = Worker(process, tmp_path)
    running.listen()
    yield running
    process.kill()
    process.communicate()


def test_a_worker_from_loading_to_leaving(worker: Worker, own_redis: RedisProcess, make_job: MakeJob) -> None:
    """Each failure is provoked: a model that loads, a Redis that is silent for a lease, SIGTERM with a job in hand."""
    client = queues.connect(own_redis.url)
    ledger: CustomizeLedger = Ledger(client, CUSTOMIZE)
    wait_for(lambda: worker.failed() == {"model": "loading"}, "the first round")
    assert worker.failed("/livez") == {}, "loading mends itself"
    (worker.home / "loaded").touch()
    wait_for(lambda: worker.failed() == {}, "the model")

    stop_child(own_redis.process.pid)
    wait_for(lambda: worker.failed() == {"redis": "not heard of"}, "the silence to be noticed")
    assert worker.failed("/livez") == {}, "a new process would not hear of Redis either"
    os.kill(own_redis.process.pid, signal.SIGCONT)
    wait_for(lambda: worker.failed() == {}, "Redis")

    for job in (make_job("job_1", steps=3, num_images=2), make_job("job_2", prompt="gate:open")):
        queues.ring_accepted(ledger, ledger.accept(job))
    wait_for(lambda: worker.metrics().get('dreamserve:requests_ended_total{state="succeeded"}') == 1, "one end")
    wait_for(lambda: worker.metrics()['dreamserve:requests_in_hand{state="running"}'] == 1, "the other to run")
    worker.process.send_signal(signal.SIGTERM)
    wait_for(lambda: worker.failed() == {"model": "stopping"}, "the word that it leaves")
    assert worker.failed("/livez") == {}
    (worker.home / "open").touch()
    assert worker.process.wait(240) == 0


def test_a_taken_port_ends_it_at_once(own_redis: RedisProcess, tmp_path: Path) -> None:
    """Exit status 2, which ends `serve` too, and one line that names the setting."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        settings = environment(tmp_path, DREAMSERVE_METRICS_PORT=str(taken.getsockname()[1]))
        for name, command in (("worker", COMMAND), ("courier", [sys.executable, "-m", "workers.courier"])):
            done = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=240, check=False)
            assert done.returncode == 2
            assert done.stderr.splitlines()[-1].startswith(f"dreamserve {name}: DREAMSERVE_METRICS_PORT: port ")


def test_a_courier_without_redis_is_not_ready(own_redis: RedisProcess, tmp_path: Path) -> None:
    """It says so within its client's patience, and takes it back."""
    command = [sys.executable, "-m", "workers.courier"]
    process = subprocess.Popen(command, env=environment(tmp_path), stderr=subprocess.PIPE, text=True)
    courier = Worker(process, tmp_path)
    try:
        courier.listen()
        wait_for(lambda: courier.failed() == {}, "the first look")
        stop_child(own_redis.process.pid)
        wait_for(lambda: courier.failed() == {"redis": "not heard of"}, "the silence to be noticed")
        os.kill(own_redis.process.pid, signal.SIGCONT)
        wait_for(lambda: courier.failed() == {}, "Redis")
    finally:
        process.kill()
        process.communicate()


def test_the_port_survives_strangers() -> None:
    """Silence, half a request and nonsense keep nobody else from an answer; other paths and methods have none."""
    registry = fresh_registry()
    counter(registry, "asked", "Nothing.").inc(3)
    exposition = Exposition("127.0.0.1", 0, registry, alive=dict[str, str], ready=lambda: {"x": "y"})
    exposition.start()
    url = f"http://127.0.0.1:{exposition.port}"
    strangers = [socket.create_connection(("127.0.0.1", exposition.port)) for _ in range(20)]
    try:
        for number, stranger in enumerate(strangers):
            stranger.sendall((b"", b"GET /met", b"\x00\xff\r\n\r\n")[number % 3])
        answer = httpx2.get(f"{url}/metrics?x=1", timeout=10.0, trust_env=False)
        assert "dreamserve:asked_total 3.0" in answer.text
        assert "_created" not in answer.text
        assert httpx2.get(f"{url}/readyz", trust_env=False).json() == {"status": "failed", "failed": {"x": "y"}}
        assert httpx2.get(f"{url}/elsewhere", trust_env=False).status_code == 404
        assert httpx2.post(f"{url}/metrics", trust_env=False).status_code == 501
    finally:
        for stranger in strangers:
            stranger.close()
        exposition.close()
    with pytest.raises(httpx2.HTTPError):
        httpx2.get(f"{url}/metrics", timeout=1.0, trust_env=False)
