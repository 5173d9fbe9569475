"""How strongly references answer to each target token (DreamO Eq. 2), without an attention matrix.

    map_i[x] = mean_q(Q_i[q]) · K[x] / sqrt(d)          x over the target's l tokens

Q_i are the queries of reference i, K the keys of the target. The mean over queries is taken before the product, with
which it commutes: O((l_i + l)·H·d) time and memory instead of O(l_i·l·H).

Shapes: as in `kernels.sites`; P pairs of a reference and its request's target. Summed in float32 or wider.

Triton reads queries and keys where attention left them, by token number: no gathered copy. Bytes, with elements of e
bytes: forward e·H·d·(Σ l_i + l) per request (l once: its references share it in L2) and 4·P·l of maps; backward as much
again for the pooled gradient, and both gradients [S, H, d] written, zeros included. 2·P·l·H·d FLOP forward, of float32.
FLUX, two references of 1024 tokens and a target of 4096: 38 MB, 9 µs at 4.3 TB/s.
"""

# Triton's arguments have no Python types, and its constants are written large.
# ruff: noqa: ANN001, ANN201, N803
# pyright: reportMissingParameterType=false, reportInvalidTypeForm=false

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import Tensor

from kernels.dispatch import choose
from kernels.jit import tl, triton_jit
from kernels.sites import Reading, read, split_maps

Heads = Literal["mean", "sum", "per_head"]
"""What becomes of the heads' maps: their mean (the default), their sum, or one map each."""


def pooled_response(references: Sequence[Tensor], target: Tensor, heads: Heads = "mean") -> Tensor:
    """Equation 2 averaged over each reference's queries.

    Args:
        references: n tensors [R, l_j, H, d]. target: [R, l, H, d].

    Returns:
        [R, n, l], or [R, n, H, l] for `per_head`; float32 or wider.
    """
    wide = torch.promote_types(target.dtype, torch.float32)
    num_heads, head_dim = target.shape[-2:]
    pooled = torch.stack([query.mean(1, dtype=wide) for query in references], 1) * head_dim**-0.5
    if heads == "per_head":
        return torch.einsum("rnhd,rlhd->rnhl", pooled, target.to(wide))
    # The heads' products add up in one product over all H·d channels.
    share = 1 / num_heads if heads == "mean" else 1.0
    return (pooled * share).flatten(2) @ target.to(wide).flatten(2).mT


def pooled_maps_reference(
    query: Tensor, key: Tensor, reading: Reading, heads: Heads = "mean"
) -> tuple[Tensor | None, ...]:
    """See `pooled_maps`."""
    return tuple(
        None if seen.target is None else pooled_response(seen.references, seen.target, heads)
        for seen in read(query, key, reading)
    )


# Rows of `pairs` and `requests`: `kernels.sites.Reading`. A program of `pool` and `spread` has one head, one of `dot`
# all; the heads of a token lie side by side, so programs that run together read whole tokens.


@dataclass(frozen=True, slots=True)
class Tile:
    """Tokens per program step, and warps."""

    tokens: int
    warps: int


POOL: Final = Tile(64, 4)
POOLED_TOKENS: Final = 256
"""Tokens a program of `pool` walks: 1024 of two references and 24 heads are 192 programs."""
DOT: Final = Tile(16, 4)
"""4096 tokens of a target and two references are 512 programs, each with four heads' keys under way."""
SPREAD: Final = Tile(32, 4)


@triton_jit
def pool(
    x,
    index,
    weights,
    pairs,
    partial,
    token_stride,
    head_stride,
    dim,
    walked,
    COLUMN: tl.constexpr,
    WEIGHTED: tl.constexpr,
    PER_HEAD: tl.constexpr,
    TOKENS: tl.constexpr,
    DIM: tl.constexpr,
):
    """partial[pair, piece, head] = Σ w[t] · x[index[t], head] over the pair's queries (COLUMN 0) or keys (2)."""
    head, pair, piece = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_heads = tl.num_programs(0)
    first = tl.load(pairs + pair * 5 + COLUMN)
    length = tl.load(pairs + pair * 5 + COLUMN + 1)
    end = tl.minimum(length, (piece + 1) * walked)
    channel = tl.arange(0, DIM)
    total = tl.zeros([TOKENS, DIM], tl.float32)
    for begin in range(piece * walked, end, TOKENS):
        place = begin + tl.arange(0, TOKENS)
        present = place < end
        token = tl.load(index + first + place, mask=present, other=0).to(tl.int64)[:, None]
        inside = present[:, None] & (channel < dim)[None, :]
        values = tl.load(x + token * token_stride + head * head_stride + channel[None, :], mask=inside, other=0.0)
        if WEIGHTED:
            start = tl.load(pairs + pair * 5 + 4)
            if PER_HEAD:
                start = start * num_heads + head * length
            total += values.to(tl.float32) * tl.load(weights + start + place, mask=present, other=0.0)[:, None]
        else:
            total += values.to(tl.float32)
    summed = tl.sum(total, 0)
    if not WEIGHTED:
        summed = summed / length
    cell = (pair * tl.num_programs(2) + piece) * num_heads + head
    tl.store(partial + cell * dim + channel, summed, mask=channel < dim)


@triton_jit
def dot(
    pooled,
    key,
    index,
    pairs,
    maps,
    token_stride,
    head_stride,
    num_heads,
    dim,
    scale,
    PER_HEAD: tl.constexpr,
    TOKENS: tl.constexpr,
    DIM: tl.constexpr,
):
    """maps[pair, x] = scale · Σ_head pooled[pair, head] · key[index[x], head], or each head's own."""
    pair = tl.program_id(0)
    first = tl.load(pairs + pair * 5 + 2)
    length = tl.load(pairs + pair * 5 + 3)
    start = tl.load(pairs + pair * 5 + 4)
    if tl.program_id(1) * TOKENS < length:
        place = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
        present = place < length
        token = tl.load(index + first + place, mask=present, other=0).to(tl.int64)[:, None]
        channel = tl.arange(0, DIM)
        inside = present[:, None] & (channel < dim)[None, :]
        total = tl.zeros([TOKENS, DIM], tl.float32)
        for head in tl.range(0, num_heads, loop_unroll_factor=4):
            keys = tl.load(key + token * token_stride + head * head_stride + channel[None, :], mask=inside, other=0.0)
            vector = tl.load(pooled + (pair * num_heads + head) * dim + channel, mask=channel < dim, other=0.0)
            product = keys.to(tl.float32) * vector[None, :]
            if PER_HEAD:
                own = maps + start * num_heads + head * length + place
                tl.store(own, tl.sum(product, 1) * scale, mask=present)
            else:
                total += product
        if not PER_HEAD:
            tl.store(maps + start + place, tl.sum(total, 1) * scale, mask=present)


@triton_jit
def spread(
    vectors,
    weights,
    index,
    requests,
    pairs,
    out,
    dim,
    scale,
    WEIGHTED: tl.constexpr,
    PER_HEAD: tl.constexpr,
    TOKENS: tl.constexpr,
    DIM: tl.constexpr,
):
    """out[index[t], head] = scale · Σ_i w_i[t] · vectors[i, head].

    WEIGHTED: over a request's keys and its pairs i. Otherwise over a pair's queries, each with a weight of 1 / number.
    """
    head, owner = tl.program_id(0), tl.program_id(1)
    num_heads = tl.num_programs(0)
    if WEIGHTED:
        first, length = tl.load(requests + owner * 4), tl.load(requests + owner * 4 + 1)
    else:
        first, length = tl.load(pairs + owner * 5), tl.load(pairs + owner * 5 + 1)
    if tl.program_id(2) * TOKENS < length:
        place = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
        present = place < length
        channel = tl.arange(0, DIM)
        total = tl.zeros([TOKENS, DIM], tl.float32)
        if WEIGHTED:
            pair = tl.load(requests + owner * 4 + 2)
            for number in range(tl.load(requests + owner * 4 + 3)):
                start = tl.load(pairs + (pair + number) * 5 + 4)
                if PER_HEAD:
                    start = start * num_heads + head * length
                weight = tl.load(weights + start + place, mask=present, other=0.0)
                cell = (pair + number) * num_heads + head
                vector = tl.load(vectors + cell * dim + channel, mask=channel < dim, other=0.0)
                total += weight[:, None] * vector[None, :]
        else:
            vector = tl.load(vectors + (owner * num_heads + head) * dim + channel, mask=channel < dim, other=0.0)
            total += (vector / length)[None, :]
        token = tl.load(index + first + place, mask=present, other=0).to(tl.int64)[:, None]
        inside = present[:, None] & (channel < dim)[None, :]
        cells = out + (token * num_heads + head) * dim + channel[None, :]
        tl.store(cells, (total * scale).to(out.dtype.element_ty), mask=inside)


def block_for(dim: int) -> int:
    """`dim` padded to a power of two, 16 at least."""
    return max(16, 1 << (dim - 1).bit_length())


def pool_triton(
    x: Tensor, index: Tensor, pairs: Tensor, longest: int, weights: Tensor | None, per_head: bool
) -> Tensor:
    """[P, H, d] float32: of x [S, H, d], each pair's mean query; or with `weights`, laid out as maps, sum of keys."""
    (num_pairs, _), (_, num_heads, dim) = pairs.shape, x.shape
    pieces = max(1, -(-longest // POOLED_TOKENS))
    partial = torch.empty(num_pairs, pieces, num_heads, dim, dtype=torch.float32, device=x.device)
    pool[(num_heads, num_pairs, pieces)](
        *(x, index, partial if weights is None else weights, pairs, partial, *x.stride()[:2], dim, POOLED_TOKENS),
        COLUMN=0 if weights is None else 2,
        WEIGHTED=weights is not None,
        PER_HEAD=per_head,
        TOKENS=POOL.tokens,
        DIM=block_for(dim),
        num_warps=POOL.warps,
    )
    return partial.sum(1)


def dot_triton(
    pooled: Tensor, key: Tensor, keys: Tensor, pairs: Tensor, longest: int, num_maps: int, scale: float, per_head: bool
) -> Tensor:
    """All maps, flat, of pooled [P, H, d] and key [S, H, d]."""
    _, num_heads, dim = key.shape
    maps = torch.empty(num_maps * (num_heads if per_head else 1), dtype=torch.float32, device=key.device)
    dot[(pairs.shape[0], -(-longest // DOT.tokens))](
        *(pooled, key, keys, pairs, maps, *key.stride()[:2], num_heads, dim, scale),
        PER_HEAD=per_head,
        TOKENS=DOT.tokens,
        DIM=block_for(dim),
        num_warps=DOT.warps,
    )
    return maps


def spread_triton(
    vectors: Tensor,
    like: Tensor,
    index: Tensor,
    owners: int,
    requests: Tensor,
    pairs: Tensor,
    longest: int,
    weights: Tensor | None,
    scale: float,
    per_head: bool,
) -> Tensor:
    """Gradient of `like` [S, H, d]: zero but where tokens were read."""
    _, num_heads, dim = like.shape
    out = torch.zeros(like.shape, dtype=like.dtype, device=like.device)
    spread[(num_heads, owners, -(-longest // SPREAD.tokens))](
        *(vectors, vectors if weights is None else weights, index, requests, pairs, out, dim, scale),
        WEIGHTED=weights is not None,
        PER_HEAD=per_head,
        TOKENS=SPREAD.tokens,
        DIM=block_for(dim),
        num_warps=SPREAD.warps,
    )
    return out


# Operations that torch.compile takes as they are. `spans` is (longest reference, longest target, elements of all maps).


@torch.library.custom_op("dreamserve::pooled_response", mutates_args=())
def pooled_response_op(
    query: Tensor,
    key: Tensor,
    queries: Tensor,
    keys: Tensor,
    pairs: Tensor,
    requests: Tensor,  # noqa: ARG001
    spans: Sequence[int],
    scale: float,
    per_head: bool,
) -> tuple[Tensor, Tensor]:
    """Maps, flat, and the pooled queries [P, H, d]. `requests` is for the backward pass."""
    pooled = pool_triton(query, queries, pairs, spans[0], None, per_head)
    return dot_triton(pooled, key, keys, pairs, spans[1], spans[2], scale, per_head), pooled


@pooled_response_op.register_fake
def _(query: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    _, _, _, pairs, _, spans, _, per_head = others
    _, num_heads, dim = query.shape
    maps = query.new_empty(spans[2] * (num_heads if per_head else 1), dtype=torch.float32)
    return maps, query.new_empty((pairs.shape[0], num_heads, dim), dtype=torch.float32)


@torch.library.custom_op("dreamserve::pooled_response_backward", mutates_args=())
def pooled_response_backward_op(
    grad: Tensor,
    pooled: Tensor,
    query: Tensor,
    key: Tensor,
    queries: Tensor,
    keys: Tensor,
    pairs: Tensor,
    requests: Tensor,
    spans: Sequence[int],
    scale: float,
    per_head: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of query and key [S, H, d] from that of the maps."""
    grad = grad.contiguous()
    moved = pool_triton(key, keys, pairs, spans[1], grad, per_head)
    tables = (requests, pairs)
    num_pairs, num_requests = pairs.shape[0], requests.shape[0]
    return (
        spread_triton(moved, query, queries, num_pairs, *tables, spans[0], None, scale, per_head),
        spread_triton(pooled, key, keys, num_requests, *tables, spans[1], grad, scale, per_head),
    )


@pooled_response_backward_op.register_fake
def _(_grad: Tensor, _pooled: Tensor, query: Tensor, key: Tensor, *_others: Any) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.spans, ctx.scale, ctx.per_head = inputs
    ctx.save_for_backward(output[1], *tensors)


def _backward(ctx: Any, grad: Tensor, _pooled: Tensor) -> tuple[Tensor | None, ...]:
    grads = pooled_response_backward_op(grad, *ctx.saved_tensors, ctx.spans, ctx.scale, ctx.per_head)
    return (*grads, *[None] * 7)


pooled_response_op.register_autograd(_backward, setup_context=_remember)


def pooled_maps(
    query: Tensor, key: Tensor, reading: Reading, heads: Heads = "mean", *, backend: str | None = None
) -> tuple[Tensor | None, ...]:
    """Equation 2 for all references of a pack: per group [R, n, l], or [R, n, H, l] for `per_head`; wide floats.

    Args:
        query, key: [S, H, d] in request order, any strides but the last, which is 1.
        backend: "triton" or "reference"; otherwise `kernels.dispatch` chooses.
    """
    if (backend or chosen(query)) == "reference" or not reading.num_maps:
        return pooled_maps_reference(query, key, reading, heads)
    num_heads, dim = query.shape[1:]
    scale = dim**-0.5 / (num_heads if heads == "mean" else 1)
    spans = [reading.longest_reference, reading.longest_target, reading.num_maps]
    tables = (reading.queries, reading.keys, reading.pairs, reading.requests)
    per_head = heads == "per_head"
    maps, _ = pooled_response_op(query, key, *tables, spans, scale, per_head)
    return split_maps(maps, reading, num_heads if per_head else None)


def chosen(query: Tensor) -> str:
    """The backend for queries like these."""
    learning = torch.is_grad_enabled() and query.requires_grad
    return choose("pooled_response", query, size=query.shape[0], gradient=learning)
