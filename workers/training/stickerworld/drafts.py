"""What a task builder hands over: everything about a record but its pixels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model.roles import Role
from workers.training.stickerworld.draws import Draws
from workers.training.stickerworld.looks import Look
from workers.training.stickerworld.scenes import Panel, Part
from workers.training.stickerworld.settings import Settings

Pixels = NDArray[np.uint8]


@dataclass(frozen=True, slots=True, eq=False)
class Carried:
    """One reference to be: a look on white, a ready picture, or (neither given) the scene itself without its style.

    Attributes:
        part: number of the part that it carries, if it carries one.
        pixels: [h, w, 3].
    """

    slot: int
    role: Role
    part: int | None = None
    look: Look | None = None
    pixels: Pixels | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Draft:
    """One record to be painted."""

    prompt: str
    parts: tuple[Part, ...]
    panels: tuple[Panel, ...]
    carried: tuple[Carried, ...] = ()
    style: str | None = None


Builder = Callable[[Draws, Settings], Draft]
"""Makes one task's records. All of its randomness comes from the draws."""
