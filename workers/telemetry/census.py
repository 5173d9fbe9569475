"""What a ledger holds and what has happened in it so far, for metrics. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from workers.books.prelude import TALLY_BOUNDS_S
from workers.books.values import text_of
from workers.jobs import JobStatus
from workers.ledger import Ledger


@dataclass(frozen=True, slots=True)
class Durations:
    """How often something took how long. `counts`: by upper bound in seconds, each without those below it."""

    counts: Mapping[float, int]
    total_s: float


@dataclass(frozen=True, slots=True)
class Census:
    """One moment of a ledger.

    Attributes:
        fetching: queued jobs whose references are still to be fetched.
        lined_up: queued jobs that wait for a place in their tenant's window.
        called: queued jobs that a worker may take.
        running: claimed jobs.
        ended: since the Redis began, by terminal state.
        waits: from acceptance until a worker takes a job up, first attempts only.
        cancels: from the request until a running job has ended, by Redis' clock.
        load_s: estimated seconds of the device that open jobs will take, by tenant.
    """

    fetching: int
    lined_up: int
    called: int
    running: int
    ended: Mapping[str, int]
    waits: Durations
    cancels: Durations
    load_s: Mapping[str, float]


def take_census(ledger: Ledger[Any, Any, Any]) -> Census:
    """The ledger as it is now.

    Raises:
        redis.exceptions.RedisError: Redis is away.
    """
    root = ledger.root
    fetchers: Any = ledger.redis.zrange(f"{root}turns:fetches", 0, -1)
    with ledger.redis.pipeline(transaction=False) as pipeline:
        for name in ("status:queued", "status:running", "calling"):
            pipeline.zcard(f"{root}{name}")
        pipeline.hgetall(f"{root}tally")
        pipeline.hgetall(f"{root}load")
        for tenant in fetchers:
            pipeline.zcard(f"{root}fetches:{text_of(tenant)}")
        queued, running, called, tally, load, *fetches = pipeline.execute()
    fetching = sum(fetches)
    counts = {text_of(name): int(value) for name, value in tally.items()}
    return Census(
        fetching=fetching,
        lined_up=max(0, queued - called - fetching),
        called=called,
        running=running,
        ended={status: counts.get(f"ended:{status}", 0) for status in JobStatus if status.terminal},
        waits=_durations(counts, "wait"),
        cancels=_durations(counts, "cancel"),
        load_s={text_of(tenant): int(value) / 1e6 for tenant, value in load.items()},
    )


def _durations(counts: Mapping[str, int], what: str) -> Durations:
    bounds = (*(f"{bound:g}" for bound in TALLY_BOUNDS_S), "inf")
    found = {float(bound): counts.get(f"{what}:{bound}", 0) for bound in bounds}
    return Durations(found, counts.get(f"{what}:us", 0) / 1e6)
