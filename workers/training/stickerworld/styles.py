"""Styles: deterministic filters over a whole picture, never named in a prompt: only a style reference carries them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
Plane = NDArray[np.float32]

_INK = np.array((35, 35, 95), dtype=np.float32)
_PAGE = np.array((248, 244, 232), dtype=np.float32)


def _luma(picture: Pixels) -> Plane:
    return picture.astype(np.float32) @ np.array([0.299, 0.587, 0.114], dtype=np.float32)


def _finish(values: NDArray[np.floating]) -> Pixels:
    return np.clip(values + 0.5, 0, 255).astype(np.uint8)


def _blocks(picture: NDArray[np.float32], step: int) -> NDArray[np.float32]:
    """[h, w, c] with each step × step block set to its mean; the last blocks may be smaller."""
    height, width = picture.shape[:2]
    rows, columns = np.arange(0, height, step), np.arange(0, width, step)
    sums: NDArray[np.float32] = np.add.reduceat(np.add.reduceat(picture, rows, axis=0), columns, axis=1)
    high = np.minimum(step, height - rows).astype(np.float32)[:, None, None]
    wide = np.minimum(step, width - columns).astype(np.float32)[None, :, None]
    return np.repeat(np.repeat(sums / (high * wide), step, axis=0), step, axis=1)[:height, :width]


def _negative(picture: Pixels) -> Pixels:
    return 255 - picture


def _sepia(picture: Pixels) -> Pixels:
    light = _luma(picture)[..., None] / 255
    return _finish(
        np.array((60, 30, 5), dtype=np.float32) * (1 - light) + np.array((255, 235, 190), dtype=np.float32) * light
    )


def _poster(picture: Pixels) -> Pixels:
    """Three levels a channel, none of them pure."""
    return np.array((35, 150, 225), dtype=np.uint8)[np.digitize(picture, (90, 185))]


def _pixelate(picture: Pixels) -> Pixels:
    return _finish(_blocks(picture.astype(np.float32), 4))


def _halftone(picture: Pixels) -> Pixels:
    """Ink dots every six pixels, as large as their cell is dark."""
    cell = 6
    dark = 1 - _blocks(_luma(picture)[..., None], cell)[..., 0] / 255
    y, x = np.indices(picture.shape[:2], dtype=np.float32)
    distance = np.hypot(y % cell - (cell - 1) / 2, x % cell - (cell - 1) / 2)
    ink = np.clip(cell * (0.08 + 0.56 * dark) + 0.5 - distance, 0, 1)[..., None]
    return _finish(_PAGE * (1 - ink) + _INK * ink)


def _outline(picture: Pixels) -> Pixels:
    """Dark lines where the light changes, on a page faintly tinted."""
    light = _luma(picture)
    edge = np.abs(np.diff(light, axis=0, append=light[-1:])) + np.abs(np.diff(light, axis=1, append=light[:, -1:]))
    line = np.clip((edge - 14) / 30, 0, 1)[..., None]
    return _finish((0.25 * picture + 0.75 * _PAGE) * (1 - line) + _INK * line)


def _hatching(picture: Pixels) -> Pixels:
    """Diagonal strokes, the stronger the darker it is."""
    y, x = np.indices(picture.shape[:2], dtype=np.float32)
    stroke = np.less((x - y) % 5, 2)[..., None]
    dark = 1 - _luma(picture)[..., None] / 255
    grey = 0.45 * picture + 0.55 * _PAGE
    return _finish(np.where(stroke, grey * (1 - 0.25 - 0.6 * dark), grey))


STYLES: dict[str, Callable[[Pixels], Pixels]] = {
    "negative": _negative,
    "sepia": _sepia,
    "poster": _poster,
    "pixelate": _pixelate,
    "halftone": _halftone,
    "outline": _outline,
    "hatching": _hatching,
}
"""By name: [h, w, 3] to [h, w, 3]."""


def stylise(picture: Pixels, style: str | None) -> Pixels:
    """The picture in that style; None leaves it as it is."""
    return picture if style is None else STYLES[style](picture)
