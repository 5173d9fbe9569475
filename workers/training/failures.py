"""Why a run cannot go on, and what can be done about it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from workers.training.recipes import Recipe


class TrainingError(Exception):
    """A run that cannot go on; the message says what to do."""


class BrokenStepError(TrainingError):
    """A step that cannot be made. `reason`: why, without a path; the message names the newest checkpoint too."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(f"{reason}; {remedy}")
        self.reason = reason


class OtherRunError(TrainingError):
    """A checkpoint that another run left; the message names the directory."""


_ANEW = "in a new run (another --out: a changed recipe goes on from no checkpoint)"
DIVERGED = f"Lower the learning rate {_ANEW}, or mend the records of this step and --resume."
EXHAUSTED = f"Lower the batch or set gradient_checkpointing {_ANEW}, or --resume on a device with more memory."


def finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether all are numbers throughout; next to no memory is taken for it."""
    return all(bool(torch.linalg.vector_norm(tensor.detach(), math.inf).isfinite()) for tensor in tensors)


def check_goes_on(facts: Mapping[str, Any], recipe: Recipe, processes: int, directory: Path) -> None:
    """Refuse a checkpoint that this run would not have left. Fields of a recipe that have been added since count with
    their defaults; a checkpoint that does not say how many processes there were is taken with any number.

    Raises:
        OtherRunError: it is of another recipe or number of processes, by which samples are drawn.
    """
    try:
        same = Recipe.model_validate(facts.get("recipe")).essence == recipe.essence
    except ValidationError:
        same = False
    if not same:
        raise OtherRunError(
            f"the checkpoint in {directory} is of another recipe: name a new directory, or restore the recipe"
        )
    if (before := facts.get("processes", processes)) != processes:
        raise OtherRunError(
            f"the checkpoint in {directory} is of a run in {before} processes, and this one is in {processes}, "
            "which would change its samples: "
            f"start it with `torchrun --nproc_per_node {before}`, or name a new directory"
        )
