"""Trains the small model's VAE on StickerWorld pictures: `python -m workers.training.tiny.autoencoder OUT`.

Everything the small model can show passes through it, so it comes first. A FLUX-shaped VAE (factor 4, 16 latent
channels, no quant convolutions), written in diffusers layout.

Its encoder is not trained: its weights spell out the principal components of 4×4 patches, brought to deviation 1 in
all. Trained with the decoder, from random weights, the same network is 9 dB behind after the same time on a CPU; and a
known encoder lets the transformer be trained before the decoder is. A step is a function of (seed, step number).
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
from torch import Tensor, nn
from torch.nn import functional as F

from model.preprocessors.prepare import to_tensor_range
from workers.training.stickerworld.settings import Settings
from workers.training.stickerworld.world import sample

app = typer.Typer(add_completion=False)

FACTOR = 4
"""Pixels per latent, in each direction."""

_PATCH = 3 * FACTOR**2
_CARRIER = 30.0
"""Of the constant channels beside the components, which fix the last norm's deviation: see `_spell_out`."""


@dataclass(frozen=True, slots=True)
class AutoencoderPlan:
    """Attributes:
    channels: per level, of encoder and decoder; three levels make the factor.
    noise: deviation of the posterior, the same everywhere; the decoder learns to see through it.
    whitening: power of the components' deviations that is divided out; 1 makes all channels alike.
    decay: of the moving average that is kept. mixed: bfloat16 autocast, three times as fast on a CPU.
    """

    channels: tuple[int, int, int] = (16, 32, 64)
    latent_channels: int = 16
    steps: int = 12000
    batch: int = 8
    crop: int = 48
    lr: float = 2e-3
    warmup: int = 50
    noise: float = 0.05
    whitening: float = 0.5
    decay: float = 0.998
    mixed: bool = True
    seed: int = 0


@dataclass(frozen=True, slots=True)
class PatchCode:
    """A linear code of 4×4 patches: mean [48] and directions [48, channels]; values are channel, row, column."""

    mean: Tensor
    directions: Tensor

    def encode(self, picture: Tensor) -> Tensor:
        """[n, 3, h, w] → [n, channels, h / 4, w / 4]."""
        patches = F.pixel_unshuffle(picture, FACTOR) - self.mean[:, None, None]
        return torch.einsum("npyx,pc->ncyx", patches, self.directions)


def principal_code(plan: AutoencoderPlan, *, batches: int = 60) -> PatchCode:
    """Principal components of training pictures' patches, scaled by `whitening` and to deviation 1 in all."""
    patches = torch.cat([F.pixel_unshuffle(pictures(plan, step), FACTOR) for step in range(batches)])
    rows = patches.permute(0, 2, 3, 1).reshape(-1, _PATCH).double()
    mean = rows.mean(0)
    variances, directions = torch.linalg.eigh(torch.cov((rows - mean).T))
    kept = slice(_PATCH - plan.latent_channels, None)
    scaled = directions[:, kept].flip(1) * variances[kept].flip(0).pow(-plan.whitening / 2)
    scaled /= ((rows - mean) @ scaled).std()
    return PatchCode(mean.float(), scaled.float())


def make_autoencoder(plan: AutoencoderPlan, code: PatchCode) -> Any:
    """A VAE whose encoder is `code` and whose decoder is fresh; diffusers' class, loosely annotated."""
    levels = len(plan.channels)
    shape: dict[str, Any] = {
        "block_out_channels": plan.channels,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)
        vae: Any = AutoencoderKL(
            latent_channels=plan.latent_channels,
            layers_per_block=1,
            norm_num_groups=1,
            use_quant_conv=False,
            use_post_quant_conv=False,
            mid_block_add_attention=False,
            scaling_factor=1.0,
            shift_factor=0.0,
            **shape,
        )
    for network in (vae.encoder, vae.decoder):
        _silence_branches(network)
    _spell_out(vae.encoder, code, plan)
    vae.encoder.requires_grad_(False)
    return vae


@torch.no_grad()
def _silence_branches(network: nn.Module) -> None:
    """Residual branches that start as nothing: the encoder needs them so, the decoder learns faster."""
    for name, parameter in network.named_parameters():
        if ".conv2." in name:
            parameter.zero_()


@torch.no_grad()
def _spell_out(encoder: Any, code: PatchCode, plan: AutoencoderPlan) -> None:
    """Write the code as convolutions: 3 colours → 2×2 pixels of them → components z and −z → z.

    Before the last norm and SiLU the components stand as z and −z beside constants c and −c: their mean is 0, and with
    c well above z their deviation hardly depends on the picture, so that the norm is a mere factor. SiLU is undone by
    silu(x) − silu(−x) = x.
    """
    count, width = plan.latent_channels, plan.channels[-1]
    for parameter in encoder.parameters():
        if parameter.ndim == 4 and parameter.shape[-1] in (1, 3):
            parameter.zero_()
    convolutions = (encoder.conv_in, *(block.downsamplers[0].conv for block in encoder.down_blocks[:2]))
    shortcuts = [block.resnets[0].conv_shortcut for block in encoder.down_blocks[1:]]
    for layer in (*convolutions, *shortcuts, encoder.conv_out):
        layer.bias.zero_()
    for colour in range(3):
        encoder.conv_in.weight[colour, colour, 1, 1] = 1
    # Strided convolutions see pixels 2i, 2i + 1, 2i + 2: diffusers pads below and to the right.
    for colour in range(3):
        for row in range(2):
            for column in range(2):
                convolutions[1].weight[4 * colour + 2 * row + column, colour, row, column] = 1
    shortcuts[0].weight[range(12), range(12), 0, 0] = 1
    directions = code.directions.reshape(3, 2, 2, 2, 2, count)  # colour, row // 2, row % 2, column // 2, column % 2
    taps = directions.permute(5, 0, 2, 4, 1, 3).reshape(count, 12, 2, 2)
    convolutions[2].weight[:count, :12, :2, :2] = taps
    convolutions[2].bias[:count] = -code.mean @ code.directions
    for sign, first in ((1.0, 0), (-1.0, count)):
        shortcuts[1].weight[range(first, first + count), range(count), 0, 0] = sign
        encoder.conv_out.weight[range(count), range(first, first + count), 1, 1] = sign
    carriers = width - 2 * count
    shortcuts[1].bias[2 * count :: 2] = _CARRIER
    shortcuts[1].bias[2 * count + 1 :: 2] = -_CARRIER
    encoder.conv_norm_out.weight.fill_(((2 * count + carriers * _CARRIER**2) / width) ** 0.5)
    encoder.conv_norm_out.bias.zero_()
    encoder.conv_out.bias[count:] = 2 * math.log(plan.noise)


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
    """The VAE with its decoder trained, the moving average of its weights kept."""
    code = principal_code(plan)
    vae = make_autoencoder(plan, code)
    decoder = vae.decoder.to(memory_format=torch.channels_last)
    learning: list[nn.Parameter] = list(decoder.parameters())
    optimizer = torch.optim.AdamW(learning, lr=plan.lr, betas=(0.9, 0.99), weight_decay=0.0)
    averages = [parameter.detach().clone() for parameter in learning]
    for step in track(range(plan.steps), "autoencoder", console=Console(stderr=True)):
        for group in optimizer.param_groups:
            group["lr"] = plan.lr * _schedule(step, plan)
        truth = pictures(plan, step)
        latents = code.encode(truth)
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(plan.seed + step))
        noisy = (latents + plan.noise * noise).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=plan.mixed):
            decoded = decoder(noisy).float()
        loss = F.l1_loss(decoded, truth) + F.mse_loss(decoded, truth)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        decay = min(plan.decay, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(averages, learning, 1 - decay)  # type: ignore[attr-defined]
    with torch.no_grad():
        for parameter, average in zip(learning, averages, strict=True):
            parameter.copy_(average)
    return vae.to(memory_format=torch.contiguous_format)


@torch.no_grad()
def fidelity(vae: Any, plan: AutoencoderPlan, *, steps: int = 4) -> float:
    """PSNR in dB of held-out pictures decoded from their posterior's mean."""
    errors: list[Tensor] = []
    for step in range(steps):
        truth = pictures(plan, step, held_out=True)
        decoded = vae.decode(vae.encode(truth).latent_dist.mean).sample.clamp(-1, 1)
        errors.append((decoded - truth).square().mean() / 4)
    return -10 * math.log10(float(torch.stack(errors).mean()))


def _schedule(step: int, plan: AutoencoderPlan) -> float:
    """Linear warm-up, then a cosine down to a hundredth."""
    if step < plan.warmup:
        return (step + 1) / plan.warmup
    done = (step - plan.warmup) / max(1, plan.steps - plan.warmup)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done))


@app.command()
def main(
    out: Annotated[Path, typer.Argument(help="Directory to write, e.g. model/tiny/vae.")],
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = AutoencoderPlan().steps,
    seed: Annotated[int, typer.Option(help="Of weights, pictures and noise.")] = 0,
) -> None:
    """Train the VAE, write it, and print its fidelity on held-out pictures."""
    plan = AutoencoderPlan(steps=steps, seed=seed)
    vae = train_autoencoder(plan)
    vae.save_pretrained(out)
    print(f"wrote {out}: {fidelity(vae, plan, steps=16):.2f} dB on held-out pictures")


if __name__ == "__main__":
    app(prog_name="python -m workers.training.tiny.autoencoder")
