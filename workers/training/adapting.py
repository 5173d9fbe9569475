"""The trained part of a transformer: LoRA through peft, and DreamO's three embedding tables.

Target sets: `released` adapts exactly the modules of the released files, q, k and v of a stream sharing one down
matrix as their fused qkv does (FLUX.1-dev at rank 128: 304 matrices, 239.1 M parameters); `attention` adapts the same
modules with a down matrix each; `all` every linear layer of the blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, cast

import torch
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from model.roles import ADDED_TOKENS
from model.weights.adapters import LowRank

Targets = Literal["released", "attention", "all"]
ADAPTER = "trained"

_STREAMS = (
    ("attn.to_q", "attn.to_k", "attn.to_v"),
    ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
)
"""Modules that share a down matrix in the released files."""
_DOUBLE = (*_STREAMS[0], *_STREAMS[1], "attn.to_out.0", "attn.to_add_out")
_SINGLE = (*_STREAMS[0], "proj_out")


def module_names(transformer: nn.Module, targets: Targets) -> list[str]:
    """Names of the linear layers that a target set adapts, in the transformer's order."""
    names: list[str] = []
    for name, module in transformer.named_modules():
        kind, _, rest = name.partition(".")
        if not isinstance(module, nn.Linear | LoraLayer) or kind not in (
            "transformer_blocks",
            "single_transformer_blocks",
        ):
            continue
        part = rest.partition(".")[2]
        released = _DOUBLE if kind == "transformer_blocks" else _SINGLE
        if part in released or (targets == "all" and "lora_" not in part and not part.endswith("base_layer")):
            names.append(name)
    return names


def add_adapter(transformer: FluxTransformer2DModel, targets: Targets, rank: int, *, seed: int) -> None:
    """Put a trainable adapter that changes nothing yet on a frozen transformer; its weights are float32.

    Args:
        seed: of the down matrices; the up matrices start at zero.
    """
    names = module_names(transformer, targets)
    transformer.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=names, init_lora_weights=True)
    inject_adapter_in_model(config, transformer, ADAPTER)
    generator = torch.Generator().manual_seed(seed)
    layers = dict(_lora_layers(transformer))
    for layer in layers.values():
        down = layer.lora_A[ADAPTER].weight
        # On the CPU and in float32, so that a seed means the same everywhere.
        values = torch.randn(down.shape, generator=generator) / down.shape[1] ** 0.5
        layer.lora_A[ADAPTER].to(torch.float32).weight.data.copy_(values)
        layer.lora_B[ADAPTER].to(torch.float32)
    if targets == "released":
        _share_downs(layers)


def _share_downs(layers: Mapping[str, Any]) -> None:
    for name, layer in layers.items():
        for first, *others in _STREAMS:
            if name.endswith(f".{first}"):
                for other in others:
                    twin = layers[name.removesuffix(first) + other]
                    twin.lora_A[ADAPTER] = layer.lora_A[ADAPTER]


def changes(transformer: nn.Module) -> dict[str, LowRank]:
    """What the adapter does, by module name, as detached float32 copies on the CPU."""
    return {
        name: LowRank(
            layer.lora_A[ADAPTER].weight.detach().float().cpu().clone(),
            layer.lora_B[ADAPTER].weight.detach().float().cpu().clone(),
            layer.scaling[ADAPTER],
        )
        for name, layer in _lora_layers(transformer)
    }


@torch.no_grad()
def start_from(transformer: nn.Module, start: Mapping[str, LowRank]) -> None:
    """Set an adapter that has just been added to given changes. Ranks left over keep their random downs and add
    nothing yet; modules without a change stay as they are.

    Raises:
        ValueError: a change is of a module outside the target set, or of a higher rank or another shape.
    """
    layers = dict(_lora_layers(transformer))
    for name, change in start.items():
        if name not in layers:
            raise ValueError(f"{name} is not among the trained modules: choose wider lora.targets")
        down, up = layers[name].lora_A[ADAPTER].weight, layers[name].lora_B[ADAPTER].weight
        rank = change.down.shape[0]
        if rank > down.shape[0]:
            raise ValueError(f"its rank is {rank}: raise lora.rank from {down.shape[0]}")
        if change.down.shape[1] != down.shape[1] or change.up.shape[0] != up.shape[0]:
            raise ValueError(f"{name} has another shape: is it made for another base model?")
        down[:rank] = change.down.float()
        up.zero_()
        up[:, :rank] = change.up.float() * (change.scale / layers[name].scaling[ADAPTER])


def _lora_layers(transformer: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in transformer.named_modules():
        if isinstance(module, LoraLayer) and ADAPTER in cast("Any", module).lora_A:
            yield name, module


def fresh_tables(width: int, text_width: int, *, seed: int) -> dict[str, torch.Tensor]:
    """Embedding tensors to start from: type zero, so that a target begins as plain FLUX's; index and text rows apart.

    A larger index deviation (0.4) is what kept references from being swapped in a small model.
    """
    generator = torch.Generator().manual_seed(seed)
    return {
        "dreamo_task_embedding": torch.zeros(2, width),
        "dreamo_idx_embedding": 0.4 * torch.randn(10, width, generator=generator),
        "dreamo_t5_embedding": torch.randn(len(ADDED_TOKENS), text_width, generator=generator),
    }


class Embeddings(nn.Module):
    """Type [2, D], index [10, D] and the added T5 tokens' rows [10, Ct], float32 and trainable."""

    def __init__(self, tables: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.type_rows = nn.Parameter(tables["dreamo_task_embedding"].detach().float().clone())
        self.index_rows = nn.Parameter(tables["dreamo_idx_embedding"].detach().float().clone())
        self.placeholder_rows = nn.Parameter(
            tables["dreamo_t5_embedding"][-len(ADDED_TOKENS) :].detach().float().clone()
        )

    def tables(self) -> dict[str, torch.Tensor]:
        """The tensors under their names in the released file, detached on the CPU."""
        return {
            "dreamo_task_embedding": self.type_rows.detach().cpu().clone(),
            "dreamo_idx_embedding": self.index_rows.detach().cpu().clone(),
            "dreamo_t5_embedding": self.placeholder_rows.detach().cpu().clone(),
        }
