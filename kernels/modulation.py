"""LayerNorm with a shift and scale, and the gated residual, where each token names the row it is modulated by.

    gate_residual:            z[n] = x[n] + gate[r] · update[n]                          r = rows[n]
    modulate:                 y[n] = (x[n] − mean) / sqrt(var + eps) · (1 + scale[r]) + shift[r]
    gate_residual_modulate:   z, and y of z: between attention and MLP a double block needs both

Shapes: N tokens, D width, M modulation rows; x, update, y, z [N, D]; shift, scale, gate [M, D] or strided views of
[M, k·D]; rows [N], any numbers in any order (in a pack they are runs). The mean and variance are taken over D.

Bytes per element in bfloat16, rows and their vectors not counted (they stay in L1 and L2):

    forward:  modulate 4, gate_residual 6, both in one pass 8 instead of 10
    backward: modulate 6, gate_residual 6, both in one pass 12 instead of 18 (the sum of z's two gradients is one more)

plus, where shift, scale or gate learn, one float32 vector of each per piece of 32 tokens (16 in short packs) and row in
it, written and read once: 0.25 bytes more per element and vector. They are summed in a fixed order, without atomics.
About 10 FLOP per element: all of it is memory-bound.
"""
# Kernels name their sizes in capitals, and Triton wants no other types.
# ruff: noqa: ANN001, ANN201, ANN202, N803, PLR0912, PLR0915
# pyright: reportMissingParameterType=false, reportInvalidTypeForm=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

from functools import reduce
from typing import Any, Final, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.dispatch import choose
from kernels.jit import tl, triton_jit

Maybe = Tensor | None

# Reference: operation for operation what the recorded pipeline computes, each rounded to the tensors' dtype.


def modulate_reference(x: Tensor, shift: Tensor, scale: Tensor, rows: Maybe, eps: float = 1e-6) -> Tensor:
    """See `modulate`."""
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + _per_token(scale, rows)) + _per_token(shift, rows)


def gate_residual_reference(x: Tensor, update: Tensor, gate: Tensor, rows: Maybe) -> Tensor:
    """See `gate_residual`."""
    return x + _per_token(gate, rows) * update


def gate_residual_modulate_reference(
    x: Tensor, update: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, rows: Maybe, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """See `gate_residual_modulate`."""
    gated = gate_residual_reference(x, update, gate, rows)
    return gated, modulate_reference(gated, shift, scale, rows, eps)


def _per_token(vectors: Tensor, rows: Maybe) -> Tensor:
    """[M, D] → [N, D]; [1, D] where all tokens share the only row, which spares the gather."""
    return vectors[:1] if rows is None or vectors.shape[0] == 1 else vectors[rows]


# Triton: float32 inside, rounded once.


Tiles = tuple[tuple[int, int, int], ...]
"""(the largest width this is for, tokens side by side in a program, its warps of 32 threads), growing."""

FORWARD: Final[Tiles] = ((256, 16, 4), (1024, 4, 4), (4096, 1, 8))
"""8 or 16 elements per thread: one or two 16-byte loads of each input under way, and many programs to an SM."""
BACKWARD: Final[Tiles] = ((256, 8, 4), (1024, 2, 4), (4096, 1, 8))
BACKWARD_OF_BOTH: Final[Tiles] = ((256, 8, 4), (1024, 2, 8), (4096, 1, 16))
"""The fused op keeps three sums per channel, which twice the threads can hold."""
BACKWARD_STAGES: Final = {2: 3, 4: 2}
"""By bytes of an element. Tokens are read two ahead, or one: only one or two of these programs fit an SM, which needs
about 50 KB under way to stay busy; shared memory of 100 KB must hold them."""
PROGRAMS: Final = 240
"""Programs of a backward pass there should be at least, if pieces of 16 tokens allow it: nearly two per SM."""
SUM: Final = {"COLUMNS": 32, "PIECES": 64}
"""The tile of the last sum: 128 bytes of 64 pieces."""


def sizes_for(tiles: Tiles, width: int) -> dict[str, int]:
    """How tokens of this width are launched; a program holds whole tokens, padded to a power of two.

    Raises:
        ValueError: they are too wide.
    """
    for largest, tokens, warps in tiles:
        if width <= largest:
            return {"WIDTH": width, "BLOCK": 1 << (width - 1).bit_length(), "TOKENS": tokens, "num_warps": warps}
    raise ValueError(f"tokens of width {width} do not fit a program; the widest is {tiles[-1][0]}")


def piece_for(num_tokens: int) -> int:
    """Tokens a program of the backward pass walks: 32 where that leaves programs enough, else 16."""
    return 32 if num_tokens >= 32 * PROGRAMS else 16


@triton_jit
def _load(base, offsets, mask):
    return tl.load(base + offsets, mask=mask, other=0.0).to(tl.float32)


@triton_jit
def forward_kernel(
    x, update, gate, shift, scale, rows, gated, modulated, moments,
    num_tokens, x_stride, update_stride, gate_stride, shift_stride, scale_stride, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr,
    GATED: tl.constexpr, NORMED: tl.constexpr, INDEXED: tl.constexpr,
):  # fmt: skip
    """A program: TOKENS whole tokens. Vectors are kept in L1 for the neighbours, streamed tokens are not."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    column = tl.arange(0, BLOCK)[None, :]
    present = token < num_tokens
    inside = present[:, None] & (column < WIDTH)
    if INDEXED:
        row = tl.load(rows + token, mask=present, other=0).to(tl.int64)[:, None]
    else:
        row = tl.zeros([TOKENS, 1], tl.int64)
    place = token[:, None]
    value = tl.load(x + place * x_stride + column, mask=inside, other=0.0, eviction_policy="evict_first")
    if GATED:
        added = tl.load(update + place * update_stride + column, mask=inside, other=0.0, eviction_policy="evict_first")
        factor = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0, eviction_policy="evict_last")
    if NORMED:  # Asked for before the sums below, which wait for all threads.
        bias = tl.load(shift + row * shift_stride + column, mask=inside, other=0.0, eviction_policy="evict_last")
        gain = tl.load(scale + row * scale_stride + column, mask=inside, other=0.0, eviction_policy="evict_last")
    value = value.to(tl.float32)
    if GATED:
        rounded = (value + factor.to(tl.float32) * added.to(tl.float32)).to(gated.dtype.element_ty)
        tl.store(gated + place * WIDTH + column, rounded, mask=inside)
        value = rounded.to(tl.float32)  # The backward pass normalises what was stored.
    if NORMED:
        mean = tl.sum(value, 1) / WIDTH
        centred = tl.where(inside, value - mean[:, None], 0.0)
        rstd = tl.rsqrt(tl.sum(centred * centred, 1) / WIDTH + eps)
        result = centred * rstd[:, None] * (1.0 + gain.to(tl.float32)) + bias.to(tl.float32)
        tl.store(modulated + place * WIDTH + column, result.to(modulated.dtype.element_ty), mask=inside)
        tl.store(moments + token, mean, mask=present)
        tl.store(moments + num_tokens + token, rstd, mask=present)


@triton_jit
def backward_kernel(
    value, moments, update, gate, scale, rows, d_gated, d_modulated, d_x, d_update, partial, found,
    num_tokens, value_stride, update_stride, gate_stride, scale_stride, d_gated_stride, d_modulated_stride,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr, PIECE: tl.constexpr, STAGES: tl.constexpr,
    GATED: tl.constexpr, NORMED: tl.constexpr, INDEXED: tl.constexpr, REDUCED: tl.constexpr,
):  # fmt: skip
    """A program: those of PIECE tokens that use one row. It is idle where none does, and says so in `found`."""
    row = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0).to(tl.int64) * PIECE
    end = tl.minimum(num_tokens - start, PIECE).to(tl.int32)
    begin = 0
    if INDEXED:
        offset = tl.arange(0, PIECE)
        mine = tl.load(rows + start + offset, mask=offset < end, other=-1) == row
        begin = tl.min(tl.where(mine, offset, PIECE))
        end = tl.max(tl.where(mine, offset + 1, 0))
        members = tl.sum(tl.where(mine, tl.full([PIECE], 1, tl.int64) << offset.to(tl.int64), 0))
    else:
        end = tl.where(row == 0, end, 0)
    column = tl.arange(0, BLOCK)
    within = column < WIDTH
    shift_sum = tl.zeros([BLOCK], tl.float32)
    scale_sum = tl.zeros([BLOCK], tl.float32)
    gate_sum = tl.zeros([BLOCK], tl.float32)
    if NORMED:
        gain = 1.0 + _load(scale, row * scale_stride + column, within & (end > begin))
    if GATED:
        factor = _load(gate, row * gate_stride + column, within & (end > begin))
    for at in tl.range(begin, end, TOKENS, num_stages=STAGES):
        near = at + tl.arange(0, TOKENS)
        wanted = near < end
        if INDEXED:
            wanted &= ((members >> near.to(tl.int64)) & 1) == 1
        token = start + near
        place = token[:, None]
        inside = wanted[:, None] & within[None, :]
        total = tl.zeros([TOKENS, BLOCK], tl.float32)
        if NORMED:
            mean = _load(moments, token, wanted)[:, None]
            rstd = _load(moments, num_tokens + token, wanted)[:, None]
            normal = (_load(value, place * value_stride + column[None, :], inside) - mean) * rstd
            given = _load(d_modulated, place * d_modulated_stride + column[None, :], inside)
            if REDUCED:
                shift_sum += tl.sum(given, 0)
                scale_sum += tl.sum(given * normal, 0)
            given *= gain[None, :]
            # Both sums wait for all threads: together they wait once.
            level, along = tl.split(tl.sum(tl.join(given, given * normal), 1) / WIDTH)
            total = (given - level[:, None] - normal * along[:, None]) * rstd
        if GATED:
            total += _load(d_gated, place * d_gated_stride + column[None, :], inside)
            if REDUCED:
                gate_sum += tl.sum(total * _load(update, place * update_stride + column[None, :], inside), 0)
            passed = (total * factor[None, :]).to(d_update.dtype.element_ty)
            tl.store(d_update + place * WIDTH + column[None, :], passed, mask=inside)
        if NORMED:
            tl.store(d_x + place * WIDTH + column[None, :], total.to(d_x.dtype.element_ty), mask=inside)
    if REDUCED:
        cell = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + row
        any_found = end > begin
        tl.store(found + cell, any_found.to(tl.int32))
        sums = partial + cell * ((2 * NORMED + GATED) * WIDTH) + column
        if NORMED:
            tl.store(sums, shift_sum, mask=within & any_found)
            tl.store(sums + WIDTH, scale_sum, mask=within & any_found)
        if GATED:
            tl.store(sums + 2 * NORMED * WIDTH, gate_sum, mask=within & any_found)


@triton_jit
def sum_kernel(partial, found, sums, num_pieces, num_rows, width, COLUMNS: tl.constexpr, PIECES: tl.constexpr):
    """sums[row] = Σ partial[piece, row] over the pieces where the row was found, in a fixed order."""
    row = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS], tl.float32)
    for first in range(0, num_pieces, PIECES):
        piece = first + tl.arange(0, PIECES)
        cell = piece * num_rows + row
        written = tl.load(found + cell, mask=piece < num_pieces, other=0) != 0
        inside = written[:, None] & (column < width)[None, :]
        total += tl.sum(_load(partial, cell[:, None] * width + column[None, :], inside), 0)
    tl.store(sums + row * width + column, total, mask=column < width)


@torch.library.custom_op("dreamserve::modulation", mutates_args=())
def modulation_triton(
    x: Tensor, update: Maybe, gate: Maybe, shift: Maybe, scale: Maybe, rows: Maybe, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """All three forwards: gated [N, D], modulated [N, D], and mean and 1/std [2, N]; empty where not asked for."""
    results = _outputs(x, update, gate, shift, scale)
    inputs = [_dense(tensor) for tensor in (x, update, gate, shift, scale, rows)]
    sizes = sizes_for(FORWARD, x.shape[1])
    forward_kernel[(-(-len(x) // sizes["TOKENS"]),)](
        *(*inputs, *results, len(x), *map(_stride, inputs[:5]), eps),
        GATED=update is not None,
        NORMED=scale is not None,
        INDEXED=rows is not None,
        **sizes,
    )
    return results


@torch.library.custom_op("dreamserve::modulation_backward", mutates_args=())
def modulation_backward_triton(
    value: Maybe, moments: Maybe, update: Maybe, gate: Maybe, scale: Maybe, rows: Maybe,
    d_gated: Maybe, d_modulated: Maybe, reduced: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x [N, D] and update [N, D], and float32 sums [M, k, D] of shift, scale and gate if `reduced`.

    Args:
        value: what was normalised: x, or the gated residual.
    """
    d_x, d_update, sums = _gradients(value, update, gate, scale, reduced)
    num_tokens, width = _either(value, update).shape
    num_rows = len(_either(gate, scale))
    piece = piece_for(num_tokens)
    num_pieces = -(-num_tokens // piece)
    columns = sums.numel() // num_rows
    partial = sums.new_empty(num_pieces, num_rows, columns)
    found = torch.empty(num_pieces, num_rows, dtype=torch.int32, device=sums.device)
    inputs = [_dense(tensor) for tensor in (value, moments, update, gate, scale, rows, d_gated, d_modulated)]
    strides = [_stride(inputs[number]) for number in (0, 2, 3, 4, 6, 7)]
    backward_kernel[(num_pieces, num_rows)](
        *(*inputs, d_x, d_update, partial, found, num_tokens, *strides),
        PIECE=piece,
        STAGES=BACKWARD_STAGES[_either(value, update).element_size()],
        GATED=update is not None,
        NORMED=scale is not None,
        INDEXED=rows is not None,
        REDUCED=reduced,
        **sizes_for(BACKWARD if update is None or scale is None else BACKWARD_OF_BOTH, width),
    )
    if reduced:
        grid = (-(-columns // SUM["COLUMNS"]), num_rows)
        sum_kernel[grid](partial, found, sums, num_pieces, num_rows, columns, **SUM)
    return d_x, d_update, sums


def _outputs(x: Tensor, update: Maybe, gate: Maybe, shift: Maybe, scale: Maybe) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the forward's results, in the dtype torch would promote to."""

    def promoted(*tensors: Maybe) -> torch.dtype:
        return reduce(torch.promote_types, (tensor.dtype for tensor in tensors if tensor is not None))

    gated = x.new_empty(x.shape if update is not None else (0,), dtype=promoted(x, update, gate))
    modulated = x.new_empty(x.shape if scale is not None else (0,), dtype=promoted(gated, shift, scale))
    moments = x.new_empty((2, x.shape[0]) if scale is not None else (0,), dtype=torch.float32)
    return gated, modulated, moments


def _gradients(value: Maybe, update: Maybe, gate: Maybe, scale: Maybe, reduced: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the backward's results; empty where not asked for."""
    some = _either(value, update)
    vectors = 2 * (scale is not None) + (update is not None)
    sums = (_either(gate, scale).shape[0], vectors, some.shape[1]) if reduced else (0,)
    return (
        some.new_empty(some.shape if value is not None else (0,)),
        _either(update, some).new_empty(some.shape if update is not None else (0,)),
        some.new_empty(sums, dtype=torch.float32),
    )


def _either(first: Maybe, second: Maybe) -> Tensor:
    return cast("Tensor", second if first is None else first)


def _dense(tensor: Maybe) -> Maybe:
    """Rows may be strided, their elements not."""
    return tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()


def _stride(tensor: Maybe) -> int:
    return 0 if tensor is None else tensor.stride(0)


# What autograd and torch.compile see.

modulation_triton.register_fake(lambda *inputs: _outputs(*inputs[:5]))
modulation_backward_triton.register_fake(
    lambda value, _0, update, gate, scale, _1, _2, _3, reduced: _gradients(value, update, gate, scale, reduced)
)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, update, gate, _, scale, rows, _ = inputs
    gated, _, moments = output
    value = None if scale is None else x if update is None else gated
    ctx.save_for_backward(value, None if scale is None else moments, update, gate, scale, rows)
    ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in inputs[:5]]


def _differentiate(ctx: Any, d_gated: Tensor, d_modulated: Tensor, _: Tensor) -> tuple[Maybe, ...]:
    saved = ctx.saved_tensors
    gated, normed = saved[2] is not None, saved[4] is not None
    reduced = any(ctx.needs_input_grad[2:5])
    d_x, d_update, sums = modulation_backward_triton(
        *saved, d_gated if gated else None, d_modulated if normed else None, reduced
    )
    vectors = sums.unbind(1) if reduced else (None, None, None)
    gradients = [
        d_x if normed else d_gated,
        d_update if gated else None,
        vectors[-1] if gated else None,
        *(vectors[:2] if normed else (None, None)),
    ]
    return *(g if g is None else g.to(dtype) for g, dtype in zip(gradients, ctx.dtypes, strict=True)), None, None


modulation_triton.register_autograd(_differentiate, setup_context=_keep)


# Public.


def modulate(
    x: Tensor, shift: Tensor, scale: Tensor, rows: Maybe, eps: float = 1e-6, *, backend: str | None = None
) -> Tensor:
    """LayerNorm(x) · (1 + scale[rows]) + shift[rows], [N, D].

    Args:
        rows: int32 or int64 [N]; None: all tokens use row 0.
        backend: "triton" (up to a width of 4096) or "reference"; None: what `dispatch` says.
    """
    if _backend("modulate", backend, x, shift, scale) == "reference":
        return modulate_reference(x, shift, scale, rows, eps)
    return modulation_triton(x, None, None, shift, scale, rows, eps)[1]


def gate_residual(x: Tensor, update: Tensor, gate: Tensor, rows: Maybe, *, backend: str | None = None) -> Tensor:
    """x + gate[rows] · update, [N, D]; arguments as in `modulate`."""
    if _backend("gate_residual", backend, x, update, gate) == "reference":
        return gate_residual_reference(x, update, gate, rows)
    return modulation_triton(x, update, gate, None, None, rows, 0.0)[0]


def gate_residual_modulate(
    x: Tensor, update: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, rows: Maybe, eps: float = 1e-6, *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`gate_residual`, and `modulate` of that, in one pass: both [N, D]; arguments as in `modulate`."""
    if _backend("gate_residual_modulate", backend, x, update, gate, shift, scale) == "reference":
        return gate_residual_modulate_reference(x, update, gate, shift, scale, rows, eps)
    gated, modulated, _ = modulation_triton(x, update, gate, shift, scale, rows, eps)
    return gated, modulated


def _backend(op: str, backend: str | None, x: Tensor, *others: Tensor) -> str:
    if backend is not None:
        return backend
    learning = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *others))
    return "reference" if x.shape[1] > FORWARD[-1][0] else choose(op, x, size=x.shape[0], gradient=learning)
