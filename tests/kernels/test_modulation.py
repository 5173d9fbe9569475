"""The modulation ops' references: the recorded pipeline's own arithmetic, and gradients."""

from __future__ import annotations

from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels import modulation
from kernels.modulation import gate_residual, gate_residual_modulate, modulate

TOKENS, WIDTH, ROWS = 23, 48, 3


def recorded(x: Tensor, update: Tensor, vectors: Tensor, rows: Tensor | None) -> tuple[tuple[Tensor, ...], ...]:
    """What the forward that was compared with the recordings computes: modulate, gate, both one after the other."""
    norm = nn.LayerNorm(WIDTH, elementwise_affine=False, eps=1e-6)
    chunks = vectors.chunk(3, dim=1)
    shift, scale, gate = chunks if rows is None else (chunk[rows] for chunk in chunks)
    gated = x + gate * update
    return (norm(x) * (1 + scale) + shift,), (gated,), (gated, norm(gated) * (1 + scale) + shift)


def ours(
    x: Tensor, update: Tensor, vectors: Tensor, rows: Tensor | None, **named: Any
) -> tuple[tuple[Tensor, ...], ...]:
    """The same through the public ops."""
    shift, scale, gate = vectors.chunk(3, dim=1)
    return (
        (modulate(x, shift, scale, rows, **named),),
        (gate_residual(x, update, gate, rows, **named),),
        gate_residual_modulate(x, update, gate, shift, scale, rows, **named),
    )


def inputs(dtype: torch.dtype, num_rows: int = ROWS) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens with an offset, which a variance around zero would not survive."""
    generator = torch.Generator().manual_seed(num_rows)
    x, update = (torch.randn(TOKENS, WIDTH, generator=generator).to(dtype) for _ in range(2))
    return x + 2, update, torch.randn(num_rows, 3 * WIDTH, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_rows", [1, ROWS])
@pytest.mark.parametrize("op", range(3))
def test_recordings_are_met_bit_for_bit(op: int, dtype: torch.dtype, num_rows: int) -> None:
    """Golden recordings are compared on a CPU through the references: forward and gradients may not differ at all."""
    rows = torch.arange(TOKENS) % num_rows if num_rows > 1 else None
    results: list[tuple[Tensor, ...]] = []
    for function in (recorded, ours):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs(dtype, num_rows)]
        out = function(*leaves, rows)[op]
        weights = [torch.linspace(-1, 1, WIDTH).to(dtype).expand_as(y) for y in out]
        gradients = torch.autograd.grad(out, leaves, weights, materialize_grads=True)
        results.append((*out, *gradients))
    for wanted, got in zip(*results, strict=True):
        assert torch.equal(wanted, got)


def test_no_rows_are_row_zero() -> None:
    """Without rows all tokens take the first row, of however many."""
    x, update, vectors = inputs(torch.float32)
    zeros = torch.zeros(TOKENS, dtype=torch.int32)
    for firsts, seconds in zip(ours(x, update, vectors, None), ours(x, update, vectors, zeros), strict=True):
        for first, second in zip(firsts, seconds, strict=True):
            assert torch.equal(first, second)


@pytest.mark.parametrize("indexed", [False, True])
def test_gradcheck(indexed: bool) -> None:
    """Gradients of all inputs against finite differences in float64."""
    generator = torch.Generator().manual_seed(0)
    x, update = (torch.randn(5, 4, dtype=torch.float64, generator=generator, requires_grad=True) for _ in range(2))
    vectors = torch.randn(2, 12, dtype=torch.float64, generator=generator, requires_grad=True)
    rows = torch.tensor([1, 0, 0, 1, 1]) if indexed else None

    def all_of(*leaves: Tensor) -> tuple[Tensor, ...]:
        return tuple(chain.from_iterable(ours(*leaves, rows)))

    assert torch.autograd.gradcheck(all_of, (x, update, vectors))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_ops_describe_their_results(dtype: torch.dtype) -> None:
    """Shapes and dtypes without running a kernel: what torch.compile sees of the Triton ops, forward and backward."""
    rows = torch.arange(TOKENS) % ROWS
    x, update, vectors = (tensor.requires_grad_() for tensor in inputs(dtype))
    wanted = list(chain.from_iterable(ours(x, update, vectors, rows)))
    with FakeTensorMode() as mode:
        leaves = [mode.from_tensor(tensor) for tensor in (x, update, vectors)]
        got = list(chain.from_iterable(ours(*leaves, mode.from_tensor(rows), backend="triton")))
        for real, fake in zip(wanted, got, strict=True):
            assert (real.shape, real.dtype) == (fake.shape, fake.dtype)
        gradients = torch.autograd.grad([y.sum() for y in got], leaves)
        for leaf, gradient in zip(leaves, gradients, strict=True):
            assert (leaf.shape, leaf.dtype) == (gradient.shape, gradient.dtype)


def test_compiles_in_one_graph() -> None:
    """No graph break in any of the three ops, whichever backend was chosen."""
    x, update, vectors = inputs(torch.float32)
    rows = torch.arange(TOKENS) % ROWS
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    for gots, wanteds in zip(compiled(x, update, vectors, rows), ours(x, update, vectors, rows), strict=True):
        for got, wanted in zip(gots, wanteds, strict=True):
            assert torch.equal(got, wanted)


@pytest.mark.parametrize("width", [8, 256, 257, 3072, 4096])
def test_every_width_has_a_launch(width: int) -> None:
    """A program holds whole tokens, and each of its threads something of them."""
    for tiles in (modulation.FORWARD, modulation.BACKWARD, modulation.BACKWARD_OF_BOTH):
        sizes = modulation.sizes_for(tiles, width)
        assert sizes["BLOCK"] >= width > sizes["BLOCK"] // 2
        assert sizes["TOKENS"] * sizes["BLOCK"] <= 64 * 32 * sizes["num_warps"]


def test_too_wide_is_refused() -> None:
    """Rather than compiled to a kernel that spills."""
    with pytest.raises(ValueError, match="width 4097"):
        modulation.sizes_for(modulation.FORWARD, 4097)
