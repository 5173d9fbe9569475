"""How many GPUs a load needs: a trace of jobs through simulated workers, with the planner that real ones use.

    python -m workers.simulate --rate 2 --jobs 500 --workers 4        what jobs would wait for, and how long
    python -m workers.simulate --rate 2 --target-p95 5                the fewest GPUs that keep it
    python -m workers.simulate measure costs.json                     what this machine's work costs, for --costs

Jobs in hand, tokens and runs of a forward and the interactive share are the worker's settings (`DREAMSERVE_…`), so that
what is tried here can be set there. docs/scaling.md says how far the result can be trusted.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from pydantic import ValidationError

from model.errors import WeightsError
from workers.capacity.arrivals import Arrival, Load, TraceError, poisson, read_trace
from workers.capacity.costs import Costs, CostsError, read_costs, write_costs
from workers.capacity.fleet import Ended, Fleet, Outcome, simulate
from workers.redis_process import RedisUnavailableError
from workers.settings import WorkerSettings, describe_bad_settings
from workers.telemetry.logs import configure_logging

app = typer.Typer(add_completion=False)


class CapacityError(ValueError):
    """A target that no number of GPUs keeps."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Seconds over jobs."""

    what: str
    jobs: int
    mean: float
    p50: float
    p95: float
    p99: float


def spread(what: str, seconds: Sequence[float]) -> Spread:
    """Mean and percentiles, interpolated between jobs."""
    p50, p95, p99 = (float(p) for p in np.percentile(seconds, (50, 95, 99)))
    return Spread(what, len(seconds), float(np.mean(seconds)), p50, p95, p99)


def spreads(outcome: Outcome) -> tuple[Spread, ...]:
    """Latency, and what of it passes before a worker takes the job and before its first step; latency by class too."""
    jobs = outcome.jobs
    rows = [
        spread("latency", [job.latency for job in jobs]),
        spread("in the queue", [job.queued for job in jobs]),
        spread("until the first step", [job.stepped - job.arrival.second for job in jobs]),
    ]
    for name, interactive in (("interactive", True), ("batch", False)):
        chosen: list[Ended] = [job for job in jobs if job.arrival.interactive == interactive]
        if 0 < len(chosen) < len(jobs):
            rows.append(spread(f"latency, {name}", [job.latency for job in chosen]))
    return tuple(rows)


def p95(outcome: Outcome) -> float:
    """Of the latency, in seconds."""
    return spreads(outcome)[0].p95


def fewest(arrivals: Sequence[Arrival], costs: Costs, fleet: Fleet, target_s: float) -> tuple[int, Outcome]:
    """The fewest workers under which the p95 of the latency is at most `target_s`, and what happens with them.

    More workers are taken to be no slower, so it is looked for by halving.

    Raises:
        CapacityError: even with a worker for each job.
    """

    def tried(workers: int) -> Outcome:
        return simulate(arrivals, costs, replace(fleet, workers=workers))

    workers, outcome = 1, tried(1)
    while p95(outcome) > target_s:
        if workers >= len(arrivals):
            raise CapacityError(
                f"no number of GPUs keeps a p95 of {target_s:g} s: with one for each job it is {p95(outcome):.3g} s; "
                "ask for fewer steps, smaller pictures or a longer time"
            )
        workers = min(2 * workers, len(arrivals))
        outcome = tried(workers)
    return _halve(workers // 2, workers, outcome, tried, target_s)


def _halve(
    few: int, enough: int, outcome: Outcome, tried: Callable[[int], Outcome], target_s: float
) -> tuple[int, Outcome]:
    """Between a number that is too few (or 0) and one that is enough."""
    while enough - few > 1:
        middle = (few + enough) // 2
        found = tried(middle)
        if p95(found) > target_s:
            few = middle
        else:
            enough, outcome = middle, found
    return enough, outcome


def described(outcome: Outcome, costs: Costs, workers: int) -> str:
    """What a simulation gave, for people."""
    lines = [
        f"costs: {costs.what} ({costs.origin})",
        f"step: fitted within {costs.step.error(costs.points):.1%} of {len(costs.points)} points",
        f"workers: {workers}, {outcome.utilisation:.1%} of their time in forwards of "
        f"{outcome.runs / max(outcome.forwards, 1):.2f} pictures",
        f"jobs: {len(outcome.jobs)} in {outcome.end:.1f} s, {len(outcome.jobs) / outcome.end:.3g} a second",
        f"{'seconds':28}{'jobs':>7}{'mean':>9}{'p50':>9}{'p95':>9}{'p99':>9}",
    ]
    lines += [
        f"{row.what:28}{row.jobs:7}{row.mean:9.3f}{row.p50:9.3f}{row.p95:9.3f}{row.p99:9.3f}"
        for row in spreads(outcome)
    ]
    if falls_behind(outcome):
        lines.append("The workers fall behind: the later a job comes, the longer it takes, without an end.")
    return "\n".join(lines)


def falls_behind(outcome: Outcome) -> bool:
    """Whether each quarter of the jobs takes longer than the one before, and the last one much longer than the second.

    Under an overload latency grows as time goes on: 1 : 3 : 5 : 7 over the quarters.
    """
    quarter = len(outcome.jobs) // 4
    if not quarter:
        return False
    means = [float(np.mean([job.latency for job in outcome.jobs[n * quarter :][:quarter]])) for n in range(4)]
    return means == sorted(means) and means[3] > 1.8 * means[1]


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    costs: Annotated[str, typer.Option(help="What work costs: a file, or a shipped prediction.")] = "h200-goal",
    trace: Annotated[
        Path | None, typer.Option(help="Arrivals, one JSON object a line, instead of random ones.")
    ] = None,
    rate: Annotated[float, typer.Option(min=1e-6, help="Jobs a second.")] = 1.0,
    jobs: Annotated[int, typer.Option(min=1, help="How many come.")] = 500,
    steps: Annotated[int, typer.Option(min=1)] = 12,
    references: Annotated[list[int] | None, typer.Option(min=0, help="Again for more. Default: 0, 1 and 2.")] = None,
    side: Annotated[int | None, typer.Option(min=1, help="Of pictures, in pixels. Default: the model's.")] = None,
    tenants: Annotated[int, typer.Option(min=1)] = 1,
    batch_share: Annotated[float, typer.Option(min=0, max=1, help="Of jobs that are not interactive.")] = 0.0,
    workers: Annotated[int, typer.Option(min=1, help="GPUs.")] = 1,
    target_p95: Annotated[float | None, typer.Option(min=0, help="Find the fewest GPUs that keep it, in s.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the random arrivals.")] = 0,
) -> None:
    """Simulate workers under a load."""
    if context.invoked_subcommand is not None:
        return
    try:
        settings = WorkerSettings()
        known = read_costs(costs)
        fleet = Fleet(workers, settings.jobs_in_hand, settings.budget(known.hands))
        load = Load(rate, jobs, steps, tuple(references or (0, 1, 2)), side, tenants, batch_share)
        arrivals = poisson(load, known.layout, seed) if trace is None else read_trace(trace, known.layout)
        if target_p95 is None:
            outcome = simulate(arrivals, known, fleet)
        else:
            workers, outcome = fewest(arrivals, known, fleet, target_p95)
    except (CapacityError, CostsError, TraceError) as error:
        raise _refused(str(error)) from error
    except ValidationError as error:
        raise _refused(describe_bad_settings(error)) from error
    print(described(outcome, known, workers))


@app.command()
def measure(
    out: Annotated[Path, typer.Argument(help="JSON to write.")],
    rounds: Annotated[int, typer.Option(min=1, help="Each cost is a median over so many.")] = 7,
) -> None:
    """Measure what the configured model's work costs on this machine (`DREAMSERVE_…`, as for a worker)."""
    from workers.capacity import measuring  # noqa: PLC0415 - torch, only to measure

    try:
        settings = WorkerSettings()
        configure_logging("warning")
        with tempfile.TemporaryDirectory() as directory, measuring.opened(Path(directory), settings) as bench:
            found = measuring.measure(bench, rounds)
        write_costs(found, out)
    except ValidationError as error:
        raise _refused(describe_bad_settings(error)) from error
    except WeightsError as error:
        raise _refused(f"the model cannot be loaded ({error.code}): {error.message}") from error
    except (OSError, RedisUnavailableError, measuring.MeasurementError) as error:
        raise _refused(str(error)) from error
    print(f"{out}: {found.what}; steps fitted within {found.step.error(found.points):.1%}")


def _refused(message: str) -> typer.Exit:
    print(f"simulate: {message}", file=sys.stderr)
    return typer.Exit(2)


if __name__ == "__main__":
    app(prog_name="python -m workers.simulate")
