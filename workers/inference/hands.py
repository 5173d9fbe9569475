"""Threads that take up whoever is first in line, not who came first."""

from __future__ import annotations

import heapq
import threading
from collections.abc import Callable
from itertools import count

import structlog

_LOG = structlog.stdlib.get_logger("workers.inference.hands")

Place = tuple[bool, int, int]
"""The smaller, the sooner; see `Work.place`."""


class Hands:
    """They live until `close`.

    Args:
        number: of threads. begin: called in each of them once.
    """

    def __init__(self, number: int, name: str, begin: Callable[[], None]) -> None:
        self._begin = begin
        self._line: list[tuple[Place, int, Callable[[], object]]] = []
        self._arrivals = count()
        self._changed = threading.Condition()
        self._closed = False
        self._threads = [threading.Thread(target=self._work, name=name, daemon=True) for _ in range(number)]
        for thread in self._threads:
            thread.start()

    def put(self, place: Place, act: Callable[[], object]) -> None:
        """Have something done, which raises nothing, unless closed. Of equal places the first to come is first."""
        with self._changed:
            if self._closed:
                return
            heapq.heappush(self._line, (place, next(self._arrivals), act))
            self._changed.notify()

    def close(self, *, wait: bool, forget: bool = True) -> None:
        """Take nothing more, and `forget` what is in line; with `wait`, until all else is done."""
        with self._changed:
            self._closed = True
            if forget:
                self._line.clear()
            self._changed.notify_all()
        for thread in self._threads if wait else ():
            thread.join()

    def _work(self) -> None:
        self._begin()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._line or self._closed)
                if not self._line:
                    return
                act = heapq.heappop(self._line)[2]
            survive(act)


def survive(act: Callable[[], object]) -> None:
    """Do what should raise nothing. If it does all the same, its thread is still needed by everybody else."""
    try:
        act()
    except Exception as error:  # noqa: BLE001
        name = threading.current_thread().name
        _LOG.error("a thread goes on after an error", thread=name, exception=type(error).__name__)
