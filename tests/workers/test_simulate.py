"""The simulation's promises: jobs are conserved, queueing theory holds, and what it cannot use it says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import simpy
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from workers import simulate as simulation
from workers.capacity.arrivals import Arrival, Load, TraceError, poisson, read_trace
from workers.capacity.costs import SHIPPED, Costs, CostsError, Layout, Point, fit, read_costs, write_costs
from workers.capacity.fleet import Device, Fleet, simulate
from workers.planner import Budget

LAYOUT = Layout(text=100, cell=16, reference=50, side=160)
SLOPE = 1e-5
"""Seconds a token: a step of a picture of 100 × 1000 tokens is a second."""
COSTS = Costs("test", "measured", LAYOUT, (Point((1000,), SLOPE * 1000), Point((3000,), SLOPE * 3000)))
LINE = Fleet(1, 1, Budget(tokens=10**9, runs=1))
"""One job after the other."""

ARRIVALS = st.lists(
    st.builds(
        Arrival,
        second=st.floats(0, 50),
        tokens=st.integers(1, 9000),
        steps=st.integers(1, 12),
        references=st.integers(0, 3),
        images=st.integers(1, 3),
        tenant=st.sampled_from("ab"),
        interactive=st.booleans(),
    ),
    min_size=1,
    max_size=20,
).map(lambda found: sorted(found, key=lambda arrival: arrival.second))
FLEETS = st.builds(
    Fleet, st.integers(1, 4), st.integers(1, 6), st.builds(Budget, st.integers(1, 20_000), st.integers(1, 6))
)
DEAR = replace(COSTS, prepare_s=0.1, reference_s=0.05, finish_s=0.2, beat_s=0.01)


@settings(max_examples=60)
@given(ARRIVALS, FLEETS, st.floats(1, 3))
def test_nothing_is_lost(arrivals: list[Arrival], fleet: Fleet, lanes: float) -> None:
    """Each job ends with all steps of all its pictures, no sooner than alone, and no worker is more than busy."""
    costs = replace(DEAR, lanes=lanes)
    outcome = simulate(arrivals, costs, fleet)
    assert [job.arrival for job in outcome.jobs] == arrivals
    for job in outcome.jobs:
        arrival = job.arrival
        assert job.steps == arrival.steps * arrival.images
        assert arrival.second - 1e-9 <= job.taken <= job.stepped < job.ended <= outcome.end
        assert job.latency >= costs.solo(arrival.tokens, arrival.steps, arrival.references) - 1e-9
    assert outcome.runs == sum(job.steps for job in outcome.jobs)
    assert outcome.runs / fleet.budget.runs <= outcome.forwards <= outcome.runs
    assert all(0 <= busy <= outcome.end + 1e-9 for busy in outcome.stepping)
    assert all(in_hand(outcome, worker) <= fleet.jobs_in_hand for worker in range(fleet.workers))


def in_hand(outcome: simulation.Outcome, worker: int) -> int:
    """The most jobs that a worker had at a time."""
    jobs = [job for job in outcome.jobs if job.worker == worker]
    return max((sum(other.taken <= job.taken < other.ended for other in jobs) for job in jobs), default=0)


def test_a_worker_takes_no_more_than_it_may_have_in_hand() -> None:
    """What there is no room for waits in the queue, where another worker could take it."""
    arrivals = [Arrival(0.0, 5000, 4) for _ in range(20)]
    outcome = simulate(arrivals, DEAR, Fleet(2, 3, Budget(10**9, 8)))
    assert [in_hand(outcome, worker) for worker in range(2)] == [3, 3]
    wide = simulate(arrivals, DEAR, Fleet(2, 32, Budget(10**9, 8)))
    assert [in_hand(wide, worker) for worker in range(2)] == [10, 10], "round robin"


@given(st.integers(1, 9000), st.integers(1, 50), st.integers(0, 9))
def test_a_job_alone_takes_its_solo_time(tokens: int, steps: int, references: int) -> None:
    """Nothing but preparation, steps, the beats between them and finishing: exactly, up to float sums."""
    outcome = simulate([Arrival(7.0, tokens, steps, references)], DEAR, LINE)
    alone = DEAR.prepare_s + references * DEAR.reference_s + steps * SLOPE * tokens + (steps - 1) * DEAR.beat_s
    assert outcome.jobs[0].latency == pytest.approx(alone + DEAR.finish_s, rel=1e-9)
    assert DEAR.solo(tokens, steps, references) == pytest.approx(outcome.jobs[0].latency, rel=1e-9)


def test_twice_the_workers_are_half_as_busy() -> None:
    """The same work on twice as many; nothing is shared in a forward here, so none of it goes away."""
    arrivals = poisson(Load(rate=1.0, jobs=2000, steps=4), LAYOUT, seed=3)
    arrivals = [replace(arrival, tokens=15_000) for arrival in arrivals]
    one, two = (simulate(arrivals, COSTS, replace(LINE, workers=n, jobs_in_hand=4)) for n in (1, 2))
    assert one.utilisation == pytest.approx(0.6, rel=0.05)
    assert two.utilisation == pytest.approx(one.utilisation / 2, rel=0.01)
    assert sum(two.stepping) == pytest.approx(sum(one.stepping))


@pytest.mark.parametrize("load", [0.5, 0.8])
def test_waiting_is_as_queueing_theory_has_it(load: float) -> None:
    """M/D/1: Poisson arrivals and equal service times wait load · service / (2 · (1 − load)) in the mean."""
    service = 0.1
    tokens = round(service / SLOPE)
    arrivals = [
        replace(arrival, tokens=tokens)
        for arrival in poisson(Load(rate=load / service, jobs=20_000, steps=1), LAYOUT, seed=1)
    ]
    waits = [job.queued for job in simulate(arrivals, COSTS, LINE).jobs]
    assert np.mean(waits) == pytest.approx(load * service / (2 * (1 - load)), rel=0.08)


def test_random_arrivals_come_at_their_rate() -> None:
    """Exponential gaps: as spread as they are long; each count of references as often as the others."""
    arrivals = poisson(Load(rate=4.0, jobs=20_000, steps=1, batch_share=0.25, tenants=2), LAYOUT, seed=0)
    gaps = np.diff([arrival.second for arrival in arrivals])
    assert np.mean(gaps) == pytest.approx(0.25, rel=0.03)
    assert np.std(gaps) == pytest.approx(0.25, rel=0.03)
    assert np.mean([arrival.references for arrival in arrivals]) == pytest.approx(1.0, rel=0.03)
    assert np.mean([arrival.interactive for arrival in arrivals]) == pytest.approx(0.75, rel=0.03)
    assert {arrival.tokens for arrival in arrivals} == {200, 250, 300}


def test_the_seed_decides() -> None:
    """A result can be had again; another seed is another draw."""
    fleet = Fleet(2, 4, Budget(20_000, 4))

    def outcome(seed: int) -> simulation.Outcome:
        return simulate(poisson(Load(5.0, 60, 6), LAYOUT, seed), DEAR, fleet)

    assert outcome(1) == outcome(1)
    assert outcome(1) != outcome(2)


def test_interactive_jobs_come_first_as_the_planner_has_it() -> None:
    """The real planner decides: under a load of both classes, interactive jobs wait less than batch ones."""
    arrivals = [Arrival(0.01 * n, 10_000, 6, interactive=bool(n % 2)) for n in range(60)]
    outcome = simulate(arrivals, COSTS, Fleet(1, 60, Budget(10_000, 1)))
    _, _, _, interactive, batch = simulation.spreads(outcome)
    assert interactive.what == "latency, interactive"
    assert interactive.mean < 0.8 * batch.mean


@given(st.lists(st.floats(0.01, 5), min_size=1, max_size=6), st.floats(1, 4))
@settings(max_examples=50)
def test_a_device_shares_its_lanes_out(works: list[float], lanes: float) -> None:
    """Pieces that begin together end by their size; the last one ends when the lanes have done all of it."""
    env = simpy.Environment()
    device = Device(env, lanes)
    ends: dict[int, float] = {}
    for number, work in enumerate(works):
        device.work(work).callbacks.append(lambda _, number=number: ends.update({number: env.now}))
    env.run()
    order = sorted(range(len(works)), key=lambda number: works[number])
    now = done = 0.0
    for place, number in enumerate(order):
        left = len(works) - place
        now += (works[number] - done) / min(1.0, lanes / left)
        done = works[number]
        assert ends[number] == pytest.approx(now, abs=1e-6)


@pytest.mark.parametrize("parts", [(0.01, 0.0, 1e-5, 1e-9), (0.0, 0.003, 2e-5, 0.0), (0.2, 0.0, 0.0, 0.0)])
def test_a_fit_finds_what_the_points_were_made_of(parts: tuple[float, float, float, float]) -> None:
    """Points without noise give back their costs; a part that is not there is nought, never negative."""
    base, run, token, square = parts
    companies = [(500,), (4000,), (9000,), (500, 500), (4000, 500, 500), (3000,) * 5]
    points = [
        Point(c, base + run * len(c) + token * sum(c) + square * sum(tokens**2 for tokens in c)) for c in companies
    ]
    found = fit(points)
    assert (found.base, found.run, found.token, found.square) == pytest.approx(parts, rel=1e-5, abs=1e-12)
    assert found.error(points) < 1e-6


def test_a_fit_of_noise_has_no_negative_part() -> None:
    """Otherwise a large forward could take less than no time."""
    random = np.random.default_rng(0)
    for _ in range(50):
        points = [
            Point(tuple(int(t) for t in random.integers(1, 5000, 3)), float(random.uniform(0.1, 1))) for _ in range(5)
        ]
        found = fit(points)
        assert min(found.base, found.run, found.token, found.square) >= 0


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_costs_are_predictions_and_say_so(name: str, tmp_path: Path) -> None:
    """Nobody takes a goal for a measurement; and what is written can be read again."""
    costs = read_costs(name)
    assert costs.origin == "predicted"
    assert "not measured" in costs.what
    assert costs.layout.tokens(1024, 1024, 2) == costs.points[2].runs[0] == 6656
    assert costs.step.error(costs.points) < 0.005
    write_costs(costs, tmp_path / "costs.json")
    assert read_costs(str(tmp_path / "costs.json")) == costs


def test_the_fewest_workers_are_found() -> None:
    """One less breaks the target; what cannot be had is refused with the reason."""
    arrivals = poisson(Load(rate=6.0, jobs=150, steps=4), LAYOUT, seed=0)
    arrivals = [replace(arrival, tokens=12_000) for arrival in arrivals]
    fleet = Fleet(1, 8, Budget(24_000, 4))
    workers, outcome = simulation.fewest(arrivals, COSTS, fleet, 1.5)
    assert workers > 1
    assert (
        simulation.p95(outcome) <= 1.5 < simulation.p95(simulate(arrivals, COSTS, replace(fleet, workers=workers - 1)))
    )
    with pytest.raises(simulation.CapacityError, match=r"no number of GPUs keeps a p95 of 0\.1 s.*it is 0\.48 s"):
        simulation.fewest(arrivals, COSTS, fleet, 0.1)


def test_workers_that_fall_behind_are_told_of() -> None:
    """The percentiles of an overload follow from where the trace ends, so they are not to be read as a promise."""
    slow, fast = ([Arrival(n / rate, 10_000, 1) for n in range(200)] for rate in (20.0, 5.0))
    assert simulation.falls_behind(simulate(slow, COSTS, LINE))
    assert not simulation.falls_behind(simulate(fast, COSTS, LINE))


GOOD = '{"second": 0.5, "width": 32, "height": 17, "references": 2, "steps": 4, "tenant": "a", "interactive": false}'


def test_a_trace_is_read(tmp_path: Path) -> None:
    """Sizes and references become tokens; empty lines are none."""
    file = tmp_path / "trace.jsonl"
    file.write_text(f'{GOOD}\n\n{{"second": 2, "tokens": 77, "steps": 1, "images": 3}}\n')
    assert read_trace(file, LAYOUT) == (
        Arrival(0.5, 100 + 2 * 2 + 2 * 50, 4, references=2, tenant="a", interactive=False),
        Arrival(2.0, 77, 1, images=3),
    )


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2: the line: .*correct it"),
        ('{"second": 1, "tokens": 5}', "line 2: steps: .*required.*correct it"),
        ('{"second": 1, "tokens": 5, "steps": 0}', "line 2: steps: .*greater.*correct it"),
        ('{"second": -1, "tokens": 5, "steps": 1}', "line 2: second: .*correct it"),
        ('{"second": 1, "tokens": 5, "steps": 1, "prompt": "x"}', "line 2: prompt: .*remove the line"),
        ('{"second": 1, "width": 5, "steps": 1}', "line 2: has no size: give tokens, or width and height"),
        ('{"second": 1, "tokens": 5, "width": 5, "steps": 1}', "line 2: has tokens and a size: give one"),
        ('{"second": 0.1, "tokens": 5, "steps": 1}', "line 2: .*sort the file by second"),
    ],
)
def test_a_bad_line_is_named_with_its_remedy(line: str, said: str, tmp_path: Path) -> None:
    """Which line, what is wrong with it, and what to do."""
    file = tmp_path / "trace.jsonl"
    file.write_text(f"{GOOD}\n{line}\n")
    with pytest.raises(TraceError, match=said):
        read_trace(file, LAYOUT)


def test_a_trace_that_is_not_there_and_one_that_is_empty(tmp_path: Path) -> None:
    """Neither is a load of nothing."""
    with pytest.raises(TraceError, match="cannot be read"):
        read_trace(tmp_path / "none", LAYOUT)
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(TraceError, match="holds no arrival"):
        read_trace(tmp_path / "empty", LAYOUT)


def test_bad_costs_are_refused(tmp_path: Path) -> None:
    """With the field, and what to do."""
    with pytest.raises(CostsError, match="h200-goal"):
        read_costs(str(tmp_path / "none.json"))
    write_costs(COSTS, tmp_path / "costs.json")
    values = json.loads((tmp_path / "costs.json").read_text())
    (tmp_path / "costs.json").write_text(json.dumps(values | {"finish_s": -1}))
    with pytest.raises(CostsError, match=r"finish_s: .*measure anew"):
        read_costs(str(tmp_path / "costs.json"))


def test_the_command_sizes_a_fleet(tmp_path: Path) -> None:
    """From arrivals to a number of GPUs, saying that the costs are predicted; refusals are one line and exit code 2."""
    command = CliRunner()
    told = command.invoke(simulation.app, ["--rate", "1", "--jobs", "60", "--target-p95", "8"])
    assert told.exit_code == 0, told.output
    assert "not measured" in told.output
    assert "workers: " in told.output
    assert "until the first step" in told.output
    (tmp_path / "trace.jsonl").write_text("{}\n")
    refused = command.invoke(simulation.app, ["--trace", str(tmp_path / "trace.jsonl")])
    assert refused.exit_code == 2
    assert "line 1" in refused.output
