"""Tasks about stickers: by text alone, one or more by reference, two columns."""

from __future__ import annotations

from collections.abc import Sequence

from model.roles import Role
from workers.training.stickerworld import grammar
from workers.training.stickerworld.colours import NAMED
from workers.training.stickerworld.drafts import Carried, Draft
from workers.training.stickerworld.draws import Draws
from workers.training.stickerworld.layouts import Spot, lay_out
from workers.training.stickerworld.looks import Sticker
from workers.training.stickerworld.scenes import Panel, Part
from workers.training.stickerworld.settings import Settings
from workers.training.stickerworld.splits import draw_background, draw_sticker, draw_triple

_ATTEMPTS = 24
_APART = 80
"""Least RGB distance between the colours of two subjects, so that a swap can be seen."""


def text_to_image(draws: Draws, settings: Settings) -> Draft:
    """One to three stickers, named by the prompt."""
    background = draw_background(draws, settings.split)
    return described_scene(draws, settings, background, draws.between(1, 3))


def described_scene(draws: Draws, settings: Settings, background: str, count: int) -> Draft:
    """Stickers of named colour on a background, with the prompt that describes all of it."""
    sizes = _sizes(draws, settings, count)
    spots = lay_out(draws, settings, [settings.side(size) for size in sizes])
    open_looks = settings.unnamed > 0 and draws.chance(settings.unnamed)
    items, parts = list[str](), list[Part]()
    for spot, size in zip(spots, sizes, strict=True):
        if open_looks:
            look = draw_sticker(draws, settings.split, background)
            item = grammar.with_article("sticker" if size is None else f"{size} sticker")
        else:
            triple = draw_triple(draws, settings.split, background, named=True)
            look = Sticker(triple[0], triple[1], NAMED[triple[2]])
            item = grammar.described(draws, triple, size)
        items.append(f"{item} {_place(draws, settings, spot)}")
        parts.append(Part(look, spot.box, spot.zone, spot.place, judged=not open_looks))
    prompt = _scene_prompt(draws, settings, items, background)
    return Draft(prompt, tuple(parts), (Panel(background, 0, settings.size),))


def single_subject(draws: Draws, settings: Settings) -> Draft:
    """One sticker by reference."""
    return _by_reference(draws, settings, 1)


def multi_subject(draws: Draws, settings: Settings) -> Draft:
    """Two or three stickers by reference, some of one shape, mentioned in any order."""
    return _by_reference(draws, settings, draws.between(2, settings.max_subjects))


def _by_reference(draws: Draws, settings: Settings, count: int) -> Draft:
    background = draw_background(draws, settings.split)
    looks = _subjects(draws, settings, [background] * count)
    sizes = _sizes(draws, settings, count)
    spots = lay_out(draws, settings, [settings.side(size) for size in sizes])
    nouns = _nouns(draws, settings, looks)
    plain = draws.chance(settings.plain)
    items = [
        f"{_item(draws, nouns, slot, sizes[slot - 1], plain)} {_place(draws, settings, spots[slot - 1])}"
        for slot in draws.shuffled(range(1, count + 1))
    ]
    parts = tuple(
        Part(look, spot.box, spot.zone, spot.place, slot)
        for slot, (look, spot) in enumerate(zip(looks, spots, strict=True), 1)
    )
    carried = tuple(Carried(slot, Role.SUBJECT, slot - 1, look) for slot, look in enumerate(looks, 1))
    return Draft(
        _scene_prompt(draws, settings, items, background), parts, (Panel(background, 0, settings.size),), carried
    )


def two_column(draws: Draws, settings: Settings) -> Draft:
    """Two single-subject pictures side by side, each on its own background."""
    backgrounds = [draw_background(draws, settings.split) for _ in range(2)]
    looks = _subjects(draws, settings, backgrounds)
    nouns = _nouns(draws, settings, looks)
    plain = draws.chance(settings.plain)
    slots = draws.shuffled((1, 2))
    sentences, parts, panels = list[str](), list[Part](), list[Panel]()
    for column, slot in enumerate(slots):
        (size,) = _sizes(draws, settings, 1)
        (spot,) = lay_out(draws, settings, [settings.side(size)])
        item = f"{_item(draws, nouns, slot, size, plain)} {_place(draws, settings, spot)}"
        background = backgrounds[slot - 1]
        sentences.append(_scene_prompt(draws, settings, [item], background))
        left = column * settings.size
        panels.append(Panel(background, left, settings.size))
        parts.append(Part(looks[slot - 1], spot.box.shifted(left), spot.zone.shifted(left), spot.place, slot))
    prompt = grammar.COLUMNS.pick(draws, settings.split).format(left=sentences[0], right=sentences[1])
    carried = tuple(Carried(slot, Role.SUBJECT, slots.index(slot), looks[slot - 1]) for slot in (1, 2))
    return Draft(prompt, tuple(parts), tuple(panels), carried)


def _subjects(draws: Draws, settings: Settings, backgrounds: Sequence[str]) -> list[Sticker]:
    """Stickers that can be told from each other: all of one shape in a share of the records, no shape twice else."""
    same = len(backgrounds) > 1 and draws.chance(settings.same_shape)
    looks: list[Sticker] = []
    for background in backgrounds:
        shapes = (looks[0].shape,) if same and looks else None
        look = draw_sticker(draws, settings.split, background, shapes=shapes)
        for _ in range(_ATTEMPTS):
            if all(_unlike(look, other) and (same or look.shape != other.shape) for other in looks):
                break
            look = draw_sticker(draws, settings.split, background, shapes=shapes)
        looks.append(look)
    return looks


def _unlike(one: Sticker, other: Sticker) -> bool:
    return sum((a - b) ** 2 for a, b in zip(one.colour, other.colour, strict=True)) >= _APART**2


def _nouns(draws: Draws, settings: Settings, looks: Sequence[Sticker]) -> list[str]:
    named = settings.shape_words > 0 and draws.chance(settings.shape_words)
    return [look.shape if named else "sticker" for look in looks]


def _item(draws: Draws, nouns: Sequence[str], slot: int, size: str | None, plain: bool) -> str:
    """How the prompt calls the reference in that slot; without placeholder by its rank among those of its noun."""
    noun = nouns[slot - 1]
    if plain:
        item = grammar.ordered(draws, noun, nouns[:slot].count(noun), nouns.count(noun))
    else:
        item = grammar.referred(draws, noun, slot)
    return item if size is None else grammar.SIZED.format(item=item, size=size)


def _sizes(draws: Draws, settings: Settings, count: int) -> list[str | None]:
    return [draws.pick(("small", "large")) if settings.sizes == "named" else None for _ in range(count)]


def _place(draws: Draws, settings: Settings, spot: Spot) -> str:
    return grammar.PLACE.pick(draws, settings.split).format(place=spot.place)


def _scene_prompt(draws: Draws, settings: Settings, items: Sequence[str], background: str) -> str:
    return grammar.SCENE.pick(draws, settings.split).format(items=grammar.listed(items), background=background)
