"""What a model's work costs on a device: measured points, and the seconds of any forward fitted to them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.resources import files
from itertools import combinations
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

SHIPPED = ("h200-floor", "h200-goal")
"""Predictions that come with the package."""
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class CostsError(ValueError):
    """A file of costs that cannot be used; says what to do."""


@dataclass(frozen=True, slots=True)
class Point:
    """A forward: the tokens of each of its runs, and the seconds it takes."""

    runs: tuple[Annotated[int, Field(ge=1)], ...]
    seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass(frozen=True, slots=True)
class Layout:
    """How a model turns a job into tokens.

    Attributes:
        text: tokens of the prompt. cell: side of a token in pixels. reference: tokens of a reference of usual size.
        side: usual one of a picture, in pixels.
    """

    text: int
    cell: int
    reference: int
    side: int

    def tokens(self, width: int, height: int, references: int) -> int:
        """Of a picture's part of a forward."""
        return self.text + math.ceil(width / self.cell) * math.ceil(height / self.cell) + references * self.reference


@dataclass(frozen=True, slots=True)
class StepCost:
    """Seconds of a forward: `base + run·runs + token·Σ tokens + square·Σ tokens²`, the sums over its runs."""

    base: float
    run: float
    token: float
    square: float

    def seconds(self, runs: Sequence[int]) -> float:
        """Of a forward of runs with so many tokens."""
        return (
            self.base + self.run * len(runs) + self.token * sum(runs) + self.square * sum(tokens**2 for tokens in runs)
        )

    def error(self, points: Sequence[Point]) -> float:
        """The largest deviation from a point, as a share of it."""
        return max(abs(self.seconds(point.runs) / point.seconds - 1) for point in points)


@dataclass(frozen=True)
class Costs:
    """All that a simulation knows of model and device.

    Attributes:
        what: they are of, for people. origin: whether a device was measured or only thought about.
        prepare_s: of a job without references, a worker's thread busy; reference_s: more for each reference.
        finish_s: of a picture: decode, encode, publish, commit.
        beat_s: between two forwards, for each of the jobs in the first one; real engines wait 50 ms at most.
        lanes: how many of preparation, forward and finishing run beside each other at full speed.
        hands: jobs that are prepared at a time, and as many that are finished.
    """

    what: str
    origin: Literal["measured", "predicted"]
    layout: Layout
    points: Annotated[tuple[Point, ...], Field(min_length=1)]
    prepare_s: Seconds = 0.0
    reference_s: Seconds = 0.0
    finish_s: Seconds = 0.0
    beat_s: Seconds = 0.0
    lanes: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 3.0
    hands: Annotated[int, Field(ge=1)] = 1

    __pydantic_config__ = ConfigDict(extra="forbid")

    @cached_property
    def step(self) -> StepCost:
        """Fitted to the points."""
        return fit(self.points)

    def prepare(self, references: int) -> float:
        """Seconds to prepare a job."""
        return self.prepare_s + references * self.reference_s

    def solo(self, tokens: int, steps: int, references: int) -> float:
        """Seconds of a job of one picture that is alone on its worker."""
        steps_s = steps * self.step.seconds((tokens,)) + (steps - 1) * self.beat_s
        return self.prepare(references) + steps_s + self.finish_s


_COSTS = TypeAdapter(Costs)


def fit(points: Sequence[Point]) -> StepCost:
    """The costs without a negative part whose relative errors are the least squares.

    Every choice of parts is tried, so there is nothing to converge; of equally good ones the first with the fewest.
    """
    columns = np.array([[1, len(p.runs), sum(p.runs), sum(t * t for t in p.runs)] for p in points], np.float64)
    scaled = columns / np.array([[p.seconds] for p in points])
    scale = np.abs(scaled).max(axis=0)
    best, least = np.zeros(4), math.inf
    for chosen in (c for size in range(1, 5) for c in combinations(range(4), size)):
        parts = np.zeros(4)
        parts[list(chosen)] = np.linalg.lstsq(scaled[:, chosen] / scale[list(chosen)], np.ones(len(points)))[0]
        parts /= scale
        squares = float(((scaled @ parts - 1) ** 2).sum())
        if (parts >= 0).all() and squares < least * (1 - 1e-6) - 1e-12:
            best, least = parts, squares
    return StepCost(*(float(part) for part in best))


def read_costs(name: str) -> Costs:
    """Costs from a file, or those shipped under a name.

    Raises:
        CostsError: saying what is wrong with it.
    """
    shipped = name in SHIPPED
    try:
        source = files("workers.capacity") / f"{name}.json" if shipped else Path(name)
        return _COSTS.validate_json(source.read_bytes())
    except OSError as error:
        raise CostsError(
            f"{name} cannot be read ({type(error).__name__}): name a file that `measure` wrote, or {', '.join(SHIPPED)}"
        ) from error
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        field = ".".join(str(part) for part in first["loc"]) or "the file"
        raise CostsError(f"{name}: {field}: {first['msg']}: correct it, or measure anew") from error


def write_costs(costs: Costs, path: Path) -> None:
    """As `read_costs` takes it, one point a line."""
    values = asdict(costs)
    points = ",\n".join(f"  {json.dumps(point)}" for point in values.pop("points"))
    rest = ",\n".join(f" {json.dumps(name)}: {json.dumps(value)}" for name, value in values.items())
    path.write_text(f'{{\n{rest},\n "points": [\n{points}\n ]\n}}\n', encoding="utf-8")
