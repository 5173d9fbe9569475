"""Adapter files for tests, in each format that there is."""

from __future__ import annotations

import json
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


def lora_files(transformer: FluxTransformer2DModel, folder: Path) -> dict[str, Path]:
    """A plain LoRA in each form in which they come."""
    adapters = {
        "every linear layer": plain_lora(folder / "all.safetensors", transformer, seed=3, amount=0.1),
        "with alphas": plain_lora(folder / "alpha.safetensors", transformer, seed=4, alpha=2.0, only="attn"),
        "one projection of three": plain_lora(folder / "part.safetensors", transformer, seed=5, only="to_k"),
        "kohya": kohya_lora(folder / "kohya.safetensors", transformer, seed=6),
    }
    config = {"r": 4, "lora_alpha": 6.0, "alpha_pattern": {"attn.to_q": 2.0}, "target_modules": ["to_q", "to_k"]}
    stated = {f"transformer.{key}": value for key, value in config.items()}
    tensors = {k: v for k, v in load_file(adapters["with alphas"]).items() if "to_q." in k or "to_k." in k}
    tensors = {k: v for k, v in tensors.items() if not k.endswith(".alpha")}
    adapters["with its configuration in the header"] = folder / "stated.safetensors"
    save_file(tensors, folder / "stated.safetensors", {"format": "pt", "lora_adapter_metadata": json.dumps(stated)})
    return adapters
