"""The ledger's outboxes, as those see them who do what is in them: ring, fetch, tell webhooks.

Each entry is leased to who takes it. Done twice is allowed everywhere: a delivery more is refused by `Ledger.claim`, a
message carries the same id, and only one token resolves a job.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final, Generic

import redis

from workers.books import outbox_scripts as scripts
from workers.books.scripts import RING_LEASE_S
from workers.books.values import Delivery, Fetch, text_of
from workers.jobs import JobError, JobT, Kind, ProgressT, ResultT, encode

LEASE_S: Final = 60.0
"""Of fetches and webhooks."""

NOTHING: Final[Mapping[str, int]] = MappingProxyType({})

WORKER_LOST: Final = JobError(
    "worker_lost", "Each worker that took this job was lost before it ended: submit it again.", retryable=True
)


class Outboxes(Generic[JobT, ProgressT, ResultT]):
    """What a ledger wants done; made as a part of it."""

    def __init__(
        self,
        redis: redis.Redis,
        kind: Kind[JobT, ProgressT, ResultT],
        *,
        job_ttl_s: int,
        max_attempts: int,
        tenant_window: int,
    ) -> None:
        self.redis = redis
        self.kind = kind
        self.root = kind.root
        self.job_ttl_s = job_ttl_s
        self.max_attempts = max_attempts
        self.tenant_window = tenant_window
        self._to_ring = redis.register_script(scripts.TO_RING)
        self._webhooks = redis.register_script(scripts.WEBHOOKS)
        self._retry_webhook = redis.register_script(scripts.RETRY_WEBHOOK)
        self._settle_webhook = redis.register_script(scripts.SETTLE_WEBHOOK)
        self._fetches = redis.register_script(scripts.FETCHES)
        self._resolve = redis.register_script(scripts.RESOLVE)
        self._fail_fetch = redis.register_script(scripts.FAIL_FETCH)

    def to_ring(self, limit: int = 64) -> list[str]:
        """Ids that have entered their tenant's window: ring for them, then say so by `rung`. See `queues.ring_due`."""
        return [text_of(job) for job in self._call(self._to_ring, limit, RING_LEASE_S)]

    def rung(self, job_ids: list[str]) -> int:
        """RQ holds deliveries for these; returns for how many of them that was still wanted."""
        wanted: Any = self.redis.zrem(f"{self.root}to_ring", *job_ids) if job_ids else 0
        return wanted

    def due_webhooks(
        self, limit: int = 16, part: int = sys.maxsize, held: Mapping[str, int] = NOTHING
    ) -> list[Delivery]:
        """Messages to be sent now; yours for a minute. Settle each by `webhook_done`, `_retry` or `_dead`.

        The tenants take turns, who was served longest ago first.

        Args:
            part: how many of one tenant the caller has room for, with those that he has already.
            held: those, by tenant.
        """
        return [Delivery.of(entry) for entry in self._call(self._webhooks, limit, LEASE_S, part, json.dumps({**held}))]

    def webhook_done(self, delivery_id: str) -> None:
        """The message was taken."""
        self._call(self._settle_webhook, delivery_id)

    def webhook_retry(self, delivery_id: str, after_s: float) -> None:
        """The message is to be sent again, not before this time has passed."""
        self._call(self._retry_webhook, delivery_id, after_s)

    def webhook_dead(self, delivery_id: str) -> None:
        """The message is not to be sent any more."""
        self._call(self._settle_webhook, delivery_id)

    def due_fetches(self, limit: int = 16, part: int = sys.maxsize, held: Mapping[str, int] = NOTHING) -> list[Fetch]:
        """Jobs with references to be fetched now, and a token for each; yours for a minute. Arguments: `due_webhooks`.

        One that was taken `max_attempts` times without an answer fails with `worker_lost`.
        """
        terms = (limit, LEASE_S, part, json.dumps({**held}), self.max_attempts, encode(WORKER_LOST))
        return [Fetch.of(entry) for entry in self._call(self._fetches, *terms)]

    def resolve(self, job_id: str, token: int, job: JobT) -> bool:
        """All that the job names is in the store now: it enters the line. False if the token is stale or it ended."""
        return self._call(self._resolve, job_id, token, encode(job)) == 1

    def fail_fetch(self, job_id: str, token: int, error: JobError) -> bool:
        """Queued → failed; False if the token is stale or it ended otherwise."""
        return self._call(self._fail_fetch, job_id, token, encode(error)) == 1

    def _call(self, script: Any, *arguments: str | float | bytes) -> Any:
        return script(keys=[self.root], args=[self.job_ttl_s, self.tenant_window, *arguments])

    def _key(self, job_id: str) -> str:
        return f"{self.root}job:{job_id}"
