"""RQ, as far as this service trusts it: it carries deliveries, nothing else. No torch, no pickle.

A delivery says "job <id> waits" and may come late, twice or never: `Ledger.claim` decides who runs, and the
workers' caretakers ring again for what got lost. From a job hash in Redis only the call is read, and only one
on the literal list; callbacks, webhooks, dependencies, retries and meta stay unread.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import redis
import structlog
from redis.backoff import ExponentialBackoff
from redis.retry import Retry
from rq import Queue
from rq.exceptions import DuplicateJobError, NoSuchJobError
from rq.job import Job
from rq.serializers import JSONSerializer
from rq.utils import import_attribute

from workers.books.outboxes import Outboxes
from workers.books.values import Accepted
from workers.jobs import CUSTOMIZE, TRAINING, AnyKind

QUEUES: Final = {kind.function: kind.queue for kind in (CUSTOMIZE, TRAINING)}
"""Everything that a delivery can make a worker call, and by which queue it travels."""

_JOB_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_MAX_CALL_BYTES = 4096
_LOG = structlog.stdlib.get_logger("workers.queues")

_RECALL: Final = """
for index = 2, #ARGV do
  local id = ARGV[index]
  if not redis.call('ZSCORE', KEYS[1], id) and redis.call('LREM', KEYS[2], 0, id) > 0 then
    redis.call('DEL', ARGV[1] .. id)
  end
end
"""
"""One script, because a job may be called for again between a look at `calling` and the removal."""


def connect(url: str, *, timeout_s: float = 5.0) -> redis.Redis:
    """A client that gives up within seconds and answers bytes, as RQ needs it.

    Raises:
        ValueError: the URL's scheme is none of redis://, rediss://, unix://.
    """
    return redis.Redis.from_url(
        url,
        socket_timeout=timeout_s,
        socket_connect_timeout=min(timeout_s, 2.0),
        retry=Retry(ExponentialBackoff(cap=0.2, base=0.02), 3),
    )


class DreamJob(Job):
    """A delivery, read from Redis as if a stranger had written it."""

    def restore(self, raw_data: dict[bytes, bytes]) -> None:
        """Take over the call and the queue's name.

        Raises:
            NoSuchJobError: the hash is not a call on the list; RQ passes over such entries.
        """
        try:
            function, arguments = _call_of(raw_data[b"data"])
        except (KeyError, ValueError, TypeError, RecursionError, zlib.error):
            _LOG.warning("delivery refused", job_id=self.id)
            raise NoSuchJobError("the hash is not a delivery") from None
        self._func_name = function
        self._instance = None
        self._args = arguments
        self._kwargs = {}
        self.origin = QUEUES[function]
        self.timeout = -1

    @property
    def func(self) -> Callable[..., Any]:
        """The function to call, looked up only if it is on the list."""
        if self.func_name not in QUEUES:
            raise NoSuchJobError("the function is not on the list")
        return import_attribute(self.func_name)


def queue(client: redis.Redis, kind: AnyKind) -> Queue:
    """The queue by which deliveries of a kind travel."""
    return Queue(kind.queue, connection=client, serializer=JSONSerializer, job_class=DreamJob, default_timeout=-1)


def ring(client: redis.Redis, kind: AnyKind, job_id: str, *, at_front: bool = False) -> None:
    """Put a delivery for an accepted job into RQ; one that is already there stays the only one."""
    try:
        queue(client, kind).enqueue_call(
            kind.function,
            args=(job_id,),
            job_id=job_id,
            description=kind.function,
            timeout=-1,
            result_ttl=0,
            at_front=at_front,
            unique=True,
        )
    except DuplicateJobError:
        return


def ring_accepted(ledger: Outboxes[Any, Any, Any], accepted: Accepted) -> None:
    """Deliver a job that has just been accepted, if it is its turn."""
    if accepted.called:
        _ring_all(ledger, [accepted.job_id])


def ring_due(ledger: Outboxes[Any, Any, Any]) -> None:
    """Deliver the jobs that have entered their tenant's window and that nobody rings for; who ends a job calls this."""
    _ring_all(ledger, ledger.to_ring())


def recall(client: redis.Redis, kind: AnyKind, job_ids: Sequence[str]) -> None:
    """Take back what nobody has popped of the deliveries for these, but for jobs that are called for.

    Who ends a job that may still be in RQ calls this, else its delivery would stand before other tenants' though its
    place in the window is free. What has been popped stays: the claim will be refused.
    """
    if job_ids:
        keys = f"{kind.root}calling", queue(client, kind).key
        client.eval(_RECALL, len(keys), *keys, DreamJob.redis_job_namespace_prefix, *job_ids)


def ring_again(client: redis.Redis, kind: AnyKind, job_id: str) -> None:
    """Deliver once more, at the front, whatever a lost worker has left of the last delivery."""
    deliveries = queue(client, kind)
    with client.pipeline() as pipeline:
        pipeline.lrem(deliveries.key, 0, job_id)
        _drop(pipeline, deliveries, job_id)
        pipeline.execute()
    ring(client, kind, job_id, at_front=True)


def ring_missing(client: redis.Redis, kind: AnyKind, job_ids: Iterable[str]) -> list[str]:
    """Deliver again those of the given queued jobs that RQ does not hold; returns them.

    What was popped a moment ago counts as held: it is about to be claimed, or is found by `popped`.
    """
    held = {*_texts(client.lrange(queue(client, kind).key, 0, -1)), *popped(client, kind)}
    missing = [job_id for job_id in job_ids if job_id not in held]
    for job_id in missing:
        ring_again(client, kind, job_id)
    return missing


def acknowledge(client: redis.Redis, kind: AnyKind, job_id: str) -> None:
    """Take a received delivery out of RQ; from here the ledger's lease watches over the job."""
    with client.pipeline() as pipeline:
        _drop(pipeline, queue(client, kind), job_id)
        pipeline.execute()


def popped(client: redis.Redis, kind: AnyKind) -> list[str]:
    """Ids that a worker has popped and not acknowledged: it is about to, or was killed in between."""
    return _texts(client.lrange(queue(client, kind).intermediate_queue_key, 0, -1))


def pending(client: redis.Redis, kind: AnyKind) -> int:
    """Deliveries that nobody has popped."""
    return queue(client, kind).count


def announce(client: redis.Redis, kind: AnyKind, name: str, card: dict[str, Any], ttl_s: float) -> None:
    """Publish what a worker is and does, for `ttl_s` seconds."""
    with client.pipeline() as pipeline:
        pipeline.set(f"{kind.cards}:{name}", json.dumps({**card, "name": name}), px=int(ttl_s * 1000))
        pipeline.sadd(kind.cards, name)
        pipeline.execute()


def withdraw(client: redis.Redis, kind: AnyKind, name: str) -> None:
    """Take a worker's card away as it leaves."""
    with client.pipeline() as pipeline:
        pipeline.delete(f"{kind.cards}:{name}")
        pipeline.srem(kind.cards, name)
        pipeline.execute()


def workers(client: redis.Redis, kind: AnyKind) -> list[dict[str, Any]]:
    """The cards of all workers that were heard of lately, by name."""
    names = sorted(_texts(client.smembers(kind.cards)))
    if not names:
        return []
    cards: Any = client.mget([f"{kind.cards}:{name}" for name in names])
    gone = [name for name, card in zip(names, cards, strict=True) if card is None]
    if gone:
        client.srem(kind.cards, *gone)
    return [json.loads(card) for card in cards if card is not None]


def _ring_all(ledger: Outboxes[Any, Any, Any], job_ids: list[str]) -> None:
    for job_id in job_ids:
        ring(ledger.redis, ledger.kind, job_id)
    if ledger.rung(job_ids) < len(job_ids):  # some have been claimed or ended meanwhile, or another rang
        recall(ledger.redis, ledger.kind, job_ids)


def _texts(entries: Any) -> list[str]:
    """Members of a list or set, which this client answers as bytes."""
    return [entry.decode() for entry in entries]


def _drop(pipeline: Any, deliveries: Queue, job_id: str) -> None:
    pipeline.lrem(deliveries.intermediate_queue_key, 0, job_id)
    pipeline.delete(DreamJob.key_for(job_id))


def _call_of(data: bytes) -> tuple[str, tuple[str]]:
    """A permitted call: the function's name and its arguments.

    Raises:
        ValueError, TypeError, RecursionError, zlib.error: anything else.
    """
    inflate = zlib.decompressobj()
    text = inflate.decompress(data, _MAX_CALL_BYTES)
    if inflate.unconsumed_tail:
        raise ValueError("a call of unusual size")
    function, instance, arguments, keywords = json.loads(text)
    if function not in QUEUES or instance is not None or keywords:
        raise ValueError("a call that is not on the list")
    (job_id,) = arguments
    if not isinstance(job_id, str) or not _JOB_ID.fullmatch(job_id):
        raise ValueError("a call with other arguments")
    return function, (job_id,)
