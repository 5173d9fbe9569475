"""What the courier counts. One per process, made by who starts it. Hosts and tenants are not among its labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric

from workers.courier.webhooks import Told
from workers.telemetry.metrics import PREFIX, Scraped, counter, fresh_registry, histogram

_ATTEMPTS = tuple(range(1, 12))


@dataclass(frozen=True, slots=True)
class CourierMetrics:
    """A registry and what is in it."""

    registry: CollectorRegistry
    _fetches: Counter
    _fetch_seconds: Histogram
    _webhooks: Counter
    _webhook_seconds: Histogram
    _attempts: Histogram

    @classmethod
    def fresh(cls) -> CourierMetrics:
        """With a registry of its own."""
        one = fresh_registry()
        return cls(
            one,
            counter(
                one,
                "fetches",
                "Jobs whose references were fetched: `resolved`, or why not.",
                "outcome",
                zeros=("resolved",),
            ),
            histogram(one, "fetch_s", "All references of a job."),
            counter(one, "webhooks", "Attempts at messages: what came of them.", "outcome", zeros=get_args(Told)),
            histogram(one, "webhook_s", "One attempt."),
            histogram(one, "webhook_attempts", "Attempts until a message was taken or given up.", bounds=_ATTEMPTS),
        )

    def fetched(self, outcome: str, seconds: float) -> None:
        """One job's references. `outcome`: `resolved`, or the code that its job fails with."""
        self._fetches.labels(outcome).inc()
        self._fetch_seconds.observe(seconds)

    def told(self, outcome: Told, attempt: int, seconds: float) -> None:
        """One attempt."""
        self._webhooks.labels(outcome).inc()
        self._webhook_seconds.observe(seconds)
        if outcome != "retry":
            self._attempts.observe(attempt)

    def watch(self, busy: Callable[[], Mapping[str, int]]) -> None:
        """Show what is in hand, by outbox, whenever somebody asks."""
        self.registry.register(Scraped(lambda: _families(busy())))


def _families(busy: Mapping[str, int]) -> Iterable[Metric]:
    in_hand = GaugeMetricFamily(f"{PREFIX}outbox_in_hand", "Entries that are being worked off.", labels=["outbox"])
    for name, number in busy.items():
        in_hand.add_metric([name], number)
    yield in_hand
