"""Memory that preparing and finishing find beside the forwards.

A forward fills the device as far as it can, so they may run out of memory where they would have had enough a moment
later. What a job has come to by then is worth a second try, without a forward beside it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TypeVar

import structlog

from workers.engine import is_out_of_memory

_LOG = structlog.stdlib.get_logger("workers.inference.room")
_FORWARD_S = 60.0
"""A second try waits so long for the forward at hand to end."""
_PAUSE_S = 10.0
"""The next forward waits so long for second tries."""

T = TypeVar("T")


class Room:
    """One device's.

    Args:
        release: gives memory back that is kept for later.
    """

    def __init__(self, release: Callable[[], None]) -> None:
        self._release = release
        self._changed = threading.Condition()
        self._forward = False
        self._short = 0

    @contextmanager
    def forward(self) -> Generator[None]:
        """A forward is made in here, once nobody is at a second try."""
        with self._changed:
            self._changed.wait_for(lambda: not self._short, _PAUSE_S)
            self._forward = True
        try:
            yield
        finally:
            with self._changed:
                self._forward = False
                self._changed.notify_all()

    def try_twice(self, act: Callable[[], T]) -> T:
        """Do something; after a want of memory once more, without a forward beside it.

        Raises:
            Exception: whatever it raises, the second time if there is one.
        """
        try:
            return act()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            _LOG.warning("out of memory beside the forwards: tried once more", exception=type(error).__name__)
        # Only now, without the error and the frames it came through, does nothing hold what the first try has computed.
        with self._alone():
            self._release()
            return act()

    @contextmanager
    def _alone(self) -> Generator[None]:
        with self._changed:
            self._short += 1
            self._changed.wait_for(lambda: not self._forward, _FORWARD_S)
        try:
            yield
        finally:
            with self._changed:
                self._short -= 1
                self._changed.notify_all()
