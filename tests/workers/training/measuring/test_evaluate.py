"""The evaluation table: its controls stand where they must, and the shipped model customizes."""

from __future__ import annotations

import numpy as np
import pytest
from typer.testing import CliRunner

from model.pipeline import Pipeline, load_pipeline
from model.weights.checkpoints import ModelSource
from workers.training.measuring.evaluate import TABLES, app, columns, pictures, through_vae
from workers.training.oracle.tables import table
from workers.training.stickerworld.scenes import Scene
from workers.training.stickerworld.settings import Settings
from workers.training.stickerworld.world import scene

SETTINGS = Settings(mixture=(("multi_subject", 1.0),), split="held_out", max_subjects=2)


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return load_pipeline(ModelSource(device="cpu"))


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [scene(3, index, SETTINGS) for index in range(8)]


def test_the_controls(pipeline: Pipeline, scenes: list[Scene]) -> None:
    """Truth scores all, shuffled truth nothing; the shipped model most, but only with its references."""
    summaries = columns(pipeline, scenes, seed=1, batch=4)
    row = "all right, per sticker"
    assert summaries["truth"][row] == 1
    assert summaries["shuffled truth"][row] < 0.1
    assert summaries["model"][row] > 0.5
    assert summaries["references withheld"][row] < 0.1
    lines = table(summaries).splitlines()
    assert lines[0].count("|") == len(summaries) + 2
    assert lines[-1].startswith("| records | 8 |")


def test_a_batch_changes_nothing_and_references_count(pipeline: Pipeline, scenes: list[Scene]) -> None:
    """Pictures are the same alone and together; withholding references changes them."""
    together = pictures(pipeline, scenes[:4], seed=1, steps=2, batch=4)
    alone = pictures(pipeline, scenes[:4], seed=1, steps=2, batch=1)
    withheld = pictures(pipeline, scenes[:4], seed=1, steps=2, batch=4, withhold=True)
    for one, two, without in zip(together, alone, withheld, strict=True):
        assert np.abs(one.astype(int) - two).max() <= 1
        assert np.abs(one.astype(int) - without).max() > 2


def test_text_alone_has_no_references_to_withhold(pipeline: Pipeline) -> None:
    """The control would be the model again."""
    described = [scene(3, index, TABLES["text-alone"]) for index in range(2)]
    assert "references withheld" not in columns(pipeline, described, seed=1, steps=1)


def test_an_unknown_table_is_named() -> None:
    """Before anything is loaded."""
    run = CliRunner().invoke(app, ["--table", "nothing"])
    assert run.exit_code == 2
    assert "no table 'nothing'" in run.stderr
    assert "two-references" in run.stderr


def test_the_vae_is_asked_without_noise(pipeline: Pipeline, scenes: list[Scene]) -> None:
    """The control is the posterior's mean: the same picture twice, of the scene's size."""
    picture = scenes[0].picture
    first, second = through_vae(pipeline, picture), through_vae(pipeline, picture)
    assert first.shape == picture.shape
    assert np.array_equal(first, second)
