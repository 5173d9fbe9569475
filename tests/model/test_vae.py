"""Latents, packing and posterior draws against diffusers."""

import pytest
import torch
from diffusers import FluxPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from hypothesis import given, settings
from hypothesis import strategies as st

from model.vae import pack_latents, unpack_latents
from model.weights.checkpoints import LoadedModel


@given(st.integers(1, 5), st.integers(1, 5))
@settings(max_examples=25)
def test_packing_equals_diffusers(rows: int, columns: int) -> None:
    """2×2 patches, channel-major, row by row; and back."""
    latents = torch.randn(16, 2 * rows, 2 * columns)
    wanted = FluxPipeline._pack_latents(latents[None], 1, 16, 2 * rows, 2 * columns)[0]
    assert torch.equal(pack_latents(latents), wanted)
    assert torch.equal(unpack_latents(pack_latents(latents), (rows, columns)), latents)


def test_a_draw_equals_diffusers(tiny: LoadedModel) -> None:
    """mean + std · noise with the log variance clamped, then FLUX's shift and scale."""
    moments = tiny.codec.moments(torch.rand(3, 32, 24) * 2 - 1)
    generator = torch.Generator().manual_seed(3)
    wanted = DiagonalGaussianDistribution(moments[None]).sample(generator)[0]
    noise = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(3))
    config = tiny.codec.vae.config
    wanted = (wanted - config["shift_factor"]) * config["scaling_factor"]
    assert torch.allclose(tiny.codec.sample(moments, noise), pack_latents(wanted), atol=1e-6)


def test_the_cell_comes_from_the_vae(tiny: LoadedModel) -> None:
    """Factor 4 gives 8 pixels a token; a size off that grid is an error, not a crop."""
    assert (tiny.codec.factor, tiny.codec.cell) == (4, 8)
    assert tiny.codec.grid(64, 32) == (8, 4)
    with pytest.raises(ValueError, match="multiple of 8"):
        tiny.codec.grid(60, 64)
