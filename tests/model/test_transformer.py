"""The packed forward against stock diffusers, and against itself one request at a time."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import cast

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import nn

from model.packing import lay_out
from model.transformer import EmbeddingTables, Network, forward
from model.weights.checkpoints import LoadedModel, ModelSource, load_model
from tests.model.requests import Sample, packed, sample


@torch.inference_mode()
def stock(model: FluxTransformer2DModel, tables: EmbeddingTables | None, one: Sample) -> torch.Tensor:
    """diffusers' own forward of one request; type and index vectors enter by a hook after the input projection."""
    layout = lay_out([one.condition])
    image = torch.cat([one.latents, *(r.tokens for r in one.condition.references)])
    hook = model.x_embedder.register_forward_hook(
        lambda _module, _inputs, output: output if tables is None else output + tables.rows(layout)
    )
    try:
        velocity = model(
            hidden_states=image[None],
            encoder_hidden_states=one.condition.text[None],
            pooled_projections=one.condition.pooled[None],
            timestep=one.timestep[None],
            guidance=torch.tensor([one.guidance]),
            img_ids=layout.ids[layout.num_text :],
            txt_ids=layout.ids[: layout.num_text],
            return_dict=False,
        )[0]
    finally:
        hook.remove()
    return velocity[0, : len(one.latents)]


@torch.inference_mode()
def ours(model: LoadedModel, samples: list[Sample]) -> list[torch.Tensor]:
    velocity = forward(Network(model.transformer), model.tables, packed(samples))
    return list(velocity.split([len(s.latents) for s in samples]))


def mixed(model: LoadedModel) -> list[Sample]:
    """0, 1, 2 and 3 references, three sizes, four timesteps, an empty slot, texts of two lengths."""
    return [
        sample(model, 1, (8, 8), {}, timestep=1.0),
        sample(model, 2, (6, 10), {1: (4, 4)}, timestep=0.72, num_text=20),
        sample(model, 3, (8, 8), {1: (3, 5), 3: (4, 2)}, timestep=0.31, guidance=4.5),
        sample(model, 4, (4, 4), {1: (4, 4), 2: (2, 3), 3: (5, 1)}, timestep=0.05, num_text=20),
    ]


@pytest.mark.parametrize("references", [{}, {1: (4, 4)}, {2: (3, 5), 5: (2, 2)}])
def test_equals_stock_diffusers(tiny: LoadedModel, references: dict[int, tuple[int, int]]) -> None:
    """Our forward is FLUX's: same weights, same inputs, same velocity, with and without references."""
    one = sample(tiny, 5, (6, 7), references, timestep=0.6)
    wanted = stock(tiny.transformer, tiny.tables, one)
    assert torch.allclose(ours(tiny, [one])[0], wanted, atol=2e-6, rtol=0)


def test_the_negative_branch_is_plain_flux(tiny: LoadedModel) -> None:
    """True CFG's negative pass adds nothing to the image tokens; a request without references does."""
    plain = sample(tiny, 6, (6, 6), {}, timestep=0.5, embedded=False)
    dressed = sample(tiny, 6, (6, 6), {}, timestep=0.5, embedded=True)
    wanted = stock(tiny.transformer, None, plain)
    assert torch.allclose(ours(tiny, [plain])[0], wanted, atol=2e-6, rtol=0)
    assert (ours(tiny, [dressed])[0] - wanted).abs().max() > 1e-2


class ReleasedNorm(nn.Module):
    """RMSNorm as diffusers 0.33.1 wrote it, on which DreamO was released: rounded before the weight, not after."""

    def __init__(self, norm: nn.RMSNorm) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return (x * scale).to(self.weight.dtype) * self.weight


def as_released(model: FluxTransformer2DModel) -> FluxTransformer2DModel:
    """A copy of diffusers' network with that norm of queries and keys."""
    copied = deepcopy(model)
    norms = [name for name, module in copied.named_modules() if isinstance(module, nn.RMSNorm)]
    for name in norms:
        copied.set_submodule(name, ReleasedNorm(cast("nn.RMSNorm", copied.get_submodule(name))))
    assert len(norms) == 4 * len(copied.transformer_blocks) + 2 * len(copied.single_transformer_blocks)
    return copied


def test_bfloat16_is_the_released_arithmetic() -> None:
    """In the dtype of production every rounding is the release's, bit for bit on any CPU; today's diffusers' is not."""
    model = load_model(ModelSource(device="cpu", dtype="bfloat16"))
    one = sample(model, 7, (8, 8), {1: (4, 4), 2: (4, 4)}, timestep=0.75, guidance=4.5)
    got = ours(model, [one])[0]
    assert torch.equal(got, stock(as_released(model.transformer), model.tables, one))
    today = stock(model.transformer, model.tables, one).float()
    assert 0 < (got.float() - today).norm() / today.norm() < 1e-2


def test_a_mixed_pack_equals_the_solo_runs(tiny: LoadedModel) -> None:
    """Sharing a forward changes nothing: sizes, references and timesteps may all differ."""
    samples = mixed(tiny)
    together = ours(tiny, samples)
    for one, velocity in zip(samples, together, strict=True):
        assert (velocity - ours(tiny, [one])[0]).abs().max() <= 1e-5
        assert (velocity - stock(tiny.transformer, tiny.tables, one)).abs().max() <= 1e-5


def test_requests_do_not_see_each_other(tiny: LoadedModel) -> None:
    """Another neighbour leaves a request's velocity as it was; its own reference does not."""
    first, second, third, fourth = mixed(tiny)
    other = sample(tiny, 99, (8, 8), {1: (3, 5), 3: (4, 2)}, timestep=0.31, guidance=4.5)
    before = ours(tiny, [first, second, third, fourth])
    after = ours(tiny, [first, second, other, fourth])
    assert torch.allclose(before[1], after[1], atol=1e-6, rtol=0)
    assert torch.allclose(before[3], after[3], atol=1e-6, rtol=0)
    assert (before[2] - after[2]).abs().max() > 1e-2


def test_guidance_and_time_are_per_request(tiny: LoadedModel) -> None:
    """Two requests that differ in guidance or time alone get different velocities in one forward."""
    a = sample(tiny, 8, (6, 6), {}, timestep=0.5, guidance=3.5)
    b = sample(tiny, 8, (6, 6), {}, timestep=0.5, guidance=1.0)
    c = sample(tiny, 8, (6, 6), {}, timestep=0.9, guidance=3.5)
    va, vb, vc = ours(tiny, [a, b, c])
    assert (va - vb).abs().max() > 1e-4
    assert (va - vc).abs().max() > 1e-4


@pytest.mark.gpu
@torch.inference_mode()
def test_cuda_agrees_with_the_cpu() -> None:
    """The mixed pack on CUDA in bfloat16 stays within bfloat16's error of float32 on the CPU."""
    reference = load_model(ModelSource(device="cpu", dtype="float32"))
    model = load_model(ModelSource(device="cuda", dtype="bfloat16"))
    samples = mixed(reference)
    wanted = torch.cat(ours(reference, samples))
    got = torch.cat(ours(model, [_moved(one, "cuda", torch.bfloat16) for one in samples])).float().cpu()
    assert (got - wanted).norm() / wanted.norm() < 5e-2


def _moved(one: Sample, device: str, dtype: torch.dtype) -> Sample:
    condition = replace(
        one.condition,
        text=one.condition.text.to(device, dtype),
        pooled=one.condition.pooled.to(device, dtype),
        references=tuple(replace(r, tokens=r.tokens.to(device, dtype)) for r in one.condition.references),
    )
    return replace(
        one,
        condition=condition,
        latents=one.latents.to(device, dtype),
        timestep=one.timestep.to(device, dtype),
    )
