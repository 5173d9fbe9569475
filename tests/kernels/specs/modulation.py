"""The modulation kernels as FLUX runs them: width 3072 in bfloat16, vectors out of a projection of several."""

from __future__ import annotations

from kernels.modulation import (
    BACKWARD,
    BACKWARD_OF_BOTH,
    BACKWARD_STAGES,
    FORWARD,
    SUM,
    backward_kernel,
    forward_kernel,
    sizes_for,
    sum_kernel,
)
from tests.kernels.ahead_of_time import Spec

WIDTH = 3072
_VECTORS = {"gate": "*bf16", "shift": "*bf16", "scale": "*bf16"}


def _forward(name: str, gated: bool, normed: bool, aligned: bool = True) -> Spec:
    flags = {"GATED": gated, "NORMED": normed, "INDEXED": True}
    sizes = sizes_for(FORWARD, WIDTH)
    warps = sizes.pop("num_warps")
    tensors = {"x": "*bf16", "update": "*bf16", "rows": "*i64", "gated": "*bf16", "modulated": "*bf16"}
    absent = [
        *(() if gated else ("update", "gate")),
        *(() if normed else ("shift", "scale")),
    ]
    tensors = {name: kind for name, kind in (tensors | _VECTORS).items() if name not in absent} | {"moments": "*fp32"}
    strides = [f"{name}_stride" for name in ("x", "update", "gate", "shift", "scale")]
    return Spec(
        name=f"{name} {WIDTH}{'' if aligned else ' unaligned'}",
        kernel=forward_kernel,
        signature=tensors | dict.fromkeys([*strides, "num_tokens"], "i32") | {"eps": "fp32"},
        constexprs=flags | sizes | dict.fromkeys(absent),
        aligned=(*tensors, *strides) if aligned else (),
        num_warps=warps,
        num_stages=3,
        mma=False,
    )


def _backward(name: str, gated: bool, normed: bool) -> Spec:
    flags = {"GATED": gated, "NORMED": normed, "INDEXED": True, "REDUCED": True}
    sizes = sizes_for(BACKWARD_OF_BOTH if gated and normed else BACKWARD, WIDTH) | {
        "PIECE": 32,
        "STAGES": BACKWARD_STAGES[2],
    }
    warps = sizes.pop("num_warps")
    halves = ("value", "update", "gate", "scale", "d_gated", "d_modulated", "d_x", "d_update")
    absent = [
        *(() if gated else ("update", "gate", "d_gated")),
        *(() if normed else ("value", "moments", "scale", "d_modulated")),
    ]
    types = dict.fromkeys(halves, "*bf16") | {"rows": "*i64", "moments": "*fp32", "partial": "*fp32", "found": "*i32"}
    tensors = {name: kind for name, kind in types.items() if name not in absent}
    strides = [f"{name}_stride" for name in ("value", "update", "gate", "scale", "d_gated", "d_modulated")]
    return Spec(
        name=f"{name} backward {WIDTH}",
        kernel=backward_kernel,
        signature=tensors | dict.fromkeys([*strides, "num_tokens"], "i32"),
        constexprs=flags | sizes | dict.fromkeys(absent),
        aligned=(*tensors, *strides),
        num_warps=warps,
        num_stages=3,
        mma=False,
    )


_SUM = Spec(
    name="modulation sum",
    kernel=sum_kernel,
    signature={"partial": "*fp32", "found": "*i32", "sums": "*fp32"}
    | dict.fromkeys(("num_pieces", "num_rows", "width"), "i32"),
    constexprs=SUM,
    aligned=("partial", "found", "sums", "width"),
    num_warps=4,
    num_stages=3,
    mma=False,
)

SPECS: tuple[Spec, ...] = (
    _forward("modulate", gated=False, normed=True),
    _forward("modulate", gated=False, normed=True, aligned=False),
    _forward("gate_residual", gated=True, normed=False),
    _forward("gate_residual_modulate", gated=True, normed=True),
    _backward("modulate", gated=False, normed=True),
    _backward("gate_residual", gated=True, normed=False),
    _backward("gate_residual_modulate", gated=True, normed=True),
    _SUM,
)
