"""What the configured model's work costs on this machine, by the real engine, runner, Redis and store."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from model.roles import Role
from workers import pictures, queues
from workers.artifacts import ArtifactStore
from workers.capacity.costs import Costs, Layout, Point
from workers.engine import Engine
from workers.inference.requests import decoded_reference, request_of
from workers.inference.runner import JobRunner
from workers.inference.worker import load_pipeline
from workers.jobs import CUSTOMIZE, CustomizeJob, JobRecord, JobResult, JobStatus, Progress, ReferenceInput, Sampling
from workers.ledger import Ledger
from workers.pictures import PictureLimits
from workers.planner import Budget, Seat
from workers.redis_process import start_redis
from workers.settings import WorkerSettings

if TYPE_CHECKING:
    from model.pipeline import Pipeline

COMPANIES = ((0,), (1,), (2,), (3,), (0, 0), (1, 2), (0, 1, 2, 3), (1,) * 4, (0, 1, 2) * 2, (2,) * 8, (0, 1, 2, 3) * 3)
"""References of each run of the forwards that are measured."""
_FORWARDS = 4
"""In a round: a company's first forward lays it out, those after it need not."""
Record = JobRecord[CustomizeJob, Progress, JobResult]


class MeasurementError(RuntimeError):
    """A job that should have ended well has not."""


@dataclass(frozen=True, slots=True)
class Bench:
    """A worker in this process with what it works on, and jobs for it. No two jobs share what caches could keep."""

    runner: JobRunner
    pipeline: Pipeline
    _noise: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    _numbers: count[int] = field(default_factory=count)

    def job(self, references: int, steps: int, side: int, tenant: str = "default") -> CustomizeJob:
        """A new job with random references."""
        number = next(self._numbers)
        sampling = Sampling(side, side, steps, 3.5, 3.5, number)
        slots = range(1, references + 1)
        prompt = " and ".join(["a picture", *(f"[ref#{slot}]" for slot in slots), str(number)])
        inputs = tuple(ReferenceInput(slot, Role.STYLE, self._picture(tenant)) for slot in slots)
        return CustomizeJob(
            f"job_{number}", self.pipeline.spec.name, prompt, "", inputs, sampling=sampling, tenant=tenant
        )

    def ended(self, job_id: str) -> Record:
        """The record of a job that has succeeded.

        Raises:
            MeasurementError: it has not.
        """
        record = self.runner.ledger.get(job_id)
        if record is None or record.status is not JobStatus.SUCCEEDED or record.result is None:
            raise MeasurementError(f"{job_id} has not ended well: {record and record.error}")
        return record

    def alone(self, job: CustomizeJob) -> Record:
        """Run a job with nobody beside it."""
        self.runner.ledger.accept(job)
        self.runner.run(job.id)
        self.runner.wait()
        return self.ended(job.id)

    def _picture(self, tenant: str) -> str:
        side = int(self.pipeline.spec.reference_resolution.default)
        pixels = self._noise.integers(0, 256, (side, side, 3), np.uint8)
        return self.runner.store.put(tenant, pictures.encode(pixels, "png"))


@contextmanager
def opened(directory: Path, settings: WorkerSettings) -> Generator[Bench]:
    """A bench whose Redis and store lie in a directory; the settings' own stay as they are.

    Raises:
        WeightsError: the model cannot be loaded.
    """
    process = start_redis(directory)
    try:
        pipeline = load_pipeline(settings)
        pipeline.warm()
        settings = settings.model_copy(update={"state_dir": directory, "redis_url": process.url})
        ledger = Ledger(queues.connect(process.url), CUSTOMIZE, tenant_window=10_000)
        runner = JobRunner(pipeline, ledger, ArtifactStore(settings.artifact_root), settings, "bench")
        try:
            yield Bench(runner, pipeline)
        finally:
            runner.close()
    finally:
        process.stop()


def measure(bench: Bench, rounds: int) -> Costs:
    """Medians over rounds, in each of which everything is measured in turn.

    Raises:
        MeasurementError: a job of the measurement failed.
    """
    side = int(bench.pipeline.spec.width.default)
    runs = [_start(bench, references, side) for references in range(4)]
    sizes = [bench.pipeline.num_tokens(run) for run, _ in runs]
    forwards: defaultdict[tuple[int, ...], list[float]] = defaultdict(list)
    starts: defaultdict[int, list[float]] = defaultdict(list)
    solos: defaultdict[tuple[int, int], list[dict[str, float]]] = defaultdict(list)
    lanes: list[float] = []
    for _ in range(rounds):
        lanes.append(_lanes(bench, runs[1][0]))
        for company in COMPANIES:
            forwards[company] += _forwards(bench.pipeline, [runs[n][0] for n in company], [sizes[n] for n in company])
        for references in (0, 2):
            starts[references].append(_start(bench, references, side)[1])
            for steps in (1, 9):
                solos[references, steps].append(_phases(bench.alone(bench.job(references, steps, side))))
    described = bench.pipeline.describe()
    return Costs(
        what=f"{bench.pipeline.spec.name}, {described['dtype']}, on {described['device']}, {_threads()} thread(s)",
        origin="measured",
        layout=Layout(sizes[0] - _cells(bench, side), bench.pipeline.model.codec.cell, sizes[1] - sizes[0], side),
        points=tuple(
            Point(tuple(sizes[n] for n in company), statistics.median(seconds)) for company, seconds in forwards.items()
        ),
        **_around(starts, solos),
        lanes=min(2.0, max(1.0, statistics.median(lanes))),
        hands=bench.pipeline.num_lanes,
    )


def _around(starts: dict[int, list[float]], solos: dict[tuple[int, int], list[dict[str, float]]]) -> dict[str, float]:
    """What comes before, between and after forwards, from jobs that were alone: 0 or 2 references, 1 or 9 steps."""

    def median(phase: str, references: Sequence[int] = (0, 2), steps: Sequence[int] = (1, 9)) -> float:
        return statistics.median(solo[phase] for r in references for s in steps for solo in solos[r, s])

    prepared = [median("prepare", [references]) + statistics.median(starts[references]) for references in (0, 2)]
    started = statistics.median(starts[0] + starts[2])
    rest = [median("rest", steps=[steps]) - started for steps in (1, 9)]
    return {
        "prepare_s": prepared[0],
        "reference_s": max(0.0, (prepared[1] - prepared[0]) / 2),
        "finish_s": median("finish") + max(0.0, rest[0]),
        "beat_s": max(0.0, (rest[1] - rest[0]) / 8),
    }


def _phases(record: Record) -> dict[str, float]:
    """Seconds of a job that was alone."""
    timings = record.result.timings if record.result else {}
    prepare = timings["preprocess_s"] + timings["encode_s"]
    whole = (record.finished_at or 0.0) - record.created_at
    finish = timings["decode_s"]
    return {"prepare": prepare, "finish": finish, "rest": whole - prepare - timings["denoise_s"] - finish}


def _start(bench: Bench, references: int, side: int) -> tuple[Any, float]:
    """A run before its first step, and the seconds from its encoded request to it."""
    job = bench.job(references, 12, side)
    pipeline = bench.pipeline
    store, limits = bench.runner.store, PictureLimits()
    inputs = [decoded_reference(each, job.tenant, store, pipeline.spec, limits) for each in job.references]
    request = request_of(job, tuple(inputs))
    encoded = pipeline.encode(request, pipeline.preprocess(request))
    began = perf_counter()
    run = pipeline.start(encoded, seed=0)
    return run, perf_counter() - began


def _forwards(pipeline: Pipeline, runs: Sequence[Any], tokens: Sequence[int]) -> list[float]:
    """Seconds of the first forwards of a company through the engine."""
    engine = Engine(pipeline, Budget(sum(tokens), len(runs)))
    for number, (run, size) in enumerate(zip(runs, tokens, strict=True)):
        engine.add(Seat(str(number), size, 12, 0.0), run)
    return [engine.forward().seconds for _ in range(_FORWARDS)]


def _cells(bench: Bench, side: int) -> int:
    rows, columns = bench.pipeline.model.codec.grid(side, side)
    return rows * columns


def _threads() -> int:
    import torch  # noqa: PLC0415 - only where the model runs

    return torch.get_num_threads()


def _lanes(bench: Bench, run: Any) -> float:
    """How much more gets done when forwards and a hand's work run beside each other: 1 to 2 times as much as in turn.

    Forwards of one run leave cores idle that forwards of several need, so the mean of both.
    """
    pipeline, side = bench.pipeline, int(bench.pipeline.spec.width.default)

    def by_hand() -> None:
        pipeline.settle_thread()
        _start(bench, 1, side)
        pipeline.decode(run)

    found: list[float] = []
    for company in {1, pipeline.num_lanes}:
        acts = (partial(_forwards, pipeline, [run] * company, [pipeline.num_tokens(run)] * company), by_hand)
        with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
            threads = (one, other)  # one for each act, alone as beside the other
            alone = [thread.submit(_repeated, act).result() for thread, act in zip(threads, acts, strict=True)]
            beside = [thread.submit(_repeated, act) for thread, act in zip(threads, acts, strict=True)]
            found.append(sum(one / both.result() for one, both in zip(alone, beside, strict=True)))
    return statistics.mean(found)


def _repeated(act: Callable[[], object]) -> float:
    """Seconds of an act, over a second of them."""
    began, times = perf_counter(), 0
    while (passed := perf_counter() - began) < 1.0 or not times:
        act()
        times += 1
    return passed / times
