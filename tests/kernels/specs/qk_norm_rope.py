"""QK norm and rotation as FLUX runs them: 24 heads of 128 (or 48 of 64) in bfloat16, fused projections."""

from __future__ import annotations

from kernels.qk_norm_rope import PIECE, backward_kernel, forward_kernel, sizes_for
from tests.kernels.ahead_of_time import Spec

_WEIGHTS = ("text_q", "text_k", "image_q", "image_k")
_INPUTS = dict.fromkeys(("text", "image", *_WEIGHTS), "*bf16") | {"cos": "*fp32", "sin": "*fp32", "order": "*i64"}
_NUMBERS = dict.fromkeys(("num_tokens", "num_text", "text_stride", "image_stride"), "i32") | {"eps": "fp32"}
_TEXT = ("text", "text_q", "text_k")


def _forward(name: str, dim: int, single: bool = False, aligned: bool = True) -> Spec:
    """`single`: a single block of one request, whose values stay where they are."""
    sizes = sizes_for(3072 // dim, dim)
    warps = sizes.pop("num_warps")
    absent = (*_TEXT, "order") if single else ()
    tensors = _INPUTS | dict.fromkeys(("query", "key", "value"), "*bf16")
    tensors = {name: kind for name, kind in tensors.items() if name not in absent}
    return Spec(
        name=f"qk_norm_rope {name} {dim}{'' if aligned else ' unaligned'}",
        kernel=forward_kernel,
        signature=tensors | _NUMBERS,
        constexprs=sizes | {"TEXT": not single, "ORDERED": not single, "VALUED": not single} | dict.fromkeys(absent),
        aligned=(*tensors, "text_stride", "image_stride") if aligned else (),
        num_warps=warps,
        num_stages=3,
        mma=False,
    )


def _backward(name: str, dim: int, learned: bool) -> Spec:
    sizes = sizes_for(3072 // dim, dim)
    warps = sizes.pop("num_warps")
    gradients = dict.fromkeys(("d_query", "d_key", "d_value", "d_text", "d_image"), "*bf16")
    tensors = _INPUTS | gradients | {"partial": "*fp32"}
    flags = {"TEXT": True, "ORDERED": True, "VALUED": True, "REDUCED": learned}
    return Spec(
        name=f"qk_norm_rope backward {name} {dim}",
        kernel=backward_kernel,
        signature=tensors | _NUMBERS,
        constexprs=sizes | flags | {"PIECE": PIECE if learned else sizes["TOKENS"]},
        aligned=(*tensors, "text_stride", "image_stride"),
        num_warps=warps,
        num_stages=3,
        mma=False,
    )


SPECS: tuple[Spec, ...] = (
    _forward("double", 128),
    _forward("double", 128, aligned=False),
    _forward("single", 64, single=True),
    _backward("frozen", 128, learned=False),
    _backward("learned", 128, learned=True),
    _backward("learned", 64, learned=True),
)
