"""Failpoints fail where and when they are told to, and only a test can tell them."""

from __future__ import annotations

import ast
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from workers.failpoints import POINTS

SCRIPT = """
import sys
from workers import failpoints
if sys.argv[1]:
    failpoints.arm(sys.argv[1])
for number in range(1, 6):
    print(number, flush=True)
    try:
        failpoints.reach("step")
    except failpoints.FailpointError:
        print("raised", flush=True)
"""


def run(plan: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A process that reaches `step` five times."""
    command = [sys.executable, "-c", SCRIPT, plan]
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=240, check=False)


@pytest.mark.parametrize(
    ("plan", "code", "said"),
    [
        ("step=kill@3", -signal.SIGKILL, "1 2 3"),
        ("step=kill", -signal.SIGKILL, "1"),
        ("step=raise@2", 0, "1 2 raised 3 4 5"),
        ("step=sleep:0.01", 0, "1 2 3 4 5"),
        ("claimed=kill", 0, "1 2 3 4 5"),
        ("", 0, "1 2 3 4 5"),
    ],
)
def test_at_the_nth_hit(plan: str, code: int, said: str) -> None:
    """Once, at that hit, at that point; without a plan, never."""
    done = run(plan)
    assert (done.returncode, done.stdout.split()) == (code, said.split())


def test_the_environment_arms_nothing() -> None:
    """Whoever can set a worker's variables cannot make it fail: only a test's own process reads this one."""
    done = run("", DREAMSERVE_FAILPOINTS="step=kill")
    assert done.returncode == 0


@pytest.mark.parametrize("plan", ["step", "step=kil", "nowhere=kill", "step=kill@0", "step=sleep", "step=kill;claimed"])
def test_a_wrong_plan_is_refused(plan: str) -> None:
    """A campaign whose faults are misspelt would prove nothing."""
    done = run(plan)
    assert done.returncode == 1
    assert "not a plan" in done.stderr


def calls(path: Path, name: str) -> list[str]:
    """The first arguments of all calls of a function, by whatever name it is reached."""
    found = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    named = [node for node in found if name in (getattr(node.func, "id", None), getattr(node.func, "attr", None))]
    return [str(node.args[0].value) if isinstance(node.args[0], ast.Constant) else "" for node in named]


def test_the_product_reaches_each_point_and_arms_none() -> None:
    """No point is a name only, and no line of the product can arm one."""
    files = [path for room in ("service", "workers", "model", "kernels") for path in (ROOT / room).rglob("*.py")]
    assert {point for path in files for point in calls(path, "reach")} == set(POINTS)
    product = [path for path in files if path.name != "failpoints.py"]
    assert [path for path in product if calls(path, "arm") or "DREAMSERVE_FAILPOINTS" in path.read_text()] == []
