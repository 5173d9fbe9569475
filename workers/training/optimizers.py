"""Optimizers by name, and their state by parameter name, so that a checkpoint does not depend on order or pickles."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from workers.training.recipes import OptimizerPart, RecipeError


def make_optimizer(part: OptimizerPart, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """A fresh optimizer.

    Raises:
        RecipeError: Prodigy is asked for and not installed.
    """
    if part.name == "adamw":
        return torch.optim.AdamW(parameters, lr=part.lr, betas=part.betas, weight_decay=part.weight_decay)
    try:
        prodigy: Any = importlib.import_module("prodigyopt").Prodigy
    except ImportError as error:
        raise RecipeError("optimizer prodigy needs a package: pip install '.[train]'") from error
    # DreamFuse's published settings.
    return prodigy(
        parameters,
        lr=part.lr,
        betas=part.betas,
        weight_decay=part.weight_decay,
        decouple=True,
        use_bias_correction=True,
        safeguard_warmup=True,
    )


def optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> dict[str, dict[str, torch.Tensor]]:
    """What the optimizer remembers of each parameter, and under `group` its own running numbers."""
    state: dict[str, dict[str, torch.Tensor]] = {}
    for name, parameter in parameters.items():
        fields = optimizer.state.get(parameter, {})
        state[name] = {key: torch.as_tensor(value) for key, value in fields.items() if value is not None}
    running = {key: _number(value) for key, value in optimizer.param_groups[0].items() if _runs(value)}
    return {name: fields for name, fields in state.items() if fields} | {"group": running}


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    state: Mapping[str, Mapping[str, torch.Tensor]],
) -> None:
    """The inverse of `optimizer_state`, for an optimizer made from the same parameters."""
    for name, parameter in parameters.items():
        fields = optimizer.state[parameter]
        for key, value in state.get(name, {}).items():
            fields[key] = value.clone() if key == "step" else value.to(parameter.device, copy=True)
    for key, value in state["group"].items():
        for group in optimizer.param_groups:
            plain = value.dtype in (torch.int64, torch.float64)
            group[key] = value.item() if plain else value.clone()


def _runs(value: object) -> bool:
    """Numbers and scalar tensors of a parameter group; Prodigy keeps its estimate there."""
    scalar = isinstance(value, torch.Tensor) and value.ndim == 0
    return scalar or (isinstance(value, int | float) and not isinstance(value, bool))


def _number(value: Any) -> torch.Tensor:
    """Python numbers as 64-bit tensors, by which `restore_optimizer` knows them again."""
    if isinstance(value, torch.Tensor):
        return value
    return torch.tensor(value, dtype=torch.int64 if isinstance(value, int) else torch.float64)
