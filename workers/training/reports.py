"""What a run tells of its steps. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from workers.training.records import Pixels


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one step did. `losses`: mean of each part over its units, nan where there were none. `sheet`: pictures that
    were drawn after it."""

    step: int
    total_steps: int
    stage: str
    loss: float
    losses: Mapping[str, float]
    samples: int
    sheet: Pixels | None = None
