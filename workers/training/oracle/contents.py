"""Whether a stylised picture shows the right things: against renderings with one thing changed, in the same style."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from workers.training.oracle.grounds import smoothed
from workers.training.stickerworld.colours import NAMED
from workers.training.stickerworld.looks import Sticker
from workers.training.stickerworld.scenes import Part, Scene, repaint
from workers.training.stickerworld.shapes import STICKER_SHAPES
from workers.training.stickerworld.textures import TEXTURES

Pixels = NDArray[np.uint8]

TIE = 0.5
"""Mean levels within which two renderings are equally near: some styles hide a colour or a texture."""


def agrees(scene: Scene, picture: Pixels, style: str | None) -> bool:
    """Whether everything in the scene is there with its shape, texture and colour, as far as `style` shows them.

    Args:
        picture: [H, W, 3].
        style: the one the picture is in, right or wrong.
    """
    truth = repaint(scene, scene.parts, style)
    return all(_agrees(scene, picture, style, truth, number) for number in range(len(scene.parts)))


def _agrees(scene: Scene, picture: Pixels, style: str | None, truth: Pixels, number: int) -> bool:
    box = scene.parts[number].box
    rows, columns = slice(max(box.top - 2, 0), box.bottom + 2), slice(max(box.left - 2, 0), box.right + 2)
    soft = smoothed(picture)[rows, columns]

    def error(rendering: Pixels) -> float:
        return float(np.abs(soft - smoothed(rendering)[rows, columns]).mean())

    own = error(truth)
    others = (repaint(scene, parts, style) for parts in _changed(scene.parts, number))
    return all(own <= error(other) + TIE for other in others)


def _changed(parts: tuple[Part, ...], number: int) -> Iterator[tuple[Part, ...]]:
    """The parts without that one, and with its shape, its texture and its colour replaced by each other one."""
    before, part, after = parts[:number], parts[number], parts[number + 1 :]
    yield (*before, *after)
    look = part.look
    if isinstance(look, Sticker):
        looks = [
            *(replace(look, shape=shape) for shape in STICKER_SHAPES),
            *(replace(look, texture=texture) for texture in TEXTURES),
            *(replace(look, colour=colour) for colour in NAMED.values()),
        ]
        for other in looks:
            if other != look:
                yield (*before, replace(part, look=other), *after)
