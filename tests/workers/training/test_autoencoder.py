"""The small model's VAE: it learns, repeats, and comes out standardised in diffusers layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from workers.training.autoencoder import AutoencoderPlan, fidelity, make_autoencoder, pictures, train_autoencoder

PLAN = AutoencoderPlan(channels=(8, 16, 16), steps=150, batch=8, crop=24, warmup=5, lr=1e-2, decay=0.95, mixed=False)


def test_it_learns(tmp_path: Path) -> None:
    """Held-out pictures come back much better than from a fresh VAE; what is written loads and is standardised."""
    trained = train_autoencoder(PLAN)
    assert fidelity(trained, PLAN) > fidelity(make_autoencoder(PLAN), PLAN) + 3
    trained.save_pretrained(tmp_path)
    loaded = AutoencoderKL.from_pretrained(tmp_path)
    latents = torch.cat([loaded.encode(pictures(PLAN, step)).latent_dist.mean for step in range(8, 24)])
    standard = (latents - loaded.config["shift_factor"]) * loaded.config["scaling_factor"]
    assert abs(float(standard.mean())) < 0.2
    assert abs(float(standard.std()) - 1) < 0.2


def test_it_repeats() -> None:
    """The same plan gives the same bits; another seed does not."""
    plan = replace(PLAN, steps=3)
    first, second, other = (list(train_autoencoder(p).parameters()) for p in (plan, plan, replace(plan, seed=1)))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_held_out_pictures_are_others() -> None:
    """Fidelity is not measured on what was trained on."""
    assert not torch.equal(pictures(PLAN, 0), pictures(PLAN, 0, held_out=True))
