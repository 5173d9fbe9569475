"""What goes wrong on a device, phase by phase, and what of it is still held afterwards."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.workers.standin import StandinPipeline


class FaultyPipeline(StandinPipeline, ABC):
    """A stand-in that is asked before each phase."""

    @abstractmethod
    def meet(self, phase: str) -> None:
        """Fail, or not, before `encode`, `start`, `step`, `preview` or `decode`."""

    def encode_prompt(self, prompt: str, adaptation: Any = None) -> Any:
        self.meet("encode")
        return super().encode_prompt(prompt, adaptation)

    def start(self, encoded: Any, seed: int, *, beside: Any = None) -> Any:
        self.meet("start")
        return super().start(encoded, seed, beside=beside)

    def step(self, runs: Sequence[Any]) -> Sequence[Any]:
        self.meet("step")
        return super().step(runs)

    def preview(self, run: Any) -> NDArray[np.uint8]:
        self.meet("preview")
        return super().preview(run)

    def decode(self, run: Any) -> NDArray[np.uint8]:
        self.meet("decode")
        return super().decode(run)


class Held:
    """Stands for what was computed. `alive`: how many of them something holds."""

    alive = 0

    def __init__(self) -> None:
        Held.alive += 1

    def __del__(self) -> None:
        Held.alive -= 1
