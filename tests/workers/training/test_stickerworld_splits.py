"""What is held out stays out of training, in looks and in words, and training still knows every part of it."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest

from workers.training.stickerworld import grammar
from workers.training.stickerworld.backgrounds import BACKGROUNDS
from workers.training.stickerworld.colours import BINS, CONTRAST, NAMED, colour_bin, difference, lab, palette, second
from workers.training.stickerworld.draws import Draws
from workers.training.stickerworld.faces import EYES, HAIR_STYLES, HAIRS, HEADS, SKINS, Face
from workers.training.stickerworld.looks import Sticker
from workers.training.stickerworld.scenes import Scene
from workers.training.stickerworld.settings import Settings
from workers.training.stickerworld.shapes import GARMENT_SHAPES, STICKER_SHAPES
from workers.training.stickerworld.splits import draw_triple, face_split, split_of, style_split, unseen_pair
from workers.training.stickerworld.styles import STYLES
from workers.training.stickerworld.tasks import TASKS
from workers.training.stickerworld.textures import TEXTURES
from workers.training.stickerworld.world import scene

COUNT = 1500
POOLS = [value for value in vars(grammar).values() if isinstance(value, grammar.Phrases)]


@pytest.fixture(scope="module")
def worlds() -> dict[str, list[Scene]]:
    mixture = tuple((task, 1.0) for task in TASKS)
    return {
        split: [scene(1, index, Settings(mixture=mixture, split=split, unnamed=0.2)) for index in range(COUNT)]
        for split in ("train", "held_out")
    }


def looks(scenes: list[Scene]) -> tuple[set[tuple[str, str, str]], set[Face]]:
    """(shape, texture, bin) of all stickers and garments, and the people, that the pictures show."""
    parts = [part.look for one in scenes for part in one.parts]
    stickers = {(look.shape, look.texture, look.bin) for look in parts if isinstance(look, Sticker)}
    people = {replace(look, expression="smiling") for look in parts if isinstance(look, Face)}
    return stickers, people


def test_training_and_held_out_share_no_look(worlds: dict[str, list[Scene]]) -> None:
    """No combination of shape, texture and colour, no person, no background in a style is in both."""
    for train, held_out in zip(looks(worlds["train"]), looks(worlds["held_out"]), strict=True):
        assert len(train) > 50
        assert len(held_out) > 50
        assert not train & held_out
    styled = {
        split: {(one.style, panel.background) for one in scenes if one.style for panel in one.panels}
        for split, scenes in worlds.items()
    }
    assert styled["held_out"]
    assert not styled["train"] & styled["held_out"]


def test_training_and_held_out_share_no_prompt(worlds: dict[str, list[Scene]]) -> None:
    """Phrases are split kind by kind, so that no sentence of one split can come out of the other."""
    prompts = {split: {one.prompt for one in scenes} for split, scenes in worlds.items()}
    assert not prompts["train"] & prompts["held_out"]
    for pool in POOLS:
        assert pool.held_out
        assert len(pool.train) > 1
        assert not set(pool.train) & set(pool.held_out)


def test_unseen_pairs_are_never_trained(worlds: dict[str, list[Scene]]) -> None:
    """One shape of each texture is missing from training in every colour; held-out records show all of these."""
    pairs = {pair for pair in product(STICKER_SHAPES, TEXTURES) if unseen_pair(*pair)}
    shown = {split: {(s, t) for s, t, _ in looks(scenes)[0]} for split, scenes in worlds.items()}
    assert len(pairs) == len(TEXTURES)
    assert not pairs & shown["train"]
    assert pairs <= shown["held_out"]
    flagged = [part.unseen_pair for one in worlds["held_out"] for part in one.parts]
    assert 0.2 < sum(flagged) / len(flagged) < 0.6


def test_training_knows_every_part_of_what_is_held_out(worlds: dict[str, list[Scene]]) -> None:
    """Each shape, texture, colour, background and word of held-out records occurs in training, in other company."""
    train = looks(worlds["train"])[0]
    assert {shape for shape, _, _ in train} == {*STICKER_SHAPES, *GARMENT_SHAPES}
    assert {texture for _, texture, _ in train} == set(TEXTURES)
    assert {colour for _, _, colour in train} == set(BINS)
    assert {panel.background for one in worlds["train"] for panel in one.panels} == set(BACKGROUNDS)
    assert set(grammar.vocabulary()) == grammar.train_vocabulary()


def test_the_vocabulary_has_every_word_and_no_other(worlds: dict[str, list[Scene]]) -> None:
    """The published list is what prompts are made of; a text encoder is pre-trained on it."""
    named = [
        scene(2, index, Settings(mixture=(("multi_subject", 1.0), ("text_to_image", 1.0)), sizes="named", unnamed=0.2))
        for index in range(COUNT)
    ]
    heard = {word for one in (*worlds["train"], *worlds["held_out"], *named) for word in grammar.words(one.prompt)}
    assert heard == set(grammar.vocabulary())
    assert len(heard) < 120


def test_a_tenth_is_held_out() -> None:
    """Neither split starves: of all triples, people and styled backgrounds a tenth to a quarter is held out."""
    triples = list(product(STICKER_SHAPES, TEXTURES, BINS))
    held = [triple for triple in triples if split_of(*triple) == "held_out"]
    assert 0.1 < len(held) / len(triples) < 0.25
    assert all(
        [style_split(style, background) for background in BACKGROUNDS].count("held_out") == 1 for style in STYLES
    )
    people = [
        Face(*fields, "smiling")
        for fields in product(HEADS, SKINS, HAIRS, HAIR_STYLES, EYES, (False, True), (False, True))
    ]
    assert len(people) == 6480
    assert 0.08 < sum(face_split(face) == "held_out" for face in people) / len(people) < 0.12


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_every_background_has_garments_and_stickers_to_draw(split: str) -> None:
    """Whatever the background, garments never run out and turn into stickers."""
    for background, named in product(BACKGROUNDS, (False, True)):
        for index in range(5):
            draws = Draws(0, index)
            shape, texture, colour = draw_triple(draws, split, background, shapes=tuple(GARMENT_SHAPES), named=named)
            assert shape in GARMENT_SHAPES
            assert split_of(shape, texture, colour) == split


def test_colours_show_on_their_background_and_on_white() -> None:
    """Every drawn colour and its second one stand out from what they lie on, and have the bin they were drawn for."""
    for background, name in product(BACKGROUNDS, BINS):
        if palette().cells[background, name]:
            for index in range(20):
                colour = palette().draw(Draws(1, index), background, name)
                assert colour_bin(colour) == name
                # The table holds for the middles of cells of 8³ values; a corner is up to ΔE 6 away from it.
                assert difference(lab(colour), lab((255, 255, 255))) > CONTRAST - 8
                assert difference(lab(second(colour)), lab(colour)) > CONTRAST - 8
    assert all(colour_bin(colour) == name for name, colour in NAMED.items())


def test_lab_agrees_with_published_values() -> None:
    """CIE Lab of sRGB primaries (D65), and a distance known to everyone: black to white is 100."""
    known = {
        (255, 0, 0): (53.24, 80.09, 67.20),
        (0, 255, 0): (87.73, -86.18, 83.18),
        (0, 0, 255): (32.30, 79.19, -107.86),
    }
    for rgb, expected in known.items():
        assert lab(rgb) == pytest.approx(expected, abs=0.05)
    assert difference(lab((0, 0, 0)), lab((255, 255, 255))) == pytest.approx(100, abs=0.01)
