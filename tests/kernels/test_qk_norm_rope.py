"""The reference of QK norm and rotary embedding: the recorded pipeline's own arithmetic, and gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels.qk_norm_rope import QKNorms, qk_norm_rope

TEXT, IMAGE, HEADS, DIM = 7, 12, 3, 8


def recorded_norm(norm: nn.RMSNorm, x: Tensor) -> Tensor:
    """As in the forward that was compared with the recordings (diffusers 0.33.1)."""
    variance = x.float().pow(2).mean(-1, keepdim=True)
    return (x * torch.rsqrt(variance + norm.eps)).to(norm.weight.dtype) * norm.weight


def recorded_rotation(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As in the same forward."""
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-imaginary, real], dim=-1).flatten(-2)
    return (x.float() * cos[:, None] + turned.float() * sin[:, None]).to(x.dtype)


def recorded(text: Tensor | None, image: Tensor, norms: QKNorms, cos: Tensor, sin: Tensor, order: Tensor | None) -> Any:
    """One stream after the other, concatenated, put in order, rotated."""
    streams = [(image, norms.image_q, norms.image_k)]
    if text is not None:
        streams.insert(0, (text, norms.text_q, norms.text_k))
    parts: list[Tensor] = []
    for part in range(3):
        tokens: list[Tensor] = []
        for qkv, *weights in streams:
            x = qkv[:, part].contiguous()
            if part < 2:
                norm = nn.RMSNorm(DIM, eps=norms.eps, dtype=x.dtype)
                norm.weight = weights[part]
                x = recorded_norm(norm, x)
            tokens.append(x)
        joint = torch.cat(tokens)
        joint = joint if order is None else joint[order]
        parts.append(joint if part == 2 else recorded_rotation(joint, cos, sin))
    return tuple(parts)


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, QKNorms, Tensor, Tensor, Tensor]:
    """Text, image, norms, tables in which no two neighbours are equal, and a permutation."""
    generator = torch.Generator().manual_seed(0)
    text, image = (torch.randn(num, 3, HEADS, DIM, generator=generator).to(dtype) for num in (TEXT, IMAGE))
    weights = [nn.Parameter(torch.randn(DIM, generator=generator).to(dtype)) for _ in range(4)]
    wide = torch.promote_types(dtype, torch.float32)
    cos, sin = (torch.randn(TEXT + IMAGE, DIM, generator=generator, dtype=wide) for _ in range(2))
    return text, image, QKNorms(*weights), cos, sin, torch.randperm(TEXT + IMAGE, generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("texted", [False, True])
def test_recordings_are_met_bit_for_bit(dtype: torch.dtype, ordered: bool, texted: bool) -> None:
    """Golden recordings are compared on a CPU through the reference, on slices of a fused projection."""
    text, image, norms, cos, sin, order = inputs(dtype)
    if not texted:
        cos, sin, order = cos[:IMAGE], sin[:IMAGE], torch.argsort(order[:IMAGE])
    # A single block's projection holds the MLP's part behind each token's qkv.
    wider = torch.cat([image.flatten(1), torch.full((IMAGE, 5), torch.nan, dtype=dtype)], dim=1)
    image = wider[:, : 3 * HEADS * DIM].unflatten(1, (3, HEADS, DIM))
    case = (text if texted else None, image, norms, cos, sin, order if ordered else None)
    for wanted, got in zip(recorded(*case), qk_norm_rope(*case), strict=True):
        assert torch.equal(wanted, got)
        assert wanted.dtype is got.dtype


def test_values_that_stay_in_place_are_not_copied() -> None:
    """A single block of one request: its values are read where the projection left them."""
    _, image, norms, cos, sin, _ = inputs(torch.float32)
    value = qk_norm_rope(None, image, norms, cos[:IMAGE], sin[:IMAGE], None)[2]
    assert value.data_ptr() == image[:, 2].data_ptr()


@pytest.mark.parametrize("ordered", [False, True])
def test_gradcheck(ordered: bool) -> None:
    """Gradients of projections and weights against finite differences in float64."""
    text, image, norms, cos, sin, order = inputs(torch.float64)
    leaves = [tensor[:, :, :2].clone().requires_grad_() for tensor in (text[:2], image[:3])]
    keep = torch.argsort(order[:5]) if ordered else None

    def all_of(text: Tensor, image: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        return qk_norm_rope(text, image, QKNorms(*weights), cos[:5], sin[:5], keep)

    weights = [weight for weight in (norms.text_q, norms.text_k, norms.image_q, norms.image_k) if weight is not None]
    assert torch.autograd.gradcheck(all_of, (*leaves, *weights))


@pytest.mark.parametrize("learning", [False, True])
def test_the_op_describes_its_results(learning: bool) -> None:
    """Shapes and dtypes without running a kernel: what torch.compile sees of the Triton op, forward and backward."""
    text, image, norms, cos, sin, order = inputs(torch.bfloat16)
    fields = ("text_q", "text_k", "image_q", "image_k")
    weights = {name: getattr(norms, name).detach().requires_grad_(learning) for name in fields}
    with FakeTensorMode() as mode:
        leaves = [mode.from_tensor(tensor.requires_grad_(learning)) for tensor in (text, image)]
        fakes = [mode.from_tensor(tensor) for tensor in (cos, sin, order)]
        held = {name: mode.from_tensor(weight) for name, weight in weights.items()}
        got = qk_norm_rope(*leaves, replace(norms, **held), *fakes, backend="triton")
        for fake in got:
            assert (fake.shape, fake.dtype) == ((TEXT + IMAGE, HEADS, DIM), torch.bfloat16)
        if learning:
            given = [*leaves, *held.values()]
            for leaf, gradient in zip(given, torch.autograd.grad([y.sum() for y in got], given), strict=True):
                assert (leaf.shape, leaf.dtype) == (gradient.shape, gradient.dtype)


def test_compiles_in_one_graph() -> None:
    """No graph break, with and without a text stream."""
    text, image, norms, cos, sin, order = inputs(torch.float32)
    compiled = torch.compile(qk_norm_rope, fullgraph=True, backend="eager")
    for case in ((text, image, norms, cos, sin, order), (None, image, norms, cos[:IMAGE], sin[:IMAGE], None)):
        for got, wanted in zip(compiled(*case), qk_norm_rope(*case), strict=True):
            assert torch.equal(got, wanted)
