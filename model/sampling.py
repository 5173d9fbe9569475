"""Denoising as a sequence of frozen states: a `Sampler` takes any number of runs one step further in
one forward.

Runs may differ in size, references, schedule and step; true CFG's negative branch is one more packed request.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from model.blocks import Site
from model.network import Standing, stand, stand_beside
from model.packing import Condition, lay_out
from model.schedule import euler_step
from model.transformer import Embedded, EmbeddingTables, Network, site_of
from model.transformer import run as run_blocks


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
    """One image between two steps; `Sampler.begin` makes it.

    Attributes:
        network: that it was begun with, which is to move it.
        sigmas: [num_steps + 1] float32. latents: [rows · columns, 64].
        standing, negative_standing: what the network has computed of the two conditions for all steps.
        velocity: of the step that led here, [rows · columns, 64]; None before the first.
    """

    network: Network
    condition: Condition
    negative: Condition | None
    guidance: Guidance
    sigmas: torch.Tensor
    latents: torch.Tensor
    standing: Standing
    negative_standing: Standing | None = None
    step: int = 0
    velocity: torch.Tensor | None = None

    @property
    def num_steps(self) -> int:
        return len(self.sigmas) - 1

    @property
    def done(self) -> bool:
        return self.step == self.num_steps

    @property
    def clean(self) -> torch.Tensor:
        """The latents without their noise, by the last velocity: x − sigma·v, [rows · columns, 64]."""
        if self.velocity is None:
            return self.latents
        return euler_step(self.latents, self.velocity, self.sigmas[self.step], torch.zeros(()))

    @property
    def timestep(self) -> torch.Tensor:
        """t in [0, 1] of the current step."""
        return timestep_of(self.sigmas[self.step], self.latents.dtype)


def timestep_of(sigma: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """t in [0, 1], rounded as the released pipeline does: ×1000, to the dtype, ÷1000."""
    return (sigma * 1000).to(dtype) / 1000


def _branches(run: Denoising) -> list[tuple[Condition, Standing]]:
    """The packed requests of a run's current step: positive, then negative where true CFG runs."""
    positive = run.condition, run.standing
    if not run.guidance.splits(run.step) or run.negative is None or run.negative_standing is None:
        return [positive]
    return [positive, (run.negative, run.negative_standing)]


def begin(
    network: Network,
    tables: EmbeddingTables,
    condition: Condition,
    negative: Condition | None,
    guidance: Guidance,
    sigmas: torch.Tensor,
    noise: torch.Tensor,
    beside: Denoising | None = None,
) -> Denoising:
    """A run before its first step; computes what stays the same in all of them.

    Args:
        beside: a run of the same request by another seed, whose text and modulation vectors it shares.
    """
    if beside is not None:
        standing = stand_beside(network, tables, condition, beside.standing)
        return Denoising(network, condition, negative, guidance, sigmas, noise, standing, beside.negative_standing)
    times = [timestep_of(sigma, noise.dtype) for sigma in sigmas[:-1]]
    scales = [guidance.at(step) for step in range(len(times))]
    standing = stand(network, tables, condition, times, scales)
    other = negative and stand(network, tables, negative, times, [guidance.negative] * len(times))
    return Denoising(network, condition, negative, guidance, sigmas, noise, standing, other)


class Sampler:
    """Runs of a network, and of those that adapters make of it (`model.weights.adapted`).

    Keeps the sites of the batches seen last: the same runs come together step after step.
    """

    def __init__(self, network: Network, tables: EmbeddingTables, *, keep: int = 64) -> None:
        self.network = network
        self.tables = tables
        self._keep = keep
        self._sites: OrderedDict[object, Site] = OrderedDict()

    def begin(
        self,
        condition: Condition,
        negative: Condition | None,
        guidance: Guidance,
        sigmas: torch.Tensor,
        noise: torch.Tensor,
    ) -> Denoising:
        """A run of this network before its first step."""
        return begin(self.network, self.tables, condition, negative, guidance, sigmas, noise)

    @torch.inference_mode()
    def velocities(self, runs: Sequence[Denoising], network: Network | None = None) -> list[list[torch.Tensor]]:
        """Velocity of each branch of each run at its current step: positive, then negative where true CFG runs.

        Args:
            network: an adapted one; by default the sampler's own.
        """
        network = network or self.network
        branches = [(run, *branch) for run in runs for branch in _branches(run)]
        latents = [run.latents for run, _, _ in branches]
        lengths = [len(noisy) for noisy in latents]
        targets = network.model.x_embedder(torch.cat(latents)).split(lengths)
        image = [
            part
            for target, (_, _, standing) in zip(targets, branches, strict=True)
            for part in (target + standing.target, standing.references)
        ]
        embedded = Embedded(
            text=torch.cat([standing.text for _, _, standing in branches]),
            image=torch.cat(image),
            vectors=torch.cat([standing.vectors[run.step] for run, _, standing in branches]),
        )
        velocity, _ = run_blocks(network, self._site([condition for _, condition, _ in branches]), embedded)
        parts = iter(velocity.split(lengths))
        return [[next(parts) for _ in _branches(run)] for run in runs]

    def advance(self, runs: Sequence[Denoising], network: Network | None = None) -> tuple[Denoising, ...]:
        """All runs one step further; one forward.

        Args:
            network: an adapted one; by default the sampler's own.

        Raises:
            ValueError: a run is already done.
        """
        if any(run.done for run in runs):
            raise ValueError("a finished run cannot take another step")
        return tuple(moved(run, parts) for run, parts in zip(runs, self.velocities(runs, network), strict=True))

    def _site(self, conditions: Sequence[Condition]) -> Site:
        """A batch's site, which follows from its shapes alone."""
        key = tuple(_shape(condition) for condition in conditions)
        if key not in self._sites:
            self._sites[key] = site_of(self.network.model, lay_out(conditions))
            while len(self._sites) > self._keep:
                self._sites.popitem(last=False)
        self._sites.move_to_end(key)
        return self._sites[key]


def _shape(condition: Condition) -> object:
    references = tuple((reference.slot, reference.role, reference.grid) for reference in condition.references)
    return len(condition.text), condition.target_grid, condition.embedded, references


@torch.inference_mode()
def moved(run: Denoising, parts: Sequence[torch.Tensor]) -> Denoising:
    """A run after its current step, by the velocities of its branches."""
    velocity = parts[0]
    if len(parts) == 2:
        velocity = parts[1] + run.guidance.true_scale * (parts[0] - parts[1])
    latents = euler_step(run.latents, velocity, run.sigmas[run.step], run.sigmas[run.step + 1])
    return replace(run, latents=latents, step=run.step + 1, velocity=velocity)
