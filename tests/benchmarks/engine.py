"""The worker's engine on the shipped model: jobs at once against one after the other, over a real Redis and store."""

from __future__ import annotations

import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import numpy as np

from model.roles import Role
from tests.benchmarks.measure import Figure, compared, figure, interleaved
from workers import pictures, queues
from workers.artifacts import ArtifactStore
from workers.inference.runner import JobRunner
from workers.inference.worker import load_pipeline
from workers.jobs import CUSTOMIZE, CustomizeJob, JobStatus, ReferenceInput, Sampling
from workers.ledger import Ledger
from workers.redis_process import start_redis
from workers.settings import WorkerSettings

JOBS = 8
"""At once."""


def run(device: str, rounds: int) -> list[Figure]:
    """Seconds for `JOBS` jobs of two references, one after the other and at once; and pictures a second."""
    with tempfile.TemporaryDirectory() as directory, bench(Path(directory), device) as line:
        seconds = interleaved(
            {"one after the other": line.in_turn, f"{JOBS} at once": line.at_once}, rounds=rounds, device=device
        )
    what = f"{JOBS} jobs, two references, 12 steps"
    figures = compared(what, seconds, "one after the other")
    return figures + [
        figure(f"{what}: {name}", "pictures/s", [JOBS / s for s in each]) for name, each in seconds.items()
    ]


class Line:
    """Jobs in, pictures out."""

    def __init__(self, runner: JobRunner, references: tuple[ReferenceInput, ...], side: int) -> None:
        self._runner = runner
        self._references = references
        self._side = side
        self._numbers = count()

    def in_turn(self) -> None:
        """Each job when the one before has ended."""
        for _ in range(JOBS):
            self._end([self._begin()])

    def at_once(self) -> None:
        """All jobs together."""
        self._end([self._begin() for _ in range(JOBS)])

    def _begin(self) -> str:
        number = next(self._numbers)
        sampling = Sampling(self._side, self._side, 12, 3.5, 3.5, number)
        job = CustomizeJob(
            f"job_{number}", "tiny", f"[ref#1] and [ref#2], {number}", "", self._references, sampling=sampling
        )
        self._runner.ledger.accept(job)
        self._runner.run(job.id)
        return job.id

    def _end(self, jobs: list[str]) -> None:
        self._runner.wait()
        for job in jobs:
            record = self._runner.ledger.get(job)
            if record is None or record.status is not JobStatus.SUCCEEDED:
                raise RuntimeError(f"{job} has not ended well: {record and record.error}")


@contextmanager
def bench(directory: Path, device: str) -> Generator[Line]:
    """A runner with the shipped model, its Redis and its store."""
    process = start_redis(directory)
    settings = WorkerSettings(state_dir=directory, device=device)
    pipeline = load_pipeline(settings)
    pipeline.warm()
    store = ArtifactStore(settings.artifact_root)
    noise = np.random.default_rng(0)
    side = int(pipeline.spec.reference_resolution.default)
    references = tuple(
        ReferenceInput(
            slot, Role.STYLE, store.put(pictures.encode(noise.integers(0, 256, (side, side, 3), np.uint8), "png"))
        )
        for slot in (1, 2)
    )
    ledger = Ledger(queues.connect(process.url), CUSTOMIZE)
    runner = JobRunner(pipeline, ledger, store, settings, "bench")
    try:
        yield Line(runner, references, int(pipeline.spec.width.default))
    finally:
        runner.close()
        process.stop()
