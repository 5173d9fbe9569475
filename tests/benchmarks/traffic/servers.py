"""The gateway and the stock application side by side, each a process of its own, over one real Redis."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from service.commands.samples import ring, star
from tests.benchmarks.traffic.load import Server, asked, request, until_it_answers
from tests.benchmarks.traffic.pictures import data_url
from tests.conftest import ROOT
from workers import queues
from workers.jobs import CUSTOMIZE, ImageArtifact, JobResult, Progress
from workers.ledger import Ledger
from workers.redis_process import start_redis
from workers.tenants import TenantBook

JOBS = 20
"""In each state."""
STATES = ("queued", "running", "ended")
SHARES = {"DREAMSERVE_SHARE_S": "1e9", "DREAMSERVE_BOUND_S": "1e9", "DREAMSERVE_TENANT_ACCEPTANCES": "0"}


@dataclass(frozen=True, slots=True)
class Bench:
    """Both servers, two tenants of ours, and jobs of the first by state."""

    ours: Server
    stock: Server
    headers: dict[str, str]
    attacker_key: str
    jobs: dict[str, list[str]]


@contextmanager
def bench() -> Generator[Bench]:
    """Both servers, and jobs in every state at both."""
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "log").open("w") as log:
        redis = start_redis(Path(folder))
        client = queues.connect(redis.url)
        book = TenantBook(client)
        keys = book.create_key("bench"), book.create_key("attacker")
        where = {**os.environ, "DREAMSERVE_STATE_DIR": folder, "DREAMSERVE_REDIS_URL": redis.url, **SHARES}
        try:
            with _gateway(where, log) as ours, _stock(where) as stock:
                both = Bench(ours, stock, {"Authorization": f"Bearer {keys[0]}"}, keys[1], {})
                both.jobs.update(_jobs(both, Ledger(client, CUSTOMIZE)))
                for job_id in (job for jobs in both.jobs.values() for job in jobs):
                    body = json.loads(asked(ours, request("GET", f"/v1/jobs/{job_id}", both.headers)).body)
                    client.hset(f"stock:job:{job_id}", mapping={name: json.dumps(body[name]) for name in body})
                yield both
        finally:
            client.close()
            redis.stop()


@contextmanager
def attacks(both: Bench, sockets: int, rate: float) -> Generator[dict[str, Any]]:
    """All of them while the block runs; what is yielded says afterwards what was answered, how often."""
    answers: dict[str, Any] = {}
    command = [sys.executable, "-m", "tests.benchmarks.traffic.attacks", str(both.ours.port), str(sockets), str(rate)]
    environment = {**os.environ, "ATTACKER_KEY": both.attacker_key}
    with _process(command, environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        yield answers
        process.stdin.close()
        answers.update(json.loads(process.stdout.readline()))


@contextmanager
def _gateway(environment: dict[str, str], log: IO[str]) -> Generator[Server]:
    """As `dreamserve serve` starts it."""
    with socket.create_server(("127.0.0.1", 0), backlog=2048) as listener:
        command = [sys.executable, "-m", "service.cli", "gateway", "--fd", str(listener.fileno())]
        with _process(command, environment, pass_fds=(listener.fileno(),), stderr=log) as process:
            server = Server(listener.getsockname()[1], process.pid)
            until_it_answers(server, request("GET", "/livez", {}), lambda: process.poll() is None)
            yield server


@contextmanager
def _stock(environment: dict[str, str]) -> Generator[Server]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    with _process([sys.executable, "-m", "tests.benchmarks.traffic.stock", str(port)], environment) as process:
        server = Server(port, process.pid)
        until_it_answers(server, request("GET", "/openapi.json", {}), lambda: process.poll() is None)
        yield server


@contextmanager
def _process(command: list[str], environment: dict[str, str], **options: Any) -> Generator[Any]:
    process = subprocess.Popen(command, cwd=ROOT, env=environment, **options)
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


def _jobs(both: Bench, ledger: Ledger[Any, Any, Any]) -> dict[str, list[str]]:
    """Submitted as callers do; from there on with a worker's words."""
    references = [{"image": data_url(data, "png"), "role": "subject"} for data in (star(), ring())]
    body = {"prompt": "the star from [ref#1] and the ring from [ref#2]", "references": references}
    message = request("POST", "/v1/customize", both.headers, json.dumps(body).encode())
    jobs = {state: [json.loads(asked(both.ours, message).body)["id"] for _ in range(JOBS)] for state in STATES}
    for job_id in jobs["running"] + jobs["ended"]:
        token = ledger.claim(job_id, "benchmark") or 0
        ledger.begin(job_id, token)
        ledger.beat(job_id, token, Progress("denoise", 5, 12))
        if job_id in jobs["ended"]:
            image = ImageArtifact(f"{job_id}.{token}.0.png", "0" * 64, "image/png", 64, 64, 9000, 7)
            timings = {"preprocess_s": 0.01, "encode_s": 0.02, "denoise_s": 0.5, "decode_s": 0.03}
            result = JobResult((image,), timings, {"prompt": "hit", "reference_1": "miss", "reference_2": "hit"})
            ledger.commit(job_id, token, result)
    return jobs
