"""Waiting for what other processes do."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_for(look: Callable[[], T | None], what: str, timeout_s: float = 240.0) -> T:
    """Look until there is something to see; after `timeout_s` the test fails and says `what` is missing."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        seen = look()
        if seen:
            return seen
        time.sleep(0.01)
    raise AssertionError(f"waited in vain for {what}")


def stop_child(pid: int) -> None:
    """SIGSTOP for a child process; on return none of its threads goes on. The signal alone lets them, for a while."""
    os.kill(pid, signal.SIGSTOP)
    os.waitid(os.P_PID, pid, os.WSTOPPED)
