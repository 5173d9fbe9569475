"""What a picture will be like, long before it is done: a linear map from latents to colours.

After a step the network's velocity says where the latents are going (x − sigma·v, the clean estimate of rectified
flow). Each of its positions becomes one pixel by a linear map [C + 1, 3], found once for a VAE by least squares over
pictures that it has encoded itself, so that it fits whichever VAE is loaded. A product of 16 by 3, not a decoder.

Shapes: latents [C, h, w]; previews uint8 [h, w, 3], h and w an eighth of the picture's sides for FLUX's VAE.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch.nn.functional import avg_pool2d, interpolate

from model.sampling import Denoising
from model.vae import LatentCodec, unpack_latents

LARGEST: Final = 160
"""Pixels a side has at most; so a preview as JPEG stays below 64 KiB."""
_PICTURES = 8
_SIDE = 16
"""Of the pictures that a map is found by, in cells."""


class PreviewMap:
    """Latents of one VAE to colours."""

    def __init__(self, weights: torch.Tensor) -> None:
        """
        Args:
            weights: [C + 1, 3] float32; the last row is the offset. Colours in [-1, 1].
        """
        self.weights = weights

    def picture(self, run: Denoising) -> NDArray[np.uint8]:
        """What a run is heading for, h, w ≤ `LARGEST`: uint8 [h, w, 3]. Of a finished run: what it has come to."""
        latents = unpack_latents(run.clean.float(), run.condition.target_grid)
        latents = avg_pool2d(latents, math.ceil(max(latents.shape[1:]) / LARGEST), ceil_mode=True)
        colours = self.colours(latents) / 2 + 0.5
        return (colours.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()

    def colours(self, latents: torch.Tensor) -> torch.Tensor:
        """[C, h, w] float32 → [h, w, 3], about -1 … 1."""
        weights = self.weights.to(latents.device)
        return rearrange(latents, "c h w -> h w c") @ weights[:-1] + weights[-1]


@torch.inference_mode()
def fit_preview_map(codec: LatentCodec, seed: int = 0) -> PreviewMap:
    """The map of a VAE, by its latents of random soft pictures; the same for the same VAE and seed."""
    generator = torch.Generator().manual_seed(seed)
    side = _SIDE * codec.cell
    rows: list[torch.Tensor] = []
    colours: list[torch.Tensor] = []
    for _ in range(_PICTURES):
        pixels = soft_picture(side, generator)
        mean, _ = codec.moments(pixels).chunk(2)
        tokens = codec.sample(torch.cat([mean, torch.full_like(mean, -30.0)]), torch.zeros_like(mean))
        latents = unpack_latents(tokens, codec.grid(side, side)).float().cpu()
        rows.append(rearrange(latents, "c h w -> (h w) c"))
        colours.append(rearrange(avg_pool2d(pixels, codec.factor), "c h w -> (h w) c"))
    inputs = torch.cat(rows)
    inputs = torch.cat([inputs, torch.ones(len(inputs), 1)], dim=1)
    return PreviewMap(torch.linalg.lstsq(inputs, torch.cat(colours)).solution)


def soft_picture(side: int, generator: torch.Generator) -> torch.Tensor:
    """Random colours at several scales: [3, side, side] in [-1, 1]."""
    total = torch.zeros(1, 3, side, side)
    for cells in (2, 4, 8, 16):
        noise = torch.rand((1, 3, cells, cells), generator=generator) * 2 - 1
        total += interpolate(noise, size=(side, side), mode="bicubic", align_corners=False)
    return total[0].clamp(-1, 1)
