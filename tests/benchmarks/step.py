"""The denoise step: our packed forward against stock diffusers, and a mixed batch packed against one by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import FluxTransformer2DModel

from model.packing import Condition, PackedSequence, ReferenceTokens, lay_out, pack
from model.roles import Role
from model.transformer import EmbeddingTables, Network, forward
from tests.benchmarks.measure import Figure, compared, interleaved


@dataclass(frozen=True, slots=True)
class Size:
    """Dimensions of a measured model and request; a reference is `side` × `side` tokens."""

    heads: int
    axes: tuple[int, int, int]
    double_blocks: int
    single_blocks: int
    text: int
    target: tuple[int, int]
    side: int


SIZES = {
    # FLUX.1-dev, and its proportions on a narrow model that a CPU can run.
    "cuda": Size(24, (16, 56, 56), 19, 38, 512, (64, 64), 32),
    "cpu": Size(4, (8, 12, 12), 2, 4, 128, (32, 32), 16),
}


def run(device: str, rounds: int) -> list[Figure]:
    """Rows for 0–3 references alone, and for the mixed batch of all four."""
    size = SIZES[device]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    with torch.device(device):
        model = FluxTransformer2DModel(
            num_layers=size.double_blocks,
            num_single_layers=size.single_blocks,
            num_attention_heads=size.heads,
            attention_head_dim=sum(size.axes),
            axes_dims_rope=size.axes,
            joint_attention_dim=4096,
            guidance_embeds=True,
        ).to(dtype)
    model.eval().requires_grad_(False)
    width = size.heads * sum(size.axes)
    tables = EmbeddingTables(
        torch.randn(2, width, dtype=dtype, device=device), torch.randn(10, width, dtype=dtype, device=device)
    )
    packs = {n: _packed([_request(size, n, device, dtype)]) for n in range(4)}
    figures: list[Figure] = []
    for references, packed in packs.items():
        candidates = {"stock": _stock(model, packed), "packed": lambda p=packed: _ours(model, tables, p)}
        seconds = interleaved(candidates, rounds=rounds, device=device)
        figures += compared(f"step, {references} references", seconds, "stock", tokens=len(packed.layout.ids))
    mixed = _packed([_request(size, n, device, dtype) for n in range(4)])
    seconds = interleaved(
        {
            "one by one": lambda: [_ours(model, tables, packed) for packed in packs.values()],
            "packed": lambda: _ours(model, tables, mixed),
        },
        rounds=rounds,
        device=device,
    )
    return figures + compared("mixed batch of 0–3 references", seconds, "one by one", tokens=len(mixed.layout.ids))


def _request(size: Size, references: int, device: str, dtype: torch.dtype) -> tuple[Condition, torch.Tensor]:
    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=dtype, device=device)

    (rows, columns), side = size.target, size.side
    tokens = tuple(
        ReferenceTokens(slot, Role.SUBJECT, draw(side * side, 64), (side, side)) for slot in range(1, references + 1)
    )
    condition = Condition(draw(size.text, 4096), draw(768), (rows, columns), tokens)
    return condition, draw(rows * columns, 64)


def _packed(requests: list[tuple[Condition, torch.Tensor]]) -> PackedSequence:
    conditions = [condition for condition, _ in requests]
    times = [torch.tensor(0.75, dtype=latents.dtype) for _, latents in requests]
    latents = [noisy for _, noisy in requests]
    return pack(lay_out(conditions), conditions, latents, times, [4.5] * len(requests))


@torch.inference_mode()
def _ours(model: FluxTransformer2DModel, tables: EmbeddingTables, packed: PackedSequence) -> torch.Tensor:
    return forward(Network(model), tables, packed)


def _stock(model: FluxTransformer2DModel, packed: PackedSequence) -> Callable[[], object]:
    num_text = packed.layout.num_text
    inputs = {
        "hidden_states": packed.image[None],
        "encoder_hidden_states": packed.text[None],
        "pooled_projections": packed.pooled,
        "timestep": packed.timestep,
        "guidance": packed.guidance,
        "txt_ids": packed.layout.ids[:num_text],
        "img_ids": packed.layout.ids[num_text:],
        "return_dict": False,
    }
    return torch.inference_mode()(lambda: model(**inputs))
