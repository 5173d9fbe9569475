"""Pixels ↔ latents ↔ packed tokens.

Shapes: pixels [3, H, W] in [-1, 1]; latents [C, H/f, W/f] with f the VAE's factor (FLUX: C 16, f 8); packed tokens
[H/2f · W/2f, 4C], each holding a 2×2 patch, channel-major.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from einops import rearrange

from model.positions import Grid


class LatentCodec:
    """A FLUX VAE with its shift and scale."""

    def __init__(self, vae: AutoencoderKL) -> None:
        self.vae: Any = vae  # diffusers annotates its forward methods loosely
        self.factor = 2 ** (len(vae.config["block_out_channels"]) - 1)
        self.channels: int = vae.config["latent_channels"]
        self._scale: float = vae.config["scaling_factor"]
        self._shift: float = vae.config.get("shift_factor") or 0.0

    @property
    def cell(self) -> int:
        """Pixels per token side."""
        return 2 * self.factor

    def grid(self, height: int, width: int) -> Grid:
        """Tokens of a picture of this size.

        Raises:
            ValueError: a side is not a multiple of the cell.
        """
        if height % self.cell or width % self.cell:
            raise ValueError(f"{height}x{width} is not a multiple of {self.cell}")
        return height // self.cell, width // self.cell

    def latent_shape(self, grid: Grid) -> tuple[int, int, int]:
        """(C, H/f, W/f) of a token grid."""
        return self.channels, 2 * grid[0], 2 * grid[1]

    @torch.inference_mode()
    def moments(self, pixels: torch.Tensor) -> torch.Tensor:
        """Posterior parameters of [3, H, W]: [2C, H/f, W/f], mean then log variance."""
        return self.batch_moments(pixels[None])[0]

    def batch_moments(self, pixels: torch.Tensor) -> torch.Tensor:
        """`moments` of pictures of one size: [n, 3, H, W] → [n, 2C, H/f, W/f]."""
        return self.vae.encode(pixels.to(self.vae.device, self.vae.dtype)).latent_dist.parameters

    def sample(self, moments: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Packed tokens of one posterior draw: (mean + std · noise − shift) · scale."""
        mean, log_variance = moments.chunk(2)
        std = torch.exp(0.5 * log_variance.clamp(-30.0, 20.0))
        latents = mean + std * noise.to(moments.device, moments.dtype)
        return pack_latents((latents - self._shift) * self._scale)

    def decode(self, tokens: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Packed tokens → pixels [3, H, W] in [0, 1], float32."""
        return shown(self.develop(tokens, grid))

    @torch.inference_mode()
    def develop(self, tokens: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Packed tokens → pixels [3, H, W] as the VAE has them, most of them in [-1, 1]."""
        latents = unpack_latents(tokens, grid).to(self.vae.dtype) / self._scale + self._shift
        return self.vae.decode(latents[None]).sample[0]


def shown(pixels: torch.Tensor) -> torch.Tensor:
    """Pixels as the VAE has them → in [0, 1], float32."""
    return (pixels / 2 + 0.5).clamp(0, 1).float()


def pack_latents(latents: torch.Tensor) -> torch.Tensor:
    """[C, 2h, 2w] → [h·w, 4C]: rows of tokens, each a 2×2 patch, channel-major."""
    return rearrange(latents, "c (h p) (w q) -> (h w) (c p q)", p=2, q=2)


def unpack_latents(tokens: torch.Tensor, grid: Grid) -> torch.Tensor:
    """[h·w, 4C] → [C, 2h, 2w]."""
    return rearrange(tokens, "(h w) (c p q) -> c (h p) (w q)", h=grid[0], w=grid[1], p=2, q=2)
