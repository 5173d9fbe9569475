"""StickerWorld's records are exact, stateless, and say in their prompts what their references do not carry."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.roles import Role
from workers.training.records import Record
from workers.training.stickerworld import grammar
from workers.training.stickerworld.colours import BINS
from workers.training.stickerworld.faces import EXPRESSIONS, IDENTITY
from workers.training.stickerworld.layouts import PLACES
from workers.training.stickerworld.looks import Sticker, paint
from workers.training.stickerworld.scenes import Box, Panel, Part, Scene, render, repaint
from workers.training.stickerworld.settings import DREAMO_MIXTURE, Settings
from workers.training.stickerworld.shapes import GARMENT_SHAPES, STICKER_SHAPES, coverage
from workers.training.stickerworld.styles import STYLES, stylise
from workers.training.stickerworld.tasks import TASKS
from workers.training.stickerworld.textures import TEXTURES
from workers.training.stickerworld.world import sample, scene

EVERYTHING = Settings(mixture=tuple((task, 1.0) for task in TASKS))
SUBJECT_TASKS = ("single_subject", "multi_subject", "two_column")
TEXTURE_WORDS = {word for ways in grammar.LOOKS.values() for way in ways for word in grammar.words(way)} - {"with"}

worlds = st.builds(
    Settings,
    size=st.sampled_from((64, 72, 96)),
    reference_size=st.sampled_from((16, 20, 21)),
    mixture=st.just(EVERYTHING.mixture),
    split=st.sampled_from(("train", "held_out")),
    placement=st.sampled_from(("grid9", "free")),
    sizes=st.sampled_from(("fixed", "named")),
    unnamed=st.sampled_from((0.0, 0.5)),
    shape_words=st.sampled_from((0.0, 0.5)),
)


def only(task: str, **changes: object) -> Settings:
    return Settings(**({"mixture": ((task, 1.0),)} | changes))


def scenes(world: Settings, count: int, seed: int = 0) -> list[Scene]:
    return [scene(seed, index, world) for index in range(count)]


def digest(records: list[Record]) -> str:
    state = hashlib.sha256()
    for record in records:
        state.update(repr((record.key, record.task, record.prompt, record.target.shape)).encode())
        state.update(record.target.tobytes())
        for reference in record.references:
            state.update(repr((reference.slot, reference.role, reference.pixels.shape)).encode())
            state.update(reference.pixels.tobytes())
            state.update(b"" if reference.target_mask is None else reference.target_mask.tobytes())
    return state.hexdigest()


def test_a_record_is_the_same_in_every_process() -> None:
    """Nothing but (seed, index, settings) matters: not the process, its hash seed, or what was made before."""
    program = (
        "from tests.workers.training.test_stickerworld import *\n"
        "print(digest([sample(7, i, EVERYTHING) for i in reversed(range(60))][::-1]))"
    )
    here = digest([sample(7, index, EVERYTHING) for index in range(60)])
    there = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONHASHSEED": "5"},
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=True,
    )
    assert there.stdout.strip() == here
    assert digest([sample(8, index, EVERYTHING) for index in range(60)]) != here


@settings(max_examples=150)
@given(world=worlds, seed=st.integers(0, 2**64 - 1), index=st.integers(0, 2**64 - 1))
def test_every_record_keeps_the_contract(world: Settings, seed: int, index: int) -> None:
    """Any settings, seed and index give a whole record: slots from 1, masks of the target's size, known words."""
    record = sample(seed, index, world)
    height, width, channels = record.target.shape
    assert (height, channels) == (world.size, 3)
    assert width == world.size * (2 if record.task == "two_column" else 1)
    assert [reference.slot for reference in record.references] == [*range(1, len(record.references) + 1)]
    for array in (record.target, *(reference.pixels for reference in record.references)):
        assert array.dtype == np.uint8
        assert array.ndim == 3
    for reference in record.references:
        carries_part = reference.role in (Role.SUBJECT, Role.IDENTITY, Role.GARMENT)
        assert (reference.target_mask is not None) == carries_part
        if reference.target_mask is not None:
            assert reference.target_mask.shape == (height, width)
            assert reference.target_mask.any()
            assert set(np.unique(reference.target_mask)) <= {0, 255}
    assert set(grammar.words(record.prompt)) <= set(grammar.vocabulary())
    assert "".join(grammar.words(record.prompt)) == record.prompt.replace(" ", "")
    assert record.prompt == re.sub(r"\s+", " ", record.prompt).strip().lower()


@settings(max_examples=100)
@given(world=worlds, index=st.integers(0, 10_000))
def test_masks_are_where_the_picture_is_painted(world: Settings, index: int) -> None:
    """A part's mask holds pixels that change when it is taken away, and hardly any other pixel does."""
    truth = scene(3, index, world)
    picture = stylise(render(truth.parts, truth.panels, world.size)[0], None)
    for number in range(len(truth.parts)):
        without = repaint(truth, truth.parts[:number] + truth.parts[number + 1 :], None)
        changed = (picture != without).any(axis=-1)
        mask = truth.visible(number) == 255
        assert not (mask & ~changed).any()
        # Beyond the mask there are only edge pixels, less than half covered.
        box = truth.parts[number].box
        cover = np.zeros(mask.shape)
        cover[box.top : box.bottom, box.left : box.right] = (
            1 - paint(truth.parts[number].look, box.bottom - box.top).ground[..., 0]
        )
        assert not (changed & ~mask & (cover > 0.501)).any()
        assert not (changed & (cover == 0)).any()


@settings(max_examples=150)
@given(world=worlds, index=st.integers(0, 10_000))
def test_nothing_overlaps_or_leaves_the_picture(world: Settings, index: int) -> None:
    """Boxes lie in the picture, apart from each other, with their middle in the cell the prompt names."""
    truth = scene(4, index, world)
    for number, part in enumerate(truth.parts):
        box = part.box
        assert 0 <= box.top < box.bottom <= truth.picture.shape[0]
        assert 0 <= box.left < box.right <= truth.picture.shape[1]
        assert part.zone.distance((box.top + box.bottom) / 2, (box.left + box.right) / 2) <= 1
        assert (truth.amodal(number) == (truth.visible(number) == 255)).all()


def test_a_hidden_pixel_is_amodal_only() -> None:
    """Where one thing covers another, the id map and the visible mask give the pixel to the upper one alone."""
    low = Part(Sticker("square", "plain", (200, 0, 0)), Box(0, 0, 24, 24), Box(0, 0, 24, 24), "top left")
    high = Part(Sticker("circle", "plain", (0, 0, 200)), Box(10, 10, 34, 34), Box(0, 0, 48, 48), "centre")
    panels = (Panel("paper", 0, 48),)
    picture, id_map = render((low, high), panels, 48)
    truth = Scene("", "", "", (low, high), panels, None, (), picture, id_map)
    both = truth.amodal(0) & truth.amodal(1)
    assert both.any()
    assert (id_map[both] == 2).all()
    assert ((truth.visible(0) == 255) == (truth.amodal(0) & ~both)).all()
    assert tuple(picture[20, 20]) == (0, 0, 200)


@pytest.mark.parametrize("task", SUBJECT_TASKS)
def test_a_reference_shows_what_the_target_shows(task: str) -> None:
    """Of fixed size, the sticker of the reference is the target's pixel by pixel, at the mask of its slot."""
    for truth in scenes(only(task), 40):
        for reference, part in ((r, truth.parts[r.part]) for r in truth.references):
            box = part.box
            whole = coverage(part.look.shape, part.side) == 1
            assert (truth.picture[box.top : box.bottom, box.left : box.right][whole] == reference.pixels[whole]).all()
            assert (reference.pixels[coverage(part.look.shape, part.side) == 0] == 255).all()
            assert part.slot == reference.slot


def described_places(prompt: str, slot: int) -> tuple[str | None, str]:
    """Size and place that a prompt about stickers gives to the reference of that slot, by an independent reading."""
    ordinal, number = ("first", "second", "third")[slot - 1], ("one", "two", "three")[slot - 1]
    noun = rf"(?:\[ref#{slot}\]|the {ordinal} sticker|sticker number {number}|(?:the|this) sticker(?! \[| from))"
    places = "|".join(sorted(PLACES, key=len, reverse=True))
    found = re.search(rf"{noun}(?: made (small|large))? (?:at|on|placed at|placed on) the ({places})\b", prompt)
    assert found, prompt
    return found[1], found[2]


@pytest.mark.parametrize("task", SUBJECT_TASKS)
@pytest.mark.parametrize("split", ["train", "held_out"])
def test_the_prompt_says_which_reference_goes_where(task: str, split: str) -> None:
    """With or without placeholders, of one shape or not, the words alone settle place and size of every reference."""
    named = only(task, split=split, placement="free", sizes="named", same_shape=0.5)
    for truth in scenes(named, 150):
        for part in truth.parts:
            size, place = described_places(truth.prompt, part.slot)
            assert place == part.place
            assert named.side(size) == part.side


def test_a_share_of_the_records_names_sizes() -> None:
    """`sized` on the nine places, `loose` placed freely too, in the shares that are asked for."""
    world = only("multi_subject", loose=0.3, sized=0.5)
    truths = scenes(world, 400)
    named = [truth for truth in truths if described_places(truth.prompt, truth.parts[0].slot)[0]]
    plain = [truth for truth in truths if truth not in named]
    assert 0.58 < len(named) / len(truths) < 0.72
    for truth in named:
        assert all(part.side == world.side(described_places(truth.prompt, part.slot)[0]) for part in truth.parts)
    assert all(part.side == world.reference_size for truth in plain for part in truth.parts)
    stands = {
        size: {
            (part.box.top, part.box.left) for truth in scenes(only("multi_subject", **how), 200) for part in truth.parts
        }
        for size, how in {"sized": {"sized": 1.0}, "loose": {"loose": 1.0}}.items()
    }
    assert len(stands["sized"]) <= 2 * 9 + 4 < len(stands["loose"]), "two sizes on nine places, or a fallback's corners"


def test_columns_are_named_from_left_to_right() -> None:
    """`the left is …` speaks of what stands in the left half, on the background of the left half."""
    for truth in scenes(only("two_column"), 80):
        left, right = (
            re.findall(rf"the {side} is (.*?)(?=[.,] the (?:left|right) is|\.$)", truth.prompt)[0]
            for side in ("left", "right")
        )
        for sentence, part, panel in zip((left, right), truth.parts, truth.panels, strict=True):
            assert panel.left <= part.box.left < part.box.right <= panel.left + panel.width
            assert panel.background in grammar.words(sentence)
            assert described_places(sentence, part.slot)[1] == part.place


@pytest.mark.parametrize("task", [*SUBJECT_TASKS, "try_on_like", "style_content"])
def test_prompts_leave_out_what_references_carry(task: str) -> None:
    """No word for shape, colour, texture, garment or style; else the text alone would solve the task."""
    carried = {*STICKER_SHAPES, *GARMENT_SHAPES, *BINS, *TEXTURE_WORDS, *STYLES, *TEXTURES}
    for truth in scenes(only(task), 150):
        assert not carried & set(grammar.words(truth.prompt))


def test_half_of_the_prompts_have_no_placeholder() -> None:
    """All of a record's placeholders are there or none; half of the records have none, or as the settings say."""
    for plain, low, high in ((0.5, 0.42, 0.58), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)):
        world = Settings(mixture=tuple((task, 1.0) for task in TASKS if task != "text_to_image"), plain=plain)
        without = 0
        for truth in scenes(world, 400):
            named = set(re.findall(r"\[ref#(\d)\]", truth.prompt))
            assert not named or named == {str(reference.slot) for reference in truth.references}
            without += not named
        assert low <= without / 400 <= high


def test_some_subjects_share_a_shape_and_all_differ_in_colour() -> None:
    """A share of 0.3 has one shape for all, the rest none twice; colours are far enough apart to see a swap."""
    same = 0
    for truth in scenes(only("multi_subject"), 500):
        shapes = Counter(part.look.shape for part in truth.parts)
        assert len(shapes) in (1, len(truth.parts))
        same += len(shapes) == 1
        colours = [np.array(part.look.colour, dtype=float) for part in truth.parts]
        assert all(np.linalg.norm(a - b) >= 80 for k, a in enumerate(colours) for b in colours[:k])
    assert 0.24 <= same / 500 <= 0.36


def test_a_person_stays_the_same_and_the_prompt_sets_the_expression() -> None:
    """Identity: reference and target agree in every attribute of the person; the expression is the prompt's."""
    changed = 0
    for truth in scenes(only("identity_like"), 80):
        face, garment = (part.look for part in truth.parts)
        assert [word for word in grammar.words(truth.prompt) if word in EXPRESSIONS] == [face.expression]
        shown = [replace(face, expression=expression) for expression in EXPRESSIONS]
        box = truth.parts[0].box
        pictures = [
            repaint(truth, (replace(truth.parts[0], look=one),), None)[box.top : box.bottom, box.left : box.right]
            for one in shown
        ]
        cover = 1 - paint(face, truth.parts[0].side).ground[..., 0]
        (reference,) = truth.references
        matches = [(picture[cover == 1] == reference.pixels[cover == 1]).all() for picture in pictures]
        assert sum(matches) == 1
        changed += shown[matches.index(True)] != face
        assert garment.shape in grammar.words(truth.prompt)
    assert len(IDENTITY) == 7
    assert changed > 30


def test_try_on_gives_two_roles_in_either_order() -> None:
    """A face and a garment, each with its mask on the figure; which comes first changes."""
    orders = Counter()
    for truth in scenes(only("try_on_like"), 60):
        roles = [reference.role for reference in truth.references]
        assert sorted(roles) == [Role.GARMENT, Role.IDENTITY]
        orders[roles[0]] += 1
        head, body = truth.parts
        assert (head.box.bottom, head.box.left, body.box.bottom) == (
            body.box.top,
            body.box.left,
            truth.picture.shape[0],
        )
    assert min(orders.values()) > 15


def test_styles_are_carried_by_references_alone() -> None:
    """The target is the content picture in the reference's style; the trigger sentence comes first; no masks."""
    for truth in scenes(only("style_content"), 60):
        assert truth.style in STYLES
        by_role = {reference.role: reference for reference in truth.references}
        assert (stylise(by_role[Role.CONTENT].pixels, truth.style) == truth.picture).all()
        assert by_role[Role.STYLE].pixels.shape == (48, 48, 3)
    for task in ("style_text", "style_content"):
        for truth in scenes(only(task), 60):
            assert truth.prompt.startswith(grammar.STYLE_TRIGGER)
            assert not set(grammar.words(truth.prompt)) & set(STYLES)
            assert all(reference.target_mask is None for reference in truth.record().references)


def test_a_style_leaves_its_content_visible() -> None:
    """Each style changes a picture, no two styles make the same one, and stickers still show."""
    for truth in scenes(only("style_text"), 60):
        versions = [repaint(truth, truth.parts, style) for style in (None, *STYLES)]
        assert len({version.tobytes() for version in versions}) == len(versions)
        empty = repaint(truth, (), truth.style)
        for part in truth.parts:
            window = np.s_[part.box.top : part.box.bottom, part.box.left : part.box.right]
            assert np.abs(truth.picture[window].astype(int) - empty[window]).mean() >= 10


def test_the_quality_stage_reconstructs_its_reference() -> None:
    """Reference and target are one picture, and the prompt describes it."""
    for record in (sample(0, index, only("self_reconstruction")) for index in range(30)):
        (reference,) = record.references
        assert (reference.pixels == record.target).all()
        assert set(grammar.words(record.prompt)) & set(BINS)


def test_unnamed_looks_are_not_judged() -> None:
    """Text-to-image without looks in the prompt says `sticker`, and marks its parts as nobody's to judge."""
    for truth in scenes(only("text_to_image", unnamed=1.0), 40):
        assert "sticker" in grammar.words(truth.prompt)
        assert not set(grammar.words(truth.prompt)) & {*BINS, *STICKER_SHAPES}
        assert not any(part.judged for part in truth.parts)
    assert all(part.judged for truth in scenes(only("text_to_image"), 40) for part in truth.parts)


def test_the_mixture_is_kept() -> None:
    """Tasks come as often as their weights say, and a weight of zero never."""
    world = Settings(mixture=(("text_to_image", 3.0), ("single_subject", 1.0), ("two_column", 0.0)))
    counts = Counter(truth.task for truth in scenes(world, 600))
    assert 0.69 <= counts["text_to_image"] / 600 <= 0.81
    assert counts["two_column"] == 0
    assert {task for task, _ in DREAMO_MIXTURE} == set(TASKS) - {"self_reconstruction"}


def test_shared_masks_cannot_be_changed() -> None:
    """What is cached for all records is read-only: a caller cannot spoil later ones."""
    with pytest.raises(ValueError, match="read-only"):
        coverage("star", 24)[0, 0] = 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"reference_size": 25},
        {"reference_size": 8},
        {"style_size": 100},
        {"mixture": ()},
        {"mixture": (("text_to_image", 0.0),)},
        {"mixture": (("text_to_image", -1.0),)},
        {"plain": 1.5},
        {"max_subjects": 4},
    ],
)
def test_settings_that_cannot_work_are_refused(wrong: dict[str, object]) -> None:
    """A size, share or mixture that makes no world fails where it is written, not in the middle of training."""
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Settings(**wrong)


def test_an_unknown_task_is_named() -> None:
    """A typo in a mixture says what there is."""
    with pytest.raises(ValueError, match=r"no task 'inpaint'.*multi_subject"):
        sample(0, 0, only("inpaint"))
    with pytest.raises(ValueError, match="seed and index"):
        sample(-1, 0, EVERYTHING)
