"""Words: every phrase a prompt can be made of, in lower case, half of each kind kept from training.

What references carry is left out. A fragment in braces is filled in; `vocabulary` lists every word that can come out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from string import Formatter

from model.roles import PLACEHOLDERS
from workers.training.stickerworld.backgrounds import BACKGROUNDS
from workers.training.stickerworld.colours import BINS
from workers.training.stickerworld.draws import Draws
from workers.training.stickerworld.faces import EXPRESSIONS
from workers.training.stickerworld.layouts import PLACES
from workers.training.stickerworld.settings import Split
from workers.training.stickerworld.shapes import GARMENT_SHAPES, STICKER_SHAPES

STYLE_TRIGGER = "generate a same style image."
"""How a prompt for a style reference begins (released DreamO)."""


@dataclass(frozen=True, slots=True)
class Phrases:
    """Ways of saying one thing; held-out ones use no word that training does not know."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]

    def pick(self, draws: Draws, split: Split) -> str:
        """One of the split's."""
        return draws.pick(self.train if split == "train" else self.held_out)


SCENE = Phrases(
    (
        "{items} on {background}",
        "{items} on a {background} background",
        "a {background} background with {items}",
        "a picture of {items} on {background}",
        "{items}, the background is {background}",
    ),
    ("on {background}, {items}", "a picture with {items} on a {background} background"),
)
PLACE = Phrases(("at the {place}", "on the {place}", "placed at the {place}"), ("placed on the {place}",))
FIGURE = Phrases(
    (
        "{person} {expression} {place} wearing {garment} on {background}",
        "{person} wearing {garment}, {expression} {place}, the background is {background}",
        "a {background} background with {person} {expression} {place} wearing {garment}",
        "a picture of {person} {place} wearing {garment} on a {background} background, {expression}",
    ),
    ("on {background}, {person} {expression} {place} wearing {garment}",),
)
COLUMNS = Phrases(
    (
        "generate a two-column image. the left is {left}. the right is {right}.",
        "a two-column image. the left is {left}, the right is {right}.",
    ),
    ("generate a two-column image. the right is {right}. the left is {left}.",),
)
STYLE = Phrases(
    ("{scene} in the style of {ref}", "{scene} with the style of {ref}", "in the style of {ref}, {scene}"),
    ("with the style of {ref}, {scene}",),
)
CONTENT = Phrases(
    (
        "the content of {content} in the style of {style}",
        "the style of {style} with the content of {content}",
        "in the style of {style}, the content of {content}",
    ),
    ("with the style of {style}, the content of {content}",),
)
PLAIN_CONTENT = Phrases(
    ("the same content", "the content of the picture", "with the content"), ("with the same content",)
)
SAME = Phrases(
    ("the picture {ref}, {scene}", "the same picture from {ref}, {scene}"), ("the same picture {ref}, {scene}",)
)

REFERRED = ("the {noun} {ref}", "the {noun} from {ref}", "{ref}")
ORDINALS = ("first", "second", "third")
NUMBERS = ("one", "two", "three")
ORDERED = ("the {ordinal} {noun}", "{noun} number {number}")
ALONE = ("the {noun}", "this {noun}")
SIZED = "{item} made {size}"
LOOKS: dict[str, tuple[str, ...]] = {
    "plain": ("{colour} {shape}", "plain {colour} {shape}"),
    "horizontal": ("{colour} {shape} with horizontal stripes", "horizontally striped {colour} {shape}"),
    "vertical": ("{colour} {shape} with vertical stripes", "vertically striped {colour} {shape}"),
    "checks": ("{colour} {shape} with checks", "checked {colour} {shape}"),
    "dots": ("{colour} {shape} with dots", "dotted {colour} {shape}"),
    "diagonal": ("{colour} {shape} with diagonal stripes", "diagonally striped {colour} {shape}"),
}
"""By texture."""


def described(draws: Draws, triple: tuple[str, str, str], size: str | None) -> str:
    """`a small red star with dots`, from (shape, texture, colour)."""
    shape, texture, colour = triple
    words = draws.pick(LOOKS[texture]).format(colour=colour, shape=shape)
    return with_article(words if size is None else f"{size} {words}")


def with_article(words: str) -> str:
    """With `a` or `an` before it."""
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def referred(draws: Draws, noun: str, slot: int) -> str:
    """A reference by its placeholder."""
    return draws.pick(REFERRED).format(noun=noun, ref=PLACEHOLDERS[slot - 1])


def ordered(draws: Draws, noun: str, slot: int, count: int) -> str:
    """A reference without placeholder: by its number where there are several of that noun."""
    if count == 1:
        return draws.pick(ALONE).format(noun=noun)
    return draws.pick(ORDERED).format(noun=noun, ordinal=ORDINALS[slot - 1], number=NUMBERS[slot - 1])


def listed(items: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def words(prompt: str) -> list[str]:
    """A prompt as words, placeholders and punctuation marks."""
    return re.findall(r"\[[a-z]+#?\d*\]|[a-z]+(?:-[a-z]+)*|[^\w\s]", prompt)


def vocabulary() -> tuple[str, ...]:
    """Every word that a prompt can hold, sorted, placeholders and marks included."""
    return tuple(sorted({*_known(_templates("train")), *_known(_templates("held_out"))}))


def train_vocabulary() -> frozenset[str]:
    """The words that training prompts can hold."""
    return frozenset(_known(_templates("train")))


def _templates(split: Split) -> list[str]:
    pools = (SCENE, PLACE, FIGURE, COLUMNS, STYLE, CONTENT, PLAIN_CONTENT, SAME)
    chosen = [phrase for pool in pools for phrase in (pool.train if split == "train" else pool.held_out)]
    shared = (STYLE_TRIGGER, SIZED, *REFERRED, *ORDERED, *ALONE, *(way for ways in LOOKS.values() for way in ways))
    return [*chosen, *shared]


def _known(templates: Iterable[str]) -> set[str]:
    fixed = [text for template in templates for text, *_ in Formatter().parse(template)]
    nouns = ("sticker", "person", "garment", "small", "large", "a", "an", "and", ",")
    fillers = (*BACKGROUNDS, *PLACES, *BINS, *EXPRESSIONS, *STICKER_SHAPES, *GARMENT_SHAPES, *ORDINALS, *NUMBERS)
    # At most three references: later placeholders never come up.
    return {word for text in (*fixed, *nouns, *fillers, *PLACEHOLDERS[:3]) for word in words(text)}
