"""Denoising as a sequence of frozen states: `advance` takes any number of runs one step further in one forward.

Runs may differ in size, references, schedule and step; true CFG's negative branch is one more packed request.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

from model.packing import Condition, lay_out, pack
from model.schedule import euler_step
from model.transformer import EmbeddingTables, forward


@dataclass(frozen=True, slots=True)
class Guidance:
    """Guidance of one run.

    Attributes:
        scale: distilled guidance, an input of the network; `first_step` replaces it at step 0.
        true_scale: v = v_neg + true_scale · (v_pos − v_neg) at steps `start` ≤ i < `end`, if > 1.
        negative: the negative branch's distilled guidance, at every step.
    """

    scale: float
    first_step: float
    true_scale: float = 1.0
    start: int = 0
    end: int = 0
    negative: float = 3.5

    def at(self, step: int) -> float:
        """Distilled guidance of the positive branch at a step."""
        return self.first_step if step == 0 else self.scale

    def splits(self, step: int) -> bool:
        """Whether true CFG runs at a step."""
        return self.true_scale > 1 and self.start <= step < self.end


@dataclass(frozen=True, slots=True)
class Denoising:
    """One image between two steps. sigmas [num_steps + 1] float32; latents [rows · columns, 64]."""

    condition: Condition
    negative: Condition | None
    guidance: Guidance
    sigmas: torch.Tensor
    latents: torch.Tensor
    step: int = 0

    @property
    def num_steps(self) -> int:
        return len(self.sigmas) - 1

    @property
    def done(self) -> bool:
        return self.step == self.num_steps

    @property
    def timestep(self) -> torch.Tensor:
        """t in [0, 1], rounded as the released pipeline does: ×1000, to the latents' dtype, ÷1000."""
        return (self.sigmas[self.step] * 1000).to(self.latents.dtype) / 1000


@dataclass(frozen=True, slots=True)
class _Branch:
    """One packed request of a step."""

    condition: Condition
    latents: torch.Tensor
    timestep: torch.Tensor
    guidance: float


def _branches(run: Denoising) -> list[_Branch]:
    positive = _Branch(run.condition, run.latents, run.timestep, run.guidance.at(run.step))
    if not run.guidance.splits(run.step) or run.negative is None:
        return [positive]
    return [positive, replace(positive, condition=run.negative, guidance=run.guidance.negative)]


@torch.inference_mode()
def velocities(
    model: FluxTransformer2DModel, tables: EmbeddingTables, runs: Sequence[Denoising]
) -> list[list[torch.Tensor]]:
    """Velocity of each branch of each run at its current step: positive, then negative where true CFG runs."""
    branches = [_branches(run) for run in runs]
    flat = [branch for group in branches for branch in group]
    conditions = [branch.condition for branch in flat]
    packed = pack(
        lay_out(conditions),
        conditions,
        [branch.latents for branch in flat],
        [branch.timestep for branch in flat],
        [branch.guidance for branch in flat],
    )
    parts = iter(forward(model, tables, packed).split([len(branch.latents) for branch in flat]))
    return [[next(parts) for _ in group] for group in branches]


@torch.inference_mode()
def advance(model: FluxTransformer2DModel, tables: EmbeddingTables, runs: Sequence[Denoising]) -> tuple[Denoising, ...]:
    """All runs one step further; one forward.

    Raises:
        ValueError: a run is already done.
    """
    if any(run.done for run in runs):
        raise ValueError("a finished run cannot take another step")
    return tuple(
        replace(run, latents=step_latents(run, parts), step=run.step + 1)
        for run, parts in zip(runs, velocities(model, tables, runs), strict=True)
    )


def step_latents(run: Denoising, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The run's latents after its current step, from the velocities of its branches."""
    velocity = parts[0]
    if len(parts) == 2:
        velocity = parts[1] + run.guidance.true_scale * (parts[0] - parts[1])
    return euler_step(run.latents, velocity, run.sigmas[run.step], run.sigmas[run.step + 1])
