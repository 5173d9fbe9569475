"""The worker's engine on the shipped model: jobs at once against one after the other, over a real Redis and store."""

from __future__ import annotations

import math
import random
import statistics
import tempfile
import time
from collections.abc import Generator, Sequence
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
from workers.jobs import CUSTOMIZE, CustomizeJob, CustomizeRecord, JobStatus, ReferenceInput, Sampling
from workers.ledger import Ledger
from workers.redis_process import start_redis
from workers.settings import WorkerSettings

JOBS = 8
"""At once."""
WAITING = 50
SHORT_STEPS = 4


def run(device: str, rounds: int) -> list[Figure]:
    """Jobs at once against one after the other, and a short job among many that wait against the same alone."""
    with tempfile.TemporaryDirectory() as directory, bench(Path(directory), device) as line:
        seconds = interleaved(
            {"one after the other": line.in_turn, f"{JOBS} at once": line.at_once}, rounds=rounds, device=device
        )
        alone, among = line.short_jobs(6 * rounds)
    what = f"{JOBS} jobs, two references, 12 steps"
    figures = compared(what, seconds, "one after the other")
    figures += [figure(f"{what}: {name}", "pictures/s", [JOBS / s for s in each]) for name, each in seconds.items()]
    what = f"a job of {SHORT_STEPS} steps while {WAITING} of 12 wait"
    return [
        *figures,
        figure(f"{what}: alone", "ms", [1e3 * s for s in alone]),
        figure(f"{what}: among them", "ms", [1e3 * s for s in among]),
        figure(f"{what}: p95 over the median alone", "x", [p95(among) / statistics.median(alone)]),
    ]


def p95(values: Sequence[float]) -> float:
    """The smallest value that 95 of 100 do not exceed."""
    return sorted(values)[math.ceil(0.95 * len(values)) - 1]


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

    def short_jobs(self, count: int) -> tuple[list[float], list[float]]:
        """Seconds of short jobs alone, and of as many while `WAITING` longer ones are in hand at each one's arrival."""
        alone = [self._short() for _ in range(count)]
        waiting: list[str] = []
        among: list[float] = []
        draw = random.Random(0)
        for _ in range(count):
            waiting += [self._begin() for _ in range(WAITING - len(self._runner.claims))]
            time.sleep(draw.uniform(0, 0.2))  # so that they come at any moment of a forward
            among.append(self._short())
        self._end(waiting)
        return alone, among

    def _short(self) -> float:
        began = time.perf_counter()
        job = self._begin(SHORT_STEPS)
        while self._record(job).status in (JobStatus.QUEUED, JobStatus.RUNNING):
            time.sleep(0.001)
        return time.perf_counter() - began

    def _begin(self, steps: int = 12) -> str:
        number = next(self._numbers)
        sampling = Sampling(self._side, self._side, steps, 3.5, 3.5, number)
        job = CustomizeJob(
            f"job_{number}", "tiny", f"[ref#1] and [ref#2], {number}", "", self._references, sampling=sampling
        )
        self._runner.ledger.accept(job)
        self._runner.run(job.id)
        return job.id

    def _end(self, jobs: list[str]) -> None:
        self._runner.wait()
        for job in jobs:
            if (record := self._record(job)).status is not JobStatus.SUCCEEDED:
                raise RuntimeError(f"{job} has not ended well: {record.error}")

    def _record(self, job: str) -> CustomizeRecord:
        record = self._runner.ledger.get(job)
        if record is None:
            raise RuntimeError(f"{job} has no record")
        return record


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
    drawn = [pictures.encode(noise.integers(0, 256, (side, side, 3), np.uint8), "png") for _ in range(2)]
    references = tuple(
        ReferenceInput(slot, Role.STYLE, store.put("default", data)) for slot, data in enumerate(drawn, start=1)
    )
    ledger = Ledger(queues.connect(process.url), CUSTOMIZE)
    runner = JobRunner(pipeline, ledger, store, settings, "bench")
    try:
        yield Line(runner, references, int(pipeline.spec.width.default))
    finally:
        runner.close()
        process.stop()
