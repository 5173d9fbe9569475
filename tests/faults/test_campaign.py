"""Every accepted job ends once, whatever dies; and where a mechanism is taken out, that is noticed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.campaign import Plan, run_campaign, schedule
from tests.faults.checker import check, table
from tests.faults.drills import CONTROLS, KILLS, run_drills


def test_a_small_campaign(tmp_path: Path) -> None:
    """Workers killed and stopped, Redis killed, deliveries repeated and forged: nothing lost, nothing twice."""
    plan = Plan(jobs=100, kills=5, redis_kills=1, stops=1, seed=11, workers=2, lease_s=1.5)
    verdict = check(run_campaign(plan, tmp_path))
    assert verdict.violations == (), table(verdict)
    assert verdict.accepted == 100
    kills, stops = (
        sum(n for fault, n in verdict.faults.items() if fault.startswith(kind)) for kind in ("kill", "stop")
    )
    assert (kills, stops, verdict.faults["redis_kill"]) == (5, 1, 1), "the faults have happened"


def test_a_kill_at_each_failpoint(tmp_path: Path) -> None:
    """Wherever a worker dies, its job ends once and right, and nothing of it is left."""
    drilled = run_drills(tmp_path, KILLS, lease_s=1.0)
    assert drilled.verdict.violations == (), table(drilled.verdict)
    assert {f"kill {plan.split('=')[0]}" for plan in KILLS} == drilled.verdict.faults.keys()


@pytest.mark.parametrize("variant", CONTROLS)
def test_a_missing_mechanism_is_caught(tmp_path: Path, variant: str) -> None:
    """Controls: no fence, a commit before the picture is there, no lease that lapses. Each time the checker says so."""
    drilled = run_drills(tmp_path, [CONTROLS[variant]] * 2, variant=variant, lease_s=1.0)
    assert drilled.caught == drilled.drills == 2, table(drilled.verdict)


def test_the_fence_holds_where_its_control_fails(tmp_path: Path) -> None:
    """The same zombie that commits twice without a fence changes nothing with it."""
    drilled = run_drills(tmp_path, [CONTROLS["unfenced"]], lease_s=1.0)
    assert drilled.verdict.violations == (), table(drilled.verdict)


def test_a_seed_is_a_schedule() -> None:
    """A campaign can be told again by its seed."""
    plan = Plan(jobs=1000, kills=30, redis_kills=3, stops=4, seed=3)
    assert schedule(plan) == schedule(plan) != schedule(Plan(1000, 30, 3, 4, seed=4))
    assert len(schedule(plan)) == 37
