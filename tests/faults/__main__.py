"""The command line of the fault campaign.

    python -m tests.faults --jobs 300 --kills 20 --redis-kills 2 --stops 3 --seed 1

Ends with 1 if a promise is broken, or a control is caught in less than 95 of 100 drills.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.faults.campaign import Plan, run_campaign
from tests.faults.checker import check, table
from tests.faults.clients import WINDOW
from tests.faults.drills import CONTROLS, KILLS, STOPS, run_drills
from tests.faults.promises import described, try_cancels, try_flood, try_leaving, try_sharing


def main() -> int:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description="Jobs under faults.")
    for name, number in (("jobs", 300), ("kills", 20), ("redis-kills", 2), ("stops", 3), ("workers", 3), ("seed", 1)):
        parser.add_argument(f"--{name}", type=int, default=number)
    parser.add_argument("--lease", type=float, default=10.0, help="seconds")
    parser.add_argument("--drills", type=int, default=0, help="kills and stops at each failpoint, one by one")
    parser.add_argument("--controls", type=int, default=0, help="drills of each variant that must be caught")
    parser.add_argument("--cancels", type=int, default=0, help="cancels at random moments")
    parser.add_argument("--leaves", type=int, default=0, help="SIGTERMs under load")
    parser.add_argument("--shared", type=int, default=0, help="jobs for two workers, then three, then two")
    parser.add_argument("--flood", type=int, default=0, help="jobs of one tenant before a single one of another")
    parser.add_argument("--out", type=Path, help="where histories and stores are left; default: a new directory")
    asked = parser.parse_args()
    out: Path = asked.out or Path(tempfile.mkdtemp(prefix="faults-"))
    print(f"seed {asked.seed}, history in {out}")
    good = True
    if asked.jobs:
        plan = Plan(asked.jobs, asked.kills, asked.redis_kills, asked.stops, asked.seed, asked.workers, asked.lease)
        began = time.monotonic()
        verdict = check(run_campaign(plan, _home(out, "campaign"), lambda line: print(line, flush=True)))
        print(f"{table(verdict)}\n{'seconds':<14}{time.monotonic() - began:.0f}")
        good = not verdict.violations
    if asked.drills:
        drilled = run_drills(_home(out, "drills"), (KILLS + STOPS) * asked.drills, lease_s=1.0, seed=asked.seed)
        print(f"drills\n{table(drilled.verdict)}")
        good = good and not drilled.verdict.violations
    if asked.controls:
        for variant, fault in CONTROLS.items():
            caught = _control(out, variant, fault, asked.controls, asked.seed)
            print(f"control {variant}: caught {caught} of {asked.controls}", flush=True)
            good = good and caught >= 0.95 * asked.controls
    for number, act in (
        (asked.cancels, try_cancels),
        (asked.leaves, try_leaving),
        (asked.shared, try_sharing),
        (asked.flood, try_flood),
    ):
        if number:
            tried = act(_home(out, act.__name__), number, asked.seed)
            print(described(tried), flush=True)
            good = good and not tried.broken
    return 0 if good else 1


def _control(out: Path, variant: str, fault: str, number: int, seed: int) -> int:
    """How many drills are caught, few at a time: a job that is lost for good keeps its place in its tenant's window."""
    caught = 0
    for first in range(0, number, WINDOW):
        plans = [fault] * min(WINDOW, number - first)
        home = _home(out, f"{variant}-{first}")
        caught += run_drills(home, plans, variant=variant, lease_s=1.0, seed=seed + first).caught
    return caught


def _home(out: Path, name: str) -> Path:
    home = out / name
    home.mkdir(parents=True)
    return home


if __name__ == "__main__":
    sys.exit(main())
