"""A whole picture, from the references' pixels to its own: the released pipeline's way and ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from model.packing import Condition
from model.sampling import Sampler, timestep_of
from model.schedule import euler_step, sigmas
from model.vae import LatentCodec
from tests.benchmarks.baselines import inputs_of, released
from tests.benchmarks.step_cases import GUIDANCE, SHIFT, STEPS, Bench, begin


def trips(bench: Bench, codec: LatentCodec, request: tuple[Condition, Tensor]) -> dict[str, Callable[[], Tensor]]:
    """Candidates by name, each of which gives the picture [3, H, W] of a request; its references are encoded first."""
    condition, noise = request
    pixels = [torch.rand(3, *(codec.cell * side for side in r.grid)).to(noise) * 2 - 1 for r in condition.references]

    def encoded() -> Condition:
        moments = [codec.moments(picture) for picture in pixels]
        tokens = [codec.sample(each, torch.ones_like(each[: codec.channels])) for each in moments]
        pairs = zip(condition.references, tokens, strict=True)
        return replace(condition, references=tuple(replace(reference, tokens=own) for reference, own in pairs))

    def as_released() -> Tensor:
        levels = sigmas(STEPS, len(noise), SHIFT)
        times = [timestep_of(level, noise.dtype) for level in levels]
        inputs = inputs_of(bench.tables, [encoded()], [noise], times[:1], [GUIDANCE.at(0)])
        for step in range(STEPS):
            now = {"timestep": times[step].to(noise)[None], "guidance": torch.tensor([GUIDANCE.at(step)]).to(noise)}
            velocity = released(bench.model, replace(inputs, **now))
            inputs = replace(inputs, latents=euler_step(inputs.latents, velocity, levels[step], levels[step + 1]))
        return codec.decode(inputs.latents[0], condition.target_grid)

    def by(sampler: Sampler) -> Tensor:
        run = begin(sampler, encoded(), noise)
        while not run.done:
            (run,) = sampler.advance([run])
        return codec.decode(run.latents, condition.target_grid)

    plain, fast = Sampler(bench.network, bench.tables), Sampler(bench.compiled, bench.tables)
    return {"released": as_released, "ours": lambda: by(plain), "ours compiled": lambda: by(fast)}
