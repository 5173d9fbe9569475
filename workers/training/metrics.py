"""What a training worker counts. One per process, made by who starts it. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from workers.claims import End
from workers.telemetry.metrics import counter, fresh_registry, gauge, histogram


@dataclass(frozen=True, slots=True)
class TrainingMetrics:
    """A registry and what is in it."""

    registry: CollectorRegistry
    _ended: Counter
    _running: Gauge
    _steps: Counter
    _samples: Counter
    _step_seconds: Histogram

    @classmethod
    def fresh(cls) -> TrainingMetrics:
        """With a registry of its own."""
        one = fresh_registry()
        return cls(
            one,
            counter(
                one,
                "trainings_ended",
                "Trainings that this worker has let go of, by how.",
                "state",
                zeros=get_args(End),
            ),
            gauge(one, "num_trainings_running", "Trainings in hand."),
            counter(one, "training_steps", "Optimizer steps."),
            counter(one, "training_samples", "Records that were trained on."),
            histogram(one, "training_step_s", "From the end of a step to the end of the next."),
        )

    def began(self) -> None:
        """A training is in hand."""
        self._running.set(1)

    def step(self, samples: int, seconds: float | None) -> None:
        """A step was made. `seconds`: since the one before it; None for the first."""
        self._steps.inc()
        self._samples.inc(samples)
        if seconds is not None:
            self._step_seconds.observe(seconds)

    def ended(self, end: End) -> None:
        """It is not in hand any more."""
        self._running.set(0)
        self._ended.labels(end).inc()
