"""The Triton kernels against their references without a GPU, in Triton's interpreter.

Triton reads TRITON_INTERPRET when a kernel is decorated, so the tests in `interpreted` get a process of their own. On a
machine with CUDA `pytest -m gpu` runs the same tests on the GPU.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = Path(__file__).with_name("interpreted")


@pytest.mark.timeout(1200)
def test_kernels_in_the_interpreter() -> None:
    """All of them pass, none is skipped, and every file of the folder takes part."""
    pytest.importorskip("triton")
    files = sorted(str(file.relative_to(ROOT)) for file in FOLDER.glob("test_*.py"))
    assert len(files) > 1
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-rA", "-p", "no:cacheprovider", *files],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-20_000:]
    assert not re.search(r"\d+ skipped", run.stdout), run.stdout[-20_000:]
    for file in files:
        assert f"PASSED {file}::" in run.stdout, f"{file} has no test marked gpu"
