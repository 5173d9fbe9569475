"""What a recipe would train and how large that is, without a weight in memory: networks on the meta device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from torch import nn

from model.errors import WeightsError
from model.weights.checkpoints import SHIPPED
from workers.training.adapting import Targets, module_names
from workers.training.recipes import Recipe
from workers.training.shapes import first_batches

FLUX_DEV = {"num_layers": 19, "num_single_layers": 38, "guidance_embeds": True}
_GIB = 2**30


def describe(recipe: Recipe) -> str:
    """Lines on the base, each target set, memory, and the stages with the shapes of their first batches.

    A hub id is not downloaded for this; it is taken to be of FLUX.1-dev's size.
    """
    config = _config(recipe)
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(**config)
    base = sum(parameter.numel() for parameter in transformer.parameters())
    lines = [f"recipe {recipe.name}: {recipe.steps:,} steps in {len(recipe.stages)} stages"]
    lines.append(f"base transformer: {base / 1e6:,.1f} M parameters, {recipe.model.dtype}")
    sets: tuple[Targets, ...] = ("released", "attention", "all")
    for targets in sets:
        matrices, size = count_adapter(transformer, targets, recipe.lora.rank)
        chosen = "  <- trained" if targets == recipe.lora.targets else ""
        lines.append(f"adapter {targets:9} rank {recipe.lora.rank}: {matrices} matrices, {size / 1e6:,.1f} M{chosen}")
    _, trained = count_adapter(transformer, recipe.lora.targets, recipe.lora.rank)
    lines.append(_memory(recipe, base, trained))
    records, batches = first_batches(recipe)
    lines.append(f"shapes in pixels, height x width; {records}")
    for stage, shapes in zip(recipe.stages, batches, strict=True):
        tasks = ", ".join(f"{task} {weight:g}" for task, weight in stage.mixture.items())
        lines.append(f"stage {stage.name}: {stage.steps:,} x {stage.batch}, lr {stage.optimizer.lr:g}; {tasks}")
        lines.extend(f"  {line}" for line in shapes)
    return "\n".join(lines)


def count_adapter(transformer: nn.Module, targets: Targets, rank: int) -> tuple[int, int]:
    """Matrices and parameters of a target set; `released` shares the down matrices of q, k and v, and counts their
    ups as the one fused matrix they are in the file."""
    matrices = parameters = 0
    shared = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
    firsts = ("to_q", "add_q_proj")
    for name in module_names(transformer, targets):
        outputs, inputs = cast("nn.Linear", transformer.get_submodule(name)).weight.shape
        last = name.rsplit(".", 1)[-1]
        together = targets == "released" and last in shared
        first = not together or last in firsts
        matrices += 2 if first else 0
        parameters += rank * outputs + (rank * inputs if first else 0)
    return matrices, parameters


def _memory(recipe: Recipe, base: int, trained: int) -> str:
    """Weights, gradients and Adam's two moments, which are sure; what a step keeps depends on its pictures."""
    bytes_per = {"float32": 4, "bfloat16": 2}[recipe.model.dtype]
    weights, learning = base * bytes_per, trained * 16
    kept = "block inputs only" if recipe.gradient_checkpointing else "every activation"
    return (
        f"memory: base {weights / _GIB:.1f} GiB + adapter with gradients and optimizer {learning / _GIB:.1f} GiB, "
        f"text encoders and VAE besides; a step keeps {kept}"
    )


def _config(recipe: Recipe) -> dict[str, Any]:
    named = str(recipe.model.base or SHIPPED)
    base = Path(named)
    if named.startswith((".", "/")) and not base.exists():
        remedy = "make it, or name one with --base"
        raise WeightsError("model_not_found", f"the recipe's base {named} is not here: {remedy}")
    file = base / "transformer" / "config.json"
    if not base.exists():
        return dict(FLUX_DEV)
    if not file.is_file():
        raise WeightsError("model_not_found", f"{base} is not in diffusers layout: transformer/config.json is missing")
    return {key: value for key, value in json.loads(file.read_bytes()).items() if not key.startswith("_")}
