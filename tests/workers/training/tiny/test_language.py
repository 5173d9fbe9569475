"""The small model's text encoders: what a prompt says is asked rightly, and a short training learns to read it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken

from model.fabricate import Shape
from model.roles import ADDED_TOKENS
from model.text import PromptEncoder
from model.weights.checkpoints import load_text
from workers.training.start import spare_rows
from workers.training.stickerworld.draws import Draws
from workers.training.stickerworld.layouts import PLACES
from workers.training.stickerworld.settings import Settings
from workers.training.stickerworld.tasks import TASKS
from workers.training.tiny.language import ANSWERS, QUESTIONS, LanguagePlan, drafts, named, train_language, truths

PLAN = LanguagePlan(steps=60, batch=16, tokens=48)
SHAPE = Shape(text_width=32, pooled_width=32)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("language")
    train_language(folder, SHAPE, PLAN)
    return folder


@pytest.fixture(scope="module")
def encoder(base: Path) -> PromptEncoder:
    loaded = load_text(base, torch.float32, PLAN.tokens)
    loaded.t5_tokenizer.add_tokens([AddedToken(token, normalized=True) for token in ADDED_TOKENS])
    return loaded


def test_questions_and_answers_fit() -> None:
    """Every cell of a scene that holds a sticker has a source and a size; a described one has its words as answers."""
    for task in ("text_to_image", "multi_subject", "two_column"):
        draft = TASKS[task](Draws(3, 5), Settings())
        truth = {name: row[0] for name, row in truths([draft]).items()}
        assert all(len(row) == QUESTIONS for row in truth.values())
        assert int((truth["source"] > 0).sum()) == len(draft.parts)
        for part in draft.parts:
            cell = len(PLACES) * (part.box.left >= 72) + PLACES.index(part.place)
            assert ANSWERS["source"][truth["source"][cell]] == ("text" if part.slot is None else str(part.slot))
            if part.slot is None:
                assert ANSWERS["shape"][truth["shape"][cell]] in draft.prompt
                assert ANSWERS["colour"][truth["colour"][cell]] in draft.prompt


def test_words_know_the_sticker_they_name(encoder: PromptEncoder) -> None:
    """A token labelled with a cell stands in the sentence about that cell, in either order of the columns."""
    scenes = [
        TASKS[task](Draws(1, number), Settings(split="held_out" if number % 2 else "train", plain=0.0))
        for task in ("multi_subject", "two_column")
        for number in range(40)
    ]
    labelled = named(encoder, scenes).tolist()
    assert len(labelled) > 3 * len(scenes)
    for scene, token, cell in labelled:
        draft = scenes[scene]
        tokens = [piece.strip("▁") for piece in encoder.t5_tokenizer.encode(draft.prompt).tokens]
        word = tokens[token]
        (part,) = (
            part
            for part in draft.parts
            if cell == len(PLACES) * (part.box.left >= draft.panels[0].width) + PLACES.index(part.place)
        )
        if word.startswith("[ref#"):
            assert word == f"[ref#{part.slot}]"
        elif word in " ".join(PLACES).split() and tokens[token + 1] != "is":  # "the left is …" names a column
            assert word in part.place


def test_reading_is_learned(tmp_path: Path, base: Path) -> None:
    """Sixty small steps read held-out prompts better than one step, and leave rows for the placeholders."""
    assert train_language(tmp_path / "trained", SHAPE, PLAN) > train_language(
        tmp_path / "fresh", SHAPE, replace(PLAN, steps=1)
    )
    rows = spare_rows(base)
    assert rows.shape == (len(ADDED_TOKENS), SHAPE.text_width)
    assert rows.std() > 0


def test_scenes_repeat() -> None:
    """A step's prompts are a function of the seed and the step."""
    first, again, other = (
        [scene.prompt for scene in drafts(plan, step)] for plan, step in ((PLAN, 2), (PLAN, 2), (PLAN, 3))
    )
    assert first == again != other
