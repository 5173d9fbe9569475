"""The Triton kernels of `kernels.attention`, forward and backward, and what launches them.

A program owns `rows` tokens of a tile of the pack and one head, and walks the other side of its sequence.
Shapes: S tokens of a pack, H heads, d head dimension (16, 32, 64 or 128).
"""
# ruff: noqa: ANN001, ANN201, ANN202, N803 — Triton's arguments have no Python types, and its constants are written large.
# pyright: reportMissingParameterType=false, reportInvalidTypeForm=false

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor

from kernels import packs
from kernels.jit import tl, triton_jit


@dataclass(frozen=True, slots=True)
class Block:
    """How a kernel divides its work: tokens a program owns, tokens it reads at a time, warps, stages of reading."""

    rows: int
    columns: int
    warps: int
    stages: int


DIMENSIONS: Final = (16, 32, 64, 128)
FORWARD, KEYS, QUERIES = "forward", "keys", "queries"
Blocks = Mapping[tuple[str, int], Block]
_HALF: Final[Blocks] = {
    (FORWARD, 64): Block(128, 64, 8, 3),
    (FORWARD, 128): Block(128, 64, 8, 3),
    (KEYS, 64): Block(128, 64, 8, 2),
    (KEYS, 128): Block(128, 32, 8, 2),
    (QUERIES, 64): Block(128, 64, 8, 2),
    (QUERIES, 128): Block(128, 32, 8, 2),
}
_LITTLE_SHARED: Final[Blocks] = _HALF | {
    (FORWARD, 128): Block(64, 64, 8, 2),
    (KEYS, 128): Block(64, 32, 8, 2),
    (QUERIES, 128): Block(64, 32, 8, 2),
}
BLOCKS: Final[Mapping[int, Blocks]] = {
    80: _HALF | {(FORWARD, 128): Block(128, 64, 8, 2), (KEYS, 128): Block(64, 64, 8, 2)},
    86: _LITTLE_SHARED,
    90: _HALF | {(QUERIES, 128): Block(128, 64, 8, 2)},
    100: _HALF | {(KEYS, 128): Block(128, 64, 8, 2)},
    120: _LITTLE_SHARED,
}
"""By compute capability, operation and largest head dimension. A device takes the last row not above its own.

The largest that spill nothing, with and without visibility; which of them is fastest is to be measured.
"""
WIDE_BLOCKS: Final[Blocks] = {
    (FORWARD, 64): Block(32, 32, 8, 1),
    (FORWARD, 128): Block(16, 16, 8, 1),
    (KEYS, 64): Block(32, 16, 8, 1),
    (KEYS, 128): Block(16, 16, 8, 1),
    (QUERIES, 64): Block(32, 16, 8, 1),
    (QUERIES, 128): Block(16, 16, 8, 1),
}
"""In float32, on every device: exact before fast (three products of tf32 for one)."""
DELTA_ROWS: Final = 64
LOG2E: Final = 1.4426950408889634


def block_for(stage: str, dim: int, dtype: torch.dtype, capability: int) -> Block:
    """The block of a kernel (FORWARD, KEYS or QUERIES) for heads of `dim` on a device of compute capability 90, say."""
    row = BLOCKS[max(known for known in BLOCKS if known <= capability)]
    return (WIDE_BLOCKS if dtype == torch.float32 else row)[stage, 64 if dim <= 64 else 128]


@triton_jit
def _place(tiles, ROWS: tl.constexpr, PARTS: tl.constexpr):
    """A program's own tokens, and the bounds of their sequence: empty for a part of a tile beyond its end."""
    program = tl.program_id(0)
    tile = tiles + 3 * (program // PARTS)
    first = tl.load(tile) + ROWS * (program % PARTS)
    start = tl.load(tile + 1)
    end = tl.load(tile + 2)
    return first, start, tl.where(first < end, end, start)


@triton_jit
def _tokens(base, first, token_stride, head_stride, NUMBER: tl.constexpr, DIM: tl.constexpr):
    """Pointers to [NUMBER, DIM] of the program's head."""
    base += first.to(tl.int64) * token_stride + tl.program_id(1).to(tl.int64) * head_stride
    return base + tl.arange(0, NUMBER)[:, None] * token_stride + tl.arange(0, DIM)[None, :]


@triton_jit
def _load(pointers, inside):
    """Some tokens; zeros for those that are not inside."""
    return tl.load(pointers, mask=inside[:, None], other=0.0)


@triton_jit
def forward_kernel(
    query, key, value, out, lse, tiles, kind, sees,
    query_token, query_head, key_token, key_head, value_token, value_head, out_token, out_head, num_tokens, scale,
    SEES: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr
):  # fmt: skip
    """Own queries against all keys. `scale` is log₂e / √d: exponentials are taken in base 2."""
    first, start, end = _place(tiles, ROWS, PARTS)
    row = first + tl.arange(0, ROWS)
    own = row < end
    q = _load(_tokens(query, first, query_token, query_head, ROWS, DIM), own)
    seen = tl.load(sees + row, mask=own, other=0)[:, None] if SEES else 0
    keys = _tokens(key, start, key_token, key_head, COLUMNS, DIM)
    values = _tokens(value, start, value_token, value_head, COLUMNS, DIM)
    # Of each row: the weighted sum of values so far, the largest score, the sum of weights.
    acc = tl.zeros([ROWS, DIM], tl.float32)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for at in range(start, end, COLUMNS):
        column = at + tl.arange(0, COLUMNS)
        inside = column < end
        k = _load(keys, inside)
        scores = tl.dot(q, tl.trans(k), input_precision="tf32x3")
        if SEES:
            kinds = tl.load(kind + column, mask=inside, other=0)[None, :]
            scores = tl.where(inside[None, :] & (((seen >> kinds) & 1) != 0), scores, float("-inf"))
        elif at + COLUMNS > end:
            scores = tl.where(inside[None, :], scores, float("-inf"))
        top = tl.maximum(peak, tl.max(scores, 1) * scale)
        base = top
        if SEES:  # A row may have seen nothing yet.
            base = tl.where(top == float("-inf"), 0.0, top)
        weights = tl.exp2(scores * scale - base[:, None])
        fade = tl.exp2(peak - base)
        v = _load(values, inside)
        acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None], input_precision="tf32x3")
        total = total * fade + tl.sum(weights, 1)
        peak = top
        keys += COLUMNS * key_token
        values += COLUMNS * value_token
    acc /= tl.where(total > 0.0, total, 1.0)[:, None]
    tl.store(_tokens(out, first, out_token, out_head, ROWS, DIM), acc.to(out.dtype.element_ty), mask=own[:, None])
    sums = lse + tl.program_id(1).to(tl.int64) * num_tokens + row
    tl.store(sums, (peak + tl.log2(total)) * 0.6931471805599453, mask=own)


@triton_jit
def delta_kernel(
    out, grad, grad_lse, delta, out_token, out_head, grad_token, grad_head, num_tokens,
    DIM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """D of the backward pass, [H, S]."""
    first = tl.program_id(0) * ROWS
    row = first + tl.arange(0, ROWS)
    own = row < num_tokens
    o = _load(_tokens(out, first, out_token, out_head, ROWS, DIM), own).to(tl.float32)
    do = _load(_tokens(grad, first, grad_token, grad_head, ROWS, DIM), own).to(tl.float32)
    place = tl.program_id(1).to(tl.int64) * num_tokens + row
    tl.store(delta + place, tl.sum(o * do, 1) - tl.load(grad_lse + place, mask=own, other=0.0), mask=own)


@triton_jit
def _weigh(own, others, own_given, others_given, sums, corrections, sees, kinds, scale, SEES: tl.constexpr):
    """P and dS of own tokens × others, either of which may be the queries. `sums` are log-sum-exps in base 2."""
    scores = tl.dot(own, tl.trans(others), input_precision="tf32x3")
    # Never more than 1: zeros beyond the end of a sequence may score far more than its tokens, and must not overflow.
    weights = tl.exp2(tl.minimum(scores * (scale * 1.4426950408889634) - sums, 0.0))
    if SEES:
        weights = tl.where(((sees >> kinds) & 1) != 0, weights, 0.0)
    slopes = tl.dot(own_given, tl.trans(others_given), input_precision="tf32x3")
    return weights, weights * (slopes - corrections)


@triton_jit
def keys_kernel(
    query, key, value, grad, lse, delta, grad_key, grad_value, tiles, kind, sees,
    query_token, query_head, key_token, key_head, value_token, value_head, grad_token, grad_head,
    out_token, out_head, num_tokens, scale,
    SEES: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr
):  # fmt: skip
    """Own keys and values against all queries: dK and dV. Zeros instead of queries beyond the end add nothing."""
    first, start, end = _place(tiles, ROWS, PARTS)
    row = first + tl.arange(0, ROWS)
    own = row < end
    k = _load(_tokens(key, first, key_token, key_head, ROWS, DIM), own)
    v = _load(_tokens(value, first, value_token, value_head, ROWS, DIM), own)
    kinds = tl.load(kind + row, mask=own, other=0)[:, None] if SEES else 0
    queries = _tokens(query, start, query_token, query_head, COLUMNS, DIM)
    grads = _tokens(grad, start, grad_token, grad_head, COLUMNS, DIM)
    lse += tl.program_id(1).to(tl.int64) * num_tokens
    delta += tl.program_id(1).to(tl.int64) * num_tokens
    column = start + tl.arange(0, COLUMNS)
    grad_k = tl.zeros([ROWS, DIM], tl.float32)
    grad_v = tl.zeros([ROWS, DIM], tl.float32)
    for _ in range(start, end, COLUMNS):
        inside = column < end
        q = _load(queries, inside)
        do = _load(grads, inside)
        summed = tl.load(lse + column, mask=inside, other=0.0) * 1.4426950408889634
        correction = tl.load(delta + column, mask=inside, other=0.0)
        seen = tl.load(sees + column, mask=inside, other=0)[None, :] if SEES else 0
        weights, slopes = _weigh(k, q, v, do, summed[None, :], correction[None, :], seen, kinds, scale, SEES)
        grad_v = tl.dot(weights.to(do.dtype), do, grad_v, input_precision="tf32x3")
        grad_k = tl.dot(slopes.to(q.dtype), q, grad_k, input_precision="tf32x3")
        queries += COLUMNS * query_token
        grads += COLUMNS * grad_token
        column += COLUMNS
    into = _tokens(grad_key, first, out_token, out_head, ROWS, DIM)
    tl.store(into, (grad_k * scale).to(grad_key.dtype.element_ty), mask=own[:, None])
    into = _tokens(grad_value, first, out_token, out_head, ROWS, DIM)
    tl.store(into, grad_v.to(grad_value.dtype.element_ty), mask=own[:, None])


@triton_jit
def queries_kernel(
    query, key, value, grad, lse, delta, grad_query, tiles, kind, sees,
    query_token, query_head, key_token, key_head, value_token, value_head, grad_token, grad_head,
    out_token, out_head, num_tokens, scale,
    SEES: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr
):  # fmt: skip
    """Own queries against all keys: dQ. Zeros instead of keys beyond the end add nothing."""
    first, start, end = _place(tiles, ROWS, PARTS)
    row = first + tl.arange(0, ROWS)
    own = row < end
    q = _load(_tokens(query, first, query_token, query_head, ROWS, DIM), own)
    do = _load(_tokens(grad, first, grad_token, grad_head, ROWS, DIM), own)
    seen = tl.load(sees + row, mask=own, other=0)[:, None] if SEES else 0
    place = tl.program_id(1).to(tl.int64) * num_tokens + row
    summed = tl.load(lse + place, mask=own, other=0.0)[:, None] * 1.4426950408889634
    correction = tl.load(delta + place, mask=own, other=0.0)[:, None]
    keys = _tokens(key, start, key_token, key_head, COLUMNS, DIM)
    values = _tokens(value, start, value_token, value_head, COLUMNS, DIM)
    column = start + tl.arange(0, COLUMNS)
    grad_q = tl.zeros([ROWS, DIM], tl.float32)
    for _ in range(start, end, COLUMNS):
        inside = column < end
        k = _load(keys, inside)
        v = _load(values, inside)
        kinds = tl.load(kind + column, mask=inside, other=0)[None, :] if SEES else 0
        _, slopes = _weigh(q, k, do, v, summed, correction, seen, kinds, scale, SEES)
        grad_q = tl.dot(slopes.to(k.dtype), k, grad_q, input_precision="tf32x3")
        keys += COLUMNS * key_token
        values += COLUMNS * value_token
        column += COLUMNS
    into = _tokens(grad_query, first, out_token, out_head, ROWS, DIM)
    tl.store(into, (grad_q * scale).to(grad_query.dtype.element_ty), mask=own[:, None])


Where = tuple[Tensor, Tensor | None, Tensor | None]
"""A pack's tiles; `kind` and `sees` of its visibility, or None."""


def attention_triton(query: Tensor, key: Tensor, value: Tensor, where: Where) -> tuple[Tensor, Tensor]:
    """out [S, H, d] and lse [H, S] of query, key and value [S, H, d]."""
    num_tokens, num_heads, dim = query.shape
    inputs = [_aligned(tensor) for tensor in (query, key, value)]
    out, lse = query.new_empty(query.shape), query.new_empty((num_heads, num_tokens), dtype=torch.float32)
    _launch(forward_kernel, FORWARD, inputs, [out, lse], where, _strides(*inputs, out), dim**-0.5 * LOG2E)
    return out, lse


def attention_backward_triton(
    grad: Tensor, grad_lse: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, where: Where
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, [S, H, d] each."""
    num_tokens, num_heads, dim = query.shape
    inputs = [_aligned(tensor) for tensor in (query, key, value, grad)]
    delta = torch.empty_like(lse)
    with _device_of(query):
        delta_kernel[(-(-num_tokens // DELTA_ROWS), num_heads)](
            *(out, inputs[3], grad_lse.contiguous(), delta, *_strides(out, inputs[3]), num_tokens),
            DIM=dim,
            ROWS=DELTA_ROWS,
            num_warps=4,
        )
    grads = [query.new_empty(query.shape) for _ in range(3)]
    strides = _strides(*inputs, grads[0])
    inputs += [lse, delta]
    _launch(keys_kernel, KEYS, inputs, grads[1:], where, strides, dim**-0.5)
    _launch(queries_kernel, QUERIES, inputs, grads[:1], where, strides, dim**-0.5)
    return grads[0], grads[1], grads[2]


def _launch(
    kernel: Any,
    stage: str,
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    where: Where,
    strides: Sequence[int],
    scale: float,
) -> None:
    """Launch one of the kernels that own tiles."""
    query = inputs[0]
    num_tokens, num_heads, dim = query.shape
    if dim not in DIMENSIONS:
        raise ValueError(f"heads of {dim} do not fit the Triton kernels; those of {DIMENSIONS} do")
    block = block_for(stage, dim, query.dtype, _capability(query.device))
    grid = (len(where[0]) * (packs.ROWS // block.rows), num_heads)
    with _device_of(query):
        kernel[grid](
            *(*inputs, *outputs, *where, *strides, num_tokens, scale),
            **constants(block, dim, where[2] is not None),
            num_warps=block.warps,
            num_stages=block.stages,
        )


def constants(block: Block, dim: int, sees: bool) -> dict[str, Any]:
    """A kernel's constexprs."""
    parts = packs.ROWS // block.rows
    return {"SEES": sees, "DIM": dim, "ROWS": block.rows, "COLUMNS": block.columns, "PARTS": parts}


def _strides(*tensors: Tensor) -> list[int]:
    """Steps from token to token and from head to head of each."""
    return [step for tensor in tensors for step in tensor.stride()[:2]]


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor itself, if its heads are dense and begin at multiples of 16; else a copy.

    Without that Triton reads number by number, and spills. Slices of a fused projection have it.
    """
    *steps, last = tensor.stride()
    fits = last == 1 and tensor.data_ptr() % 16 == 0 and all(step % 16 == 0 for step in steps)
    return tensor if fits else tensor.clone(memory_format=torch.contiguous_format)


def _device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


@cache
def _capability(device: torch.device) -> int:
    """90 for compute capability 9.0; the interpreter does as Hopper would."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
