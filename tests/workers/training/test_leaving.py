"""A command that trains leaves when it is asked to, and at once when it is asked again."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

STEP = """
import threading, time
from workers.training.leaving import heed_signals
stop = threading.Event()
heed_signals(stop)
print("a step has begun", flush=True)
while not stop.is_set():
    time.sleep(0.01)
print("asked to leave", flush=True)
if "short" not in sys.argv:
    time.sleep(3600)
"""


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_the_second_ctrl_c_does_not_wait(first: signal.Signals) -> None:
    """The first only says that the step at hand is the last; the second ends even one that does not end."""
    process = _begun()
    process.send_signal(first)
    assert _line(process) == "asked to leave"
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=240)
    assert process.returncode == -signal.SIGINT
    assert said.count("Ctrl-C again stops at once") == 1


def test_the_first_one_loses_nothing() -> None:
    """The control: a step that ends is not interrupted; asked by SIGTERM again and again, neither."""
    process = _begun("short")
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=240)
    assert process.returncode == 0, said


def test_nobody_has_to_read_it() -> None:
    """Ctrl-C ends the other end of a pipe as well; the step goes on to its end, and to its checkpoint."""
    process = _begun("short")
    assert process.stderr is not None
    process.stderr.close()
    process.send_signal(signal.SIGINT)
    assert _line(process) == "asked to leave"
    assert process.wait(240) == 0


def _begun(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", "import sys" + STEP, *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert _line(process) == "a step has begun"
    return process


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()
