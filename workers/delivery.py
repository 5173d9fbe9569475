"""RQ's SimpleWorker, cut down to what a hot model needs; the only file that knows RQ's worker hooks (2.12).

- One queue, so that RQ pops with BLMOVE and a crash loses nothing; one second per pop, so that a stop is seen
  without raising from a signal handler, which could drop a delivery that has just been popped.
- A delivery is acknowledged as it is received: the ledger's lease, not RQ's registries, watches over the job.
- No pub/sub commands, no callbacks, no webhooks, no results.
"""

from __future__ import annotations

import threading
from typing import Any, Protocol

import redis
import structlog
from redis.exceptions import RedisError
from rq import Queue, SimpleWorker
from rq.exceptions import StopRequested
from rq.job import Job
from rq.serializers import JSONSerializer
from rq.utils import now
from rq.worker import WorkerStatus
from rq.worker_registration import clean_worker_registry

from workers import queues
from workers.jobs import AnyKind

_LOG = structlog.stdlib.get_logger("workers.delivery")
_WORKER_TTL_S = 16
"""RQ blocks for this less 15 seconds in a pop."""


class Room(Protocol):
    """Says whether another delivery can be taken. `broken`: never again."""

    @property
    def broken(self) -> bool: ...
    def wait_for_room(self, timeout_s: float) -> bool: ...


class DeliveryWorker(SimpleWorker):
    """Pops deliveries and calls them in this process until `stop` is set."""

    max_connection_wait_time = 1.0

    def __init__(self, client: redis.Redis, kind: AnyKind, name: str, stop: threading.Event, room: Room) -> None:
        super().__init__(
            [queues.queue(client, kind)],
            name=name,
            connection=client,
            worker_ttl=_WORKER_TTL_S,
            job_class=queues.DreamJob,
            serializer=JSONSerializer,
            log_job_description=False,
        )
        self._kind = kind
        self._stop = stop
        self._room = room
        self._popped = False

    def execute_job(self, job: Job, queue: Queue) -> None:  # noqa: ARG002 - RQ's signature
        """Acknowledge and call; when stopping, or without room by now, leave the delivery to another worker."""
        self._popped = False
        if self._stop.is_set() or not self._room.wait_for_room(0.0):
            queues.ring_again(self.connection, self._kind, job.id)
            return
        queues.acknowledge(self.connection, self._kind, job.id)
        if job.func_name != self._kind.function:
            _LOG.warning("delivery of another kind", job_id=job.id)
            return
        self.set_state(WorkerStatus.BUSY)
        function = job.func
        try:
            if function is not None:
                function(*job.args)
        except RedisError as error:
            _LOG.warning("redis was away for too long", job_id=job.id, exception=type(error).__name__)
        self.set_state(WorkerStatus.IDLE)

    def heartbeat(self, timeout: int | None = None, pipeline: Any = None) -> None:
        """RQ calls this before each pop and at each try to reach Redis, so a stop is seen here and a full worker waits.

        Raises:
            StopRequested: RQ's own way out of its loop.
        """
        super().heartbeat(timeout, pipeline)
        while not self._popped:
            if self._stop.is_set() or self._room.broken:
                raise StopRequested
            if self._room.wait_for_room(_WORKER_TTL_S / 8):
                return
            super().heartbeat(timeout)

    def clean_registries(self) -> None:
        """RQ's upkeep: of names of workers that died only.

        Nothing is in its registries. In deliveries that were popped and left it would note a failure, in a hash that
        nobody removes, and take for left what a second worker pops a minute after the first: they are the caretaker's.
        """
        for queue in self.queues:
            clean_worker_registry(queue)
        self.last_cleaned_at = now()

    def reorder_queues(self, reference_queue: Queue) -> None:  # noqa: ARG002 - RQ's signature
        """RQ calls this right after a pop: what has been popped is not to be dropped on a stop."""
        self._popped = True

    def subscribe(self) -> None:
        """No commands by pub/sub: jobs are stopped through the ledger, workers by signals."""

    def unsubscribe(self) -> None:
        """Nothing was subscribed to."""

    def _install_signal_handlers(self) -> None:
        """The process has its own, which outlive this object."""
