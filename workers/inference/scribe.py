"""The thread that tells the ledger how far jobs are and brings back who was canceled or lost.

The engine goes on while Redis is slow or away: only the newest progress of each job waits here to be told.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from workers.claims import Stop
from workers.jobs import Progress
from workers.ledger import Beat

Tell = Callable[[Progress, bytes | None], Beat]


class Scribe(threading.Thread):
    """Beats for jobs, the oldest word first, until `halt`.

    Args:
        stopped: called, in this thread, with the id of a job that is not to go on.
    """

    def __init__(self, stopped: Callable[[str, Stop], None]) -> None:
        super().__init__(name="scribe", daemon=True)
        self._stopped = stopped
        self._words: dict[str, tuple[Tell, Progress, bytes | None]] = {}
        self._changed = threading.Condition()
        self._telling = False
        self._halted = False

    def tell(self, job_id: str, tell: Tell, progress: Progress, preview: bytes | None = None) -> None:
        """Have a job's beat made soon, instead of an older one that still waits, whose preview it takes along."""
        with self._changed:
            if preview is None and job_id in self._words:
                preview = self._words[job_id][2]
            self._words[job_id] = tell, progress, preview
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
                job_id = next(iter(self._words))
                tell, progress, preview = self._words.pop(job_id)
                self._telling = True
            answer = tell(progress, preview)
            if answer != "ok":
                self._stopped(job_id, answer)
            with self._changed:
                self._telling = False
                self._changed.notify_all()
