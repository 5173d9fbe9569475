"""Which looks training never shows: by combination of shape, texture and colour, of a face, of style and background.

Two kinds of stickers are held out: a tenth of all (shape, texture, colour bin) triples, whose pairs training does know,
and one shape of every texture in every colour: pairs that training never sees at all.
"""

from __future__ import annotations

from functools import cache
from zlib import crc32

from workers.training.stickerworld.backgrounds import BACKGROUNDS
from workers.training.stickerworld.colours import BINS, RGB, palette, shows
from workers.training.stickerworld.draws import Draws
from workers.training.stickerworld.faces import EXPRESSIONS, EYES, HAIR_STYLES, HAIRS, HEADS, SKINS, Face
from workers.training.stickerworld.looks import Sticker
from workers.training.stickerworld.settings import Split
from workers.training.stickerworld.shapes import STICKER_SHAPES
from workers.training.stickerworld.styles import STYLES
from workers.training.stickerworld.textures import TEXTURES

Triple = tuple[str, str, str]


def _tenth(*parts: object) -> bool:
    return crc32("/".join(map(str, parts)).encode()) % 10 == 0


def unseen_pair(shape: str, texture: str) -> bool:
    """Whether this shape with this texture is held out in every colour. Never true of garments."""
    if shape not in STICKER_SHAPES:
        return False
    return (list(STICKER_SHAPES).index(shape) - 3 * list(TEXTURES).index(texture)) % len(STICKER_SHAPES) == 1


def split_of(shape: str, texture: str, bin_name: str) -> Split:
    """The split that may show this combination."""
    return "held_out" if unseen_pair(shape, texture) or _tenth(shape, texture, bin_name) else "train"


def face_split(face: Face) -> Split:
    """The split that may show this person, whatever the expression."""
    parts = (face.head, face.skin, face.hair, face.hair_style, face.eyes, face.glasses, face.beard)
    return "held_out" if _tenth(*parts) else "train"


def style_split(style: str, background: str) -> Split:
    """The split that may show a picture on this background in this style: one background of each is held out."""
    place = list(BACKGROUNDS).index(background) - 3 * list(STYLES).index(style)
    return "held_out" if place % len(BACKGROUNDS) == 0 else "train"


@cache
def _triples(split: Split, shapes: tuple[str, ...], background: str, named: bool, pairs: bool) -> tuple[Triple, ...]:
    colours = palette().named[background] if named else BINS
    return tuple(
        (shape, texture, colour)
        for shape in shapes
        for texture in TEXTURES
        for colour in colours
        if (named or palette().cells[background, colour])
        and split_of(shape, texture, colour) == split
        and unseen_pair(shape, texture) == pairs
    )


def draw_triple(
    draws: Draws, split: Split, background: str, *, shapes: tuple[str, ...] | None = None, named: bool = False
) -> Triple:
    """A (shape, texture, colour bin) of that split whose colour shows on that background.

    Half of the held-out ones are unseen pairs, where `shapes` allow any. With `named`, the bin's own colour has to
    show. Where a shape has none (possible for a single shape of the held-out split only), another shape comes.
    """
    shapes = shapes or tuple(STICKER_SHAPES)
    pairs = split == "held_out" and draws.chance(0.5)
    triples = _triples(split, shapes, background, named, pairs) or _triples(split, shapes, background, named, not pairs)
    return draws.pick(triples) if triples else draw_triple(draws, split, background, named=named)


def draw_sticker(draws: Draws, split: Split, background: str, *, shapes: tuple[str, ...] | None = None) -> Sticker:
    """A sticker of continuous colour."""
    shape, texture, colour = draw_triple(draws, split, background, shapes=shapes)
    return Sticker(shape, texture, palette().draw(draws, background, colour))


def draw_face(draws: Draws, split: Split, background: str) -> Face:
    """A person of that split whose skin and hair show on that background."""
    skins, hairs = _face_colours(background)
    while True:
        face = Face(
            head=draws.pick(HEADS),
            skin=draws.pick(skins),
            hair=draws.pick(hairs),
            hair_style=draws.pick(HAIR_STYLES),
            eyes=draws.pick(EYES),
            glasses=draws.chance(0.5),
            beard=draws.chance(0.5),
            expression=draws.pick(EXPRESSIONS),
        )
        if face_split(face) == split:
            return face


@cache
def _face_colours(background: str) -> tuple[tuple[RGB, ...], tuple[RGB, ...]]:
    return tuple(c for c in SKINS if shows(c, background)), tuple(c for c in HAIRS if shows(c, background))


def draw_background(draws: Draws, split: Split, style: str | None = None) -> str:
    """A background, of those that this split may show in `style`."""
    return draws.pick(_backgrounds(split, style))


@cache
def _backgrounds(split: Split, style: str | None) -> tuple[str, ...]:
    if style is None:
        return tuple(BACKGROUNDS)
    return tuple(name for name in BACKGROUNDS if style_split(style, name) == split)
