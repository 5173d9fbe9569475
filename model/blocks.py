"""One block of a FLUX transformer over a packed sequence, on the parameters of diffusers' modules.

Linear layers are called as modules, so peft adapters and low-precision layers work in their place.

Shapes: T text, I image tokens, S = T + I, M modulation rows, D model width, H heads, d head dimension (D = H·d).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from diffusers.models.transformers.transformer_flux import (
    FluxAttention,
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from torch import Tensor, nn

from kernels.attention import Pack, packed_attention
from kernels.modulation import gate_residual, gate_residual_modulate, modulate
from kernels.qk_norm_rope import QKNorms, qk_norm_rope
from model.routing import Probe, Response, observe

Responses = tuple[Response, ...]
"""What a block saw; empty unless it was asked."""
Projections = tuple[nn.Module, ...]
"""The streams' q, k and v as one linear layer each, D → 3·D: text and image, or one; empty: the model's own layers."""


@dataclass(frozen=True, slots=True)
class Last:
    """What the last block computes: only the target tokens go on.

    Attributes:
        tokens: [Σ targets] their numbers in request order. rows: their modulation rows; None as in `Site`.
    """

    tokens: Tensor
    rows: Tensor | None


@dataclass(frozen=True, slots=True)
class Site:
    """Where a forward runs: what follows from a layout and is the same in all blocks and steps.

    Attributes:
        cos, sin: [S, d] float32 rotary tables, in request order (frequencies in float64, theta 10000).
        order, inverse: as in `Layout`.
        text_rows, image_rows, joint_rows: modulation row of each token; None when all use the only one.
    """

    cos: Tensor
    sin: Tensor
    order: Tensor | None
    inverse: Tensor | None
    text_rows: Tensor | None
    image_rows: Tensor | None
    joint_rows: Tensor | None
    pack: Pack
    last: Last


def double_block(
    block: FluxTransformerBlock,
    text: Tensor,
    image: Tensor,
    image_vectors: Tensor,
    text_vectors: Tensor,
    site: Site,
    fused: Projections = (),
    probe: Probe | None = None,
) -> tuple[Tensor, Tensor, Responses]:
    """One two-stream block: text [T, D] and image [I, D] attend jointly, each with its own weights.

    Args:
        image_vectors, text_vectors: [M, 6·D].
        fused: the text's and the image's projection.

    Also returns what `probe` sees in its attention.
    """
    attn = block.attn
    text_rows, image_rows = site.text_rows, site.image_rows
    image_mod, text_mod = image_vectors.chunk(6, dim=1), text_vectors.chunk(6, dim=1)
    normed_text = modulate(text, text_mod[0], text_mod[1], text_rows)
    normed_image = modulate(image, image_mod[0], image_mod[1], image_rows)
    own = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj), (attn.to_q, attn.to_k, attn.to_v)
    text_qkv = project(attn, own[0], fused[0] if fused else None, normed_text)
    image_qkv = project(attn, own[1], fused[1] if fused else None, normed_image)
    norms = norms_of(attn.norm_added_q, attn.norm_added_k, attn.norm_q, attn.norm_k)
    query, key, value, seen = queries_and_keys(text_qkv, image_qkv, norms, site, probe)
    attended = to_stream_order(packed_attention(query, key, value, site.pack).flatten(1), site)
    attended_text, attended_image = attended.split([text.shape[0], image.shape[0]])
    image = after_attention(image, attn.to_out[0](attended_image), block.ff, image_mod, image_rows)
    text = after_attention(text, attn.to_add_out(attended_text), block.ff_context, text_mod, text_rows)
    return text, image, seen


def after_attention(
    stream: Tensor, update: Tensor, feed_forward: nn.Module, vectors: tuple[Tensor, ...], rows: Tensor | None
) -> Tensor:
    """The second half of a double block for one of its streams, with its six vectors."""
    stream, normed = gate_residual_modulate(stream, update, vectors[2], vectors[3], vectors[4], rows)
    return gate_residual(stream, feed_forward(normed), vectors[5], rows)


def single_block(
    block: FluxSingleTransformerBlock,
    joint: Tensor,
    vectors: Tensor,
    site: Site,
    fused: Projections = (),
    probe: Probe | None = None,
    last: Last | None = None,
) -> tuple[Tensor, Responses]:
    """One single-stream block over [S, D] in request order: attention and MLP in parallel; and what `probe` sees.

    Args:
        vectors: [M, 3·D].
        last: compute, and return, the target tokens alone: [Σ targets, D].
    """
    shift, scale, gate = vectors.chunk(3, dim=1)
    attn, rows = block.attn, site.joint_rows
    normed = modulate(joint, shift, scale, rows)
    qkv = project(attn, (attn.to_q, attn.to_k, attn.to_v), fused[0] if fused else None, normed)
    norms = norms_of(attn.norm_q, attn.norm_k, attn.norm_q, attn.norm_k)
    query, key, value, seen = queries_and_keys(None, qkv, norms, site, probe)
    attended = packed_attention(query, key, value, site.pack).flatten(1)
    if last is not None:
        rows = last.rows
        attended, joint, normed = (tokens.index_select(0, last.tokens) for tokens in (attended, joint, normed))
    mlp = block.act_mlp(block.proj_mlp(normed))
    return gate_residual(joint, block.proj_out(torch.cat([attended, mlp], dim=1)), gate, rows), seen


def to_request_order(stream: Tensor, site: Site) -> Tensor:
    """[S, …] in stream order → request order."""
    return stream if site.order is None else stream.index_select(0, site.order)


def to_stream_order(joint: Tensor, site: Site) -> Tensor:
    """[S, …] in request order → stream order."""
    return joint if site.inverse is None else joint.index_select(0, site.inverse)


def project(attn: FluxAttention, own: tuple[nn.Module, ...], fused: nn.Module | None, x: Tensor) -> Tensor:
    """[N, D] → [N, 3, H, d]."""
    if fused is not None:
        return fused(x).unflatten(1, (3, -1, attn.head_dim))
    return torch.stack([layer(x).unflatten(1, (-1, attn.head_dim)) for layer in own], dim=1)


def norms_of(text_q: nn.Module, text_k: nn.Module, image_q: nn.Module, image_k: nn.Module) -> QKNorms:
    layers = cast("tuple[nn.RMSNorm, ...]", (text_q, text_k, image_q, image_k))
    return QKNorms(*(layer.weight for layer in layers), eps=cast("float", layers[0].eps))


def queries_and_keys(
    text_qkv: Tensor | None, image_qkv: Tensor, norms: QKNorms, site: Site, probe: Probe | None
) -> tuple[Tensor, Tensor, Tensor, Responses]:
    """Normalised and rotated q and k, and v, [S, H, d] in request order; and what `probe` sees of q and k."""
    order = None if text_qkv is None else site.order
    query, key, value = qk_norm_rope(text_qkv, image_qkv, norms, site.cos, site.sin, order)
    if probe is None:
        return query, key, value, ()
    if probe.capture.stage == "pre_rope":
        unturned = torch.ones_like(site.cos), torch.zeros_like(site.sin)
        return query, key, value, observe(probe, *qk_norm_rope(text_qkv, image_qkv, norms, *unturned, order)[:2])
    return query, key, value, observe(probe, query, key)
