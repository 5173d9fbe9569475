"""From records to what one training step takes: latents, noise, times, masks, conditions; all draws in one place.

Every draw comes from the generator passed in, on the CPU, so a step is a function of its seed.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from model.losses import TimestepLaw, token_mask
from model.packing import ReferenceTokens
from model.positions import Grid
from model.preprocessors.prepare import to_tensor_range
from model.routing import ReferenceKey
from model.vae import LatentCodec
from workers.training.datasets.prompts import without_placeholders
from workers.training.recipes import Stage
from workers.training.records import Pixels, Record

Moments = Callable[[Sequence[Pixels]], list[torch.Tensor]]
"""Pictures → the parameters [2C, H/f, W/f] of each one's posterior, in order."""


@dataclass(frozen=True, slots=True)
class Example:
    """One sample of a step, encoded.

    Attributes:
        key: the record's.
        prompt: as the network gets it, after any drop.
        latents: [l, 64] the clean target. noise: [l, 64].
        references: tokens as they take part, after any drop.
    """

    key: str
    task: str
    prompt: str
    grid: Grid
    latents: torch.Tensor
    noise: torch.Tensor
    references: tuple[ReferenceTokens, ...]


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's samples, shortest sequence first, so that equal lengths lie together.

    Attributes:
        times: [n] t in [0, 1], 1 = noise. guidances: [n].
        masks: [l] per (sample, slot) whose place in the target is known.
    """

    examples: tuple[Example, ...]
    times: torch.Tensor
    guidances: torch.Tensor
    masks: dict[ReferenceKey, torch.Tensor]


def step_generator(seed: int, step: int, process: int) -> torch.Generator:
    """The randomness of one process's part of a step."""
    digest = hashlib.sha256(f"{seed} {step}.{process}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


def compose(
    records: Sequence[Record],
    stage: Stage,
    codec: LatentCodec,
    generator: torch.Generator,
    moments: Moments | None = None,
) -> Batch:
    """Encode and draw.

    Args:
        moments: encodes the pictures; None has the codec encode those of one size together.

    Raises:
        ValueError: a picture's sides are not multiples of the cell.
    """
    ordered = sorted(records, key=_length)
    kept = [() if _hit(stage.reference_drop, generator) else record.references for record in ordered]
    pictures = [record.target for record in ordered] + [r.pixels for references in kept for r in references]
    found = moments(pictures) if moments else picture_moments(pictures, codec)
    latents = iter(posterior_draws(found, codec, generator))
    targets = [next(latents) for _ in ordered]
    examples: list[Example] = []
    masks: dict[ReferenceKey, torch.Tensor] = {}
    for number, (record, references, clean) in enumerate(zip(ordered, kept, targets, strict=True)):
        grid = codec.grid(*record.target.shape[:2])
        tokens: list[ReferenceTokens] = []
        for reference in references:
            shape = codec.grid(*reference.pixels.shape[:2])
            whole = ReferenceTokens(reference.slot, reference.role, next(latents), shape)
            tokens.append(thinned(whole, stage.token_drop, generator))
            if reference.target_mask is not None:
                masks[number, reference.slot] = token_mask(reference.target_mask, grid).to(clean.device)
        noise = torch.randn(clean.shape, generator=generator).to(clean)
        prompt = _prompt(record.prompt, bool(references), stage, generator)
        examples.append(Example(record.key, record.task, prompt, grid, clean, noise, tuple(tokens)))
    low, high = stage.guidance
    return Batch(
        examples=tuple(examples),
        times=TimestepLaw(**stage.time.model_dump()).draw(len(examples), generator),
        guidances=low + (high - low) * torch.rand(len(examples), generator=generator),
        masks=masks,
    )


@torch.no_grad()
def picture_moments(pictures: Sequence[Pixels], codec: LatentCodec) -> list[torch.Tensor]:
    """Posterior parameters, in order; pictures of one size share a call."""
    sizes: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for index, pixels in enumerate(pictures):
        sizes[pixels.shape].append(index)
    moments: dict[int, torch.Tensor] = {}
    for indices in sizes.values():
        stack = torch.stack([torch.from_numpy(to_tensor_range(pictures[index])) for index in indices])
        moments |= dict(zip(indices, codec.batch_moments(stack), strict=True))
    return [moments[index] for index in range(len(pictures))]


def posterior_draws(
    moments: Sequence[torch.Tensor], codec: LatentCodec, generator: torch.Generator
) -> list[torch.Tensor]:
    """Packed tokens of one draw from each posterior."""
    draws: list[torch.Tensor] = []
    for parameters in moments:
        channels, height, width = parameters.shape
        noise = torch.randn((channels // 2, height, width), generator=generator)
        draws.append(codec.sample(parameters, noise))
    return draws


def thinned(reference: ReferenceTokens, drop: float, generator: torch.Generator) -> ReferenceTokens:
    """The reference with a share `drop` of its tokens left out, at least one kept; the rest keep their positions."""
    if drop == 0:
        return reference
    length = len(reference.tokens)
    count = max(1, round((1 - drop) * length))
    kept = torch.randperm(length, generator=generator)[:count].sort().values
    return ReferenceTokens(reference.slot, reference.role, reference.tokens[kept], reference.grid, kept)


def _prompt(prompt: str, referenced: bool, stage: Stage, generator: torch.Generator) -> str:
    drop, strip = _hit(stage.prompt_drop, generator), _hit(stage.plain_text, generator)
    if drop:
        return ""
    return without_placeholders(prompt) if strip or not referenced else prompt


def _hit(chance: float, generator: torch.Generator) -> bool:
    """One draw whatever the chance, so that changing a share does not shift the others' draws."""
    return bool(torch.rand((), generator=generator) < chance)


def _length(record: Record) -> int:
    return record.target.size + sum(reference.pixels.size for reference in record.references)
