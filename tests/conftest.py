"""A whole service that tests of several rooms share."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).parents[1]

LONG = ("tests/kernels/test_interpreted.py", "tests/workers/training/")
"""What takes minutes comes first: at the end one core would wait for it."""

# Several processes run torch at once here; with all cores each they slow one another down many times over.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A machine that is busy is no fault of the code. Fixtures of a test are shared by its examples knowingly.
settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
settings.load_profile("any machine")


def pytest_xdist_auto_num_workers() -> int:
    """One more than cores, since some tests wait for a clock; four at most, since each holds torch and a model."""
    return min((os.cpu_count() or 1) + 1, 4)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files are given to the processes of a run in the order of their first test."""
    items.sort(key=lambda item: not item.nodeid.startswith(LONG))


@pytest.fixture(scope="session")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The state directory of the service at `address`."""
    return tmp_path_factory.mktemp("state")


@pytest.fixture(scope="session")
def address(state: Path) -> Generator[str]:
    """`dreamserve serve` with the shipped model, as `make serve` starts it; its URL."""
    command = [sys.executable, "-m", "service.cli", "serve", "--port", "0", "--state-dir", str(state)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("DREAMSERVE_")}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert "ready" in line
        yield line.split()[-1]
    finally:
        process.terminate()
        assert process.wait(240) == 0
