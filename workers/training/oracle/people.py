"""Whether a painted face is that person: the nearest of all faces is searched, attribute by attribute."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from workers.training.oracle.grounds import smoothed
from workers.training.stickerworld.faces import EXPRESSIONS, EYES, HAIR_STYLES, HAIRS, HEADS, IDENTITY, SKINS, Face
from workers.training.stickerworld.looks import over
from workers.training.stickerworld.scenes import Box, Part

Pixels = NDArray[np.uint8]
Values = NDArray[np.float32]

_VALUES: dict[str, tuple[Any, ...]] = {
    "head": HEADS,
    "skin": SKINS,
    "hair": HAIRS,
    "hair_style": HAIR_STYLES,
    "eyes": EYES,
    "glasses": (False, True),
    "beard": (False, True),
    "expression": EXPRESSIONS,
}

_ROUNDS = 4


@dataclass(frozen=True, slots=True)
class FaceScore:
    """One face.

    Attributes:
        agreed: those fields of `faces.IDENTITY` that are as in the reference.
        expression: as the prompt says.
    """

    slot: int | None
    present: bool
    agreed: frozenset[str]
    expression: bool

    @property
    def agreement(self) -> float:
        """Share of the attributes of a person that agree."""
        return len(self.agreed) / len(IDENTITY)

    @property
    def identity(self) -> bool:
        """The same person in every attribute."""
        return self.present and len(self.agreed) == len(IDENTITY)

    @property
    def all_right(self) -> bool:
        """The same person, with the expression asked for."""
        return self.identity and self.expression


def judge_face(picture: Pixels, ground: Values, part: Part, face: Face, *, present: bool) -> FaceScore:
    """Score the face that should be in the part's box, give or take a pixel.

    Args:
        picture: [H, W, 3].
        ground: [H, W, 3]: the background without the face.
        present: whether enough stands in the box at all.
    """
    if not present:
        return FaceScore(part.slot, False, frozenset(), False)
    found = min((_recognise(picture, ground, box, face) for box in _around(part.box, picture)), key=lambda one: one[0])[
        1
    ]
    right = {name for name in _VALUES if getattr(found, name) == getattr(face, name)}
    return FaceScore(part.slot, True, frozenset(right & set(IDENTITY)), "expression" in right)


def _recognise(picture: Pixels, ground: Values, box: Box, face: Face) -> tuple[float, Face]:
    """The face nearest to the picture in a box, and its error: one attribute after the other, from `face`."""
    window = smoothed(picture[box.top : box.bottom, box.left : box.right])
    behind = ground[box.top : box.bottom, box.left : box.right]

    def error(candidate: Face) -> float:
        return float(np.abs(smoothed(over(candidate, behind)) - window).mean())

    least = error(face)
    for _ in range(_ROUNDS):
        before = face
        for name, values in _VALUES.items():
            for value in values:
                candidate = replace(face, **{name: value})
                if candidate != face and (other := error(candidate)) < least:
                    least, face = other, candidate
        if face == before:
            break
    return least, face


def _around(box: Box, picture: Pixels) -> list[Box]:
    """The box and its eight neighbours, as far as they lie in the picture; itself first."""
    boxes: list[Box] = []
    for row in (0, -1, 1):
        for column in (0, -1, 1):
            moved = Box(box.top + row, box.left + column, box.bottom + row, box.right + column)
            if (
                moved.top >= 0
                and moved.left >= 0
                and moved.bottom <= picture.shape[0]
                and moved.right <= picture.shape[1]
            ):
                boxes.append(moved)
    return boxes
