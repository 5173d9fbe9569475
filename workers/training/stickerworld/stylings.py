"""Tasks about whole pictures: style by reference with text or with content, and the quality stage."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import numpy as np

from model.roles import PLACEHOLDERS, Role
from workers.training.stickerworld import grammar
from workers.training.stickerworld.backgrounds import Pixels, backdrop
from workers.training.stickerworld.drafts import Carried, Draft
from workers.training.stickerworld.draws import Draws
from workers.training.stickerworld.scenes import render
from workers.training.stickerworld.settings import Settings
from workers.training.stickerworld.splits import draw_background
from workers.training.stickerworld.styles import STYLES, stylise
from workers.training.stickerworld.subjects import described_scene, text_to_image

_VISIBLE = 10
"""Least mean difference, in levels, that a sticker must make to its box once the picture is stylised."""


def style_text(draws: Draws, settings: Settings) -> Draft:
    """The described scene in the style of a picture of something else."""
    style = draws.pick(tuple(STYLES))
    draft = _content(draws, settings, style)
    reference = _style_reference(draws, settings, style, slot=1)
    prompt = draft.prompt
    if not draws.chance(settings.plain):
        prompt = grammar.STYLE.pick(draws, settings.split).format(scene=prompt, ref=PLACEHOLDERS[0])
    return replace(draft, prompt=f"{grammar.STYLE_TRIGGER} {prompt}", style=style, carried=(reference,))


def style_content(draws: Draws, settings: Settings) -> Draft:
    """The scene of one picture in the style of another; the prompt describes neither."""
    style = draws.pick(tuple(STYLES))
    draft = _content(draws, settings, style)
    style_slot, content_slot = draws.shuffled((1, 2))
    carried = [_style_reference(draws, settings, style, style_slot), Carried(content_slot, Role.CONTENT)]
    carried.sort(key=lambda one: one.slot)
    if draws.chance(settings.plain):
        prompt = grammar.PLAIN_CONTENT.pick(draws, settings.split)
    else:
        prompt = grammar.CONTENT.pick(draws, settings.split).format(
            content=PLACEHOLDERS[content_slot - 1], style=PLACEHOLDERS[style_slot - 1]
        )
    return replace(draft, prompt=f"{grammar.STYLE_TRIGGER} {prompt}", style=style, carried=tuple(carried))


def self_reconstruction(draws: Draws, settings: Settings) -> Draft:
    """The quality stage: a described picture, given itself. The trainer drops most of the reference's tokens."""
    draft = text_to_image(draws, settings)
    prompt = draft.prompt
    if not draws.chance(settings.plain):
        prompt = grammar.SAME.pick(draws, settings.split).format(scene=prompt, ref=PLACEHOLDERS[0])
    return replace(draft, prompt=prompt, carried=(Carried(1, Role.CONTENT),))


def _content(draws: Draws, settings: Settings, style: str, attempts: int = 12) -> Draft:
    """One or two stickers that the style leaves visible."""
    background = draw_background(draws, settings.split, style)
    draft = described_scene(draws, settings, background, draws.between(1, 2))
    if attempts == 1 or _survives(draft, settings.size, style):
        return draft
    return _content(draws, settings, style, attempts - 1)


def _survives(draft: Draft, size: int, style: str) -> bool:
    picture, _ = render(draft.parts, draft.panels, size)
    change = np.abs(stylise(picture, style).astype(np.int16) - _ground(draft.panels[0].background, size, style))
    boxes = [part.box for part in draft.parts]
    return all(change[b.top : b.bottom, b.left : b.right].mean() >= _VISIBLE for b in boxes)


@lru_cache(maxsize=256)
def _ground(background: str, size: int, style: str) -> Pixels:
    return stylise(backdrop(background, size, size), style)


def _style_reference(draws: Draws, settings: Settings, style: str, slot: int) -> Carried:
    """Another scene, smaller, in the same style."""
    smaller = replace(settings, size=settings.style_size, reference_size=settings.style_size // 3, sizes="fixed")
    other = _content(draws, smaller, style)
    picture, _ = render(other.parts, other.panels, smaller.size)
    return Carried(slot, Role.STYLE, pixels=stylise(picture, style))
