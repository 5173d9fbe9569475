"""Random packed requests for tests of the forward."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from model.packing import Condition, PackedSequence, ReferenceTokens, lay_out, pack
from model.positions import Grid
from model.roles import Role
from model.weights.checkpoints import LoadedModel


@dataclass(frozen=True, slots=True)
class Sample:
    """One request at one moment of its denoising."""

    condition: Condition
    latents: torch.Tensor
    timestep: torch.Tensor
    guidance: float


def sample(
    model: LoadedModel,
    seed: int,
    target: Grid,
    references: dict[int, Grid],
    *,
    timestep: float,
    guidance: float = 3.5,
    num_text: int = 12,
    embedded: bool = True,
) -> Sample:
    """A request with random tokens; `references` maps slots to grids."""
    generator = torch.Generator().manual_seed(seed)
    config, dtype = model.transformer.config, model.transformer.dtype

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    condition = Condition(
        text=draw(num_text, config["joint_attention_dim"]),
        pooled=draw(config["pooled_projection_dim"]),
        target_grid=target,
        references=tuple(
            ReferenceTokens(slot, Role.SUBJECT, draw(grid[0] * grid[1], 64), grid) for slot, grid in references.items()
        ),
        embedded=embedded,
    )
    return Sample(condition, draw(target[0] * target[1], 64), torch.tensor(timestep).to(dtype), guidance)


def packed(samples: list[Sample]) -> PackedSequence:
    """All samples in one sequence."""
    conditions = [s.condition for s in samples]
    return pack(
        lay_out(conditions),
        conditions,
        [s.latents for s in samples],
        [s.timestep for s in samples],
        [s.guidance for s in samples],
    )
