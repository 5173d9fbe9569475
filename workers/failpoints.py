"""Named points at which a test lets this process fail. Nothing in the product lights a fuse: reaching a point costs a
look at an empty table.

No setting, request or variable of the environment leads here in a worker or gateway: only `arm` does, and only the
tests' own worker process calls it (`tests/faults/worker.py`).

    before_commit=stop          at the next commit, SIGSTOP
    step=sleep:0.2@3 claimed=kill    at the third forward from now, wait; after the next claim, SIGKILL
"""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from dataclasses import dataclass
from typing import Final, Literal, cast, get_args

Point = Literal["claimed", "step", "before_file", "before_rename", "renamed", "before_commit", "committed"]
"""After a claim; before each forward; around a file's writing; around the commit."""
Action = Literal["kill", "stop", "sleep", "raise"]
POINTS: Final[tuple[Point, ...]] = get_args(Point)

_WORD = re.compile(rf"({'|'.join(POINTS)})=(kill|stop|raise|sleep(?=:))(?::([0-9.]+))?(?:@([1-9][0-9]*))?")


class FailpointError(Exception):
    """What the action `raise` raises."""


@dataclass(slots=True)
class _Fuse:
    action: Action
    seconds: float
    hits: int


_fuses: dict[str, _Fuse] = {}
_lock = threading.Lock()


def reach(point: Point) -> None:
    """Fail here if a test wants it.

    Raises:
        FailpointError: it wants just that.
    """
    if _fuses:
        _burn(point)


def arm(plan: str) -> None:
    """Have points fail, each once: `point=action[:seconds][@n]`, separated by blanks, n counted from now.

    Raises:
        ValueError: the plan is none.
    """
    words = [_WORD.fullmatch(word) for word in plan.split()]
    if None in words:
        raise ValueError(f"not a plan of failpoints: {plan}")
    with _lock:
        for word in words:
            if word is not None:
                point, action, seconds, hits = word.groups()
                _fuses[point] = _Fuse(cast("Action", action), float(seconds or 0), int(hits or 1))


def _burn(point: Point) -> None:
    with _lock:
        fuse = _fuses.get(point)
        if fuse is None:
            return
        fuse.hits -= 1
        if fuse.hits:
            return
        del _fuses[point]
    match fuse.action:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":  # to this thread, so that it stops here; with it stops the whole process
            signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
        case "sleep":
            time.sleep(fuse.seconds)
        case "raise":
            raise FailpointError(point)
