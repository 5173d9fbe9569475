"""Hands for tests of the ledger: values to commit, and what workers and time do to a job."""

from __future__ import annotations

from tests.workers.conftest import MakeJob
from workers.jobs import CUSTOMIZE, CustomizeRecord, ImageArtifact, JobError, JobResult, Progress
from workers.ledger import CustomizeLedger, Ledger

RESULT = JobResult((ImageArtifact("job_1.1.0.png", "0" * 64, "image/png", 16, 32, 9, 7),), {"denoise_s": 0.5})
ERROR = JobError("no_face", "Send a picture with a face.")
STEP = Progress("denoise", 1, 2)


def running(ledger: CustomizeLedger, make_job: MakeJob, job_id: str = "job_1") -> int:
    """Accept and claim; returns the token."""
    ledger.accept(make_job(job_id))
    token = ledger.claim(job_id, "w")
    assert token is not None
    return token


def lapse(ledger: CustomizeLedger, job_id: str, token: int) -> None:
    """Let the claim's lease end now, by a beat that renews it for no time at all."""
    assert Ledger(ledger.redis, CUSTOMIZE, lease_s=0.0).beat(job_id, token) in ("ok", "canceled")


def record(ledger: CustomizeLedger, job_id: str = "job_1") -> CustomizeRecord:
    found = ledger.get(job_id)
    assert found is not None
    return found
