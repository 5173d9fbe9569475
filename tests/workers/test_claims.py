"""A claimed job while Redis is away."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import redis

from tests.workers.conftest import MakeJob
from tests.workers.ledgers import running
from workers import queues
from workers.caretaker import Claim
from workers.claims import ClaimedJob
from workers.jobs import CUSTOMIZE, CustomizeJob, CustomizeRecord, JobResult, Progress
from workers.ledger import Ledger
from workers.redis_process import start_redis


class WatchedLedger(Ledger[CustomizeJob, Progress, JobResult]):
    """Says when it has found Redis away."""

    away: threading.Event

    def get(self, job_id: str) -> CustomizeRecord | None:
        try:
            return super().get(job_id)
        except redis.RedisError:
            self.away.set()
            raise


def test_reading_a_job_waits_for_redis(tmp_path: Path, make_job: MakeJob) -> None:
    """A Redis that restarts between claim and reading does not fail the job."""
    server = start_redis(tmp_path)
    ledger = WatchedLedger(queues.connect(server.url), CUSTOMIZE)
    ledger.away = threading.Event()
    claimed = ClaimedJob(ledger, Claim("job_1", running(ledger, make_job), time.monotonic()), patience_s=60.0)
    server.stop()
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(claimed.read)
        assert ledger.away.wait(60)
        server = start_redis(tmp_path)
        assert reading.result(60).job == make_job("job_1")
    server.stop()
