"""A few long-lived child processes that live and die together.

A child that ends is started again after a growing pause; one that says a restart cannot help (`FATAL_EXIT`)
ends the tree. Children have sessions of their own: a Ctrl-C in the terminal reaches only the parent, which asks
each of them once. On Linux the kernel ends them if the parent is killed without a chance to ask.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from workers.lifeline import die_with_parent

FATAL_EXIT = 2
"""Exit status of a child that cannot run as configured: wrong options, or a model that does not load."""
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0
LOOK_EVERY_S = 0.02
STEADY_S = 60.0
"""A child that ran this long starts again without a growing pause."""


class TreeFailedError(Exception):
    """A child cannot run as configured; its own message is on standard error."""


@dataclass(frozen=True, slots=True)
class Program:
    """What to run; `environment` is added to the parent's. `grace_s`: time to end when asked; None: as others have."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict[str, str])
    pass_fds: tuple[int, ...] = ()
    grace_s: float | None = None


@dataclass(slots=True)
class _Child:
    program: Program
    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    start_again_at: float = 0.0
    pause_s: float = FIRST_PAUSE_S


class ProcessTree:
    """Runs `programs` until `stop`.

    Call `start` and `watch` from the main thread only: a child's life is tied to the thread that started it.
    """

    def __init__(self, programs: Sequence[Program], *, report: Callable[[str], None]) -> None:
        self._children = [_Child(program) for program in programs]
        self._report = report
        self.restarts = 0
        """Children that ended so far."""

    def start(self) -> None:
        """Start every program."""
        for child in self._children:
            _start(child)

    def watch(self) -> None:
        """One look at the children: those that ended are started again when their pause is over.

        Raises:
            TreeFailedError: a child ended with `FATAL_EXIT`.
        """
        now = time.monotonic()
        for child in self._children:
            if child.process is None:
                if now >= child.start_again_at:
                    _start(child)
                continue
            status = child.process.poll()
            if status is None:
                continue
            _kill_session(child.process)  # what it had started itself
            if status == FATAL_EXIT:
                raise TreeFailedError(f"{child.program.name} cannot run as configured (its message is above)")
            if now - child.started_at > STEADY_S:
                child.pause_s = FIRST_PAUSE_S
            self.restarts += 1
            self._report(f"{child.program.name} ended with status {status}; again in {child.pause_s:g} s")
            child.process = None
            child.start_again_at = now + child.pause_s
            child.pause_s = min(child.pause_s * 2, LONGEST_PAUSE_S)

    def stop(self, grace_s: float, hurry: Callable[[], bool] = lambda: False) -> None:
        """Ask every child to end; whatever is left of it after `grace_s`, or its program's own, is killed.

        Args:
            hurry: asked all the while; once it says yes, nobody is waited for.
        """
        running = [
            (grace_s if child.program.grace_s is None else child.program.grace_s, child.process)
            for child in self._children
            if child.process is not None
        ]
        for _, process in running:
            if process.poll() is None:
                process.terminate()
        asked_at = time.monotonic()
        for seconds, process in sorted(running, key=lambda one: one[0]):
            while process.poll() is None and time.monotonic() < asked_at + seconds and not hurry():
                time.sleep(LOOK_EVERY_S)
            if process.poll() is None:
                waited = "at once" if hurry() else f"within {seconds:g} s"
                self._report(f"process {process.pid} did not end {waited}: killed")
            _kill_session(process)
            process.wait()

    def pids(self) -> dict[str, int]:
        """Process ids of the children that run, by program name."""
        return {child.program.name: child.process.pid for child in self._children if child.process is not None}


def _start(child: _Child) -> None:
    program = child.program
    # Standard output stays the parent's own: it prints the address there, and scripts read it.
    child.process = subprocess.Popen(
        list(program.command),
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr.fileno(),
        env={**os.environ, **program.environment},
        pass_fds=program.pass_fds,
        start_new_session=True,
        preexec_fn=die_with_parent(),  # noqa: PLW1509 - one system call; the parent has no other threads
    )
    child.started_at = time.monotonic()


def _kill_session(process: subprocess.Popen[bytes]) -> None:
    """Kill the child, if it still runs, and everything that it started and left behind."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
