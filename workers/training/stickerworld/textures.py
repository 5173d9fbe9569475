"""Textures: which share of each pixel of a sticker's box has its second colour. They scale with the box."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np

from workers.training.stickerworld.shapes import Coverage, Inside, Plane, supersampled


def _plain(x: Plane, y: Plane) -> Inside:
    return np.zeros(np.broadcast_shapes(x.shape, y.shape), dtype=np.bool_)


def _horizontal(x: Plane, y: Plane) -> Inside:  # noqa: ARG001 – one signature for all
    return np.abs(3 * y % 1 - 0.5) < 0.2


def _vertical(x: Plane, y: Plane) -> Inside:  # noqa: ARG001 – one signature for all
    return np.abs(3 * x % 1 - 0.5) < 0.2


def _diagonal(x: Plane, y: Plane) -> Inside:
    return np.abs(2.25 * (x + y) % 1 - 0.5) < 0.2


def _checks(x: Plane, y: Plane) -> Inside:
    return (np.floor(4 * x) + np.floor(4 * y)) % 2 == 1


def _dots(x: Plane, y: Plane) -> Inside:
    return (3 * x % 1 - 0.5) ** 2 + (3 * y % 1 - 0.5) ** 2 < 0.32**2


TEXTURES: dict[str, Callable[[Plane, Plane], Inside]] = {
    "plain": _plain,
    "horizontal": _horizontal,
    "vertical": _vertical,
    "checks": _checks,
    "dots": _dots,
    "diagonal": _diagonal,
}
"""By name; x and y run over the box from 0 to 1."""


@lru_cache(maxsize=512)
def pattern(texture: str, side: int) -> Coverage:
    """[side, side] in [0, 1]: the second colour's share of each pixel. Read-only."""
    predicate = TEXTURES[texture]
    share = supersampled(lambda u, v: predicate((u + 1) / 2, (v + 1) / 2), side)
    share.setflags(write=False)
    return share
