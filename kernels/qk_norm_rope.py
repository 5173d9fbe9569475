"""Root-mean-square norm and rotary embedding of queries and keys, from the fused QKV projections, in one pass.

    n[s, h] = x[s, h] / sqrt(mean(x[s, h]²) + eps) · w        x: the query or key of stream token order[s]
    q[s, h, 2i]     = n[2i] · cos[s, 2i]     − n[2i + 1] · sin[s, 2i]
    q[s, h, 2i + 1] = n[2i + 1] · cos[s, 2i + 1] + n[2i] · sin[s, 2i + 1]

Values only change places. Text and image tokens have weights of their own; one launch serves both and leaves the
tokens in request order, so that no stream is concatenated or gathered beforehand.

Shapes: T text, I image tokens, S = T + I, H heads, d head dimension; text_qkv [T, 3, H, d], image_qkv [I, 3, H, d],
weights [d], cos and sin [S, d] float32, order [S]; q, k, v [S, H, d].

Bytes per token in bfloat16: 12·H·d + 8·d forward (6 read, 6 written, and the tables, which the caches hold for a
token's heads), 8·H·d + 8·d where values may stay in place; 16·H·d + 8·d backward, and 4 float32 vectors of d per piece
of 16 tokens and 8 heads where the weights learn. About 10 FLOP per element: memory-bound.
"""
# Kernels name their sizes in capitals, and Triton wants no other types.
# ruff: noqa: ANN001, ANN201, ANN202, N803, PLR0915
# pyright: reportMissingParameterType=false, reportInvalidTypeForm=false

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from kernels.dispatch import choose
from kernels.jit import tl, triton_jit

Maybe = Tensor | None


@dataclass(frozen=True, slots=True)
class QKNorms:
    """Weights [d] of a block's norms; a single block has no text stream. `eps` is added to the mean of squares."""

    text_q: Maybe
    text_k: Maybe
    image_q: Tensor
    image_k: Tensor
    eps: float = 1e-6


# Reference: operation for operation what the recorded pipeline computes.


def qk_norm_rope_reference(
    text_qkv: Maybe, image_qkv: Tensor, norms: QKNorms, cos: Tensor, sin: Tensor, order: Maybe
) -> tuple[Tensor, Tensor, Tensor]:
    """See `qk_norm_rope`; q and k have the weights' dtype here."""
    query, key, value = image_qkv.unbind(1)
    query, key = _normalized(query, norms.image_q, norms.eps), _normalized(key, norms.image_k, norms.eps)
    if text_qkv is not None and norms.text_q is not None and norms.text_k is not None:
        text_query, text_key, text_value = text_qkv.unbind(1)
        query = torch.cat([_normalized(text_query, norms.text_q, norms.eps), query])
        key = torch.cat([_normalized(text_key, norms.text_k, norms.eps), key])
        value = torch.cat([text_value, value])
    if order is not None:
        query, key, value = query[order], key[order], value[order]
    return _rotated(query, cos, sin), _rotated(key, cos, sin), value


def _normalized(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm over d in float32, rounded to the weight's dtype before the weight is applied.

    So did diffusers 0.33.1, on which DreamO was released; torch's own RMSNorm rounds once, after the weight.
    """
    variance = _wide(x).pow(2).mean(-1, keepdim=True)
    return (x * torch.rsqrt(variance + eps)).to(weight.dtype) * weight


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate interleaved pairs in float32, back to x's dtype: [S, H, d]."""
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-imaginary, real], dim=-1).flatten(-2)
    return (_wide(x) * cos[:, None] + _wide(turned) * sin[:, None]).to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


# Triton: float32 inside, rounded once.

ELEMENTS: Final = 1024
"""Of q, of k and of v in a program: with 4 warps each thread has one 16-byte load of each under way."""
HEADS: Final = 8
"""Heads of a token in a program, which share its rows of the tables. 24 heads are three programs."""
WARPS: Final = 4
PIECE: Final = 16
"""Tokens a program of the backward pass walks where the weights learn."""


def sizes_for(num_heads: int, head_dim: int) -> dict[str, int]:
    """How a launch divides heads and tokens; a program's heads and their dimension are padded to powers of two."""
    block_heads = min(HEADS, _power_of_two(num_heads))
    block_dim = _power_of_two(head_dim)
    return {
        "NUM_HEADS": num_heads,
        "DIM": head_dim,
        "BLOCK_HEADS": block_heads,
        "BLOCK_DIM": block_dim,
        "TOKENS": max(1, ELEMENTS // (block_heads * block_dim)),
        "num_warps": WARPS,
    }


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


@triton_jit
def _pairs(x, HALF: tl.constexpr):
    """[tokens, heads, d] → its even and its odd elements, [tokens, heads, d / 2] each."""
    return tl.split(tl.reshape(x, [x.shape[0], x.shape[1], HALF, 2]))


@triton_jit
def _turned(x, weight, cos, sin, eps, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """Norm and rotation of a tile; all are [tokens, heads, d]."""
    x = x.to(tl.float32)
    x *= tl.rsqrt(tl.sum(x * x, 2) / DIM + eps)[:, :, None]
    real, imaginary = _pairs(x * weight, BLOCK_DIM // 2)
    cos_even, cos_odd = _pairs(cos, BLOCK_DIM // 2)
    sin_even, sin_odd = _pairs(sin, BLOCK_DIM // 2)
    turned = tl.join(real * cos_even - imaginary * sin_even, imaginary * cos_odd + real * sin_odd)
    return tl.reshape(turned, [x.shape[0], x.shape[1], BLOCK_DIM])


@triton_jit
def _turned_gradient(x, given, weight, cos, sin, eps, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """Gradients of x and, per token and head, of the weight, where `given` is that of `_turned`."""
    x = x.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, 2) / DIM + eps)[:, :, None]
    normal = x * rstd
    even, odd = _pairs(given.to(tl.float32), BLOCK_DIM // 2)
    cos_even, cos_odd = _pairs(cos, BLOCK_DIM // 2)
    sin_even, sin_odd = _pairs(sin, BLOCK_DIM // 2)
    back = tl.join(even * cos_even + odd * sin_odd, odd * cos_odd - even * sin_even)
    back = tl.reshape(back, [x.shape[0], x.shape[1], BLOCK_DIM])
    inner = back * weight
    along = tl.sum(inner * normal, 2)[:, :, None] / DIM
    return (inner - normal * along) * rstd, back * normal


@triton_jit
def _weights(text, image, from_text, column, mask, TEXT: tl.constexpr):
    """Each token's norm weights."""
    source = image
    if TEXT:
        source = tl.where(from_text, text, image)[:, None, None]
    return tl.load(source + column, mask=mask, other=0.0).to(tl.float32)


@triton_jit
def forward_kernel(
    text, image, text_q, text_k, image_q, image_k, cos, sin, order, query, key, value,
    num_tokens, num_text, text_stride, image_stride, eps,
    NUM_HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_DIM: tl.constexpr,
    TOKENS: tl.constexpr, TEXT: tl.constexpr, ORDERED: tl.constexpr, VALUED: tl.constexpr,
):  # fmt: skip
    """A program: TOKENS tokens, BLOCK_HEADS of their heads, all of d."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    column = tl.arange(0, BLOCK_DIM)
    present = token < num_tokens
    stream = token
    if ORDERED:
        stream = tl.load(order + token, mask=present, other=0).to(tl.int64)
    source = image + (stream - num_text) * image_stride
    from_text = stream < num_text
    if TEXT:
        source = tl.where(from_text, text + stream * text_stride, source)
    inside = present[:, None, None] & (head < NUM_HEADS)[None, :, None] & (column < DIM)[None, None, :]
    within = head[None, :, None] * DIM + column[None, None, :]
    read = source[:, None, None] + within
    write = token[:, None, None] * (NUM_HEADS * DIM) + within
    q = tl.load(read, mask=inside, other=0.0)
    k = tl.load(read + NUM_HEADS * DIM, mask=inside, other=0.0)
    if VALUED:
        v = tl.load(read + 2 * NUM_HEADS * DIM, mask=inside, other=0.0)
        tl.store(value + write, v, mask=inside)
    # Addressed by head, though heads share them: so threads that have an element of q also get what goes with it.
    channel = head[None, :, None] * 0 + column[None, None, :]
    table = token[:, None, None] * DIM + channel
    cosine = tl.load(cos + table, mask=inside, other=0.0).to(tl.float32)
    sine = tl.load(sin + table, mask=inside, other=0.0).to(tl.float32)
    q_weight = _weights(text_q, image_q, from_text, channel, inside, TEXT)
    k_weight = _weights(text_k, image_k, from_text, channel, inside, TEXT)
    q = _turned(q, q_weight, cosine, sine, eps, DIM, BLOCK_DIM)
    tl.store(query + write, q.to(query.dtype.element_ty), mask=inside)
    k = _turned(k, k_weight, cosine, sine, eps, DIM, BLOCK_DIM)
    tl.store(key + write, k.to(key.dtype.element_ty), mask=inside)


@triton_jit
def backward_kernel(
    text, image, text_q, text_k, image_q, image_k, cos, sin, order, d_query, d_key, d_value, d_text, d_image, partial,
    num_tokens, num_text, text_stride, image_stride, eps,
    NUM_HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_DIM: tl.constexpr,
    TOKENS: tl.constexpr, PIECE: tl.constexpr, TEXT: tl.constexpr, ORDERED: tl.constexpr, VALUED: tl.constexpr,
    REDUCED: tl.constexpr,
):  # fmt: skip
    """A program: PIECE tokens, TOKENS at a time, and BLOCK_HEADS of their heads. `order` is a permutation."""
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    column = tl.arange(0, BLOCK_DIM)
    within = head[None, :, None] * DIM + column[None, None, :]
    channel = head[None, :, None] * 0 + column[None, None, :]
    held = (head < NUM_HEADS)[None, :, None] & (column < DIM)[None, None, :]
    text_q_sum = tl.zeros([BLOCK_HEADS, BLOCK_DIM], tl.float32)
    text_k_sum = tl.zeros([BLOCK_HEADS, BLOCK_DIM], tl.float32)
    image_q_sum = tl.zeros([BLOCK_HEADS, BLOCK_DIM], tl.float32)
    image_k_sum = tl.zeros([BLOCK_HEADS, BLOCK_DIM], tl.float32)
    for first in range(0, PIECE, TOKENS):
        token = tl.program_id(0).to(tl.int64) * PIECE + first + tl.arange(0, TOKENS)
        present = token < num_tokens
        stream = token
        if ORDERED:
            stream = tl.load(order + token, mask=present, other=0).to(tl.int64)
        source = image + (stream - num_text) * image_stride
        target = d_image + (stream - num_text) * (3 * NUM_HEADS * DIM)
        from_text = stream < num_text
        if TEXT:
            source = tl.where(from_text, text + stream * text_stride, source)
            target = tl.where(from_text, d_text + stream * (3 * NUM_HEADS * DIM), target)
        inside = present[:, None, None] & held
        read = source[:, None, None] + within
        write = target[:, None, None] + within
        given = token[:, None, None] * (NUM_HEADS * DIM) + within
        dq = tl.load(d_query + given, mask=inside, other=0.0)
        dk = tl.load(d_key + given, mask=inside, other=0.0)
        q = tl.load(read, mask=inside, other=0.0)
        k = tl.load(read + NUM_HEADS * DIM, mask=inside, other=0.0)
        dv = tl.zeros([TOKENS, BLOCK_HEADS, BLOCK_DIM], d_image.dtype.element_ty)
        if VALUED:
            dv = tl.load(d_value + given, mask=inside, other=0.0)
        tl.store(write + 2 * NUM_HEADS * DIM, dv, mask=inside)
        table = token[:, None, None] * DIM + channel
        cosine = tl.load(cos + table, mask=inside, other=0.0).to(tl.float32)
        sine = tl.load(sin + table, mask=inside, other=0.0).to(tl.float32)
        weight = _weights(text_q, image_q, from_text, channel, inside, TEXT)
        dq, dq_weight = _turned_gradient(q, dq, weight, cosine, sine, eps, DIM, BLOCK_DIM)
        tl.store(write, dq.to(d_image.dtype.element_ty), mask=inside)
        weight = _weights(text_k, image_k, from_text, channel, inside, TEXT)
        dk, dk_weight = _turned_gradient(k, dk, weight, cosine, sine, eps, DIM, BLOCK_DIM)
        tl.store(write + NUM_HEADS * DIM, dk.to(d_image.dtype.element_ty), mask=inside)
        if REDUCED:
            of_text = from_text[:, None, None]
            image_q_sum += tl.sum(tl.where(of_text, 0.0, dq_weight), 0)
            image_k_sum += tl.sum(tl.where(of_text, 0.0, dk_weight), 0)
            if TEXT:
                text_q_sum += tl.sum(tl.where(of_text, dq_weight, 0.0), 0)
                text_k_sum += tl.sum(tl.where(of_text, dk_weight, 0.0), 0)
    if REDUCED:
        sums = partial + (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * (4 * DIM) + column
        tl.store(sums, tl.sum(text_q_sum, 0), mask=column < DIM)
        tl.store(sums + DIM, tl.sum(text_k_sum, 0), mask=column < DIM)
        tl.store(sums + 2 * DIM, tl.sum(image_q_sum, 0), mask=column < DIM)
        tl.store(sums + 3 * DIM, tl.sum(image_k_sum, 0), mask=column < DIM)


@torch.library.custom_op("dreamserve::qk_norm_rope", mutates_args=())
def qk_norm_rope_triton(
    text_qkv: Maybe, image_qkv: Tensor, text_q: Maybe, text_k: Maybe, image_q: Tensor, image_k: Tensor,
    cos: Tensor, sin: Tensor, order: Maybe, eps: float, valued: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The forward; v is empty unless `valued`."""
    query, key, value = _outputs(text_qkv, image_qkv, valued)
    text, image = _dense(text_qkv), _dense(image_qkv)
    num_tokens, num_heads, head_dim = query.shape
    sizes = sizes_for(num_heads, head_dim)
    order = None if order is None else order.contiguous()
    grid = (-(-num_tokens // sizes["TOKENS"]), -(-num_heads // sizes["BLOCK_HEADS"]))
    forward_kernel[grid](
        *(text, image, text_q, text_k, image_q, image_k, cos.contiguous(), sin.contiguous(), order, query, key, value),
        *(num_tokens, num_tokens - len(image_qkv), _stride(text), _stride(image), eps),
        TEXT=text is not None,
        ORDERED=order is not None,
        VALUED=valued,
        **sizes,
    )
    return query, key, value


@torch.library.custom_op("dreamserve::qk_norm_rope_backward", mutates_args=())
def qk_norm_rope_backward_triton(
    text_qkv: Maybe, image_qkv: Tensor, text_q: Maybe, text_k: Maybe, image_q: Tensor, image_k: Tensor,
    cos: Tensor, sin: Tensor, order: Maybe, d_query: Tensor, d_key: Tensor, d_value: Maybe, eps: float, reduced: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of text_qkv (empty without text) and image_qkv, and float32 [4, d] of the weights if `reduced`."""
    d_text, d_image, _ = _gradients(text_qkv, image_qkv, reduced)
    text, image = _dense(text_qkv), _dense(image_qkv)
    num_tokens, num_heads, head_dim = d_query.shape
    sizes = sizes_for(num_heads, head_dim)
    order = None if order is None else order.contiguous()
    piece = max(PIECE, sizes["TOKENS"]) if reduced else sizes["TOKENS"]
    grid = (-(-num_tokens // piece), -(-num_heads // sizes["BLOCK_HEADS"]))
    partial = d_image.new_empty((*grid, 4, head_dim) if reduced else (0,), dtype=torch.float32)
    given = [None if gradient is None else gradient.contiguous() for gradient in (d_query, d_key, d_value)]
    backward_kernel[grid](
        *(text, image, text_q, text_k, image_q, image_k, cos.contiguous(), sin.contiguous(), order),
        *(*given, d_text, d_image, partial),
        *(num_tokens, num_tokens - len(image_qkv), _stride(text), _stride(image), eps),
        PIECE=piece,
        TEXT=text is not None,
        ORDERED=order is not None,
        VALUED=d_value is not None,
        REDUCED=reduced,
        **sizes,
    )
    return d_text, d_image, partial.sum((0, 1)) if reduced else partial


def _outputs(text_qkv: Maybe, image_qkv: Tensor, valued: bool) -> tuple[Tensor, Tensor, Tensor]:
    num_tokens = image_qkv.shape[0] + (0 if text_qkv is None else text_qkv.shape[0])
    shape = (num_tokens, *image_qkv.shape[2:])
    return image_qkv.new_empty(shape), image_qkv.new_empty(shape), image_qkv.new_empty(shape if valued else (0,))


def _gradients(text_qkv: Maybe, image_qkv: Tensor, reduced: bool) -> tuple[Tensor, Tensor, Tensor]:
    return (
        image_qkv.new_empty((0,) if text_qkv is None else text_qkv.shape),
        image_qkv.new_empty(image_qkv.shape),
        image_qkv.new_empty((4, image_qkv.shape[-1]) if reduced else (0,), dtype=torch.float32),
    )


def _dense(qkv: Maybe) -> Maybe:
    """Tokens may be strided (a slice of a wider projection), what belongs to one may not."""
    if qkv is None or qkv.stride()[1:] == (qkv.shape[2] * qkv.shape[3], qkv.shape[3], 1):
        return qkv
    return qkv.contiguous()


def _stride(qkv: Maybe) -> int:
    return 0 if qkv is None else qkv.stride(0)


# What autograd and torch.compile see.

qk_norm_rope_triton.register_fake(lambda text, image, *others: _outputs(text, image, others[-1]))
qk_norm_rope_backward_triton.register_fake(lambda text, image, *others: _gradients(text, image, others[-1]))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:  # noqa: ARG001
    *tensors, ctx.eps, ctx.valued = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, d_query: Tensor, d_key: Tensor, d_value: Tensor) -> tuple[Maybe, ...]:
    saved = ctx.saved_tensors
    reduced = any(ctx.needs_input_grad[2:6])
    d_text, d_image, d_weights = qk_norm_rope_backward_triton(
        *saved, d_query, d_key, d_value if ctx.valued else None, ctx.eps, reduced
    )
    weights = d_weights.unbind(0) if reduced else (None,) * 4
    cast = (None if g is None or w is None else g.to(w.dtype) for g, w in zip(weights, saved[2:6], strict=True))
    return (None if saved[0] is None else d_text, d_image, *cast, *(None,) * 5)


qk_norm_rope_triton.register_autograd(_differentiate, setup_context=_keep)


def qk_norm_rope(
    text_qkv: Maybe, image_qkv: Tensor, norms: QKNorms, cos: Tensor, sin: Tensor, order: Maybe, *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Queries and keys, normed and rotated, and values, [S, H, d] each, in request order.

    q and k are contiguous. So is v, except that without text and order it is the view of `image_qkv` that it already
    was, if nothing is to learn from it or it comes from the reference.

    Args:
        text_qkv: [T, 3, H, d]; None: there is no text stream (single blocks). image_qkv: [I, 3, H, d].
        cos, sin: [S, d] float32, in request order.
        order: [S] stream token (< T: text, else image) of each token in request order, a permutation; None: the same.
        backend: "triton" or "reference"; None: what `dispatch` says.
    """
    weights = (norms.text_q, norms.text_k, norms.image_q, norms.image_k)
    learning = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (text_qkv, image_qkv, *weights)
    )
    if (backend or choose("qk_norm_rope", image_qkv, size=len(cos), gradient=learning)) == "reference":
        return qk_norm_rope_reference(text_qkv, image_qkv, norms, cos, sin, order)
    valued = learning or text_qkv is not None or order is not None
    query, key, value = qk_norm_rope_triton(text_qkv, image_qkv, *weights, cos, sin, order, norms.eps, valued)
    return query, key, value if valued else image_qkv[:, 2]
