"""Worker processes under faults: one load for many jobs, and no job lost or done twice, whatever is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import redis

from tests.waiting import stop_child, wait_for
from tests.workers.conftest import MakeJob
from tests.workers.standin import BASE, LOADS, StandinPipeline, picture
from workers import queues
from workers.artifacts import ArtifactStore
from workers.jobs import CUSTOMIZE, CustomizeJob, CustomizeRecord, JobStatus
from workers.ledger import Ledger
from workers.pictures import PictureLimits, decode
from workers.redis_process import RedisProcess, start_redis

LEASE_S = 3.0


@dataclass
class Crew:
    """One Redis, one store, and the worker processes on them."""

    home: Path
    redis: RedisProcess
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list[subprocess.Popen[bytes]])
    jobs: int = 0

    def __post_init__(self) -> None:
        self.client = queues.connect(self.redis.url)
        self.ledger = Ledger(self.client, CUSTOMIZE, lease_s=LEASE_S)
        self.store = ArtifactStore(self.home / "artifacts")

    @property
    def log(self) -> str:
        return (self.home / "workers.log").read_text()

    def spawn(self, *arguments: str, before: Sequence[str] = (), **variables: str) -> subprocess.Popen[bytes]:
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("DREAMSERVE_")},
            "DREAMSERVE_STATE_DIR": str(self.home),
            "DREAMSERVE_LEASE_S": str(LEASE_S),
            "STANDIN_DIR": str(self.home),
            **variables,
        }
        with (self.home / "workers.log").open("ab") as log:
            command = [*before, sys.executable, "-m", "tests.workers.standin", *arguments]
            process = subprocess.Popen(command, env=environment, stderr=log)
        self.processes.append(process)
        return process

    def ensure(self, number: int) -> None:
        """Have this many workers that are ready, started if need be."""
        self.processes = [process for process in self.processes if process.poll() is None]
        while len(self.processes) < number:
            self.spawn()
        pids = {process.pid for process in self.processes}
        wait_for(lambda: {card["pid"] for card in self.cards() if card["state"] == "ready"} >= pids, "readiness")

    def cards(self) -> list[dict[str, object]]:
        return queues.workers(self.client, CUSTOMIZE)

    def submit(self, make_job: MakeJob, **changes: object) -> CustomizeJob:
        self.jobs += 1
        job = make_job(f"job_{self.jobs}", **changes)
        assert self.ledger.accept(job).outcome == "new"
        queues.ring(self.client, CUSTOMIZE, job.id)
        return job

    def held_by(self, job: CustomizeJob) -> subprocess.Popen[bytes]:
        """The process that has taken one step of a gated job."""
        wait_for(lambda: (p := self.record(job).progress) and p.phase == "denoise" and p.step == 1, "a first step")
        name: bytes = self.client.hget(f"{CUSTOMIZE.root}job:{job.id}", "worker")  # pyright: ignore[reportAssignmentType]  # sync client
        pid = int(name.decode().rpartition(".")[2])
        return next(process for process in self.processes if process.pid == pid)

    def open_gate(self, name: str) -> None:
        (self.home / name).touch()

    def record(self, job: CustomizeJob) -> CustomizeRecord:
        found = self.ledger.get(job.id)
        assert found is not None
        return found

    def ended(self, job: CustomizeJob) -> CustomizeRecord:
        def look() -> CustomizeRecord | None:
            try:
                found = self.record(job)
            except redis.RedisError:
                return None
            return found if found.status.terminal else None

        return wait_for(look, f"the end of {job.id}")

    def check_pictures(self, record: CustomizeRecord) -> None:
        """The committed pictures are the right ones, byte for byte."""
        assert record.status is JobStatus.SUCCEEDED and record.result is not None
        job = record.job
        for image in record.result.images:
            pixels = decode(self.store.read_picture(image.name, image.sha256), PictureLimits())
            steps = job.sampling.num_inference_steps
            np.testing.assert_array_equal(pixels, picture(job.prompt, image.seed, steps, 32, 16))

    def loads(self) -> list[int]:
        return [int(line) for line in (self.home / LOADS).read_text().split()]


@pytest.fixture(scope="module")
def crew(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crew]:
    home = tmp_path_factory.mktemp("crew")
    crew = Crew(home, start_redis(home))
    yield crew
    for process in crew.processes:
        if process.poll() is None:
            process.kill()
            process.wait()
    crew.redis.stop()


def test_two_workers_many_jobs(crew: Crew, make_job: MakeJob) -> None:
    """Each job's pictures are right, each worker loads once, and RQ and the leases drain to nothing."""
    crew.ensure(2)
    jobs = [crew.submit(make_job, seed=seed, num_images=2) for seed in range(6)]
    for job in jobs:
        record = crew.ended(job)
        crew.check_pictures(record)
        assert record.attempt == 1
    pids = sorted(process.pid for process in crew.processes)
    wait_for(lambda: len(crew.loads()) >= len(pids), "both workers")
    assert sorted(crew.loads()) == pids
    assert crew.client.keys("rq:job:*") == []
    assert crew.client.llen("rq:queue:customize:intermediate") == 0
    assert crew.client.zcard(f"{CUSTOMIZE.root}leases") == 0
    card = crew.cards()[0]
    assert card.keys() == {"pid", "state", "model", "name"} | StandinPipeline().describe().keys()
    assert (card["model"], card["base"]) == ("standin", BASE)


def test_forged_delivery_between_jobs(crew: Crew, make_job: MakeJob) -> None:
    """A live worker passes over a forged call and goes on."""
    crew.ensure(1)
    mark = crew.home / "forged-ran"
    crew.client.hset(
        "rq:job:forged",
        mapping={"data": json.dumps(["os.system", None, [f"touch {mark}"], {}]), "status": "queued"},
    )
    crew.client.rpush("rq:queue:customize", "forged")
    assert crew.ended(crew.submit(make_job)).status is JobStatus.SUCCEEDED
    assert not mark.exists()


def test_nothing_of_the_user_in_the_logs(crew: Crew, make_job: MakeJob) -> None:
    """Prompts and the text of exceptions stay out of the log, which is JSON lines."""
    crew.ensure(1)
    record = crew.ended(crew.submit(make_job, prompt="boom canary-prompt"))
    assert record.error is not None and record.error.code == "internal"
    lines = [json.loads(line) for line in crew.log.splitlines()]
    assert any(line.get("job_id") == record.job.id and line.get("exception") == "KeyError" for line in lines)
    assert "canary" not in crew.log


def test_redis_restarted_while_idle(crew: Crew, make_job: MakeJob) -> None:
    """The worker waits for Redis and goes on, its model still loaded."""
    crew.ensure(1)
    loads = crew.loads()
    crew.redis.stop()
    wait_for(lambda: "redis is away" in crew.log, "the outage to be noticed")
    crew.redis = start_redis(crew.home)
    record = crew.ended(crew.submit(make_job))
    crew.check_pictures(record)
    assert crew.loads() == loads


def test_lost_delivery_is_brought_again(crew: Crew, make_job: MakeJob) -> None:
    """A gateway that died between accept and ring, and a pop whose reply was lost: the job still runs."""
    crew.ensure(1)
    crew.jobs += 1
    job = make_job(f"job_{crew.jobs}")
    crew.ledger.accept(job)
    assert crew.ended(job).attempt == 1


def test_stopped_worker_comes_back_too_late(crew: Crew, make_job: MakeJob) -> None:
    """SIGSTOP beyond the lease: another worker does the job; the zombie's pictures and commit count for nothing."""
    crew.ensure(2)
    job = crew.submit(make_job, prompt="gate:zombie")
    zombie = crew.held_by(job)
    stop_child(zombie.pid)
    crew.open_gate("zombie")
    record = crew.ended(job)
    crew.check_pictures(record)
    zombie.send_signal(signal.SIGCONT)
    wait_for(lambda: f'"job_id": "{job.id}", "state": "lost"' in crew.log, "the zombie to notice")
    assert crew.record(job) == record
    assert record.attempt == 2
    names = {path.name for path in (crew.home / "artifacts/pictures").iterdir() if path.name.startswith(job.id + ".")}
    assert record.result is not None and names == {record.result.images[0].name}


def test_killed_worker(crew: Crew, make_job: MakeJob) -> None:
    """kill -9 in the middle of a job: another worker ends it with attempt 2, when the lease has ended."""
    crew.ensure(2)
    job = crew.submit(make_job, prompt="gate:killed")
    victim = crew.held_by(job)
    victim.kill()
    victim.wait()
    crew.open_gate("killed")
    record = crew.ended(job)
    crew.check_pictures(record)
    assert record.attempt == 2


OWN_PIDS = ("unshare", "--pid", "--fork", "--kill-child=KILL")


def test_a_restarted_container_works_at_once(server: RedisProcess, tmp_path: Path, make_job: MakeJob) -> None:
    """A container that is killed comes back with its host name and its process number, 1. RQ still knows the worker of
    that name as alive, and would refuse another: names are new at every start."""
    if subprocess.run([*OWN_PIDS, "true"], check=False, capture_output=True).returncode:
        pytest.skip("no process numbers of one's own to be had here")
    crew = Crew(tmp_path, server)
    crew.client.flushall()
    for _ in ("begun", "begun again"):
        process = crew.spawn(before=OWN_PIDS, DREAMSERVE_REDIS_URL=server.url)
        try:
            wait_for(lambda: any(card["pid"] == 1 and card["state"] == "ready" for card in crew.cards()), "its card")
            crew.check_pictures(crew.ended(crew.submit(make_job)))
            assert process.poll() is None
        finally:
            process.kill()
            process.wait()


def test_sigterm_ends_the_running_job_first(crew: Crew, make_job: MakeJob) -> None:
    """SIGTERM: the job in hand is finished, the next one is left in the queue for others, the exit code is 0."""
    crew.ensure(1)
    while len(crew.processes) > 1:
        extra = crew.processes.pop()
        extra.send_signal(signal.SIGTERM)
        assert extra.wait(240) == 0, "an idle worker leaves at once"
    job = crew.submit(make_job, prompt="gate:term")
    worker = crew.held_by(job)
    worker.send_signal(signal.SIGTERM)
    worker.send_signal(signal.SIGTERM)
    wait_for(lambda: any(card["state"] == "stopping" for card in crew.cards()), "the signal to be seen")
    left = crew.submit(make_job)
    crew.open_gate("term")
    assert worker.wait(240) == 0
    record = crew.record(job)
    crew.check_pictures(record)
    assert record.attempt == 1
    assert crew.record(left).status is JobStatus.QUEUED
    assert queues.queue(crew.client, CUSTOMIZE).get_job_ids() == [left.id]
    assert worker.pid not in {card["pid"] for card in crew.cards()}, (
        "one that was killed before may still have its card"
    )

    crew.ledger.cancel(left.id)
    assert crew.spawn("--burst").wait(240) == 0, "a burst worker ends when nothing is left"
    assert queues.queue(crew.client, CUSTOMIZE).get_job_ids() == []
    assert crew.record(left).status is JobStatus.CANCELED


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"DREAMSERVE_BASE_MODEL": "absent"}, "model_not_found"),
        ({"DREAMSERVE_REDIS_URL": "http://localhost"}, "DREAMSERVE_REDIS_URL"),
        ({"DREAMSERVE_STATE_DIR": "/nonexistent"}, "no Redis"),
    ],
)
def test_what_cannot_start_says_why(crew: Crew, variables: dict[str, str], said: str) -> None:
    """Exit code 2 and one line on stderr, no traceback."""
    before = len(crew.log)
    assert crew.spawn(**variables).wait(240) == 2
    lines = crew.log[before:].splitlines()
    assert len(lines) == 1 and said in lines[0] and lines[0].startswith("dreamserve worker: ")
