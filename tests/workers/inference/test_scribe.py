"""The thread that tells of jobs outlives whatever goes wrong with one of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import structlog

from workers.caretaker import Claim
from workers.claims import ClaimedJob, Stop
from workers.inference.scribe import Scribe
from workers.jobs import Progress
from workers.ledger import Beat


@dataclass
class Book:
    """A ledger that takes beats; those of a job `bad` raise."""

    answer: Beat = "ok"
    told: list[tuple[str, int]] = field(default_factory=list[tuple[str, int]])

    def beat(self, job_id: str, token: int, progress: Progress, preview: bytes | None = None) -> Beat:
        if job_id == "bad":
            raise ValueError(f"canary {token} {preview}")
        self.told.append((job_id, progress.step))
        return self.answer


def claimed(book: Any, job_id: str) -> Any:
    return ClaimedJob(book, Claim(job_id, 1, 0.0), 0.0)


@pytest.mark.parametrize("beats", [True, False])
def test_what_fails_for_one_job_is_told_of_the_next(beats: bool) -> None:
    """A beat that raises, and a listener that does, are written down without their words, and nobody waits for them."""

    def stopped(_: Claim, reason: Stop) -> None:
        raise LookupError(f"canary {reason}")

    book = Book("ok" if beats else "canceled")
    scribe = Scribe(stopped)
    scribe.start()
    with structlog.testing.capture_logs() as logs:
        scribe.tell(claimed(book, "bad" if beats else "heard"), Progress("denoise", 1, 4))
        assert scribe.settle(30)
        book.answer = "ok"
        scribe.tell(claimed(book, "good"), Progress("denoise", 2, 4))
        assert scribe.settle(30)
    scribe.halt()
    assert book.told[-1] == ("good", 2)
    assert [log["exception"] for log in logs] == ["ValueError" if beats else "LookupError"]
    assert "canary" not in repr(logs)
