"""What the gateway counts, and what it reads off the ledgers when somebody asks. One per process, passed down.

What is said of the ledgers is the same at every gateway over one Redis: take one's word for it, not their sum.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass
from typing import Any, Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from redis.exceptions import RedisError

from service.problems import TABLE
from workers.ledger import Ledger
from workers.telemetry.census import Census, take_census
from workers.telemetry.metrics import PREFIX, Scraped, add_durations, counter, fresh_registry, gauge, histogram

_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
UNKNOWN_ROUTE: Final = "unknown"

Ledgers = dict[str, Ledger[Any, Any, Any]]


@dataclass(frozen=True, slots=True)
class GatewayMetrics:
    """A registry and what is in it."""

    registry: CollectorRegistry
    _requests: Counter
    _seconds: Histogram
    _rejects: Counter
    _submissions: Counter
    _streams: Gauge

    @classmethod
    def fresh(cls) -> GatewayMetrics:
        """With a registry of its own."""
        one = fresh_registry()
        return cls(
            one,
            counter(one, "http_requests", "Answers, by route template.", "method", "route", "status"),
            histogram(one, "http_request_s", "From a request's head to its answer's end.", "method", "route"),
            counter(one, "rejects", "Problems answered, by their code in docs/errors.md.", "code", zeros=TABLE),
            counter(one, "submissions", "Submissions accepted, or replayed by their key.", "kind", "outcome"),
            gauge(one, "event_streams", "Event streams that are open."),
        )

    def answered(self, method: str, route: str | None, status: int, seconds: float) -> None:
        """A request has its whole answer. `route`: its template; None: there is no such route."""
        labels = (method if method in _METHODS else "other", route or UNKNOWN_ROUTE)
        self._requests.labels(*labels, status).inc()
        self._seconds.labels(*labels).observe(seconds)

    def rejected(self, code: str) -> None:
        """A problem was answered."""
        self._rejects.labels(code).inc()

    def submitted(self, kind: str, *, replayed: bool) -> None:
        """A job (`customize`) or training (`training`) was answered with 202."""
        self._submissions.labels(kind, "replayed" if replayed else "accepted").inc()

    async def counted(self, told: AsyncGenerator[str]) -> AsyncGenerator[str]:
        """An event stream, open while it is iterated over."""
        with self._streams.track_inprogress():
            async for text in told:
                yield text

    def watch(self, ledgers: Ledgers, *, tenants: bool) -> None:
        """Show what the ledgers hold, by kind; tenants by name only where the operator wants that."""
        self.registry.register(Scraped(lambda: _families(ledgers, tenants=tenants)))


def _families(ledgers: Ledgers, *, tenants: bool) -> Iterable[Metric]:
    try:
        found = {kind: take_census(ledger) for kind, ledger in ledgers.items()}
    except RedisError:
        found = {}
    yield GaugeMetricFamily(f"{PREFIX}redis_up", "Whether Redis answered this very question.", bool(found))
    yield from _lines(found)
    yield from _past(found)
    if tenants:
        load = GaugeMetricFamily(f"{PREFIX}tenant_load_s", "Estimated device time of open jobs.", labels=["tenant"])
        for census in found.values():
            for tenant, seconds in census.load_s.items():
                load.add_metric([tenant], seconds)
        yield load


def _lines(found: dict[str, Census]) -> Iterable[Metric]:
    """What is there now."""
    waiting = GaugeMetricFamily(
        f"{PREFIX}num_requests_waiting",
        "Queued: references to be `fetching`, `lined_up` behind the tenant's window, or `called` for by no worker yet.",
        labels=["kind", "place"],
    )
    running = GaugeMetricFamily(f"{PREFIX}num_requests_running", "Claimed by a worker.", labels=["kind"])
    load = GaugeMetricFamily(f"{PREFIX}load_s", "Estimated device time of all open jobs.", labels=["kind"])
    for kind, census in found.items():
        for place, number in (
            ("fetching", census.fetching),
            ("lined_up", census.lined_up),
            ("called", census.called),
        ):
            waiting.add_metric([kind, place], number)
        running.add_metric([kind], census.running)
        load.add_metric([kind], sum(census.load_s.values()))
    return waiting, running, load


def _past(found: dict[str, Census]) -> Iterable[Metric]:
    """What has happened since the Redis began."""
    ended = CounterMetricFamily(f"{PREFIX}jobs_ended", "Jobs in a terminal state.", labels=["kind", "state"])
    waits = HistogramMetricFamily(
        f"{PREFIX}request_queue_wait_s", "From acceptance until a worker begins, by Redis' clock.", labels=["kind"]
    )
    cancels = HistogramMetricFamily(
        f"{PREFIX}cancel_latency_s", "From a cancel until the running job has ended, by Redis' clock.", labels=["kind"]
    )
    for kind, census in found.items():
        for state, number in census.ended.items():
            ended.add_metric([kind, state], number)
        add_durations(waits, [kind], census.waits.counts, census.waits.total_s)
        add_durations(cancels, [kind], census.cancels.counts, census.cancels.total_s)
    return ended, waits, cancels
