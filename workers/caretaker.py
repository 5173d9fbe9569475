"""The thread beside the model: keeps the worker's card and leases fresh and brings back what others have lost.

It has a Redis client of its own, so neither a long forward nor a blocked pop keeps it from its round.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import redis
import structlog
from redis.exceptions import RedisError

from workers import queues
from workers.jobs import AnyKind
from workers.ledger import Ledger

_LOG = structlog.stdlib.get_logger("workers.caretaker")
_IDLE_S = 1.0
"""Another worker that has been ready for so long is given something to do."""


@dataclass(slots=True)
class Claim:
    """A job in hand. `moved_at`: monotonic second of its last progress."""

    job_id: str
    token: int
    moved_at: float

    @property
    def key(self) -> str:
        """Names it among all: a worker that loses a claim may get the same job again."""
        return f"{self.job_id}.{self.token}"


class Holder(Protocol):
    """Who has jobs in hand. All of it is called several times per lease, by the caretaker's thread."""

    @property
    def claims(self) -> Sequence[Claim]:
        """The jobs in hand."""
        ...

    def hear(self, claim: Claim, reason: Literal["canceled", "expired", "lost"]) -> None:
        """A claimed job is not to go on."""
        ...

    def hand_over(self) -> None:
        """Other workers are idle: let them have some of what has not begun."""
        ...

    def tidy(self) -> None:
        """Drop from memory what is not to be there any more."""
        ...


class Caretaker(threading.Thread):
    """Goes its round several times per lease until `halt`.

    Args:
        client: of its own. ledger: on that client.
        card: what to announce, asked anew each time.
        holder: who has the jobs in hand; None as long as nobody can.
        stall_s: a claim without progress for so long is no longer kept alive.
        sweep: clears what expired jobs have left.
        sweep_s: seconds between two sweeps.
    """

    def __init__(
        self,
        client: redis.Redis,
        kind: AnyKind,
        ledger: Ledger[Any, Any, Any],
        name: str,
        *,
        card: Callable[[], dict[str, Any]],
        holder: Callable[[], Holder | None],
        stall_s: float,
        sweep: Callable[[], object],
        sweep_s: float = 600.0,
    ) -> None:
        super().__init__(name="caretaker", daemon=True)
        self.client = client
        self.kind = kind
        self.ledger = ledger
        self.worker = name
        self.card = card
        self.holder = holder
        self.stall_s = stall_s
        self.sweep = sweep
        self.sweep_s = sweep_s
        self._halted = threading.Event()
        self._away = False
        self.heard_at = float("-inf")
        """Monotonic second at which Redis last answered a whole round."""
        self._searched_at = float("-inf")  # at once: where workers die often, none may live until the next one
        self._swept_at = time.monotonic()
        self._idle = IdleWatch(name)
        self._popped: set[str] = set()

    def run(self) -> None:
        """One round after the other, whatever becomes of one; while Redis is away, wait for it."""
        while not self._halted.is_set():
            try:
                self.round()
                self.heard_at = time.monotonic()
                self._away = False
            except RedisError as error:
                if not self._away:
                    _LOG.warning("redis is away", exception=type(error).__name__)
                self._away = True
            except Exception as error:  # noqa: BLE001 - without this thread leases lapse and lost jobs stay lost
                _LOG.error("round ended early", exception=type(error).__name__)
            self._halted.wait(self.ledger.lease_s / 20)

    def round(self) -> None:
        """Announce, renew one's own leases first, then look for what others have lost or could do."""
        self.announce()
        holder = self.holder()
        if holder is not None:
            self._renew(holder)
        for job_id in self.ledger.reap():
            _LOG.warning("lease lapsed, job queued again", job_id=job_id)
            queues.ring_again(self.client, self.kind, job_id)
        expired = self.ledger.expire()
        for job_id in expired:
            _LOG.info("not begun in time, job expired", job_id=job_id)
        queues.recall(self.client, self.kind, expired)
        queues.ring_due(self.ledger)
        if holder is not None:
            holder.tidy()
            self._share(holder)
        now = time.monotonic()
        if now - self._searched_at >= self.ledger.lease_s:
            self._searched_at = now
            self.search()
        if now - self._swept_at >= self.sweep_s:
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

    def search(self) -> None:
        """At first, then once a lease: look for deliveries that others have lost by dying at the wrong moment.

        What was popped counts as left if it was at the last search, a lease ago, or if its job has waited for long. Who
        has popped the latter just now claims it all the same; one delivery too many does nothing.

        Raises:
            redis.exceptions.RedisError: Redis is away.
        """
        popped = set(queues.popped(self.client, self.kind))
        waiting = self.ledger.waiting(self.ledger.lease_s / 2)
        left = popped & (self._popped | {*waiting})
        for job_id in left:
            _LOG.warning("delivery was popped and left", job_id=job_id)
            queues.acknowledge(self.client, self.kind, job_id)
        self._popped = popped - left
        if waiting:
            for job_id in queues.ring_missing(self.client, self.kind, waiting):
                _LOG.warning("delivery was missing", job_id=job_id)

    def _renew(self, holder: Holder) -> None:
        """Keep one's leases, and hear what is not to go on, though it may have made no step of late."""
        for claim in holder.claims:
            if time.monotonic() - claim.moved_at < self.stall_s:
                answer = self.ledger.beat(claim.job_id, claim.token)
                if answer != "ok":
                    holder.hear(claim, answer)

    def _share(self, holder: Holder) -> None:
        """Hand over while others have nothing to do: a queue that holds deliveries gives them enough."""
        if len(holder.claims) < 2:
            self._idle.forget()
        elif self._idle.look(queues.workers(self.client, self.kind), time.monotonic()) and not queues.pending(
            self.client, self.kind
        ):
            self._idle.forget()
            holder.hand_over()


@dataclass(slots=True)
class IdleWatch:
    """Which other workers have been ready for a while. `name`: one's own."""

    name: str
    _since: dict[str, float] = field(default_factory=dict[str, float])

    def look(self, cards: Iterable[Mapping[str, Any]], now: float) -> list[str]:
        """Names of those that were ready at every look for the last second."""
        ready = {str(card["name"]) for card in cards if card.get("state") == "ready"} - {self.name}
        self._since = {name: self._since.get(name, now) for name in ready}
        return [name for name, since in self._since.items() if now - since >= _IDLE_S]

    def forget(self) -> None:
        """Begin anew."""
        self._since = {}


def to_hand_over(waiting: int, in_hand: int) -> int:
    """How many jobs to give to idle workers: half of those that wait here, but not the last one in hand."""
    return max(0, min((waiting + 1) // 2, in_hand - 1))
