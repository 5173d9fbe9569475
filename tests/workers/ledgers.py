"""Hands for tests of the ledger: values to commit, and what workers and time do to a job."""

from __future__ import annotations

from typing import Any

import redis

from tests.waiting import wait_for
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


def settled_hour(client: redis.Redis) -> int:
    """Redis' hour, one that does not end while a test counts in it."""

    def seconds() -> int:
        return client.time()[0]  # pyright: ignore[reportIndexIssue]  # sync client

    wait_for(lambda: seconds() % 3600 < 3570, "an hour with time left")
    return seconds() // 3600


def record(ledger: CustomizeLedger, job_id: str = "job_1") -> CustomizeRecord:
    found = ledger.get(job_id)
    assert found is not None
    return found


def boxed(ledger: Ledger[Any, Any, Any], box: str) -> dict[str, dict[str, float]]:
    """What lies in an outbox: by tenant, each entry and the second from which it may be taken."""
    with ledger.redis.pipeline() as pipeline:  # at one moment: others may be settling
        pipeline.zrange(f"{ledger.root}turns:{box}", 0, -1)
        pipeline.keys(f"{ledger.root}{box}:*")
        turns, there = pipeline.execute()
    keys = {tenant.decode(): f"{ledger.root}{box}:{tenant.decode()}" for tenant in turns}
    lines: dict[str, Any] = {tenant: ledger.redis.zrange(key, 0, -1, withscores=True) for tenant, key in keys.items()}
    assert {key.decode() for key in there} == {*keys.values()}
    return {tenant: {entry.decode(): due for entry, due in line} for tenant, line in lines.items()}


def make_due(ledger: Ledger[Any, Any, Any], box: str) -> None:
    """The leases of all that is in an outbox are over."""
    for tenant, line in boxed(ledger, box).items():
        ledger.redis.zadd(f"{ledger.root}{box}:{tenant}", dict.fromkeys(line, 0))
        ledger.redis.zadd(f"{ledger.root}turns:{box}", {tenant: 0})
