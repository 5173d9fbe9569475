"""A busy worker's waiting jobs go to one that has nothing to do."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.waiting import wait_for
from tests.workers.conftest import MakeJob
from workers import queues
from workers.jobs import CUSTOMIZE, CustomizeRecord, JobStatus
from workers.ledger import CustomizeLedger, Ledger
from workers.redis_process import RedisProcess, start_redis

Spawn = Callable[[], subprocess.Popen[bytes]]


@pytest.fixture
def redis_at_home(tmp_path: Path) -> Iterator[RedisProcess]:
    process = start_redis(tmp_path)
    yield process
    process.stop()


@pytest.fixture
def spawn(tmp_path: Path, redis_at_home: RedisProcess) -> Iterator[Spawn]:
    """Starts workers of one run a forward; they are killed at the end."""
    processes: list[subprocess.Popen[bytes]] = []
    variables = {"STATE_DIR": str(tmp_path), "LEASE_S": "10", "FORWARD_RUNS": "1", "LOG_LEVEL": "warning"}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DREAMSERVE_")}
    environment |= {f"DREAMSERVE_{name}": value for name, value in variables.items()}

    def start() -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "tests.workers.standin"]
        processes.append(subprocess.Popen(command, env={**environment, "STANDIN_DIR": str(tmp_path)}))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()


def worker_of(ledger: CustomizeLedger, job_id: str) -> int:
    """Process id of who claimed a job last; 0 for nobody."""
    name: bytes | None = ledger.redis.hget(f"{CUSTOMIZE.root}job:{job_id}", "worker")  # pyright: ignore[reportAssignmentType]  # sync client
    return int(name.rpartition(b".")[2]) if name else 0


def test_an_idle_worker_gets_what_a_busy_one_has_not_begun(
    tmp_path: Path, redis_at_home: RedisProcess, spawn: Spawn, make_job: MakeJob
) -> None:
    """One worker holds six jobs, and its first one takes long. As soon as another is ready, it runs the others."""
    ledger: CustomizeLedger = Ledger(queues.connect(redis_at_home.url), CUSTOMIZE)

    def record(job_id: str) -> CustomizeRecord:
        found = ledger.get(job_id)
        assert found is not None
        return found

    def submit(job_id: str, **changes: object) -> None:
        queues.ring_accepted(ledger, ledger.accept(make_job(job_id, **changes)))

    busy = spawn()
    submit("job_long", prompt="a toy gate:open")
    wait_for(lambda: (p := record("job_long").progress) and p.step == 1, "the long job's first step")
    others = [f"job_{number}" for number in range(5)]
    for job_id in others:
        submit(job_id)
    wait_for(lambda: all(record(one).status is JobStatus.RUNNING for one in others), "all jobs in one hand")
    assert {worker_of(ledger, one) for one in others} == {busy.pid}, "with nobody else there, it takes and keeps them"

    idle = spawn()
    wait_for(lambda: all(record(one).status is JobStatus.SUCCEEDED for one in others), "the ends of the others")
    assert {worker_of(ledger, one) for one in others} == {idle.pid}
    assert {record(one).attempt for one in others} == {1}, "nobody is charged"
    assert record("job_long").status is JobStatus.RUNNING
    (tmp_path / "open").touch()
    wait_for(lambda: record("job_long").status is JobStatus.SUCCEEDED, "the end of the long job")
    assert worker_of(ledger, "job_long") == busy.pid, "what has begun stays where it is"
