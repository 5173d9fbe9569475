"""How much of a reference's attention falls on each target token: heat maps for people, by the attention's log-sum-exp.

    mass_i[x] = mean_h mean_q exp(Q_i[q, h] · K[x, h] / sqrt(d) − lse[h, q])

is the mean of the softmax over all of the request's tokens, in its columns of the target; so Σ_x mass_i[x] ≤ 1 is the
share of reference i's attention that goes to the target. It needs a second Q·Kᵀ, no matrix: a tile of the product lives
in registers. No gradient.

Shapes: as in `kernels.sites`. A reference of l_i tokens and a target of l take 2·l_i·l·H·d FLOP and l_i·l·H
exponentials; bytes: its queries once for each tile of keys (from L2), the keys once, 4·H·l of results. FLUX, 1024
tokens on 4096: 26 GFLOP and 0.1 G exponentials.
"""

# Triton's arguments have no Python types, and its constants are written large.
# ruff: noqa: ANN001, ANN201, N803
# pyright: reportMissingParameterType=false, reportInvalidTypeForm=false

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import torch
from torch import Tensor

from kernels.dispatch import choose
from kernels.jit import tl, triton_jit
from kernels.pooled_response import block_for
from kernels.sites import Reading, split_maps

_TILE: Final = 2**24
"""Elements of the product that the reference holds at a time."""


def log_sum_exp_reference(query: Tensor, key: Tensor, boundaries: Sequence[int]) -> Tensor:
    """log Σ_k exp(q · k / sqrt(d)) over the tokens of q's own request: [H, S], float32 or wider.

    Args:
        query, key: [S, H, d], requests one after the other. boundaries: their R + 1 offsets.
    """
    parts: list[Tensor] = []
    for start, end in pairwise(boundaries):
        keys = _wide(key[start:end])
        parts += [_products(rows, keys).logsumexp(-1) for rows in query[start:end].split(_rows(keys))]
    return torch.cat(parts, 1)


def column_mass_reference(query: Tensor, key: Tensor, lse: Tensor, reading: Reading) -> tuple[Tensor | None, ...]:
    """See `column_mass`."""
    groups: list[Tensor | None] = []
    for site in reading.sites:
        if site.target is None:
            groups.append(None)
            continue
        maps = [
            _mass(query[reference[request]], lse[:, reference[request]], _wide(key[target]))
            for request, target in enumerate(site.target)
            for reference in site.references
        ]
        groups.append(torch.stack(maps).unflatten(0, (len(site.target), len(site.references))))
    return tuple(groups)


def _mass(queries: Tensor, lse: Tensor, keys: Tensor) -> Tensor:
    """Queries [q, H, d], lse [H, q], keys [x, H, d] → [x]."""
    rows = _rows(keys)
    sums = [
        (_products(some, keys) - levels[..., None]).exp().sum((0, 1))
        for some, levels in zip(queries.split(rows), lse.split(rows, dim=1), strict=True)
    ]
    return torch.stack(sums).sum(0) / (queries.shape[0] * queries.shape[1])


def _products(queries: Tensor, keys: Tensor) -> Tensor:
    """[q, H, d] and [k, H, d] → [H, q, k], scaled."""
    return _wide(queries).transpose(0, 1) @ keys.permute(1, 2, 0) * keys.shape[-1] ** -0.5


def _rows(keys: Tensor) -> int:
    """Queries at a time, so that their products with `keys` stay small."""
    return max(1, _TILE // max(1, keys.shape[0] * keys.shape[1]))


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


@dataclass(frozen=True, slots=True)
class Tile:
    """Queries and keys of a program's product, warps, and stages of the queries' pipeline."""

    queries: int
    keys: int
    warps: int
    stages: int


TILES: Final = {64: Tile(64, 128, 8, 3), 128: Tile(64, 128, 8, 3)}
"""By padded head dimension (smaller ones use the first). With 128 queries, tensors that are not aligned spill."""
SLOW_TILE: Final = Tile(32, 64, 4, 1)
"""For float32 and for head dimensions beyond 128."""
LOG2E: Final = 1.4426950408889634


@triton_jit
def mass_kernel(
    query,
    key,
    lse,
    queries,
    keys,
    pairs,
    sums,
    query_token_stride,
    query_head_stride,
    key_token_stride,
    key_head_stride,
    lse_head_stride,
    lse_token_stride,
    dim,
    scale,
    LOG2E: tl.constexpr,
    PRECISION: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    DIM: tl.constexpr,
):
    """sums[pair, head, x] for a tile of keys: the mean over the reference's queries."""
    head, pair = tl.program_id(1), tl.program_id(2)
    first_query = tl.load(pairs + pair * 5)
    num_queries = tl.load(pairs + pair * 5 + 1)
    first_key = tl.load(pairs + pair * 5 + 2)
    num_keys = tl.load(pairs + pair * 5 + 3)
    start = tl.load(pairs + pair * 5 + 4)
    if tl.program_id(0) * KEYS < num_keys:
        channel = tl.arange(0, DIM)
        place = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
        present = place < num_keys
        token = tl.load(keys + first_key + place, mask=present, other=0).to(tl.int64)[:, None]
        inside = present[:, None] & (channel < dim)[None, :]
        cells = key + token * key_token_stride + head * key_head_stride + channel[None, :]
        columns = tl.trans(tl.load(cells, mask=inside, other=0.0))
        total = tl.zeros([QUERIES, KEYS], tl.float32)
        for begin in range(0, num_queries, QUERIES):
            row = begin + tl.arange(0, QUERIES)
            asked = row < num_queries
            source = tl.load(queries + first_query + row, mask=asked, other=0).to(tl.int64)
            asking = query + source[:, None] * query_token_stride + head * query_head_stride + channel[None, :]
            rows = tl.load(asking, mask=asked[:, None] & (channel < dim)[None, :], other=0.0)
            # Absent queries have an infinite sum, so nothing of it.
            levels = lse + head * lse_head_stride + source * lse_token_stride
            level = tl.load(levels, mask=asked, other=float("inf")) * LOG2E
            products = tl.dot(rows, columns, input_precision=PRECISION)
            total += tl.exp2(products * (scale * LOG2E) - level[:, None])
        found = sums + start * tl.num_programs(1) + head * num_keys + place
        tl.store(found, tl.sum(total, 0) / num_queries, mask=present)


def tile_for(dim: int, dtype: torch.dtype) -> Tile:
    """The tile for a head dimension."""
    if dtype == torch.float32 or dim > max(TILES):
        return SLOW_TILE
    return next(tile for bound, tile in TILES.items() if dim <= bound)


def column_mass_triton(
    query: Tensor, key: Tensor, lse: Tensor, queries: Tensor, keys: Tensor, pairs: Tensor, longest: int, num_maps: int
) -> Tensor:
    """[elements of all maps · H]: each pair's [H, l], the mean over queries."""
    _, num_heads, dim = query.shape
    sums = torch.empty(num_maps * num_heads, dtype=torch.float32, device=query.device)
    tile = tile_for(dim, query.dtype)
    mass_kernel[(-(-longest // tile.keys), num_heads, pairs.shape[0])](
        *(query, key, lse, queries, keys, pairs, sums),
        *(*query.stride()[:2], *key.stride()[:2], *lse.stride(), dim, dim**-0.5),
        LOG2E=LOG2E,
        PRECISION=precision(query.dtype),
        QUERIES=tile.queries,
        KEYS=tile.keys,
        DIM=block_for(dim),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return sums


def precision(dtype: torch.dtype) -> str:
    """How float32 is multiplied: in three TF32 products; narrower types have no choice."""
    return "tf32x3" if dtype == torch.float32 else "tf32"


@torch.library.custom_op("dreamserve::column_mass", mutates_args=())
def column_mass_op(
    query: Tensor, key: Tensor, lse: Tensor, queries: Tensor, keys: Tensor, pairs: Tensor, longest: int, num_maps: int
) -> Tensor:
    """`column_mass_triton` for torch.compile."""
    return column_mass_triton(query, key, lse, queries, keys, pairs, longest, num_maps)


@column_mass_op.register_fake
def _(query: Tensor, *others: Any) -> Tensor:
    return query.new_empty(others[-1] * query.shape[1], dtype=torch.float32)


def column_mass(
    query: Tensor, key: Tensor, lse: Tensor, reading: Reading, *, backend: str | None = None
) -> tuple[Tensor | None, ...]:
    """What share of each reference's attention every target token gets, the mean over heads and queries.

    Args:
        query, key: [S, H, d] in request order, any strides but the last, which is 1.
        lse: [H, S] float32, the natural log-sum-exp of each query's scaled products with all keys of its request.
        backend: "triton" or "reference"; otherwise `kernels.dispatch` chooses.

    Returns:
        Per group of the reading [R, n, l], float32 or wider; None where no map is wanted. Without gradient.
    """
    query, key, lse = query.detach(), key.detach(), lse.detach()
    backend = backend or choose("column_mass", query, size=query.shape[0])
    if backend == "reference" or not reading.num_maps:
        return column_mass_reference(query, key, lse, reading)
    tables = (reading.queries, reading.keys, reading.pairs)
    sums = column_mass_op(query, key, lse, *tables, reading.longest_target, reading.num_maps)
    return tuple(None if maps is None else maps.mean(2) for maps in split_maps(sums, reading, query.shape[1]))
