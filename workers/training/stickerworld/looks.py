"""Looks: what a sticker, a garment or a person looks like wherever it stands, and how that is painted.

A paint is shares of a few colours in each pixel of a box; putting it on a picture is one small matrix product.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from workers.training.stickerworld.colours import RGB, SHEET, colour_bin, second
from workers.training.stickerworld.faces import DARK, LIPS, Face, face_layers
from workers.training.stickerworld.shapes import Inside, coverage
from workers.training.stickerworld.textures import pattern

Pixels = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Sticker:
    """A shape (or a garment) with a texture of two colours, the second following from the first."""

    shape: str
    texture: str
    colour: RGB

    @property
    def bin(self) -> str:
        """The named colour nearest to it."""
        return colour_bin(self.colour)


Look = Sticker | Face


@dataclass(frozen=True, slots=True, eq=False)
class Paint:
    """How to paint one kind of look.

    Attributes:
        shares: [side · side, n]: the share of each of n colours.
        ground: [side, side, 1]: the share left to what lies below.
        solid: [side, side]: at least half covered.
    """

    shares: NDArray[np.float32]
    ground: NDArray[np.float32]
    solid: Inside


@lru_cache(maxsize=1024)
def _sticker_paint(shape: str, texture: str, side: int) -> Paint:
    cover, other = coverage(shape, side), pattern(texture, side)
    return _paint(np.stack([cover * (1 - other), cover * other], axis=-1))


@lru_cache(maxsize=4096)
def _face_paint(
    head: str, hair_style: str, eyes: float, glasses: bool, beard: bool, expression: str, side: int
) -> Paint:
    return _paint(face_layers(head, hair_style, eyes, glasses, beard, expression, side))


def _paint(shares: NDArray[np.float32]) -> Paint:
    ground = 1 - shares.sum(axis=-1, keepdims=True)
    return Paint(np.ascontiguousarray(shares.reshape(-1, shares.shape[-1])), ground, ground[..., 0] <= 0.5)


def paint(look: Look, side: int) -> Paint:
    """The shares of a look at that size; cached by structure, whatever the colours."""
    if isinstance(look, Sticker):
        return _sticker_paint(look.shape, look.texture, side)
    return _face_paint(look.head, look.hair_style, look.eyes, look.glasses, look.beard, look.expression, side)


@lru_cache(maxsize=64)
def _colours(look: Look) -> NDArray[np.float32]:
    """[n, 3] in the order of the paint's shares."""
    if isinstance(look, Sticker):
        return np.stack([np.asarray(look.colour, dtype=np.float32), second(look.colour)])
    return np.array([look.skin, look.hair, DARK, LIPS], dtype=np.float32)


def put(canvas: Pixels, look: Look, top: int, left: int, side: int) -> Inside:
    """Paint a look into `canvas` [h, w, 3], in place; return the [side, side] pixels that are its own."""
    window = canvas[top : top + side, left : left + side]
    layer = over(look, window)
    layer += 0.5
    window[...] = layer.astype(np.uint8)
    return paint(look, side).solid


def over(look: Look, ground: NDArray[np.uint8] | NDArray[np.float32]) -> NDArray[np.float32]:
    """[side, side, 3]: a look over a ground [side, side, 3], not rounded."""
    side = ground.shape[0]
    how = paint(look, side)
    layer = (how.shares @ _colours(look)).reshape(side, side, 3)
    layer += how.ground * ground
    return layer


def alone(look: Look, side: int) -> Pixels:
    """[side, side, 3]: a look on the white sheet, as a reference shows it."""
    canvas = np.full((side, side, 3), SHEET[0], dtype=np.uint8)
    put(canvas, look, 0, 0, side)
    return canvas
