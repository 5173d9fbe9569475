"""The QK norm and rotation kernels against their reference in float64: streams, orders, strides, types, gradients."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from kernels import qk_norm_rope as ops
from kernels.qk_norm_rope import QKNorms
from tests.kernels.interpreted.broken import broken
from tests.kernels.interpreted.test_modulation import DTYPES

pytestmark = pytest.mark.gpu

SHAPES = [(5, 14, 3, 64), (0, 19, 9, 32), (17, 4, 2, 128), (3, 2, 24, 24)]
"""(text tokens, image tokens, heads, head dimension): heads and a dimension that are no powers of two, no text."""
FIELDS = ("text_q", "text_k", "image_q", "image_k")


def projected(
    tokens: int, heads: int, dim: int, generator: torch.Generator, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """[tokens, 3, H, d] inside a wider projection, NaN before, between and behind."""
    width = 3 * heads * dim
    room = torch.full((tokens + 2, 3 * width + 5), float("nan"))
    room[1:-1, width + 1 : 2 * width + 1] = torch.randn(tokens, width, generator=generator)
    view = room.to(device, dtype)[1:-1, width + 1 : 2 * width + 1].unflatten(1, (3, heads, dim))
    return view.requires_grad_()


def leaves_of(shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> list[Tensor | None]:
    """Text and image projections, then the four weights; without text, three are None."""
    text, image, heads, dim = shape
    generator = torch.Generator().manual_seed(dim)
    streams = [projected(tokens, heads, dim, generator, dtype, device) if tokens else None for tokens in (text, image)]
    weights = [
        torch.randn(dim, generator=generator).to(device, dtype).requires_grad_() if text or "image" in name else None
        for name in FIELDS
    ]
    return [*streams, *weights]


def tables_of(
    shape: tuple[int, int, int, int], ordered: bool, device: torch.device
) -> tuple[Tensor, Tensor, Tensor | None]:
    """cos and sin in which no two neighbours are equal, and a permutation."""
    generator = torch.Generator().manual_seed(1)
    total = shape[0] + shape[1]
    cos, sin = (torch.randn(total, shape[3], generator=generator).to(device) for _ in range(2))
    return cos, sin, torch.randperm(total, generator=generator).to(device) if ordered else None


def check(
    module: ModuleType,
    shape: tuple[int, int, int, int],
    ordered: bool,
    dtype: torch.dtype,
    tolerance: float,
    device: torch.device,
) -> None:
    """All results, and the gradients of projections and weights."""
    leaves = leaves_of(shape, dtype, device)
    exact_leaves = [None if leaf is None else leaf.detach().double().requires_grad_() for leaf in leaves]
    cos, sin, order = tables_of(shape, ordered, device)
    got = module.qk_norm_rope(leaves[0], leaves[1], QKNorms(*leaves[2:]), cos, sin, order, backend="triton")
    wanted = ops.qk_norm_rope_reference(
        exact_leaves[0], exact_leaves[1], QKNorms(*exact_leaves[2:]), cos.double(), sin.double(), order
    )
    assert all(mine.is_contiguous() for mine in got)
    generator = torch.Generator().manual_seed(2)
    weights = [torch.randn(y.shape, generator=generator).to(device, dtype) for y in got]
    got += torch.autograd.grad(got, [leaf for leaf in leaves if leaf is not None], weights)
    exact = [leaf for leaf in exact_leaves if leaf is not None]
    wanted += torch.autograd.grad(wanted, exact, [weight.double() for weight in weights])
    for mine, true in zip(got, wanted, strict=True):
        assert mine.dtype is dtype
        assert mine.shape == true.shape
        assert (mine - true).abs().max() <= tolerance * true.abs().max()


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_reference(
    device: torch.device, shape: tuple[int, int, int, int], ordered: bool, dtype: torch.dtype, tolerance: float
) -> None:
    """Forward and all gradients; both streams in one launch, tokens in request order."""
    check(ops, shape, ordered, dtype, tolerance, device)


@pytest.mark.parametrize("ordered", [False, True])
def test_values_are_copied_only_where_they_move(device: torch.device, ordered: bool) -> None:
    """Inference of a single block of one request leaves them in the projection; of several it gathers them."""
    shape = (0, 9, 3, 32)
    _, image, *weights = leaves_of(shape, torch.float32, device)
    assert image is not None
    arguments = (None, image, QKNorms(*weights), *tables_of(shape, ordered, device))
    with torch.no_grad():
        got = ops.qk_norm_rope(*arguments, backend="triton")
        wanted = ops.qk_norm_rope_reference(*arguments)
    assert (got[2].data_ptr() == image[:, 2].data_ptr()) is not ordered
    assert torch.equal(got[2], wanted[2])
    for mine, theirs in zip(got[:2], wanted[:2], strict=True):
        assert (mine - theirs).abs().max() <= 1e-6 * theirs.abs().max()


def test_frozen_weights(device: torch.device) -> None:
    """LoRA leaves the norms alone: nothing is summed, and the projections' gradients are the same."""
    shape = SHAPES[0]
    leaves = leaves_of(shape, torch.float32, device)
    norms = QKNorms(*leaves[2:])
    frozen = replace(norms, **{name: getattr(norms, name).detach() for name in FIELDS})
    gradients = [
        torch.autograd.grad(
            [
                y.square().sum()
                for y in ops.qk_norm_rope(*leaves[:2], some, *tables_of(shape, True, device), backend="triton")
            ],
            leaves[:2],
        )
        for some in (norms, frozen)
    ]
    for learned, alone in zip(*gradients, strict=True):
        assert torch.equal(learned, alone)


@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_torch_takes_the_op(device: torch.device, shape: tuple[int, int, int, int]) -> None:
    """torch's own checks: schema, fake results, autograd under compilation with dynamic shapes."""
    leaves = leaves_of(shape, torch.float32, device)
    dense = [None if leaf is None else leaf.detach().contiguous().requires_grad_() for leaf in leaves]
    torch.library.opcheck(ops.qk_norm_rope_triton, (*dense, *tables_of(shape, True, device), 1e-6, True))
    compiled = torch.compile(ops.qk_norm_rope, fullgraph=True, backend="aot_eager")
    arguments = (*leaves[:2], QKNorms(*leaves[2:]), *tables_of(shape, True, device))
    got, wanted = (function(*arguments, backend="triton") for function in (compiled, ops.qk_norm_rope))
    for mine, theirs in zip(got, wanted, strict=True):
        assert torch.equal(mine, theirs)


FAULTS = [
    ("real * cos_even - imaginary * sin_even", "real * cos_even + imaginary * sin_even"),
    ("imaginary * cos_odd + real * sin_odd", "imaginary * cos_odd + real * sin_even"),
    ("tl.where(from_text, text, image)", "tl.where(from_text, image, text)"),
    ("x *= tl.rsqrt(tl.sum(x * x, 2) / DIM + eps)", "x *= tl.rsqrt(tl.sum(x * x, 2) / BLOCK_DIM + eps)"),
    (
        "k = tl.load(read + NUM_HEADS * DIM, mask=inside, other=0.0)\n    if",
        "k = tl.load(read, mask=inside, other=0.0)\n    if",
    ),
    ("even * cos_even + odd * sin_odd", "even * cos_even + odd * sin_even"),
    ("(inner - normal * along)", "inner"),
    ("tl.where(of_text, 0.0, dq_weight)", "dq_weight"),
    ("text_k_sum += ", "text_k_sum = "),
    ("dv = tl.load(d_value + given, mask=inside, other=0.0)", "dv = dq"),
]


@pytest.mark.parametrize("fault", range(len(FAULTS)))
def test_the_check_sees_a_broken_kernel(device: torch.device, tmp_path: Path, fault: int) -> None:
    """Control: each of these mistakes is refused by the check above."""
    module = broken(ops, *FAULTS[fault], tmp_path)
    with pytest.raises(AssertionError):
        check(module, (13, 30, 3, 24), True, torch.float32, 2e-6, device)
