"""Response maps as FLUX runs them: 24 heads of 128 in bfloat16, read out of a fused projection."""

from __future__ import annotations

from typing import Any

import torch

from kernels.column_mass import LOG2E, mass_kernel, precision, tile_for
from kernels.pooled_response import DOT, POOL, SPREAD, dot, pool, spread
from tests.kernels.ahead_of_time import Spec

_FLAGS = ({"WEIGHTED": False, "PER_HEAD": False}, {"WEIGHTED": True, "PER_HEAD": False})


def _pool(dim: int, flags: dict[str, Any]) -> Spec:
    types = {"x": "*bf16", "index": "*i64", "weights": "*fp32", "pairs": "*i32", "partial": "*fp32"}
    numbers = {"token_stride": "i32", "head_stride": "i32", "dim": "i32", "walked": "i32"}
    return Spec(
        name=f"response-pool-{'weighted' if flags['WEIGHTED'] else 'mean'}-{dim}",
        kernel=pool,
        signature=types | numbers,
        constexprs=flags | {"COLUMN": 2 if flags["WEIGHTED"] else 0, "TOKENS": POOL.tokens, "DIM": dim},
        aligned=(*types, *numbers),
        num_warps=POOL.warps,
        num_stages=3,
        mma=False,
    )


def _dot(dim: int, per_head: bool) -> Spec:
    types = {"pooled": "*fp32", "key": "*bf16", "index": "*i64", "pairs": "*i32", "maps": "*fp32"}
    numbers = {"token_stride": "i32", "head_stride": "i32", "num_heads": "i32", "dim": "i32"}
    return Spec(
        name=f"response-dot-{'per-head' if per_head else 'mean'}-{dim}",
        kernel=dot,
        signature=types | numbers | {"scale": "fp32"},
        constexprs={"PER_HEAD": per_head, "TOKENS": DOT.tokens, "DIM": dim},
        aligned=(*types, "token_stride", "head_stride", "dim"),
        num_warps=DOT.warps,
        num_stages=3,
        mma=False,
    )


def _spread(dim: int, flags: dict[str, Any]) -> Spec:
    types = {
        "vectors": "*fp32",
        "weights": "*fp32",
        "index": "*i64",
        "requests": "*i32",
        "pairs": "*i32",
        "out": "*bf16",
    }
    return Spec(
        name=f"response-spread-{'weighted' if flags['WEIGHTED'] else 'mean'}-{dim}",
        kernel=spread,
        signature=types | {"dim": "i32", "scale": "fp32"},
        constexprs=flags | {"TOKENS": SPREAD.tokens, "DIM": dim},
        aligned=(*types, "dim"),
        num_warps=SPREAD.warps,
        num_stages=3,
        mma=False,
    )


def _mass(dim: int, dtype: torch.dtype, aligned: bool = True, archs: tuple[int, ...] = (80, 90, 100)) -> Spec:
    tile = tile_for(dim, dtype)
    name = {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
    types = {"query": f"*{name}", "key": f"*{name}", "lse": "*fp32", "queries": "*i64", "keys": "*i64", "pairs": "*i32"}
    strides = [f"{tensor}_{axis}_stride" for tensor in ("query", "key") for axis in ("token", "head")]
    numbers = dict.fromkeys([*strides, "lse_head_stride", "lse_token_stride", "dim"], "i32")
    return Spec(
        name=f"column-mass-{name}-{dim}{'' if aligned else '-unaligned'}",
        kernel=mass_kernel,
        signature=types | {"sums": "*fp32"} | numbers | {"scale": "fp32"},
        constexprs={
            "LOG2E": LOG2E,
            "PRECISION": precision(dtype),
            "QUERIES": tile.queries,
            "KEYS": tile.keys,
            "DIM": dim,
        },
        aligned=(*types, "sums", *strides, "dim") if aligned else (),
        num_warps=tile.warps,
        num_stages=tile.stages,
        mma=True,
        archs=archs,
    )


SPECS: tuple[Spec, ...] = (
    *(_pool(128, flags) for flags in _FLAGS),
    _dot(128, per_head=False),
    _dot(128, per_head=True),
    *(_spread(128, flags) for flags in _FLAGS),
    _mass(64, torch.bfloat16),
    _mass(128, torch.bfloat16),
    _mass(128, torch.bfloat16, aligned=False, archs=(80, 100)),
    _mass(128, torch.float32, archs=(80,)),
)
