"""The packed attention kernels against the reference in float64, over odd lengths, and broken copies of them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import attention, flash
from kernels.attention import Pack, Visibility, attention_reference, make_pack, packed_attention
from tests.kernels.interpreted.broken import broken

pytestmark = pytest.mark.gpu
HEADS = 2
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Largest error allowed, relative to the largest value (or 1)."""
GUARD = 3
"""Tokens of NaN before and after everything a kernel reads."""

CASES = [
    ([1], 64, torch.float32),
    ([33, 1, 70], 64, torch.float32),
    ([64, 128], 16, torch.float32),
    ([130, 1, 65], 128, torch.bfloat16),
    ([40, 200], 64, torch.float16),
    ([127, 96, 2], 64, torch.bfloat16),
]


def packed(lengths: Sequence[int], device: torch.device, seen: bool = False) -> Pack:
    """A pack; `seen`: every token has a kind of five and sees some of them, some see nothing."""
    boundaries = [0, *accumulate(lengths)]
    if not seen:
        return make_pack(boundaries, device)
    generator = torch.Generator().manual_seed(5)
    # Kinds in runs, like segments: whole blocks of keys are out of sight for some queries.
    kind = (torch.arange(boundaries[-1]) // 40 % 5).to(device, torch.int32)
    sees = torch.randint(0, 32, (boundaries[-1],), generator=generator).to(device, torch.int32)
    return make_pack(boundaries, device, Visibility(kind, sees))


def guarded(
    tokens: int, dim: int, dtype: torch.dtype, device: torch.device, seed: int, opposed: float = 0.0
) -> tuple[Tensor, ...]:
    """q, k and v [tokens, HEADS, dim], views of a fused projection, amid NaN; q points away from k if `opposed`."""
    generator = torch.Generator().manual_seed(seed)
    whole = torch.full((tokens + 2 * GUARD, 3, HEADS, dim), float("nan"), dtype=dtype, device=device)
    whole[GUARD:-GUARD] = torch.randn(tokens, 3, HEADS, dim, generator=generator).to(device, dtype)
    whole[:, 0] -= opposed
    whole[:, 1] += opposed > 0
    return whole[GUARD:-GUARD].unbind(1)


def close(got: Tensor, wanted: Tensor, tolerance: float) -> bool:
    """Within a tolerance relative to the largest value; infinities in the same places, NaN nowhere."""
    got = got.double()
    finite = wanted.isfinite()
    error = (got - wanted)[finite].abs().max() if finite.any() else torch.tensor(0.0)
    scale = wanted[finite].abs().max() if finite.any() else torch.tensor(1.0)
    # A sum that comes to nothing (lse of one token's own score, gradient of a single weight) has no scale of its own.
    return bool((got[~finite] == wanted[~finite]).all() and error <= tolerance * max(float(scale), 1.0))


def mistakes(
    kernels: Any,
    lengths: Sequence[int],
    dim: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    seen: bool = False,
    opposed: float = 0.0,
) -> list[str]:
    """Which of the results of `kernels` (the module, or a broken copy) are not those of the reference in float64."""
    pack = packed(lengths, device, seen)
    visibility = pack.visibility
    where = (pack.tiles, visibility and visibility.kind, visibility and visibility.sees)
    inputs = guarded(sum(lengths), dim, dtype, device, 0, opposed)
    weight = guarded(sum(lengths), dim, dtype, device, 1)[0]
    exact = [tensor.double().requires_grad_() for tensor in inputs]
    wanted = attention_reference(*exact, pack)
    # The log-sum-exp is differentiable too, where there is one.
    pull = torch.linspace(-1, 1, wanted[1].numel(), device=device).view_as(wanted[1]) * wanted[1].isfinite()
    loss = (wanted[0] * weight.double()).sum() + (wanted[1].nan_to_num(neginf=0.0) * pull).sum()
    wanted += torch.autograd.grad(loss, exact)
    out, lse = kernels.attention_triton(*inputs, where)
    grads = kernels.attention_backward_triton(weight, pull, *inputs, out, lse, where)
    # Rounding errors of scores near -128 are as much larger than those of scores near 1.
    tolerance = TOLERANCE[dtype] * (10 if opposed else 1)
    names = ("out", "lse", "query", "key", "value")
    return [
        name
        for name, ours, theirs in zip(names, (out, lse, *grads), wanted, strict=True)
        if not close(ours, theirs.detach(), tolerance)
    ]


@pytest.mark.parametrize(("lengths", "dim", "dtype"), CASES)
def test_equals_the_reference(lengths: list[int], dim: int, dtype: torch.dtype, device: torch.device) -> None:
    """Output, log-sum-exp and all gradients, within sequences only, reading nothing outside the pack."""
    assert mistakes(flash, lengths, dim, dtype, device) == []


@pytest.mark.parametrize(("lengths", "dim", "dtype"), [CASES[1], CASES[3]])
def test_visibility(lengths: list[int], dim: int, dtype: torch.dtype, device: torch.device) -> None:
    """Tokens attend to the kinds they see; to whole blocks they do not see, or to nothing, neither."""
    assert mistakes(flash, lengths, dim, dtype, device, seen=True) == []


def test_scores_far_below_zero(device: torch.device, tmp_path: Path) -> None:
    """Where all scores are near -128, a score of 0 beyond the end of a sequence would be e^128 and overflow."""
    case = ([65, 40], 64, torch.float32, device)
    assert mistakes(flash, *case, opposed=16.0) == []
    copy = broken(
        flash,
        "tl.minimum(scores * (scale * 1.4426950408889634) - sums, 0.0)",
        "scores * (scale * 1.4426950408889634) - sums",
        tmp_path,
    )
    assert "query" in mistakes(copy, *case, opposed=16.0)


BROKEN = [
    # (what is written, what a careless edit would write, what is then wrong, with visibility)
    ("acc * fade[:, None]", "acc", {"out"}, False),
    ('tl.where(inside[None, :], scores, float("-inf"))', "scores", {"out", "lse"}, False),
    ("elif at + COLUMNS > end", "elif at > end", {"out", "lse"}, False),
    ("inside[None, :] & (((seen", "(((seen", {"out", "lse"}, True),
    ("tl.load(tile + 1)", "tl.load(tile) * 0", {"out", "lse", "query", "key", "value"}, False),
    ("tl.sum(o * do, 1) - ", "tl.sum(o * do, 1) + ", {"query", "key"}, False),
    ("(grad_k * scale)", "grad_k", {"key"}, False),
    ("(grad_q * scale)", "grad_q", {"query"}, False),
    ("slopes.to(k.dtype), k, grad_q", "slopes.to(k.dtype), v, grad_q", {"query"}, False),
    ("weights.to(do.dtype), do, grad_v", "slopes.to(do.dtype), do, grad_v", {"value"}, False),
    ("(seen >> kinds)", "(seen >> (kinds + 1))", {"out", "lse"}, True),
    ("((sees >> kinds) & 1) != 0", "((sees >> kinds) & 1) != 2", {"query", "key", "value"}, True),
]


@pytest.mark.parametrize(("written", "instead", "wrong", "seen"), BROKEN)
def test_control_broken_kernels(
    written: str, instead: str, wrong: set[str], seen: bool, device: torch.device, tmp_path: Path
) -> None:
    """The same check refuses kernels with a mistake in them."""
    copy = broken(flash, written, instead, tmp_path, everywhere=True)
    assert wrong <= set(mistakes(copy, [65, 40], 64, torch.float32, device, seen=seen))


def test_gradients_through_the_operator(device: torch.device) -> None:
    """The public operation on views of a fused projection: the gradient arrives in the projection."""
    pack = packed([33, 20], device, seen=True)
    fused = torch.randn(53, 3, HEADS, 16, device=device, requires_grad=True)
    exact = fused.detach().double().requires_grad_()
    weight = torch.randn(53, HEADS, 16, device=device)
    out = packed_attention(*fused.unbind(1), pack, backend="triton")
    (out * weight).sum().backward()
    (attention_reference(*exact.unbind(1), pack)[0] * weight).sum().backward()
    assert fused.grad is not None
    assert exact.grad is not None
    assert close(fused.grad, exact.grad, 1e-5)


def test_any_strides_will_do(device: torch.device) -> None:
    """Heads that begin anywhere, or are not dense, are copied, and the result is the same."""
    pack = packed([33, 20], device)
    odd = torch.randn(53 * 3 * HEADS * 16 + 1, device=device)[1:].view(53, 3, HEADS, 16).unbind(1)
    apart = tuple(torch.randn(53, HEADS, 16, 2, device=device)[..., 0] for _ in range(3))
    for inputs in (odd, apart):
        wanted = attention_reference(*(tensor.double() for tensor in inputs), pack)[0]
        assert close(packed_attention(*inputs, pack, backend="triton"), wanted, 1e-5)


def test_dense_gradients_are_not_needed(device: torch.device) -> None:
    """A gradient that is an expanded number, as a sum's is, has no dense last dimension."""
    query = torch.randn(20, HEADS, 16, device=device, requires_grad=True)
    packed_attention(query, query, query, [0, 20], backend="triton").sum().backward()
    exact = query.detach().double().requires_grad_()
    attention_reference(exact, exact, exact, make_pack([0, 20], device))[0].sum().backward()
    assert query.grad is not None
    assert exact.grad is not None
    assert close(query.grad, exact.grad, 1e-5)


def test_the_operator_is_registered_well(device: torch.device) -> None:
    """Schema, fake tensors and autograd agree with what the kernels return, also for a symbolic number of tokens."""
    pack = packed([20, 7], device, seen=True)
    assert pack.visibility is not None
    inputs = [tensor.detach().requires_grad_() for tensor in guarded(27, 16, torch.float32, device, 2)]
    where = (pack.tiles, pack.visibility.kind, pack.visibility.sees)
    torch.library.opcheck(attention.flash, (*inputs, *where))


def test_one_graph_for_all_lengths(device: torch.device) -> None:
    """`torch.compile` makes one whole graph of a call; the second length makes it general, others take that one."""
    graphs: list[Any] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def call(query: Tensor, pack: Pack) -> Tensor:
        return packed_attention(query, query, query, pack, backend="triton") * 2

    torch.compiler.reset()
    compiled = torch.compile(call, backend=backend, fullgraph=True)
    for lengths in ([20, 7], [12, 30, 3], [9, 150], [5, 6, 7]):
        query = torch.randn(sum(lengths), HEADS, 16, device=device)
        pack = packed(lengths, device)
        assert torch.equal(compiled(query, pack), call(query, pack))
    assert len(graphs) <= 2
    torch.compiler.reset()
