"""The thread beside the model: keeps the worker's card and leases fresh and brings back what others have lost.

It has a Redis client of its own, so neither a long forward nor a blocked pop keeps it from its round.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import redis
import structlog
from redis.exceptions import RedisError

from workers import queues
from workers.jobs import AnyKind
from workers.ledger import Ledger

_LOG = structlog.stdlib.get_logger("workers.caretaker")
_SWEEP_S = 600.0


@dataclass(slots=True)
class Claim:
    """A job in hand. `moved_at`: monotonic second of its last progress."""

    job_id: str
    token: int
    moved_at: float


class Caretaker(threading.Thread):
    """Goes its round several times per lease until `halt`.

    Args:
        client: of its own. ledger: on that client.
        card: what to announce, asked anew each time.
        claims: the jobs in hand.
        stall_s: a claim without progress for so long is no longer kept alive.
        sweep: clears what expired jobs have left; called every ten minutes.
    """

    def __init__(
        self,
        client: redis.Redis,
        kind: AnyKind,
        ledger: Ledger[Any, Any, Any],
        name: str,
        *,
        card: Callable[[], dict[str, Any]],
        claims: Callable[[], Sequence[Claim]],
        stall_s: float,
        sweep: Callable[[], object],
    ) -> None:
        super().__init__(name="caretaker", daemon=True)
        self.client = client
        self.kind = kind
        self.ledger = ledger
        self.worker = name
        self.card = card
        self.claims = claims
        self.stall_s = stall_s
        self.sweep = sweep
        self._halted = threading.Event()
        self._away = False
        self._searched_at = self._swept_at = time.monotonic()

    def run(self) -> None:
        """One round after the other; while Redis is away, wait for it."""
        while not self._halted.is_set():
            try:
                self.round()
                self._away = False
            except RedisError as error:
                if not self._away:
                    _LOG.warning("redis is away", exception=type(error).__name__)
                self._away = True
            self._halted.wait(self.ledger.lease_s / 20)

    def round(self) -> None:
        """Announce, renew one's own leases first, then look for what others have lost."""
        self.announce()
        for claim in self.claims():
            if time.monotonic() - claim.moved_at < self.stall_s:
                self.ledger.beat(claim.job_id, claim.token)
        for job_id in self.ledger.reap():
            _LOG.warning("lease lapsed, job queued again", job_id=job_id)
            queues.ring_again(self.client, self.kind, job_id)
        now = time.monotonic()
        if now - self._searched_at >= self.ledger.lease_s:
            self._searched_at = now
            self._find_missing()
        if now - self._swept_at >= _SWEEP_S:
            self._swept_at = now
            self.sweep()

    def announce(self) -> None:
        """Publish the card; it outlives a few missed rounds."""
        queues.announce(self.client, self.kind, self.worker, self.card(), ttl_s=max(2.0, 1.5 * self.ledger.lease_s))

    def halt(self) -> None:
        """End the rounds and take the card away."""
        self._halted.set()
        self.join()
        try:
            queues.withdraw(self.client, self.kind, self.worker)
        except RedisError:
            return  # the card lapses by itself

    def _find_missing(self) -> None:
        """Ring for jobs that wait without a delivery: their gateway or worker died at the wrong moment."""
        waiting = self.ledger.waiting(self.ledger.lease_s / 2)
        if waiting:
            for job_id in queues.ring_missing(self.client, self.kind, waiting):
                _LOG.warning("delivery was missing", job_id=job_id)
