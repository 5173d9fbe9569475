"""The small model's VAE: its encoder is the code it was written from, its decoder learns, and all of it repeats."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from workers.training.tiny.autoencoder import (
    AutoencoderPlan,
    fidelity,
    make_autoencoder,
    pictures,
    principal_code,
    train_autoencoder,
)

PLAN = AutoencoderPlan(steps=120, batch=4, crop=24, warmup=5, lr=4e-3, decay=0.95, mixed=False)


def test_the_encoder_is_the_code() -> None:
    """Convolutions, norm and SiLU together give the principal components of held-out pictures, and the same spread."""
    code = principal_code(PLAN, batches=20)
    vae = make_autoencoder(PLAN, code)
    picture = pictures(PLAN, 3, held_out=True)
    posterior = vae.encode(picture).latent_dist
    wanted = code.encode(picture)
    assert wanted.std() > 0.5
    assert (posterior.mean - wanted).abs().max() < 0.01
    assert (posterior.std - PLAN.noise).abs().max() < 1e-4


def test_the_code_keeps_what_it_can() -> None:
    """Its channels are uncorrelated over training pictures, the widest first, and their deviation is one in all."""
    code = principal_code(PLAN, batches=20)
    latents = torch.cat([code.encode(pictures(PLAN, step)) for step in range(20)]).transpose(0, 1).flatten(1)
    covariance = torch.cov(latents)
    deviations = covariance.diagonal().sqrt()
    assert (covariance - covariance.diagonal().diag()).abs().max() < 1e-3
    assert torch.equal(deviations, deviations.sort(descending=True).values)
    assert abs(float(latents.std()) - 1) < 1e-3


def test_it_learns(tmp_path: Path) -> None:
    """Held-out pictures come back better than from the bare start, also from the written files."""
    trained = train_autoencoder(PLAN)
    assert fidelity(trained, PLAN) > fidelity(make_autoencoder(PLAN, principal_code(PLAN)), PLAN) + 3
    trained.save_pretrained(tmp_path)
    assert abs(fidelity(AutoencoderKL.from_pretrained(tmp_path), PLAN) - fidelity(trained, PLAN)) < 1e-3


def test_it_repeats() -> None:
    """The same plan gives the same bits; another seed does not."""
    plan = replace(PLAN, steps=3)
    first, second, other = (list(train_autoencoder(p).parameters()) for p in (plan, plan, replace(plan, seed=1)))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_held_out_pictures_are_others() -> None:
    """Fidelity is not measured on what was trained on."""
    assert not torch.equal(pictures(PLAN, 0), pictures(PLAN, 0, held_out=True))
