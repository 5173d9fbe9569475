"""The FLUX forward over a packed sequence, on the parameters of diffusers' `FluxTransformer2DModel`.

One function for every task: what differs between target, references and requests is data in the `Layout`. Nothing of
diffusers is subclassed or patched; linear layers are called as modules, so peft adapters work. Training reads response
maps of the blocks (`model.routing`): they are part of what a block returns, so gradient checkpointing keeps them.

Shapes: T text, I image tokens, S = T + I, M modulation rows, D model width, H heads, d head dimension (D = H·d).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import ParamSpec, TypeVar, cast

import torch
from diffusers.models.transformers.transformer_flux import (
    FluxAttention,
    FluxSingleTransformerBlock,
    FluxTransformer2DModel,
    FluxTransformerBlock,
)
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as recomputed

from kernels.attention import packed_attention
from model.packing import Layout, PackedSequence
from model.routing import Capture, Positions, Probe, Response, ResponseMaps, collect, observe, plan

P = ParamSpec("P")
T = TypeVar("T")
Responses = tuple[Response, ...]
"""What a block saw; empty unless it was asked."""


@dataclass(frozen=True, slots=True)
class EmbeddingTables:
    """DreamO's learned vectors: type [2, D] (row 1 target, 0 reference), index [10, D] (row = slot)."""

    type: Tensor
    index: Tensor

    def rows(self, layout: Layout) -> Tensor:
        """[I, D]: what is added to each image token after the input projection."""
        blank = torch.zeros_like(self.type[:1])
        return torch.cat([blank, self.type])[layout.type_rows] + torch.cat([blank, self.index])[layout.index_rows]


@dataclass(frozen=True, slots=True)
class Rotary:
    """RoPE tables in request order, float32: cos and sin [S, d]."""

    cos: Tensor
    sin: Tensor


@dataclass(frozen=True, slots=True)
class Embedded:
    """A packed sequence after the input layers: text [T, D], image [I, D], SiLU of the time embedding [M, D]."""

    text: Tensor
    image: Tensor
    time: Tensor


def forward(
    model: FluxTransformer2DModel, tables: EmbeddingTables, packed: PackedSequence, *, checkpoint: bool = False
) -> Tensor:
    """Velocity (noise − latents) of the target tokens of all requests, in order: [Σ targets, 64].

    Args:
        checkpoint: for training: keep only each block's inputs and compute the block again in the backward pass.
    """
    return _run(model, tables, packed, None, checkpoint)[0]


def forward_with_maps(
    model: FluxTransformer2DModel,
    tables: EmbeddingTables,
    packed: PackedSequence,
    capture: Capture,
    positions: Sequence[Positions] | None = None,
    *,
    checkpoint: bool = False,
) -> tuple[Tensor, ResponseMaps]:
    """`forward`, and the response maps of the captured blocks, part of the same graph.

    Args:
        positions: per request, where its placeholders stand; only `capture.holder` needs them.

    Raises:
        ValueError: see `routing.plan`.
    """
    probe = plan(packed.layout, capture, num_blocks(model), positions)
    velocity, responses = _run(model, tables, packed, probe, checkpoint)
    return velocity, collect(probe, responses)


def num_blocks(model: FluxTransformer2DModel) -> int:
    """Double and single blocks together; the layers of response maps are numbered so."""
    return len(model.transformer_blocks) + len(model.single_transformer_blocks)


def _run(
    model: FluxTransformer2DModel,
    tables: EmbeddingTables,
    packed: PackedSequence,
    probe: Probe | None,
    checkpoint: bool,
) -> tuple[Tensor, list[Responses]]:
    """Velocity, and what the blocks in `probe.layers` saw, in their order."""
    layout = packed.layout
    rotary = rotary_tables(model, layout)
    embedded = embed(model, tables, packed)
    text, image = embedded.text, embedded.image
    shared = (embedded.time, rotary, layout)
    probes = iter([probe if probe and layer in probe.layers else None for layer in range(num_blocks(model))])
    responses: list[Responses] = []
    for block in cast("Iterable[FluxTransformerBlock]", model.transformer_blocks):
        text, image, seen = _call(checkpoint, double_block, block, text, image, *shared, next(probes))
        responses.append(seen)
    joint = to_request_order(torch.cat([text, image]), layout)
    for block in cast("Iterable[FluxSingleTransformerBlock]", model.single_transformer_blocks):
        joint, seen = _call(checkpoint, single_block, block, joint, *shared, next(probes))
        responses.append(seen)
    return project(model, joint, embedded.time, layout), [seen for seen in responses if seen]


def _call(checkpoint: bool, block: Callable[P, T], *inputs: P.args, **named: P.kwargs) -> T:
    """Call a block. Recomputed or not, its outputs are those of the first call: maps are neither lost nor doubled."""
    if checkpoint and torch.is_grad_enabled():
        return cast("T", recomputed(block, *inputs, use_reentrant=False, **named))
    return block(*inputs, **named)


def rotary_tables(model: FluxTransformer2DModel, layout: Layout) -> Rotary:
    """Rotary tables of the layout's position ids (frequencies in float64, theta 10000)."""
    return Rotary(*model.pos_embed(layout.ids))


def embed(model: FluxTransformer2DModel, tables: EmbeddingTables, packed: PackedSequence) -> Embedded:
    """Input projections, the added type and index vectors, and the time embedding of each modulation row.

    Times and guidance are scaled by 1000 here, in the model's dtype, as in FLUX.
    """
    time = packed.timestep * 1000
    if model.config["guidance_embeds"]:
        condition = model.time_text_embed(time, packed.guidance * 1000, packed.pooled)
    else:
        condition = model.time_text_embed(time, packed.pooled)
    return Embedded(
        text=model.context_embedder(packed.text),
        image=model.x_embedder(packed.image) + tables.rows(packed.layout),
        time=F.silu(condition),
    )


def double_block(
    block: FluxTransformerBlock,
    text: Tensor,
    image: Tensor,
    time: Tensor,
    rotary: Rotary,
    layout: Layout,
    probe: Probe | None,
) -> tuple[Tensor, Tensor, Responses]:
    """One two-stream block: text [T, D] and image [I, D] attend jointly, each with its own weights.

    Also returns what `probe` sees in its attention.
    """
    image_mod = _modulation(block.norm1.linear(time), layout.image_rows, 6)
    text_mod = _modulation(block.norm1_context.linear(time), layout.text_rows, 6)
    attended_text, attended_image, seen = _joint_attention(
        block.attn,
        _modulated(block.norm1_context.norm, text, text_mod[0], text_mod[1]),
        _modulated(block.norm1.norm, image, image_mod[0], image_mod[1]),
        rotary,
        layout,
        probe,
    )
    image = image + image_mod[2] * attended_image
    image = image + image_mod[5] * block.ff(_modulated(block.norm2, image, image_mod[3], image_mod[4]))
    text = text + text_mod[2] * attended_text
    text = text + text_mod[5] * block.ff_context(_modulated(block.norm2_context, text, text_mod[3], text_mod[4]))
    return text, image, seen


def single_block(
    block: FluxSingleTransformerBlock, joint: Tensor, time: Tensor, rotary: Rotary, layout: Layout, probe: Probe | None
) -> tuple[Tensor, Responses]:
    """One single-stream block over [S, D] in request order: attention and MLP in parallel; and what `probe` sees."""
    shift, scale, gate = _modulation(block.norm.linear(time), layout.joint_rows, 3)
    normed = _modulated(block.norm.norm, joint, shift, scale)
    attn = block.attn
    attended, seen = _attention(
        _normalized(attn.norm_q, _heads(attn, attn.to_q(normed))),
        _normalized(attn.norm_k, _heads(attn, attn.to_k(normed))),
        _heads(attn, attn.to_v(normed)),
        rotary,
        layout,
        probe,
    )
    mlp = block.act_mlp(block.proj_mlp(normed))
    return joint + gate * block.proj_out(torch.cat([attended.flatten(1), mlp], dim=1)), seen


def project(model: FluxTransformer2DModel, joint: Tensor, time: Tensor, layout: Layout) -> Tensor:
    """Final norm and projection, on target tokens only: [S, D] in request order → [Σ targets, 64]."""
    image = to_stream_order(joint, layout)[layout.num_text :]
    target = torch.cat([image[span] for span in layout.targets])
    rows = torch.cat([layout.image_rows[span] for span in layout.targets])
    scale, shift = _modulation(model.norm_out.linear(time), rows, 2)
    return model.proj_out(_modulated(model.norm_out.norm, target, shift, scale))


def to_request_order(stream: Tensor, layout: Layout) -> Tensor:
    """[S, …] in stream order → request order."""
    return stream if layout.order is None else stream[layout.order]


def to_stream_order(joint: Tensor, layout: Layout) -> Tensor:
    """[S, …] in request order → stream order."""
    return joint if layout.inverse is None else joint[layout.inverse]


def _joint_attention(
    attn: FluxAttention, text: Tensor, image: Tensor, rotary: Rotary, layout: Layout, probe: Probe | None
) -> tuple[Tensor, Tensor, Responses]:
    """Attention over both streams; each is projected, normalised and projected back with its own weights."""
    query = torch.cat(
        [
            _normalized(attn.norm_added_q, _heads(attn, attn.add_q_proj(text))),
            _normalized(attn.norm_q, _heads(attn, attn.to_q(image))),
        ]
    )
    key = torch.cat(
        [
            _normalized(attn.norm_added_k, _heads(attn, attn.add_k_proj(text))),
            _normalized(attn.norm_k, _heads(attn, attn.to_k(image))),
        ]
    )
    value = torch.cat([_heads(attn, attn.add_v_proj(text)), _heads(attn, attn.to_v(image))])
    attended, seen = _attention(
        to_request_order(query, layout),
        to_request_order(key, layout),
        to_request_order(value, layout),
        rotary,
        layout,
        probe,
    )
    attended = to_stream_order(attended.flatten(1), layout)
    attended_text, attended_image = attended[: layout.num_text], attended[layout.num_text :]
    return attn.to_add_out(attended_text), attn.to_out[0](attended_image), seen


def _attention(
    query: Tensor, key: Tensor, value: Tensor, rotary: Rotary, layout: Layout, probe: Probe | None
) -> tuple[Tensor, Responses]:
    """Rotary attention over [S, H, d] in request order, after the QK norm, and what `probe` sees of it."""
    seen: Responses = ()
    if probe is not None and probe.capture.stage == "pre_rope":
        seen = observe(probe, query, key)
    query, key = _rotate(query, rotary), _rotate(key, rotary)
    if probe is not None and probe.capture.stage == "post_rope":
        seen = observe(probe, query, key)
    return packed_attention(query, key, value, layout.boundaries), seen


def _modulation(vectors: Tensor, rows: Tensor, num: int) -> tuple[Tensor, ...]:
    """[M, num·D] → `num` tensors of [tokens, D], or of [1, D] when all tokens share the only row."""
    chunks = vectors.chunk(num, dim=1)
    return chunks if vectors.shape[0] == 1 else tuple(chunk[rows] for chunk in chunks)


def _modulated(norm: torch.nn.Module, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return norm(x) * (1 + scale) + shift


def _heads(attn: FluxAttention, x: Tensor) -> Tensor:
    return rearrange(x, "s (h d) -> s h d", d=attn.head_dim)


def _normalized(norm: torch.nn.RMSNorm, x: Tensor) -> Tensor:
    """RMS norm over d in float32, rounded to the weight's dtype before the weight is applied.

    So did diffusers 0.33.1, on which DreamO was released; torch's own RMSNorm rounds once, after the weight.
    """
    variance = x.float().pow(2).mean(-1, keepdim=True)
    return (x * torch.rsqrt(variance + cast("float", norm.eps))).to(norm.weight.dtype) * norm.weight


def _rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotate interleaved pairs in float32, back to x's dtype: [S, H, d]."""
    cos, sin = rotary.cos[:, None], rotary.sin[:, None]
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-imaginary, real], dim=-1).flatten(-2)
    return (x.float() * cos + turned.float() * sin).to(x.dtype)
