"""Named backgrounds: smooth patterns of pixel coordinates, one picture per name and size."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
Grid = NDArray[np.float64]


def _tint(base: tuple[int, int, int], light: Grid) -> Grid:
    return np.asarray(base, dtype=np.float64) + light[..., None]


def _paper(y: Grid, x: Grid) -> Grid:
    return _tint((238, 234, 222), 3 * np.sin(0.7 * x + np.sin(0.5 * y)))


def _sky(y: Grid, x: Grid) -> Grid:
    return (
        np.asarray((120, 185, 240.0)) + (y / (y.max() + 1))[..., None] * np.asarray((70, 38, 10.0)) + 0 * x[..., None]
    )


def _grass(y: Grid, x: Grid) -> Grid:
    return _tint((100, 165, 78), 12 * np.sin(0.9 * x + 1.5 * np.sin(0.23 * y)) * np.sin(0.35 * y + 0.4 * x))


def _wood(y: Grid, x: Grid) -> Grid:
    return _tint((190, 145, 95), 12 * np.sin(0.8 * y + 0.9 * np.sin(0.09 * x)))


def _stone(y: Grid, x: Grid) -> Grid:
    return _tint((138, 140, 145), 7 * (np.sin(0.31 * x + 0.2 * y) + np.sin(0.37 * y - 0.15 * x + 1)))


def _night(y: Grid, x: Grid) -> Grid:
    stars = 60 * np.exp(-((x % 24 - 11.5) ** 2 + ((y + 8 * (x // 24 % 3)) % 24 - 11.5) ** 2) / 2)
    return _tint((28, 30, 66), stars)


def _brick(y: Grid, x: Grid) -> Grid:
    joint = (y % 8 < 1) | ((x + 8 * (y // 8 % 2)) % 16 < 1)
    return np.where(joint[..., None], np.asarray((190, 125, 105.0)), np.asarray((165, 82, 62.0)))


def _water(y: Grid, x: Grid) -> Grid:
    return _tint((35, 108, 145), 12 * np.sin(0.6 * y + 1.3 * np.sin(0.26 * x)))


BACKGROUNDS: dict[str, Callable[[Grid, Grid], Grid]] = {
    "paper": _paper,
    "sky": _sky,
    "grass": _grass,
    "wood": _wood,
    "stone": _stone,
    "night": _night,
    "brick": _brick,
    "water": _water,
}
"""By name, as the prompt says it."""


@lru_cache(maxsize=256)
def backdrop(name: str, height: int, width: int) -> Pixels:
    """[height, width, 3]. Read-only."""
    y, x = np.meshgrid(np.arange(height, dtype=np.float64), np.arange(width, dtype=np.float64), indexing="ij")
    pixels = np.clip(np.rint(BACKGROUNDS[name](y, x)), 0, 255).astype(np.uint8)
    pixels.setflags(write=False)
    return pixels
