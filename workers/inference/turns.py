"""Whose turn it is to be prepared.

Interactive jobs come first, then small ones, then by arrival. What is prepared too early only takes memory, and the
device from those who are being denoised, so jobs wait while there is enough for the next forwards; one that goes before
some of it does not.

A job that has lost a worker may be what killed it: of such suspects one is at work at a time, and one on its last
attempt is alone. So whoever is beside a job that kills its workers loses one attempt by it: the company of its first
death is not there at the second, and nobody at the third.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import count

from workers.inference.works import Work


class Turns:
    """Jobs in hand that have not had their turn. Its caller locks.

    Args:
        ahead: jobs at work that are enough.
    """

    def __init__(self, ahead: int) -> None:
        self._ahead = ahead
        self._waiting: list[Work] = []
        self._numbers = count()

    def add(self, work: Work) -> None:
        """One more waits."""
        work.number = next(self._numbers)
        self._waiting.append(work)
        self._waiting.sort(key=lambda work: work.place)

    def next(self, at_work: Sequence[Work]) -> Work | None:
        """The first that goes with those at work, or that is not to go on at all; None if all have to wait."""
        last = max((work.place for work in at_work), default=None) if len(at_work) >= self._ahead else None
        for work in self._waiting:
            if work.ended or work.stop is not None:
                return work
            if fits(work, at_work) and (last is None or work.place < last):
                return work
        return None

    def take(self, work: Work) -> None:
        """It has its turn."""
        self._waiting.remove(work)
        work.at_work = True
        work.turn_at = time.monotonic()


def fits(work: Work, at_work: Sequence[Work]) -> bool:
    """Whether a job may go on beside those that are at work."""
    if work.alone or any(other.alone for other in at_work):
        return not at_work
    return not (work.suspect and any(other.suspect for other in at_work))
