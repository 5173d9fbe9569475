"""What all processes' metrics have in common: names, bounds, a registry of one's own. No torch.

Names are vLLM-Omni's (`vllm_omni:num_requests_running`, `_s` for seconds, `_total`, `_bytes`) under our own prefix, so
that a dashboard for the one needs its prefix changed to show the other. Nothing is registered with the library's
global registry: each process makes one, and passes it down within a frozen value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, disable_created_metrics
from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

PREFIX: Final = "dreamserve:"
SHORT_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Bounds for answers, steps and stages."""
LONG_S: Final = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)
"""Bounds for whole jobs."""


def fresh_registry() -> CollectorRegistry:
    """A registry with the process' own memory, processor time and open files in it."""
    disable_created_metrics()  # a second series for each counter, which nobody reads
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    return registry


def counter(registry: CollectorRegistry, name: str, meaning: str, *labels: str, zeros: Iterable[str] = ()) -> Counter:
    """A counter; `_total` is added to its name.

    Args:
        zeros: values of its one label that are there from the start: in a series that appears as 1 Prometheus sees no
            increase, and an alert would miss the first.
    """
    made = Counter(f"{PREFIX}{name}", meaning, labels, registry=registry)
    for value in zeros:
        made.labels(value)
    return made


def gauge(registry: CollectorRegistry, name: str, meaning: str, *labels: str) -> Gauge:
    return Gauge(f"{PREFIX}{name}", meaning, labels, registry=registry)


def histogram(
    registry: CollectorRegistry, name: str, meaning: str, *labels: str, bounds: Iterable[float] = SHORT_S
) -> Histogram:
    return Histogram(f"{PREFIX}{name}", meaning, labels, registry=registry, buckets=tuple(bounds))


class Scraped(Collector):
    """Metrics that are read off something when somebody asks, and cost nothing until then."""

    def __init__(self, read: Callable[[], Iterable[Metric]]) -> None:
        self._read = read

    def collect(self) -> Iterable[Metric]:
        return self._read()

    def describe(self) -> Iterable[Metric]:
        """Nothing: registering is not to ask yet."""
        return ()


def add_durations(family: HistogramMetricFamily, labels: list[str], counts: Mapping[float, int], total: float) -> None:
    """One histogram from counts by upper bound, each without those below it."""
    below, buckets = 0, list[tuple[str, float]]()
    for bound, number in sorted(counts.items()):
        below += number
        buckets.append(("+Inf" if bound == float("inf") else str(float(bound)), below))
    family.add_metric(labels, buckets, total)
