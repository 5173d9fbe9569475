"""Scores of one picture against the truth of its scene; no networks.

Tolerances, chosen so that noise of sigma 6 or a blur of sigma 0.7 (more than the shipped VAE makes) passes:
colour ΔE < 15 (CIE 1976); side within a fifth and a pixel; a sticker's middle in the cell asked for, or two pixels out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from math import inf

import numpy as np
from numpy.typing import NDArray

from workers.training.oracle.contents import agrees
from workers.training.oracle.findings import Finding, components, fit, measure, standing_in
from workers.training.oracle.grounds import behind, recognise
from workers.training.oracle.people import FaceScore, judge_face
from workers.training.stickerworld.faces import Face
from workers.training.stickerworld.looks import Sticker, paint
from workers.training.stickerworld.scenes import Part, Scene
from workers.training.stickerworld.shapes import GARMENT_SHAPES, STICKER_SHAPES

Pixels = NDArray[np.uint8]
Values = NDArray[np.float32]
Mask = NDArray[np.bool_]

COLOUR_TOLERANCE = 15.0
_MARGIN = 2.0
_LEAST = 0.4
"""Share of a figure's part that has to stand out from the background for it to be there."""


@dataclass(frozen=True, slots=True)
class StickerScore:
    """One sticker or garment.

    Attributes:
        judged: whether anything said how it should look; else only `present` and `size` mean something.
        unseen_pair: training never shows this shape with this texture.
        present: something stands where it was asked for.
        colour_error: ΔE of the dominant colour; infinite when absent.
        iou: of its pixels with the expected shape at the expected size, best within a pixel.
        shape, texture: it is of that class.
    """

    slot: int | None
    garment: bool
    judged: bool
    unseen_pair: bool
    present: bool
    size: bool
    colour_error: float
    iou: float
    shape: bool
    texture: bool

    @property
    def colour(self) -> bool:
        """The dominant colour is right."""
        return self.colour_error < COLOUR_TOLERANCE

    @property
    def all_right(self) -> bool:
        """Where, as large and as it should be."""
        return self.present and self.size and self.colour and self.shape and self.texture


@dataclass(frozen=True, slots=True)
class Scores:
    """One picture.

    Attributes:
        background: right in all columns.
        count: as many separate things as in the truth; None in a style and for figures, whose parts hang together.
        swapped: the references explain the picture better in another order; None for fewer than two stickers.
        style, content: agreement in a styled scene; None elsewhere.
    """

    task: str
    background: bool
    count: bool | None = None
    swapped: bool | None = None
    stickers: tuple[StickerScore, ...] = ()
    faces: tuple[FaceScore, ...] = ()
    style: bool | None = None
    content: bool | None = None

    @property
    def all_right(self) -> bool:
        """Every judged thing is, and style and content agree where there is a style."""
        things = all(one.all_right for one in self.stickers if one.judged) and all(one.all_right for one in self.faces)
        return things and self.style is not False and self.content is not False


def score(scene: Scene, picture: Pixels) -> Scores:
    """Compare a picture [H, W, 3] with what its scene asks for.

    Raises:
        ValueError: the picture is not uint8 or not of the scene's size.
    """
    if picture.dtype != np.uint8 or picture.shape != scene.picture.shape:
        raise ValueError(f"the picture is {picture.dtype} {picture.shape}, the scene uint8 {scene.picture.shape}")
    grounds = [recognise(scene, picture, panel) for panel in scene.panels]
    background = all(ground.right for ground in grounds)
    if scene.style is not None:
        content = agrees(scene, picture, grounds[0].style)
        style = all(ground.style_right for ground in grounds)
        return Scores(scene.task, background, style=style, content=content)
    ground = behind(scene, picture, grounds)
    things = components(picture, ground)
    places = _places(scene, things)
    found = [
        measure(picture, ground, rough, _shapes(part.look))
        if isinstance(part.look, Sticker) and rough is not None
        else None
        for part, rough in zip(scene.parts, places, strict=True)
    ]
    return Scores(
        task=scene.task,
        background=background,
        count=None if _has_figure(scene) else len(things) == len(scene.parts),
        swapped=_swapped(scene.parts, found),
        stickers=tuple(
            _judge(part, part.look, finding)
            for part, finding in zip(scene.parts, found, strict=True)
            if isinstance(part.look, Sticker)
        ),
        faces=tuple(
            judge_face(picture, ground, part, part.look, present=rough is not None)
            for part, rough in zip(scene.parts, places, strict=True)
            if isinstance(part.look, Face)
        ),
    )


def _places(scene: Scene, things: Sequence[Mask]) -> list[Mask | None]:
    """What stands where each part should be. The parts of a figure touch, so there it is cut out by their boxes."""
    if not _has_figure(scene):
        return standing_in(things, [part.zone for part in scene.parts], _MARGIN)
    anything = np.logical_or.reduce([np.zeros_like(scene.id_map, dtype=np.bool_), *things])
    places: list[Mask | None] = []
    for part in scene.parts:
        box, mask = part.box, np.zeros_like(anything)
        mask[box.top : box.bottom, box.left : box.right] = anything[box.top : box.bottom, box.left : box.right]
        places.append(mask if mask.sum() >= _LEAST * paint(part.look, part.side).solid.sum() else None)
    return places


def _has_figure(scene: Scene) -> bool:
    return any(isinstance(part.look, Face) for part in scene.parts)


def _shapes(look: Sticker) -> tuple[str, ...]:
    return tuple(GARMENT_SHAPES if look.shape in GARMENT_SHAPES else STICKER_SHAPES)


def _judge(part: Part, look: Sticker, found: Finding | None) -> StickerScore:
    garment = look.shape in GARMENT_SHAPES
    if found is None:
        return StickerScore(part.slot, garment, part.judged, part.unseen_pair, False, False, inf, 0.0, False, False)
    return StickerScore(
        slot=part.slot,
        garment=garment,
        judged=part.judged,
        unseen_pair=part.unseen_pair,
        present=True,
        size=abs(found.fits[found.shape].side - part.side) <= part.side / 5 + 1,
        colour_error=found.palette.error(look.colour),
        iou=fit(found.mask, look.shape, (part.side,)).iou,
        shape=found.shape == look.shape,
        texture=found.texture == look.texture,
    )


def _swapped(parts: Sequence[Part], found: Sequence[Finding | None]) -> bool | None:
    """Whether another assignment of the referenced stickers to the places explains what was found better."""
    pairs = [
        (part.look, finding)
        for part, finding in zip(parts, found, strict=True)
        if isinstance(part.look, Sticker) and part.slot is not None and part.look.shape in STICKER_SHAPES
    ]
    if len(pairs) < 2:
        return None
    cost = [[_unlikeness(look, finding) for _, finding in pairs] for look, _ in pairs]
    straight = range(len(pairs))
    totals = {order: sum(cost[k][order[k]] for k in straight) for order in permutations(straight)}
    return min(totals.values()) < totals[tuple(straight)] - 0.05


def _unlikeness(look: Sticker, found: Finding | None) -> float:
    """Colour, shape and texture together; what is absent is equally unlike everything."""
    if found is None:
        return 2.0
    colour = min(found.palette.error(look.colour), 60.0) / 60
    return colour + (1 - found.fits[look.shape].iou) + 0.5 * (found.texture != look.texture)
