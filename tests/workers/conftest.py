"""Real parts for the tests of this room: a Redis process, a store on disk, jobs to put through."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import redis

from workers import queues
from workers.artifacts import ArtifactStore
from workers.jobs import CustomizeJob, Sampling
from workers.redis_process import RedisProcess, start_redis

MakeJob = Callable[..., CustomizeJob]


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisProcess]:
    """One Redis for the whole run; tests that kill a server start their own."""
    process = start_redis(tmp_path_factory.mktemp("state"))
    yield process
    process.stop()


@pytest.fixture
def client(server: RedisProcess) -> Iterator[redis.Redis]:
    """A client on an empty Redis."""
    with queues.connect(server.url) as connected:
        connected.flushall()
        yield connected


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "artifacts")


@pytest.fixture
def make_job() -> MakeJob:
    """Small jobs: `make_job("job_1", num_images=2, steps=3)`."""

    def make(job_id: str, *, steps: int = 2, seed: int = 7, **changes: object) -> CustomizeJob:
        sampling = Sampling(
            width=16, height=32, num_inference_steps=steps, guidance=4.5, first_step_guidance=4.5, seed=seed
        )
        job = CustomizeJob(job_id, "standin", "a toy", "", (), sampling)
        return replace(job, **changes)  # pyright: ignore[reportArgumentType]  # names are the test's own

    return make
