"""Tasks about people: a face in another picture, and someone in a garment."""

from __future__ import annotations

from dataclasses import replace

from model.roles import Role
from workers.training.stickerworld import grammar
from workers.training.stickerworld.colours import NAMED
from workers.training.stickerworld.drafts import Carried, Draft
from workers.training.stickerworld.draws import Draws
from workers.training.stickerworld.faces import EXPRESSIONS
from workers.training.stickerworld.layouts import figure_spots
from workers.training.stickerworld.looks import Sticker
from workers.training.stickerworld.scenes import Panel, Part
from workers.training.stickerworld.settings import Settings
from workers.training.stickerworld.shapes import GARMENT_SHAPES
from workers.training.stickerworld.splits import draw_background, draw_face, draw_sticker, draw_triple


def identity_like(draws: Draws, settings: Settings) -> Draft:
    """A person by reference, with the expression and in the garment that the prompt names."""
    background = draw_background(draws, settings.split)
    triple = draw_triple(draws, settings.split, background, shapes=tuple(GARMENT_SHAPES), named=True)
    garment = Sticker(triple[0], triple[1], NAMED[triple[2]])
    return _figure(draws, settings, background, garment, grammar.described(draws, triple, None))


def try_on_like(draws: Draws, settings: Settings) -> Draft:
    """A person and a garment by reference, in either order."""
    background = draw_background(draws, settings.split)
    garment = draw_sticker(draws, settings.split, background, shapes=tuple(GARMENT_SHAPES))
    return _figure(draws, settings, background, garment, None)


def _figure(draws: Draws, settings: Settings, background: str, garment: Sticker, worn: str | None) -> Draft:
    """A figure wearing a garment; `worn` describes it where no reference carries it."""
    shown = draw_face(draws, settings.split, background)
    face = replace(shown, expression=draws.pick(EXPRESSIONS))
    face_slot, garment_slot = draws.shuffled((1, 2)) if worn is None else (1, None)
    plain = draws.chance(settings.plain)

    def named(noun: str, slot: int) -> str:
        return grammar.ordered(draws, noun, 1, 1) if plain else grammar.referred(draws, noun, slot)

    head, body = figure_spots(draws, settings)
    prompt = grammar.FIGURE.pick(draws, settings.split).format(
        person=named("person", face_slot),
        expression=face.expression,
        place=grammar.PLACE.pick(draws, settings.split).format(place=head.place),
        garment=worn if garment_slot is None else named("garment", garment_slot),
        background=background,
    )
    parts = (
        Part(face, head.box, head.zone, head.place, face_slot),
        Part(garment, body.box, body.zone, body.place, garment_slot),
    )
    carried = [Carried(face_slot, Role.IDENTITY, 0, shown)]
    if garment_slot is not None:
        carried.append(Carried(garment_slot, Role.GARMENT, 1, garment))
    carried.sort(key=lambda one: one.slot)
    return Draft(prompt, parts, (Panel(background, 0, settings.size),), tuple(carried))
