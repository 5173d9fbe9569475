"""Shapes of stickers and garments as antialiased masks, made once per size.

A shape is a predicate on its box: u to the right and v down, both in [-1, 1]. Masks are [side, side].
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Plane = NDArray[np.float64]
Inside = NDArray[np.bool_]
Coverage = NDArray[np.float32]
Predicate = Callable[[Plane, Plane], Inside]

FILL = 0.86
"""Share of the box that a shape spans: neighbours on the grid stay some pixels apart."""

_OVERSAMPLING = 8


def supersampled(predicate: Predicate, side: int, fill: float = 1.0) -> Coverage:
    """Share of each pixel of a [side, side] box that lies inside; the box's [-1, 1] spans `fill` of it."""
    fine = ((np.arange(side * _OVERSAMPLING) + 0.5) / (side * _OVERSAMPLING) * 2 - 1) / fill
    v, u = np.meshgrid(fine, fine, indexing="ij")
    inside = predicate(u, v).reshape(side, _OVERSAMPLING, side, _OVERSAMPLING)
    return inside.mean(axis=(1, 3), dtype=np.float32)


def _polygon(points: list[tuple[float, float]]) -> Predicate:
    def inside(u: Plane, v: Plane) -> Inside:
        odd = np.zeros(u.shape, dtype=np.bool_)
        for (x0, y0), (x1, y1) in zip(points, points[1:] + points[:1], strict=True):
            if y0 != y1:
                crosses = (y0 > v) != (y1 > v)
                odd ^= crosses & (u < x0 + (v - y0) * (x1 - x0) / (y1 - y0))
        return odd

    return inside


def _spokes(count: int, radii: tuple[float, ...]) -> Predicate:
    """A polygon around the centre, first point up, whose corners lie at `radii` in turn."""
    angles = [2 * np.pi * k / count - np.pi / 2 for k in range(count)]
    return _polygon(
        [(radii[k % len(radii)] * np.cos(a), radii[k % len(radii)] * np.sin(a)) for k, a in enumerate(angles)]
    )


def _circle(u: Plane, v: Plane) -> Inside:
    return u**2 + v**2 <= 1


def _ring(u: Plane, v: Plane) -> Inside:
    return (u**2 + v**2 <= 1) & (u**2 + v**2 >= 0.5**2)


def _crescent(u: Plane, v: Plane) -> Inside:
    return (u**2 + v**2 <= 1) & ((u - 0.55) ** 2 + v**2 >= 0.8**2)


def _square(u: Plane, v: Plane) -> Inside:
    return np.maximum(np.abs(u), np.abs(v)) <= 0.96


def _cross(u: Plane, v: Plane) -> Inside:
    return (np.minimum(np.abs(u), np.abs(v)) <= 0.38) & (np.maximum(np.abs(u), np.abs(v)) <= 1)


def _heart(u: Plane, v: Plane) -> Inside:
    x, y = u * 1.16, 0.12 - v * 1.13
    return (x**2 + y**2 - 1) ** 3 - x**2 * y**3 <= 0


STICKER_SHAPES: dict[str, Predicate] = {
    "circle": _circle,
    "square": _square,
    "triangle": _polygon([(0, -0.95), (1, 0.85), (-1, 0.85)]),
    "pentagon": _spokes(5, (1.0,)),
    "star": _spokes(10, (1.05, 0.46)),
    "cross": _cross,
    "ring": _ring,
    "heart": _heart,
    "arrow": _polygon([(-1, -0.3), (0, -0.3), (0, -0.92), (1, 0), (0, 0.92), (0, 0.3), (-1, 0.3)]),
    "crescent": _crescent,
}
"""By name, as the prompt says it."""

GARMENT_SHAPES: dict[str, Predicate] = {
    "shirt": _polygon(
        [(-0.5, -1), (0.5, -1), (1, -0.55), (1, 0), (0.6, 0), (0.6, 1), (-0.6, 1), (-0.6, 0), (-1, 0), (-1, -0.55)]
    ),
    "vest": _polygon([(-0.6, -1), (-0.28, -1), (0, -0.45), (0.28, -1), (0.6, -1), (0.6, 1), (-0.6, 1)]),
    "dress": _polygon([(-0.45, -1), (0.45, -1), (0.34, -0.15), (1, 1), (-1, 1), (-0.34, -0.15)]),
}

_ALL = STICKER_SHAPES | GARMENT_SHAPES


@lru_cache(maxsize=1024)
def coverage(shape: str, side: int) -> Coverage:
    """[side, side] in [0, 1]: how much of each pixel the shape covers. Read-only.

    A garment reaches the top of its box, where the neck of a figure ends.
    """
    mask = supersampled(_ALL[shape], side, FILL)
    if shape in GARMENT_SHAPES:
        mask = np.roll(mask, -int((1 - FILL) / 2 * side), axis=0)
    mask.setflags(write=False)
    return mask


@lru_cache(maxsize=1024)
def solid(shape: str, side: int) -> Inside:
    """[side, side]: the pixels that belong to the shape, at least half covered. Read-only."""
    mask = coverage(shape, side) >= 0.5
    mask.setflags(write=False)
    return mask
