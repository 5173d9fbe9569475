"""What a run tells on standard error, to a terminal, to a file, and to nobody."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from workers.training.log import TrainingLog
from workers.training.reports import StepReport

RUN = """
import sys
from pathlib import Path
from workers.training.log import TrainingLog
from workers.training.stderr import say
from workers.training.reports import StepReport
print("ready", flush=True)
sys.stdin.readline()
with TrainingLog(Path(sys.argv[1]), 9) as log:
    for step in range(1, 10):
        log.step(StepReport(step, 9, f"stage{step // 3}", 0.5, {"flow": 0.5}, 3))
say("stopped after a step")
print("checkpointed", flush=True)
sys.exit(3)
"""


def test_a_file_gets_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not a line for each step: the first of each stage, and the last with the time that is left; what was not measured
    is left out."""
    with TrainingLog(tmp_path, 6) as log:
        for step in range(1, 7):
            losses = {"flow": step / 10, "route": float("nan")}
            log.step(StepReport(step, 6, "first" if step < 4 else "second", 0.5, losses, 3))
    said = [line.split("  ") for line in capsys.readouterr().err.splitlines()]
    assert [words[:2] for words in said] == [
        ["first 1/6", "flow 0.1000"],
        ["second 4/6", "flow 0.4000"],
        ["second 6/6", "flow 0.6000"],
    ]
    assert all(words[2].endswith("/s") for words in said)
    assert said[-1][3:] == ["0:00:00 left"]


def test_within_a_stage_lines_come_by_the_clock(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """When it is time, with the time that is left; the control is the test above, where it is not."""
    monkeypatch.setattr("workers.training.log._LINE_EVERY_S", 0.0)
    with TrainingLog(tmp_path, 4) as log:
        for step in range(1, 4):
            log.step(StepReport(step, 4, "only", 0.5, {}, 3))
    said = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in said] == ["1/4", "2/4", "3/4"]
    assert [line.endswith(" left") for line in said] == [False, True, True]


def test_a_terminal_gets_a_bar(tmp_path: Path) -> None:
    """Drawn over and over in its place, with the losses."""
    ours, theirs = pty.openpty()
    with _begun(tmp_path, theirs) as process:
        os.close(theirs)
        _go_on(process)
        seen = b""
        try:
            while chunk := os.read(ours, 65536):
                seen += chunk
        except OSError:  # how a terminal ends whose other side is closed
            pass
        os.close(ours)
        assert process.wait(240) == 3
    assert b"flow 0.5000" in seen
    assert b"9/9" in seen
    assert b"\x1b[" in seen
    assert b"stopped after a step" in seen


def test_nobody_has_to_read_it(tmp_path: Path) -> None:
    """`2>&1 | tee log` and Ctrl-C: `tee` is gone, the run goes on to its end and its exit status."""
    reading, writing = os.pipe()
    with _begun(tmp_path, writing) as process:
        os.close(writing)
        os.close(reading)
        assert "checkpointed" in _go_on(process)
        assert process.wait(240) == 3


def _begun(directory: Path, stderr: int) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"} | {"TERM": "xterm"}
    return subprocess.Popen(
        [sys.executable, "-c", RUN, str(directory)],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
    )


def _go_on(process: subprocess.Popen[str]) -> str:
    """Wait until all is imported, whose warnings are not what is tested, and let it run; what it prints, for a pipe."""
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.stdin.write("\n")
    process.stdin.close()
    return process.stdout.read()
