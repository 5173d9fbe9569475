"""Previews: a few numbers per pixel in place of a decoder, close enough to know the picture by."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from model.previews import PreviewMap, fit_preview_map
from model.sampling import Guidance
from model.weights.checkpoints import LoadedModel
from tests.model.test_sampling import run, sampler
from workers.training.stickerworld.settings import Settings
from workers.training.stickerworld.world import sample


@pytest.fixture(scope="module")
def preview_map(tiny: LoadedModel) -> PreviewMap:
    return fit_preview_map(tiny.codec)


def likeness(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Correlation over all pixels and channels."""
    return float(np.corrcoef(one.ravel(), other.ravel())[0, 1])


def small(pixels: NDArray[np.uint8], factor: int) -> NDArray[np.float64]:
    """Block means [H / factor, W / factor, 3]."""
    height, width, _ = pixels.shape
    return pixels.reshape(height // factor, factor, width // factor, factor, 3).mean((1, 3))


@pytest.mark.parametrize("number", range(3))
def test_a_preview_looks_like_the_picture(tiny: LoadedModel, preview_map: PreviewMap, number: int) -> None:
    """Latents of a scene give its colours, block by block; the map with its rows in another order does not."""
    picture = sample(1, number, Settings()).target
    side = picture.shape[0] // tiny.codec.cell * tiny.codec.cell
    picture = picture[:side, :side]
    pixels = torch.from_numpy(picture.astype(np.float32) / 127.5 - 1).permute(2, 0, 1)
    moments = tiny.codec.moments(pixels)
    tokens = tiny.codec.sample(moments, torch.zeros_like(moments.chunk(2)[0]))
    grid = tiny.codec.grid(side, side)
    begun = run(tiny, 1, 2, Guidance(3.5, 3.5), references=0)
    shown = replace(begun, latents=tokens, condition=replace(begun.condition, target_grid=grid))
    wanted = small(picture, tiny.codec.factor)
    assert likeness(preview_map.picture(shown).astype(np.float64), wanted) > 0.95
    rolled = PreviewMap(preview_map.weights.roll(1, 0))
    assert likeness(rolled.picture(shown).astype(np.float64), wanted) < 0.8


def test_the_clean_estimate_is_where_one_long_step_leads(tiny: LoadedModel) -> None:
    """After a step, x − sigma·v: from the old latents straight to sigma 0 by the same velocity."""
    begun = run(tiny, 3, 4, Guidance(3.5, 3.5), references=1)
    assert begun.clean is begun.latents, "before the first step there is nothing to go by"
    (after,) = sampler(tiny).advance([begun])
    (velocity,) = sampler(tiny).velocities([begun])[0]
    torch.testing.assert_close(after.clean, begun.latents - begun.sigmas[0] * velocity, rtol=0, atol=1e-5)
    while not after.done:
        (after,) = sampler(tiny).advance([after])
    torch.testing.assert_close(after.clean, after.latents)


def test_a_map_follows_from_its_vae(tiny: LoadedModel, preview_map: PreviewMap) -> None:
    """Two workers with the same model show the same preview."""
    torch.testing.assert_close(fit_preview_map(tiny.codec).weights, preview_map.weights, rtol=0, atol=1e-5)
