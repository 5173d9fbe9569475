"""What fused and low-precision layers stand for, as plain weights."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from torch import nn

from model.precision import Fp8Linear, Int8Linear
from model.transformer import Network
from model.weights.checkpoints import ModelSource, load_model


def unfolded(network: Network, source: ModelSource) -> FluxTransformer2DModel:
    """A fresh transformer with the weights that a network's layers stand for."""
    fresh = load_model(source).transformer
    for number, block in enumerate([*fresh.transformer_blocks, *fresh.single_transformer_blocks]):
        layers = network.projections[number]
        own = [[block.attn.to_q, block.attn.to_k, block.attn.to_v]]
        if len(layers) == 2:
            own.insert(0, [block.attn.add_q_proj, block.attn.add_k_proj, block.attn.add_v_proj])
        for layer, parts in zip(layers, own, strict=True):
            for part, weight in zip(parts, weight_of(layer).chunk(3), strict=True):
                part.weight.data = weight.clone()
    for name, module in network.model.named_modules():
        if isinstance(module, Int8Linear | Fp8Linear) and "attn.to_qkv" not in name and "added_qkv" not in name:
            fresh.get_submodule(name).weight.data = weight_of(module).clone()
    return fresh


def weight_of(layer: Any) -> torch.Tensor:
    """[out, in] in float32."""
    if isinstance(layer, nn.Linear):
        return layer.weight.float()
    return layer.weight.float() * (layer.scale if isinstance(layer, Int8Linear) else layer.scale.t())
