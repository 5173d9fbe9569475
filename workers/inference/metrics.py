"""What an inference worker counts. One per process, made by who starts it; any thread may use it. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from workers.claims import End
from workers.engine import Forward
from workers.inference.caches import Counts
from workers.telemetry.metrics import LONG_S, PREFIX, Scraped, counter, fresh_registry, histogram

_TOKENS = (256, 512, 1024, 2048, 4096, 8192, 16_384, 32_768, 65_536)
_RUNS = (1, 2, 3, 4, 6, 8, 12, 16, 32)


@dataclass(frozen=True, slots=True)
class InHand:
    """What a worker has at one moment.

    Attributes:
        waiting: jobs that nothing was done for yet. running: the others.
        runs: pictures between their first and last step.
        sheds: runs that were left out of a forward, or failed, for want of memory, so far.
    """

    waiting: int
    running: int
    runs: int
    sheds: int
    caches: Mapping[str, Counts]


@dataclass(frozen=True, slots=True)
class WorkerMetrics:
    """A registry and what is in it."""

    registry: CollectorRegistry
    _ended: Counter
    _job_seconds: Histogram
    _stage_seconds: Histogram
    _images: Counter
    _forward_seconds: Histogram
    _forward_tokens: Histogram
    _forward_runs: Histogram
    _steps: Counter
    _handed_over: Counter

    @classmethod
    def fresh(cls) -> WorkerMetrics:
        """With a registry of its own."""
        one = fresh_registry()
        return cls(
            one,
            counter(
                one, "requests_ended", "Jobs that this worker has let go of, by how.", "state", zeros=get_args(End)
            ),
            histogram(one, "e2e_request_latency_s", "From a job's claim to its commit.", bounds=LONG_S),
            histogram(one, "stage_gen_time_s", "Time that a job spent in a stage, its share of forwards.", "stage"),
            counter(one, "image_count", "Pictures of committed jobs."),
            histogram(one, "denoise_step_s", "One forward."),
            histogram(one, "forward_tokens", "Tokens in a forward: text, targets, references.", bounds=_TOKENS),
            histogram(one, "forward_runs", "Pictures in a forward.", bounds=_RUNS),
            counter(one, "denoise_steps", "Steps made, over all pictures."),
            counter(one, "handed_over", "Jobs given to idle workers."),
        )

    def forward(self, forward: Forward) -> None:
        """A forward has been made."""
        self._forward_seconds.observe(forward.seconds)
        self._forward_tokens.observe(forward.tokens)
        self._forward_runs.observe(len(forward.moved))
        self._steps.inc(len(forward.moved))

    def ended(self, end: End, seconds: float, timings: Mapping[str, float], images: int) -> None:
        """A job has ended here. `seconds`: since its claim; `timings`: seconds by stage, `<stage>_s`."""
        self._ended.labels(end).inc()
        for name, spent in timings.items():
            self._stage_seconds.labels(name.removesuffix("_s")).observe(spent)
        if end == "succeeded":
            self._job_seconds.observe(seconds)
            self._images.inc(images)

    def handed_over(self, jobs: int) -> None:
        """Jobs go to other workers."""
        self._handed_over.inc(jobs)

    def watch(self, look: Callable[[], InHand]) -> None:
        """Show what is in hand, whenever somebody asks."""
        self.registry.register(Scraped(lambda: _families(look())))


def _families(now: InHand) -> Iterable[Metric]:
    in_hand = GaugeMetricFamily(f"{PREFIX}requests_in_hand", "Jobs claimed: `waiting`, `running`.", labels=["state"])
    in_hand.add_metric(["waiting"], now.waiting)
    in_hand.add_metric(["running"], now.running)
    yield in_hand
    yield GaugeMetricFamily(f"{PREFIX}runs", "Pictures between their first and last step.", now.runs)
    yield CounterMetricFamily(f"{PREFIX}out_of_memory_sheds", "Pictures left out for want of memory.", now.sheds)
    asked = CounterMetricFamily(f"{PREFIX}cache_requests", "What was asked of a cache.", labels=["cache", "outcome"])
    evicted = CounterMetricFamily(f"{PREFIX}cache_evictions", "Values that made room for others.", labels=["cache"])
    entries = GaugeMetricFamily(f"{PREFIX}cache_entries", "Values kept; of adapters: resident ones.", labels=["cache"])
    size = GaugeMetricFamily(f"{PREFIX}cache_bytes", "Bytes kept.", labels=["cache"])
    for name, counts in now.caches.items():
        asked.add_metric([name, "hit"], counts.hits)
        asked.add_metric([name, "miss"], counts.misses)
        evicted.add_metric([name], counts.evictions)
        entries.add_metric([name], counts.entries)
        size.add_metric([name], counts.nbytes)
    yield from (asked, evicted, entries, size)
