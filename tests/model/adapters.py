"""Adapter files for tests, in each format that there is."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import nn


def another_dreamo(out: Path, main: Path, *, seed: int, amount: float = 0.5) -> Path:
    """A main file like a given one, its every tensor changed: by a share of its own deviation."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: (tensor.float() + amount * tensor.float().std() * torch.randn(tensor.shape, generator=generator)).to(
            tensor
        )
        for name, tensor in load_file(main).items()
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out)
    return out


def plain_lora(
    out: Path,
    transformer: FluxTransformer2DModel,
    *,
    seed: int,
    rank: int = 4,
    alpha: float | None = None,
    amount: float = 0.3,
    only: str = "",
) -> Path:
    """A LoRA in diffusers' keys on every linear layer whose name holds `only`."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear) and only in name:
            inputs, outputs = module.in_features, module.out_features
            down = torch.randn(rank, inputs, generator=generator) / inputs**0.5
            up = amount * torch.randn(outputs, rank, generator=generator) / rank**0.5
            tensors |= {f"transformer.{name}.lora_A.weight": down, f"transformer.{name}.lora_B.weight": up}
            if alpha is not None:
                tensors[f"transformer.{name}.alpha"] = torch.tensor(alpha)
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out)
    return out


def kohya_lora(out: Path, transformer: FluxTransformer2DModel, *, seed: int, alpha: float = 2.0) -> Path:
    """A LoRA in kohya's keys on the image stream's fused qkv of the first double block, and on a single block."""
    generator = torch.Generator().manual_seed(seed)
    config = transformer.config
    width = config["num_attention_heads"] * config["attention_head_dim"]
    tensors: dict[str, torch.Tensor] = {}
    for name, outputs in (("double_blocks_0_img_attn_qkv", 3 * width), ("single_blocks_1_modulation_lin", 3 * width)):
        tensors |= {
            f"lora_unet_{name}.lora_down.weight": torch.randn(4, width, generator=generator) / width**0.5,
            f"lora_unet_{name}.lora_up.weight": 0.3 * torch.randn(outputs, 4, generator=generator),
            f"lora_unet_{name}.alpha": torch.tensor(alpha),
        }
    save_file(tensors, out)
    return out
