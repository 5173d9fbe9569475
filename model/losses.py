"""DreamO's training objective: rectified flow, the routing loss and the placeholder loss (§3.2, equations 1 and 3–5).

    total = flow · L_diff + route · L_route + holder · L_holder

Time runs as in FLUX: x_t = (1 − t)·latents + t·noise, velocity = noise − latents. DreamO writes t' = 1 − t and the
opposite sign, which is the same loss.

Every loss is a mean over units (requests, or references with a mask), kept as a sum and a count, because only those add
up over processes. Shapes: l target tokens, Λ captured layers, n references.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from model.packing import Layout
from model.positions import Grid
from model.routing import GroupMaps, ReferenceKey, ResponseMaps

Normalise = Literal["none", "sigmoid", "minmax", "softmax"]
"""What a response map becomes before it is compared with a mask. The paper's is `none`; the others are for ablations:
`minmax` of each map, `softmax` over the target, scaled to the mask's sum."""


@dataclass(frozen=True, slots=True)
class LossTerm:
    """One loss over `count` units; total is their sum, a scalar in the graph."""

    total: Tensor
    count: int

    @property
    def value(self) -> Tensor:
        """The mean over this process's units; 0 where there are none."""
        return self.total / max(self.count, 1)


@dataclass(frozen=True, slots=True)
class LossWeights:
    """Equation 5's lambdas. route = flow is the authors' answer; holder is not published."""

    flow: float = 1.0
    route: float = 1.0
    holder: float = 1.0


@dataclass(frozen=True, slots=True)
class LossCounts:
    """What each loss is divided by instead of its own count: where a batch is spread over processes whose gradients
    are averaged, the mean count of a process (all counts together / number of processes)."""

    flow: float
    route: float
    holder: float


@dataclass(frozen=True, slots=True)
class Losses:
    """The parts of equation 5 for one pack."""

    flow: LossTerm
    route: LossTerm
    holder: LossTerm

    def total(self, weights: LossWeights, counts: LossCounts | None = None) -> Tensor:
        """Equation 5, a scalar. A part of weight 0 stays out of the graph."""
        parts = [
            (weights.flow, self.flow, counts.flow if counts else self.flow.count),
            (weights.route, self.route, counts.route if counts else self.route.count),
            (weights.holder, self.holder, counts.holder if counts else self.holder.count),
        ]
        total = torch.zeros_like(self.flow.total)
        for weight, part, count in parts:
            if weight and part.count:
                total = total + weight * part.total / count
        return total


@dataclass(frozen=True, slots=True)
class TimestepLaw:
    """How training draws t in [0, 1], 1 = noise. DreamO's is not published; the default is OminiControl's.

    Attributes:
        kind: `logit_normal`: sigmoid(mean + std·n), n standard normal; `uniform` ignores mean and std.
        shift: added to the logit of t, as FLUX's mu is; for `logit_normal` the same as a larger mean.
        high_share: part of the draws that is uniform in [0.9, 1] instead, where the layout of a picture is decided.
    """

    kind: Literal["logit_normal", "uniform"] = "logit_normal"
    mean: float = 0.0
    std: float = 1.0
    shift: float = 0.0
    high_share: float = 0.0

    def draw(self, num: int, generator: torch.Generator) -> Tensor:
        """[num] float32 on the generator's device."""
        if self.kind == "uniform":
            times = torch.rand(num, generator=generator, device=generator.device)
            logits = torch.logit(times)
        else:
            logits = self.mean + self.std * torch.randn(num, generator=generator, device=generator.device)
        times = torch.sigmoid(logits + self.shift)
        if self.high_share == 0:
            return times
        chance, place = torch.rand(2, num, generator=generator, device=generator.device)
        return torch.where(chance < self.high_share, 0.9 + 0.1 * place, times)


LAYOUT_LAW = TimestepLaw(mean=1.2, std=1.2, high_share=0.25)
"""For small targets: with nine tokens a subject, the default puts 0.5 % of its draws where layout is decided."""


def noised(latents: Tensor, noise: Tensor, timestep: Tensor | float) -> Tensor:
    """x_t = (1 − t)·latents + t·noise, in the latents' dtype."""
    return ((1 - timestep) * latents + timestep * noise).to(latents.dtype)


def flow_loss(velocity: Tensor, latents: Sequence[Tensor], noise: Sequence[Tensor], layout: Layout) -> LossTerm:
    """Equation 1: (velocity − (noise − latents))², mean over a request's target tokens and channels; a unit a request.

    Args:
        velocity: [Σ l, C] of all requests, as `transformer.forward` returns it.
        latents, noise: per request, [l, C]: its clean target and the noise that was mixed in.

    Raises:
        ValueError: latents or noise do not have the layout's lengths.
    """
    lengths = [span.stop - span.start for span in layout.targets]
    if [len(x) for x in latents] != lengths or [len(x) for x in noise] != lengths:
        raise ValueError(f"the layout has targets of {lengths} tokens; latents or noise have others")
    wanted = _wide(torch.cat(list(noise))) - _wide(torch.cat(list(latents)))
    errors = (_wide(velocity) - wanted).square().mean(1)
    shares = torch.repeat_interleave(torch.tensor([1 / n for n in lengths]), torch.tensor(lengths))
    return LossTerm((errors * shares.to(errors)).sum(), len(lengths))


def token_mask(mask: NDArray[np.uint8], grid: Grid, *, threshold: float | None = None) -> Tensor:
    """A pixel mask as the token grid sees it: the share of each token's area inside, [rows · columns] float32.

    Args:
        mask: [H, W], 255 = inside. threshold: makes it 0 or 1; soft by default, right for subjects below a token.

    Raises:
        ValueError: the grid does not divide the mask.
    """
    (height, width), (rows, columns) = mask.shape, grid
    if height % rows or width % columns:
        raise ValueError(f"a {height}x{width} mask does not divide into {rows}x{columns} tokens")
    cells = torch.from_numpy(np.ascontiguousarray(mask)).float().div(255)
    soft = cells.reshape(rows, height // rows, columns, width // columns).mean((1, 3)).flatten()
    return soft if threshold is None else (soft >= threshold).float()


def route_loss(maps: ResponseMaps, masks: Mapping[ReferenceKey, Tensor], *, normalise: Normalise = "none") -> LossTerm:
    """Equation 3: (map − mask)², mean over the target's tokens and the layers; a unit a reference with a mask.

    Args:
        masks: [l] per reference, 1 = inside its subject. References without one count for nothing.

    Raises:
        ValueError: a mask belongs to no captured reference, or has another size than the target.
    """
    totals: list[Tensor] = []
    count = 0
    for group in maps.groups:
        given = [[key in masks for key in keys] for keys in group.keys]
        if group.route is None or not masks:
            continue
        wanted = _masks(group, group.route, masks)
        errors = (_normalised(group.route, wanted, normalise) - wanted).square().mean((0, *range(3, group.route.ndim)))
        totals.append((errors * torch.tensor(given).to(errors)).sum())
        count += sum(map(sum, given))
    if count != len(masks):
        raise ValueError(f"{len(masks)} masks were given, and {count} of them belong to captured references")
    return LossTerm(torch.stack(totals).sum() if totals else torch.zeros(()), count)


def holder_loss(maps: ResponseMaps) -> LossTerm:
    """Equation 4: (A − B)², where B says that each query of a reference answers to its own placeholder alone.

    Mean over the queries and placeholders and the layers; a unit a reference, of requests that take part
    (`routing.plan`). The paper sums over the entries where this takes the mean, as the routing loss does.
    """
    totals: list[Tensor] = []
    count = 0
    for group in maps.groups:
        for reference, response in enumerate(group.holder):
            own = F.one_hot(torch.tensor(reference), response.shape[-1]).to(response)
            totals.append((response - own).square().mean((0, 2, 3)).sum())
            count += len(group.keys)
    return LossTerm(torch.stack(totals).sum() if totals else torch.zeros(()), count)


def _masks(group: GroupMaps, maps: Tensor, masks: Mapping[ReferenceKey, Tensor]) -> Tensor:
    """The masks that go with maps [Λ, R, n, (H,) l]: [R, n, (1,) l], zeros where none is given."""
    blank = next(iter(masks.values())).new_zeros(maps.shape[-1])
    rows = [masks.get(key, blank) for keys in group.keys for key in keys]
    if wrong := [mask for mask in rows if mask.shape != blank.shape]:
        raise ValueError(f"a mask has shape {tuple(wrong[0].shape)}, its target {len(blank)} tokens")
    wanted = torch.stack(rows).unflatten(0, maps.shape[1:3]).to(maps)
    return wanted.unsqueeze(-2) if maps.ndim == 5 else wanted


def _normalised(maps: Tensor, wanted: Tensor, normalise: Normalise) -> Tensor:
    match normalise:
        case "none":
            return maps
        case "sigmoid":
            return maps.sigmoid()
        case "minmax":
            low, high = maps.amin(-1, keepdim=True), maps.amax(-1, keepdim=True)
            return (maps - low) / (high - low).clamp_min(1e-6)
        case "softmax":
            return maps.softmax(-1) * wanted.sum(-1, keepdim=True)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
