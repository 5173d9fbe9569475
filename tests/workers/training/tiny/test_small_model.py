"""The way from nothing to the shipped model, in a few steps each: what comes out loads, and nothing is made twice."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from model.spec import load_spec
from model.weights.checkpoints import ModelSource, load_model
from tests.model.requests import sample
from tests.model.test_transformer import ours
from workers.training.recipes import Recipe
from workers.training.tiny.autoencoder import AutoencoderPlan
from workers.training.tiny.language import LanguagePlan
from workers.training.tiny.small_model import SHAPE, assemble, still_transformer, train, write_start

LANGUAGE = LanguagePlan(steps=4, batch=4, tokens=48)
AUTOENCODER = AutoencoderPlan(steps=2, batch=2)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start")
    write_start(folder, LANGUAGE, AUTOENCODER)
    return folder


def test_from_nothing_to_a_model(start: Path, tmp_path: Path) -> None:
    """Base and adapter are trained, put together in bfloat16 and loaded like any other model."""
    stage = {"steps": 2, "batch": 2, "optimizer": {"lr": 1e-3}}
    recipe = Recipe.model_validate(
        {
            "name": "short",
            "model": {"base": str(start), "placeholders": "spare"},
            "lora": {"rank": 2},
            "stages": [
                {**stage, "name": "base", "train": "base", "mixture": {"text_to_image": 1}},
                {**stage, "name": "adapter", "mixture": {"multi_subject": 1}, "settings": {"loose": 1.0}},
            ],
        }
    )
    train(recipe, tmp_path / "run")
    assemble(start, tmp_path / "run", tmp_path / "model")
    model = load_model(ModelSource(str(tmp_path / "model"), device="cpu"))
    velocity = ours(model, [sample(model, 1, (4, 6), {1: (2, 2)}, timestep=0.5)])[0]
    assert velocity.std() > 0
    spec = load_spec(str(tmp_path / "model"))
    assert (spec.name, spec.cell, spec.width.default) == ("dreamo-tiny", 8, 72)
    assert sum(file.stat().st_size for file in (tmp_path / "model").rglob("*.*")) < 30e6


def test_nothing_is_made_twice(start: Path) -> None:
    """Repeated after a stop, the command makes what is missing and leaves the rest."""
    before = {file: file.stat().st_mtime_ns for file in start.glob("*/*.safetensors")}
    missing = start / "transformer" / "diffusion_pytorch_model.safetensors"
    (start / "transformer").rename(start / "elsewhere")
    write_start(start, LANGUAGE, AUTOENCODER)
    assert missing.is_file()
    assert {file: file.stat().st_mtime_ns for file in before if file != missing} == {
        file: time for file, time in before.items() if file != missing
    }


@torch.no_grad()
def test_the_transformer_starts_still() -> None:
    """Every gate and the last projection are zero: the first velocity is zero, whatever goes in."""
    transformer = still_transformer(SHAPE, 0)
    assert all(
        not block.norm1.linear.weight.any() and not block.norm1_context.linear.bias.any()
        for block in transformer.transformer_blocks
    )
    assert not transformer.proj_out.weight.any()
    assert transformer.x_embedder.weight.any()
