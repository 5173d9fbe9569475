"""A scene is the exact truth of one record: what lies where, what each reference carries, what picture that makes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model.roles import Role
from workers.training.records import Record, RecordReference
from workers.training.stickerworld.backgrounds import backdrop
from workers.training.stickerworld.looks import Look, Sticker, paint, put
from workers.training.stickerworld.splits import unseen_pair
from workers.training.stickerworld.styles import stylise

Pixels = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Box:
    """Rows top … bottom - 1 and columns left … right - 1 of the picture, in pixels."""

    top: int
    left: int
    bottom: int
    right: int

    def shifted(self, columns: int) -> Box:
        """The same box further to the right."""
        return Box(self.top, self.left + columns, self.bottom, self.right + columns)

    def distance(self, row: float, column: float) -> float:
        """Pixels from a point to the box along the axis where it is farther out; 0 inside."""
        return max(self.top - row, row - self.bottom, self.left - column, column - self.right, 0.0)


@dataclass(frozen=True, slots=True)
class Part:
    """One thing in a scene.

    Attributes:
        box: the square box it is painted in; that of a figure's head and garment touch.
        zone: where its centre must lie to be where the prompt asks; for a part of a figure, its box.
        slot: the reference that carries its look; None: the prompt does.
        place: the words of the prompt.
        judged: False where neither prompt nor reference says how it looks.
    """

    look: Look
    box: Box
    zone: Box
    place: str
    slot: int | None = None
    judged: bool = True

    @property
    def side(self) -> int:
        """Of the box, in pixels."""
        return self.box.bottom - self.box.top

    @property
    def unseen_pair(self) -> bool:
        """Whether training never shows this shape with this texture."""
        return isinstance(self.look, Sticker) and unseen_pair(self.look.shape, self.look.texture)


@dataclass(frozen=True, slots=True)
class Panel:
    """One column of a picture: columns left … left + width - 1 on one background."""

    background: str
    left: int
    width: int


@dataclass(frozen=True, slots=True, eq=False)
class SceneReference:
    """A reference and the part of the scene it carries, by number; None where it carries style or content.

    pixels [h, w, 3].
    """

    slot: int
    role: Role
    pixels: Pixels
    part: int | None


@dataclass(frozen=True, slots=True, eq=False)
class Scene:
    """One record with its truth.

    Attributes:
        picture: [H, W, 3], in its style.
        id_map: [H, W]: 0 background, k the visible pixels of `parts[k - 1]`.
        style: name of the filter over the picture; None: none.
    """

    key: str
    task: str
    prompt: str
    parts: tuple[Part, ...]
    panels: tuple[Panel, ...]
    style: str | None
    references: tuple[SceneReference, ...]
    picture: Pixels
    id_map: Pixels

    def amodal(self, number: int) -> NDArray[np.bool_]:
        """[H, W]: all pixels of part `number`, those that others hide included."""
        box = self.parts[number].box
        mask = np.zeros(self.id_map.shape, dtype=np.bool_)
        mask[box.top : box.bottom, box.left : box.right] = paint(self.parts[number].look, self.parts[number].side).solid
        return mask

    def visible(self, number: int) -> Pixels:
        """[H, W], 255 on the visible pixels of part `number`."""
        return np.multiply(self.id_map == number + 1, 255, dtype=np.uint8)

    def record(self) -> Record:
        """The training sample of this scene."""
        references = tuple(
            RecordReference(r.slot, r.role, r.pixels, None if r.part is None else self.visible(r.part))
            for r in self.references
        )
        return Record(self.key, self.task, self.prompt, references, self.picture)


def render(parts: Iterable[Part], panels: tuple[Panel, ...], height: int) -> tuple[Pixels, Pixels]:
    """Paint the parts in order on their backgrounds: picture [height, W, 3] and id map [height, W]."""
    width = sum(panel.width for panel in panels)
    picture = np.empty((height, width, 3), dtype=np.uint8)
    for panel in panels:
        picture[:, panel.left : panel.left + panel.width] = backdrop(panel.background, height, panel.width)
    id_map = np.zeros((height, width), dtype=np.uint8)
    for number, part in enumerate(parts, 1):
        box = part.box
        solid = put(picture, part.look, box.top, box.left, part.side)
        id_map[box.top : box.bottom, box.left : box.right][solid] = number
    return picture, id_map


def repaint(scene: Scene, parts: tuple[Part, ...], style: str | None) -> Pixels:
    """[H, W, 3]: the picture that other parts would have made in this scene, in another style."""
    return stylise(render(parts, scene.panels, scene.picture.shape[0])[0], style)
