"""The simulation of docs/scaling.md against a real run of the same trace: JobRunner, Redis and store, one worker.

Costs are measured, a trace is played, costs are measured again, and so on: each trace is simulated with the costs
before and after it, because a machine that others use too drifts meanwhile.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from threading import Thread

import numpy as np

from tests.benchmarks.measure import Figure, figure
from workers.capacity.arrivals import Arrival, Load, poisson
from workers.capacity.costs import Costs
from workers.capacity.fleet import Fleet, simulate
from workers.capacity.measuring import Bench, measure, opened
from workers.settings import WorkerSettings
from workers.telemetry.logs import configure_logging

JOBS = 30
LOAD = 0.8
"""Jobs that arrive in the time that one takes alone."""


@dataclass(frozen=True, slots=True)
class Played:
    """Latencies in seconds, of the same jobs."""

    real: Sequence[float]
    simulated: Sequence[float]


def run(device: str, rounds: int) -> list[Figure]:
    """Mean and p95 of the latency as it was and as it was foretold."""
    settings = WorkerSettings(device=device)
    configure_logging("warning")
    found: list[Played] = []
    with tempfile.TemporaryDirectory() as directory, opened(Path(directory), settings) as bench:
        before = measure(bench, rounds=3)
        for seed in range(rounds):
            arrivals = drawn(before, seed)
            real = latencies(bench, arrivals, before.layout.side)
            after = measure(bench, rounds=3)
            foretold = [simulated(arrivals, costs, settings) for costs in (before, after)]
            found.append(Played(real, [(one + two) / 2 for one, two in zip(*foretold, strict=True)]))
            before = after
    what = f"latency of {JOBS} jobs, 0–2 references, 4–12 steps, Poisson at {LOAD} of a job's time alone"
    figures: list[Figure] = []
    for name, of in (("mean", mean), ("p95", p95)):
        real, foretold = [of(each.real) for each in found], [of(each.simulated) for each in found]
        figures += [
            figure(f"{what}: {name}, real", "s", real),
            figure(f"{what}: {name}, simulated", "s", foretold),
            figure(f"{what}: {name}, simulated over real", "x", [s / r for s, r in zip(foretold, real, strict=True)]),
        ]
    return figures


def simulated(arrivals: Sequence[Arrival], costs: Costs, settings: WorkerSettings) -> list[float]:
    """Latencies of a trace with one worker, in seconds."""
    outcome = simulate(arrivals, costs, Fleet(1, settings.jobs_in_hand, settings.budget(costs.hands)))
    return [job.latency for job in outcome.jobs]


def drawn(costs: Costs, seed: int) -> list[Arrival]:
    """A trace at the wanted load of what was measured."""
    usual = costs.solo(costs.layout.tokens(costs.layout.side, costs.layout.side, 1), 8, 1)
    arrivals = poisson(Load(rate=LOAD / usual, jobs=JOBS, steps=8, tenants=2), costs.layout, seed)
    steps = np.random.default_rng(seed).integers(4, 13, JOBS)
    return [replace(arrival, steps=int(n)) for arrival, n in zip(arrivals, steps, strict=True)]


def latencies(bench: Bench, arrivals: Sequence[Arrival], side: int) -> list[float]:
    """Play a trace; seconds from each job's acceptance to its commit, by Redis' clock."""
    jobs = [bench.job(arrival.references, arrival.steps, side, arrival.tenant) for arrival in arrivals]
    queue: SimpleQueue[str] = SimpleQueue()
    began = time.monotonic()

    def arrive() -> None:
        for arrival, job in zip(arrivals, jobs, strict=True):
            time.sleep(max(0.0, began + arrival.second - time.monotonic()))
            bench.runner.ledger.accept(job)
            queue.put(job.id)

    arriving = Thread(target=arrive, name="arrivals")
    arriving.start()
    for _ in jobs:
        job_id = queue.get()
        while not bench.runner.wait_for_room(1.0):
            pass
        bench.runner.run(job_id)
    arriving.join()
    bench.runner.wait()
    records = [bench.ended(job.id) for job in jobs]
    return [(record.finished_at or 0.0) - record.created_at for record in records]


def mean(seconds: Sequence[float]) -> float:
    return float(np.mean(seconds))


def p95(seconds: Sequence[float]) -> float:
    return float(np.percentile(seconds, 95))
