"""The thread that tells the ledger how far jobs are and brings back who was canceled or lost.

The engine goes on while Redis is slow or away: only the newest progress of each job waits here to be told.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import structlog

from workers.caretaker import Claim
from workers.claims import ClaimedJob, Stop
from workers.jobs import CustomizeJob, JobResult, Progress

_LOG = structlog.stdlib.get_logger("workers.inference.scribe")
Told = ClaimedJob[CustomizeJob, Progress, JobResult]


class Scribe(threading.Thread):
    """Beats for jobs, the oldest word first, until `halt`.

    Args:
        stopped: called, in this thread, with the claim of a job that is not to go on.
    """

    def __init__(self, stopped: Callable[[Claim, Stop], None]) -> None:
        super().__init__(name="scribe", daemon=True)
        self._stopped = stopped
        self._words: dict[str, tuple[Told, Progress, bytes | None]] = {}
        self._changed = threading.Condition()
        self._telling = False
        self._halted = False

    def tell(self, claimed: Told, progress: Progress, preview: bytes | None = None) -> None:
        """Have a job's beat made soon, instead of an older one that still waits, whose preview it takes along."""
        key = claimed.claim.key
        with self._changed:
            if preview is None and key in self._words:
                preview = self._words[key][2]
            self._words[key] = claimed, progress, preview
            self._changed.notify_all()

    def settle(self, timeout_s: float) -> bool:
        """Wait until everything is told; False if that takes longer."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._words and not self._telling, timeout_s)

    def halt(self) -> None:
        """End; what is not told yet is not told."""
        with self._changed:
            self._halted = True
            self._changed.notify_all()
        self.join()

    def run(self) -> None:
        """One beat after the other."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._words or self._halted)
                if self._halted:
                    return
                claimed, progress, preview = self._words.pop(next(iter(self._words)))
                self._telling = True
            try:
                answer = claimed.beat(progress, preview)
                if answer != "ok":
                    self._stopped(claimed.claim, answer)
            except Exception as error:  # noqa: BLE001 - without this thread no job's progress is told any more
                _LOG.error("beat not made", job_id=claimed.claim.job_id, exception=type(error).__name__)
            finally:
                with self._changed:
                    self._telling = False
                    self._changed.notify_all()
