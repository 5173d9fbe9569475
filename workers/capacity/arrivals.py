"""Who comes when: a trace of jobs, drawn at random or read from a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked

from workers.capacity.costs import Layout


class TraceError(ValueError):
    """A trace that cannot be used; says which line and what to do."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """A job that comes.

    Attributes:
        second: at which it is accepted, from the trace's begin.
        tokens: of each of its pictures in a forward: text, target and references.
        steps: of each picture.
        references: that are to be prepared.
    """

    second: float
    tokens: int
    steps: int
    references: int = 0
    images: int = 1
    tenant: str = "default"
    interactive: bool = True


@dataclass(frozen=True, slots=True)
class Load:
    """What random jobs are like.

    Attributes:
        rate: jobs a second.
        side: of the pictures, in pixels; None: the model's own.
        references: a job has one of these counts, each as likely.
        tenants: how many there are, each as likely.
        batch_share: of the jobs that are not interactive.
    """

    rate: float
    jobs: int
    steps: int
    references: Sequence[int] = (0, 1, 2)
    side: int | None = None
    tenants: int = 1
    batch_share: float = 0.0


@checked(frozen=True, config={"extra": "forbid", "allow_inf_nan": False})
class _Line:
    second: Annotated[float, Field(ge=0)]
    steps: Annotated[int, Field(ge=1)]
    tokens: Annotated[int | None, Field(ge=1)] = None
    width: Annotated[int | None, Field(ge=1)] = None
    height: Annotated[int | None, Field(ge=1)] = None
    references: Annotated[int, Field(ge=0)] = 0
    images: Annotated[int, Field(ge=1)] = 1
    tenant: str = "default"
    interactive: bool = True


_LINE = TypeAdapter(_Line)


def poisson(load: Load, layout: Layout, seed: int) -> tuple[Arrival, ...]:
    """Jobs that come independently of each other, at a constant rate."""
    random = np.random.default_rng(seed)
    seconds = np.cumsum(random.exponential(1 / load.rate, load.jobs))
    references = random.choice(np.asarray(load.references), load.jobs)
    tenants = random.integers(load.tenants, size=load.jobs)
    interactive = random.random(load.jobs) >= load.batch_share
    side = load.side or layout.side
    return tuple(
        Arrival(
            second=float(seconds[n]),
            tokens=layout.tokens(side, side, int(references[n])),
            steps=load.steps,
            references=int(references[n]),
            tenant=f"tenant-{tenants[n]}",
            interactive=bool(interactive[n]),
        )
        for n in range(load.jobs)
    )


def read_trace(path: Path, layout: Layout) -> tuple[Arrival, ...]:
    """A file of one JSON object a line: `second`, `steps`, and `tokens` or `width` and `height`; besides, if wanted,
    `references`, `images`, `tenant`, `interactive`.

    Raises:
        TraceError: naming the line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(
            f"{path}: cannot be read ({type(error).__name__}): give a text file, one JSON a line"
        ) from error
    found: list[Arrival] = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            arrival = _arrival(line, layout, f"{path}, line {number}")
            if found and arrival.second < found[-1].second:
                raise TraceError(f"{path}, line {number}: comes before the line above it: sort the file by second")
            found.append(arrival)
    if not found:
        raise TraceError(f"{path}: holds no arrival: write one JSON object a line")
    return tuple(found)


def _arrival(text: str, layout: Layout, where: str) -> Arrival:
    try:
        line = _LINE.validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        field = ".".join(str(part) for part in first["loc"]) or "the line"
        raise TraceError(f"{where}: {field}: {first['msg']}: correct it, or remove the line") from error
    tokens = line.tokens
    if tokens is None:
        if line.width is None or line.height is None:
            raise TraceError(f"{where}: has no size: give tokens, or width and height")
        tokens = layout.tokens(line.width, line.height, line.references)
    elif line.width is not None or line.height is not None:
        raise TraceError(f"{where}: has tokens and a size: give one of them")
    return Arrival(line.second, tokens, line.steps, line.references, line.images, line.tenant, line.interactive)
