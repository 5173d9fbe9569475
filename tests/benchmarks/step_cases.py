"""What `step` measures on: models of FLUX's shape with random weights, and random requests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from torch import Tensor

from model.compilation import compiled
from model.network import ready
from model.packing import Condition, ReferenceTokens
from model.positions import Grid
from model.roles import Role
from model.sampling import Denoising, Guidance, Sampler
from model.schedule import ShiftRule, sigmas
from model.transformer import EmbeddingTables, Network
from model.vae import LatentCodec
from tests.benchmarks.measure import Timer, interleaved, own_seconds

STEPS = 12
"""Of the released settings with the Turbo adapter."""
SHIFT = ShiftRule(dynamic=True, shift=3.0, base_tokens=256, max_tokens=4096, base_mu=0.5, max_mu=1.15)
"""FLUX.1-dev's."""
GUIDANCE = Guidance(scale=4.5, first_step=3.5)
FLOOR = 790e12
"""FLOP per second that an H200 makes of a large product in bfloat16 (8192³, measured)."""


@dataclass(frozen=True, slots=True)
class Size:
    """Dimensions of a measured model and request, in tokens; a reference is `side` × `side`.

    Attributes:
        channels: of the VAE's levels.
    """

    heads: int
    axes: tuple[int, int, int]
    double_blocks: int
    single_blocks: int
    text: int
    target: Grid
    side: int
    channels: tuple[int, ...]

    @property
    def width(self) -> int:
        return self.heads * sum(self.axes)

    def tokens(self, references: int) -> int:
        """S of a request."""
        return self.text + self.target[0] * self.target[1] + references * self.side**2

    def flop(self, references: int) -> float:
        """Of a step: per block 24·D²·S for the linear layers and 4·D·S² for attention. Embedders are left out."""
        tokens, width = self.tokens(references), self.width
        return (self.double_blocks + self.single_blocks) * (24.0 * width**2 * tokens + 4.0 * width * tokens**2)


SIZES = {
    # FLUX.1-dev, and its proportions on a narrow model that a CPU can run.
    "cuda": Size(24, (16, 56, 56), 19, 38, 512, (64, 64), 32, (128, 256, 512, 512)),
    "cpu": Size(4, (8, 12, 12), 2, 4, 128, (32, 32), 16, (16, 32, 32)),
}


@dataclass(frozen=True, slots=True)
class Bench:
    """A model and how it is measured.

    Attributes:
        compiled: `network` with compiled blocks. whole: the stock forward, compiled for each size.
        timer: on one thread of a CPU, the process's own seconds, so that what others run there counts less.
    """

    size: Size
    device: str
    dtype: torch.dtype
    rounds: int
    model: FluxTransformer2DModel
    tables: EmbeddingTables
    network: Network
    compiled: Network
    whole: Callable[..., tuple[torch.Tensor]]
    timer: Timer | None

    def measured(self, candidates: Mapping[str, Callable[[], object]]) -> dict[str, list[float]]:
        return interleaved(candidates, rounds=self.rounds, device=self.device, timer=self.timer)


def prepare(size: Size, device: str, rounds: int) -> Bench:
    """The model of this size on the device, as serving readies it; our fused layers and its own share their weights."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model, tables = make_model(size, device, dtype)
    alone = device == "cpu" and torch.get_num_threads() == 1
    network = ready(model)
    return Bench(
        size,
        device,
        dtype,
        rounds,
        model,
        tables,
        network,
        compiled=compiled(network),
        whole=torch.compile(model.forward, fullgraph=True, dynamic=False),
        timer=own_seconds if alone else None,
    )


def make_model(size: Size, device: str, dtype: torch.dtype) -> tuple[FluxTransformer2DModel, EmbeddingTables]:
    """A model for inference and DreamO's tables."""
    with torch.device(device):
        model = FluxTransformer2DModel(
            num_layers=size.double_blocks,
            num_single_layers=size.single_blocks,
            num_attention_heads=size.heads,
            attention_head_dim=sum(size.axes),
            axes_dims_rope=size.axes,
            joint_attention_dim=4096,
            guidance_embeds=True,
        ).to(dtype)
        tables = EmbeddingTables(*(torch.randn(rows, size.width, dtype=dtype) for rows in (2, 10)))
    return model.eval().requires_grad_(False), tables


def make_codec(size: Size, device: str, dtype: torch.dtype) -> LatentCodec:
    """A VAE of FLUX's kind."""
    levels = len(size.channels)
    with torch.device(device):
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=size.channels,
            layers_per_block=2,
            latent_channels=16,
            norm_num_groups=min(32, *size.channels),
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ).to(dtype)
    return LatentCodec(vae.eval().requires_grad_(False))


def make_request(size: Size, references: int, device: str, dtype: torch.dtype) -> tuple[Condition, Tensor]:
    """A request with subjects in the first slots, and the noise of its target."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype, device=device)

    rows, columns = size.target
    condition = Condition(draw(size.text, 4096), draw(768), size.target)
    return with_references(condition, [draw(size.side**2, 64) for _ in range(references)]), draw(rows * columns, 64)


def with_references(condition: Condition, tokens: list[Tensor]) -> Condition:
    """The request with square subjects of these tokens in the slots after those it has."""
    sides = [round(len(reference) ** 0.5) for reference in tokens]
    more = [
        ReferenceTokens(slot, Role.SUBJECT, reference, (side, side))
        for slot, (reference, side) in enumerate(zip(tokens, sides, strict=True), start=len(condition.references) + 1)
    ]
    return replace(condition, references=(*condition.references, *more))


def begin(sampler: Sampler, condition: Condition, noise: Tensor, step: int = 0) -> Denoising:
    """A run of `STEPS` steps at one of them."""
    run = sampler.begin(condition, None, GUIDANCE, sigmas(STEPS, len(noise), SHIFT), noise)
    return replace(run, step=step)
