"""The attention kernels as FLUX launches them: views of a fused projection, 24 heads."""

from __future__ import annotations

from typing import Any

import torch

from kernels import flash
from kernels.flash import FORWARD, KEYS, QUERIES
from tests.kernels.ahead_of_time import Spec

_KERNELS = {FORWARD: flash.forward_kernel, KEYS: flash.keys_kernel, QUERIES: flash.queries_kernel}
_TYPES = {"lse": "*fp32", "delta": "*fp32", "grad_lse": "*fp32", "tiles": "*i32", "kind": "*i32", "sees": "*i32"}
_NUMBERS = {"num_tokens": "i32", "scale": "fp32"}


def _spec(name: str, kernel: Any, constants: dict[str, Any], *, dtype: str = "bf16", **launch: Any) -> Spec:
    """Addresses and strides are divisible by 16, which `flash` sees to; the number of tokens is not."""
    left_out = () if constants.get("SEES", True) else ("kind", "sees")
    constexprs = constants | dict.fromkeys(left_out)
    signature: dict[str, str] = {}
    for argument in kernel.arg_names:
        if argument not in constexprs:
            stride = argument.endswith(("_token", "_head"))
            signature[argument] = _NUMBERS.get(argument) or ("i32" if stride else _TYPES.get(argument, f"*{dtype}"))
    divisible = tuple(argument for argument in signature if argument not in _NUMBERS)
    return Spec(name, kernel, signature, constexprs, divisible, **launch)


def _attention(
    stage: str,
    dim: int,
    suffix: str = "",
    *,
    sees: bool = False,
    wide: bool = False,
    archs: tuple[int, ...] = (80, 90, 100),
) -> tuple[Spec, ...]:
    """One spec for all compute capabilities that use the same block."""
    dtype = torch.float32 if wide else torch.bfloat16
    blocks = {arch: flash.block_for(stage, dim, dtype, arch) for arch in archs}
    specs: list[Spec] = []
    for block in dict.fromkeys(blocks.values()):
        alike = tuple(arch for arch in archs if blocks[arch] == block)
        name = f"attention-{stage}-{dim}{suffix}" + ("" if alike[-1] == archs[-1] else f"-sm_{alike[0]}")
        specs.append(
            _spec(
                name,
                _KERNELS[stage],
                flash.constants(block, dim, sees),
                dtype="fp32" if wide else "bf16",
                num_warps=block.warps,
                num_stages=block.stages,
                mma=True,
                archs=alike,
            )
        )
    return tuple(specs)


SPECS: tuple[Spec, ...] = (
    *_attention(FORWARD, 128),
    *_attention(FORWARD, 128, "-visibility", sees=True),
    *_attention(FORWARD, 128, "-fp32", wide=True, archs=(90,)),
    *_attention(FORWARD, 128, "-small", archs=(86, 120)),
    *_attention(FORWARD, 64),
    *_attention(KEYS, 128),
    *_attention(KEYS, 128, "-visibility", sees=True, archs=(90,)),
    *_attention(KEYS, 128, "-fp32", wide=True, archs=(90,)),
    *_attention(KEYS, 64),
    *_attention(QUERIES, 128),
    *_attention(QUERIES, 128, "-visibility", sees=True, archs=(90,)),
    *_attention(QUERIES, 128, "-fp32", wide=True, archs=(90,)),
    *_attention(QUERIES, 64),
    _spec(
        "attention-delta-128",
        flash.delta_kernel,
        {"DIM": 128, "ROWS": flash.DELTA_ROWS},
        num_warps=4,
        num_stages=3,
        mma=False,
        archs=(90,),
    ),
)
