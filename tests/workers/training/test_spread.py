"""Training by several processes under DDP: one result, the same in each, and as exactly resumable as one process'."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.workers.training.spread import RECIPE
from workers.training.failures import TrainingError
from workers.training.snapshots import newest_snapshot
from workers.training.start import prepare

STEPS = 6


def run(*trainings: str) -> None:
    """Two processes, which do these one after the other."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    subprocess.run(
        [*command, "tests.workers.training.spread", *trainings],
        check=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=240,
        capture_output=True,
    )


def ended(directory: Path) -> list[dict[str, Any]]:
    """What the two processes ended with."""
    return [json.loads((directory / f"rank-{rank}.json").read_text()) for rank in range(2)]


def test_two_processes_train_one_model_and_resume_exactly(tmp_path: Path) -> None:
    """Both processes hold the same weights after an adapter and a base stage, whether or not the run was stopped
    between (one process hears of the stop, both obey); only one reports and saves. Another number of processes would
    draw other samples, and is refused."""
    for name in ("calm", "stopped"):
        (tmp_path / name).mkdir()
    run(str(tmp_path / "calm"), f"{tmp_path / 'stopped'}:2")
    calm, stopped = ended(tmp_path / "calm"), ended(tmp_path / "stopped")
    assert calm[0]["digest"] == calm[1]["digest"]
    assert [rank["step"] for rank in calm] == [STEPS, STEPS]
    assert [len(rank["losses"]) for rank in calm] == [STEPS, 0]
    assert [rank["step"] for rank in stopped] == [2, 2]
    assert stopped[0]["digest"] == stopped[1]["digest"] != calm[0]["digest"]
    run(str(tmp_path / "stopped"))
    resumed = ended(tmp_path / "stopped")
    assert [rank["digest"] for rank in resumed] == [rank["digest"] for rank in calm]
    assert stopped[0]["losses"] + resumed[0]["losses"] == calm[0]["losses"]
    snapshot = newest_snapshot(tmp_path / "calm" / "checkpoints")
    assert snapshot is not None and snapshot.step == STEPS
    with pytest.raises(TrainingError, match=r"of a run in 2 processes, and this one is in 1.*nproc_per_node 2"):
        prepare(RECIPE, tmp_path / "stopped", lambda _: None).resume()
