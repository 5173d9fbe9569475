"""What reading response maps costs a training step: forward, losses and backward with and without them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import FluxTransformer2DModel

from model.losses import Losses, LossWeights, flow_loss, holder_loss, route_loss
from model.packing import Condition, PackedSequence, ReferenceTokens, lay_out, pack
from model.positions import Grid
from model.roles import Role
from model.routing import Capture, Positions
from model.transformer import EmbeddingTables, Network, forward_with_maps
from tests.benchmarks.measure import Figure, compared, figure, interleaved


@dataclass(frozen=True, slots=True)
class Size:
    """A model and a batch of requests with two references of `side` × `side` tokens."""

    name: str
    heads: int
    axes: tuple[int, int, int]
    blocks: tuple[int, int]
    text_width: int
    text: int
    target: Grid
    side: int
    batch: int
    checkpoint: bool = False


SIZES = {
    # What trains the shipped model, and FLUX's proportions: whole on a GPU, on a narrow model elsewhere.
    "cpu": (
        Size("tiny model, batch 32", 6, (8, 12, 12), (2, 4), 64, 32, (9, 9), 3, 32),
        Size("FLUX's proportions, batch 1", 4, (8, 12, 12), (2, 4), 512, 128, (32, 32), 16, 1),
    ),
    "cuda": (
        Size("tiny model, batch 64", 8, (8, 12, 12), (3, 6), 64, 32, (9, 9), 3, 64),
        Size("FLUX.1-dev, batch 1", 24, (16, 56, 56), (19, 38), 4096, 512, (32, 32), 32, 1, checkpoint=True),
    ),
}


@dataclass(frozen=True, slots=True)
class Batch:
    """A packed batch and what its losses need."""

    packed: PackedSequence
    latents: list[torch.Tensor]
    noise: list[torch.Tensor]
    masks: dict[tuple[int, int], torch.Tensor]
    positions: list[Positions]


def run(device: str, rounds: int) -> list[Figure]:
    """Rows for each size: a step with the flow loss alone, with routing, with routing and placeholders."""
    figures: list[Figure] = []
    for size in SIZES[device]:
        seconds = interleaved(_steps(size, device), rounds=rounds, device=device)
        figures += compared(f"step, {size.name}", seconds, "flow", batch=size.batch, references=2)
        for name in ("route", "route and holder"):
            extra = [100 * (v / f - 1) for v, f in zip(seconds[name], seconds["flow"], strict=True)]
            figures.append(figure(f"step, {size.name}: added by {name}", "%", extra, batch=size.batch, references=2))
    return figures


def _steps(size: Size, device: str) -> dict[str, Callable[[], object]]:
    """A training step by what it reads. Weights of queries, keys, values and outputs train, as with LoRA."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    with torch.device(device):
        model = FluxTransformer2DModel(
            num_layers=size.blocks[0],
            num_single_layers=size.blocks[1],
            num_attention_heads=size.heads,
            attention_head_dim=sum(size.axes),
            axes_dims_rope=size.axes,
            joint_attention_dim=size.text_width,
            pooled_projection_dim=64,
            guidance_embeds=True,
        ).to(dtype)
    model.requires_grad_(False)
    trained = [p.requires_grad_() for name, p in model.named_parameters() if ".attn." in name and p.ndim == 2]
    width = size.heads * sum(size.axes)
    tables = EmbeddingTables(*(torch.randn(n, width, dtype=dtype, device=device) for n in (2, 10)))
    batch = _batch(size, device, dtype)

    def step(capture: Capture) -> None:
        velocity, maps = forward_with_maps(
            Network(model), tables, batch.packed, capture, batch.positions, checkpoint=size.checkpoint
        )
        losses = Losses(
            flow=flow_loss(velocity, batch.latents, batch.noise, batch.packed.layout),
            route=route_loss(maps, batch.masks if capture.route else {}),
            holder=holder_loss(maps),
        )
        losses.total(LossWeights()).backward()
        for parameter in trained:
            parameter.grad = None

    return {
        "flow": lambda: step(Capture(route=False, holder=False)),
        "route": lambda: step(Capture(holder=False)),
        "route and holder": lambda: step(Capture()),
    }


def _batch(size: Size, device: str, dtype: torch.dtype) -> Batch:
    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=dtype, device=device)

    tokens, side = size.target[0] * size.target[1], size.side
    conditions = [
        Condition(
            draw(size.text, size.text_width),
            draw(64),
            size.target,
            tuple(ReferenceTokens(slot, Role.SUBJECT, draw(side * side, 64), (side, side)) for slot in (1, 2)),
        )
        for _ in range(size.batch)
    ]
    latents = [draw(tokens, 64) for _ in conditions]
    times = [torch.tensor(0.75, dtype=dtype)] * size.batch
    return Batch(
        packed=pack(lay_out(conditions), conditions, latents, times, [1.0] * size.batch),
        latents=latents,
        noise=[draw(tokens, 64) for _ in conditions],
        masks={(r, slot): torch.rand(tokens, device=device) for r in range(size.batch) for slot in (1, 2)},
        positions=[{1: (3,), 2: (8,)}] * size.batch,
    )
