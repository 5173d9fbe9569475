"""Recipes and stages as they are shipped, and small records for them."""

from __future__ import annotations

import torch

from workers.training.recipes import ModelPart, Recipe, Stage, load_recipe
from workers.training.stickerworld.settings import Settings

NAMED = Settings(mixture=(("multi_subject", 1.0),), size=48, reference_size=16, plain=0.0, max_subjects=2)
"""Records whose prompts all have placeholders, small enough to encode many."""

WORLDLY = ("tiny", "ablations")
"""Shipped recipes whose records are StickerWorld's; the other one's come from a directory."""


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def shipped(name: str) -> Recipe:
    """A recipe on the shipped base, wherever its own base is."""
    return load_recipe(name).model_copy(update={"model": ModelPart()})


def stage_of(recipe: str, stage: str) -> Stage:
    (found,) = (one for one in load_recipe(recipe).stages if one.name == stage)
    return found


def adapter_stages(recipe: Recipe) -> tuple[Stage, ...]:
    return tuple(stage for stage in recipe.stages if stage.train == "adapter")
