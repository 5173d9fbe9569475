"""The modulation kernels against their references in float64: odd shapes, any rows, strides, types, all gradients."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from kernels import modulation
from tests.kernels.interpreted.broken import broken

pytestmark = pytest.mark.gpu

DTYPES = [(torch.float32, 2e-6), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)]
"""Error allowed, of the largest number of each result."""
SHAPES = [("scattered", 45, 96, 3), ("runs", 7, 1100, 2), ("one", 37, 257, 1), ("absent", 33, 64, 4)]
"""(how tokens choose among rows, tokens, width, rows): below, at and beyond a program's tokens, no powers of two."""


def guarded(tensor: Tensor) -> Tensor:
    """The same numbers as a view with NaN between, before and behind its rows: further than any tile reaches."""
    tokens, width = tensor.shape
    room = torch.full((tokens + 2, 4 * width + 7), float("nan"), dtype=tensor.dtype, device=tensor.device)
    view = room[1:-1, width + 3 : 2 * width + 3]
    view.copy_(tensor.detach())
    return view.requires_grad_(tensor.requires_grad)


def choose_rows(pattern: str, tokens: int, num_rows: int, generator: torch.Generator) -> Tensor | None:
    """Rows [tokens]; `absent` leaves the last row without any token."""
    if pattern == "one":
        return None
    if pattern == "runs":
        return torch.arange(tokens) * num_rows // tokens
    return torch.randint(num_rows - (pattern == "absent"), (tokens,), generator=generator)


def check(
    module: ModuleType, shape: tuple[str, int, int, int], dtype: torch.dtype, tolerance: float, device: torch.device
) -> None:
    """All three ops of the module, and the gradients of everything they take."""
    pattern, tokens, width, num_rows = shape
    generator = torch.Generator().manual_seed(tokens)
    rows = choose_rows(pattern, tokens, num_rows, generator)
    if rows is not None:
        rows = rows.to(device, torch.int32 if pattern == "runs" else torch.int64)
    drawn = [torch.randn(size, width, generator=generator) for size in (tokens, tokens, num_rows, num_rows, num_rows)]
    leaves = [guarded(tensor.to(device, dtype)).requires_grad_() for tensor in drawn]
    exact_leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
    for name in ("modulate", "gate_residual", "gate_residual_modulate"):
        used = {"modulate": (0, 3, 4), "gate_residual": (0, 1, 2)}.get(name, range(5))
        arguments, exact_arguments = ([some[place] for place in used] for some in (leaves, exact_leaves))
        got = outputs(getattr(module, name)(*arguments, rows, backend="triton"))
        wanted = outputs(getattr(modulation, f"{name}_reference")(*exact_arguments, rows))
        weights = [torch.randn(y.shape, generator=generator).to(device, dtype) for y in got]
        got += torch.autograd.grad(got, arguments, weights)
        wanted += torch.autograd.grad(wanted, exact_arguments, [weight.double() for weight in weights])
        for mine, exact in zip(got, wanted, strict=True):
            assert mine.dtype is dtype
            assert (mine - exact).abs().max() <= tolerance * exact.abs().max()


def outputs(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else result


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape[0])
def test_equals_the_reference(
    device: torch.device, shape: tuple[str, int, int, int], dtype: torch.dtype, tolerance: float
) -> None:
    """Forward and all gradients, of tokens that use one row, runs of rows or rows in no order."""
    check(modulation, shape, dtype, tolerance, device)


def test_many_pieces(device: torch.device) -> None:
    """More pieces than the last sum takes at a time. On a GPU, where they come in any order, twice the same bits."""
    tokens, width = 16 * (modulation.SUM["PIECES"] + 1), 8
    generator = torch.Generator().manual_seed(0)
    x, given = (torch.randn(tokens, width, generator=generator).to(device) for _ in range(2))
    vectors = torch.randn(2, 2 * width, generator=generator).to(device).requires_grad_()
    rows = (torch.arange(tokens, device=device) > tokens - 9).long()

    def gradient(function: Callable[..., Tensor], dtype: torch.dtype) -> Tensor:
        wide = vectors.detach().to(dtype).requires_grad_()
        out = function(x.to(dtype), *wide.chunk(2, dim=1), rows)
        return torch.autograd.grad(out, wide, given.to(dtype))[0]

    def by_triton(x: Tensor, shift: Tensor, scale: Tensor, rows: Tensor | None) -> Tensor:
        return modulation.modulate(x, shift, scale, rows, backend="triton")

    got = gradient(by_triton, torch.float32)
    assert device.type == "cpu" or torch.equal(got, gradient(by_triton, torch.float32))
    wanted = gradient(modulation.modulate_reference, torch.float64)
    assert (got - wanted).abs().max() <= 1e-6 * wanted.abs().max()


def test_mixed_types(device: torch.device) -> None:
    """Vectors in bfloat16 modulate tokens in float32 without a copy; results and gradients have torch's dtypes."""
    generator = torch.Generator().manual_seed(0)
    x, update = (torch.randn(9, 40, generator=generator).to(device).requires_grad_() for _ in range(2))
    vectors = [torch.randn(1, 40, generator=generator).to(device, torch.bfloat16).requires_grad_() for _ in range(3)]
    got = modulation.gate_residual_modulate(x, update, *vectors, None, backend="triton")
    wanted = modulation.gate_residual_modulate_reference(x, update, *vectors, None)
    leaves = (x, update, *vectors)
    got += torch.autograd.grad([y.sum() for y in got], leaves)
    wanted += torch.autograd.grad([y.sum() for y in wanted], leaves)
    for mine, theirs in zip(got, wanted, strict=True):
        assert mine.dtype is theirs.dtype
        assert (mine - theirs).abs().max() <= 1e-2 * theirs.abs().max()


def test_frozen_vectors(device: torch.device) -> None:
    """Where shift, scale and gate do not learn nothing is summed, and the tokens' gradients are the same."""
    generator = torch.Generator().manual_seed(0)
    x, update = (torch.randn(21, 40, generator=generator).to(device).requires_grad_() for _ in range(2))
    vectors = [torch.randn(1, 40, generator=generator).to(device) for _ in range(3)]
    learning = [vector.clone().requires_grad_() for vector in vectors]
    gradients = [
        torch.autograd.grad(
            sum(modulation.gate_residual_modulate(x, update, *some, None, backend="triton")).sum(), leaves
        )
        for some, leaves in ((vectors, (x, update)), (learning, (x, update)))
    ]
    for frozen, learned in zip(*gradients, strict=True):
        assert torch.equal(frozen, learned)


def test_torch_takes_the_op(device: torch.device) -> None:
    """torch's own checks: schema, fake results, autograd under compilation with dynamic shapes."""
    generator = torch.Generator().manual_seed(0)
    x, update, gate, shift, scale = (
        torch.randn(size, 24, generator=generator).to(device).requires_grad_() for size in (5, 5, 2, 2, 2)
    )
    rows = torch.tensor([0, 1, 1, 0, 1], device=device)
    torch.library.opcheck(modulation.modulation_triton, (x, update, gate, shift, scale, rows, 1e-6))
    torch.library.opcheck(modulation.modulation_triton, (x, None, None, shift, scale, None, 1e-6))

    def both(x: Tensor, update: Tensor) -> tuple[Tensor, Tensor]:
        return modulation.gate_residual_modulate(x, update, gate, shift, scale, rows, backend="triton")

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for got, wanted in zip(compiled(x, update), both(x, update), strict=True):
        assert torch.equal(got, wanted)


FAULTS = [
    ("(1.0 + gain.to(tl.float32))", "gain.to(tl.float32)"),
    (
        "value = tl.load(x + place * x_stride + column, mask=inside",
        "value = tl.load(x + place * x_stride + column, mask=present[:, None]",
    ),
    ("centred = tl.where(inside, value - mean[:, None], 0.0)", "centred = value - mean[:, None]"),
    (
        "row = tl.load(rows + token, mask=present, other=0).to(tl.int64)[:, None]",
        "row = tl.zeros([TOKENS, 1], tl.int64)",
    ),
    (" - normal * along[:, None]", ""),
    ("(given - level[:, None]", "(given"),
    ("wanted &= ((members >> near.to(tl.int64)) & 1) == 1", "wanted &= near >= 0"),
    ("tl.max(tl.where(mine, offset + 1, 0))", "tl.max(tl.where(mine, offset, 0))"),
    ("shift_sum += tl.sum(given, 0)", "shift_sum = tl.sum(given, 0)"),
    ("scale_sum += tl.sum(given * normal, 0)", "scale_sum += tl.sum(given, 0)"),
    ("passed = (total * factor[None, :])", "passed = total"),
    ("written = tl.load(found + cell, mask=piece < num_pieces, other=0) != 0", "written = piece < num_pieces - 1"),
]


@pytest.mark.parametrize("fault", range(len(FAULTS)))
def test_the_check_sees_a_broken_kernel(device: torch.device, tmp_path: Path, fault: int) -> None:
    """Control: each of these mistakes is refused by the check above."""
    module = broken(modulation, *FAULTS[fault], tmp_path)
    with pytest.raises(AssertionError):
        check(module, SHAPES[0], torch.float32, 2e-6, device)
