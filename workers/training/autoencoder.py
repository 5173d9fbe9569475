"""Trains the small model's VAE on StickerWorld pictures: `python -m workers.training.autoencoder OUT`.

Everything the small model can show passes through it, so it comes first. A FLUX-shaped VAE (16 latent channels, shift
and scale in its configuration, no quant convolutions), written in diffusers layout; its latents are brought to mean 0
and deviation 1, as FLUX's shift and scale do. A step is a function of (seed, step number).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.nn import functional as F

from model.preprocess import to_tensor_range
from workers.training.stickerworld.settings import Settings
from workers.training.stickerworld.world import sample

app = typer.Typer(add_completion=False)


@dataclass(frozen=True, slots=True)
class AutoencoderPlan:
    """Attributes:
    channels: per level; the factor is 2^(levels − 1).
    posterior: weight of the KL divergence from a standard normal: small, so that pictures come back sharp.
    decay: of the moving average that is kept. mixed: bfloat16 autocast, three times as fast on a CPU.
    """

    channels: tuple[int, ...] = (32, 64, 64)
    latent_channels: int = 16
    steps: int = 6000
    batch: int = 16
    crop: int = 48
    lr: float = 5e-4
    warmup: int = 100
    posterior: float = 1e-6
    decay: float = 0.998
    mixed: bool = True
    seed: int = 0


def make_autoencoder(plan: AutoencoderPlan) -> Any:
    """A fresh VAE; diffusers' class, whose forward methods are loosely annotated."""
    levels = len(plan.channels)
    shape: dict[str, Any] = {
        "block_out_channels": plan.channels,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)
        return AutoencoderKL(
            latent_channels=plan.latent_channels,
            layers_per_block=1,
            norm_num_groups=8,
            use_quant_conv=False,
            use_post_quant_conv=False,
            scaling_factor=1.0,
            shift_factor=0.0,
            **shape,
        )


def pictures(plan: AutoencoderPlan, step: int, *, held_out: bool = False) -> Tensor:
    """A step's crops: [batch, 3, crop, crop] in [-1, 1], of targets of all tasks."""
    settings = Settings(split="held_out" if held_out else "train", placement="free", sizes="named")
    crops: list[Tensor] = []
    for number in range(plan.batch):
        index = step * plan.batch + number
        picture = sample(plan.seed, index, settings).target
        random = np.random.default_rng([plan.seed, index])
        top = int(random.integers(0, picture.shape[0] - plan.crop + 1))
        left = int(random.integers(0, picture.shape[1] - plan.crop + 1))
        crops.append(torch.from_numpy(to_tensor_range(picture[top : top + plan.crop, left : left + plan.crop])))
    return torch.stack(crops)


def train_autoencoder(plan: AutoencoderPlan) -> Any:
    """The trained VAE with its moving average as weights and its shift and scale set."""
    vae = make_autoencoder(plan)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=plan.lr, betas=(0.9, 0.99), weight_decay=0.0)
    averages = [parameter.detach().clone() for parameter in vae.parameters()]
    for step in track(range(plan.steps), "autoencoder", console=Console(stderr=True)):
        for group in optimizer.param_groups:
            group["lr"] = plan.lr * _schedule(step, plan)
        with torch.autocast("cpu", torch.bfloat16, enabled=plan.mixed):
            loss = _loss(vae, pictures(plan, step), plan, torch.Generator().manual_seed(plan.seed + step))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        decay = min(plan.decay, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(averages, list(vae.parameters()), 1 - decay)  # type: ignore[attr-defined]
    with torch.no_grad():
        for parameter, average in zip(vae.parameters(), averages, strict=True):
            parameter.copy_(average)
    _standardise(vae, plan)
    return vae


@torch.no_grad()
def fidelity(vae: Any, plan: AutoencoderPlan, *, steps: int = 4) -> float:
    """PSNR in dB of held-out pictures decoded from their posterior's mean."""
    errors: list[Tensor] = []
    for step in range(steps):
        truth = pictures(plan, step, held_out=True)
        decoded = vae.decode(vae.encode(truth).latent_dist.mean).sample.clamp(-1, 1)
        errors.append((decoded - truth).square().mean() / 4)
    return -10 * math.log10(float(torch.stack(errors).mean()))


def _loss(vae: Any, truth: Tensor, plan: AutoencoderPlan, generator: torch.Generator) -> Tensor:
    """Absolute and squared error of a posterior draw, and the KL divergence per latent value."""
    posterior = vae.encode(truth).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=generator)
    decoded = vae.decode(posterior.mean + posterior.std * noise).sample
    divergence = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
    return F.l1_loss(decoded, truth) + F.mse_loss(decoded, truth) + plan.posterior * divergence


@torch.no_grad()
def _standardise(vae: Any, plan: AutoencoderPlan) -> None:
    """Set shift and scale so that latents have mean 0 and deviation 1 over training pictures."""
    latents = torch.cat([vae.encode(pictures(plan, step)).latent_dist.mean for step in range(8)])
    vae.register_to_config(shift_factor=float(latents.mean()), scaling_factor=1 / float(latents.std()))


def _schedule(step: int, plan: AutoencoderPlan) -> float:
    """Linear warm-up, then a cosine down to a hundredth."""
    if step < plan.warmup:
        return (step + 1) / plan.warmup
    done = (step - plan.warmup) / max(1, plan.steps - plan.warmup)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done))


@app.command()
def main(
    out: Annotated[Path, typer.Argument(help="Directory to write, e.g. model/tiny/vae.")],
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = AutoencoderPlan.steps,
    seed: Annotated[int, typer.Option(help="Of weights, pictures and noise.")] = 0,
) -> None:
    """Train the VAE, write it, and print its fidelity on held-out pictures."""
    plan = AutoencoderPlan(steps=steps, seed=seed)
    vae = train_autoencoder(plan)
    vae.save_pretrained(out)
    print(f"wrote {out}: {fidelity(vae, plan, steps=16):.2f} dB on held-out pictures")


if __name__ == "__main__":
    app(prog_name="python -m workers.training.autoencoder")
