"""A FLUX transformer readied for inference: projections fused, and what is the same in every step computed once.

Training runs the plain `Network`: its adapters sit on the model's own linear layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from torch import Tensor, nn

from model.blocks import Projections
from model.packing import Condition, lay_out
from model.transformer import (
    EmbeddingTables,
    Network,
    double_blocks,
    embed_time,
    modulation_vectors,
    single_blocks,
)

_STREAMS = (("add_q_proj", "add_k_proj", "add_v_proj"), ("to_q", "to_k", "to_v"))
"""What a double block's two projections are made of; a single block has the second alone."""


@dataclass(frozen=True, slots=True)
class Standing:
    """What of a request stays as it is while it is denoised.

    Attributes:
        text: [T, D]. references: [Σ l_j, D] with their type and index vectors.
        target: [D] what is added to each target token.
        vectors: [N, M, V] modulation vectors of each step: M rows a request, usually one.
    """

    text: Tensor
    references: Tensor
    target: Tensor
    vectors: Tensor


@torch.inference_mode()
def stand(
    network: Network,
    tables: EmbeddingTables,
    condition: Condition,
    timesteps: Sequence[Tensor],
    guidances: Sequence[float],
) -> Standing:
    """Embed a request's text and references, and compute the modulation vectors of all of its steps.

    On a CPU the steps are computed one by one, as the released pipeline does: bits may depend on how many rows a
    product has. Elsewhere one product reads the modulation layers' weights, a quarter of FLUX, once for all steps.

    Args:
        timesteps: per step, t in [0, 1] as a scalar in the model's dtype. guidances: distilled guidance per step.
    """
    model, layout = network.model, lay_out([condition])
    clean = torch.tensor([0.0 if row.clean else 1.0 for row in layout.rows])
    times = torch.stack([t * clean.to(t) for t in timesteps]).to(condition.pooled.device)
    scales = torch.tensor(guidances, dtype=torch.float32).to(times)[:, None].expand(times.shape)
    pooled = condition.pooled.expand(times.numel(), -1)
    flat = times.flatten(), scales.flatten(), pooled
    each = 1 if times.device.type == "cpu" else times.numel()
    parts = zip(*(values.split(each) for values in flat), strict=True)
    vectors = torch.cat([modulation_vectors(model, embed_time(model, *part)) for part in parts])
    target, references = _image(network, tables, condition)
    return Standing(
        text=model.context_embedder(condition.text),
        references=references,
        target=target,
        vectors=vectors.unflatten(0, (len(timesteps), -1)),
    )


@torch.inference_mode()
def stand_beside(network: Network, tables: EmbeddingTables, condition: Condition, other: Standing) -> Standing:
    """What stands of another image of a request: its references are another draw, all else is the other's own tensors.

    Args:
        other: of the same text, pooled prompt and sizes, at the same times and guidances.
    """
    return replace(other, references=_image(network, tables, condition)[1])


def _image(network: Network, tables: EmbeddingTables, condition: Condition) -> tuple[Tensor, Tensor]:
    """What is added to each target token, by itself, and the references' tokens."""
    added = tables.rows(lay_out([condition]))
    rows, columns = condition.target_grid
    references = [reference.tokens for reference in condition.references]
    embedded = network.model.x_embedder(torch.cat(references)) if references else added[:0]
    return added[0].clone(), embedded + added[rows * columns :]


def ready(model: FluxTransformer2DModel) -> Network:
    """The model as serving runs it: fused on a GPU; on a CPU by its own layers, whose bits the recordings have.

    A model in low precision is fused already.
    """
    if held := held_projections(model):
        return Network(model, held)
    return fused(model) if model.device.type == "cuda" else Network(model)


def held_projections(model: FluxTransformer2DModel) -> tuple[Projections, ...]:
    """The fused projections that the model holds as layers of its own, under diffusers' names; empty: none."""
    doubles = [(block.attn.to_added_qkv, block.attn.to_qkv) for block in double_blocks(model) if _holds(block)]
    return (*doubles, *((block.attn.to_qkv,) for block in single_blocks(model) if _holds(block)))


def projected_layers(network: Network) -> dict[str, tuple[nn.Module, int]]:
    """Which layer of the network's projections stands for which of the model's own, and as which third of its rows:
    by diffusers' name.
    """
    found: dict[str, tuple[nn.Module, int]] = {}
    number = len(network.model.transformer_blocks)
    for place, layers in enumerate(network.projections):
        double = place < number
        block = f"transformer_blocks.{place}" if double else f"single_transformer_blocks.{place - number}"
        for names, layer in zip(_STREAMS if double else _STREAMS[1:], layers, strict=True):
            found |= {f"{block}.attn.{name}": (layer, third) for third, name in enumerate(names)}
    return found


def _holds(block: nn.Module) -> bool:
    return hasattr(block.attn, "to_qkv")


def fused(model: FluxTransformer2DModel) -> Network:
    """The model with q, k and v of each stream as one layer. Its own layers become views: no weight is held twice."""
    doubles = tuple(
        (
            _fuse(block.attn.add_q_proj, block.attn.add_k_proj, block.attn.add_v_proj),
            _fuse(block.attn.to_q, block.attn.to_k, block.attn.to_v),
        )
        for block in double_blocks(model)
    )
    singles = tuple((_fuse(block.attn.to_q, block.attn.to_k, block.attn.to_v),) for block in single_blocks(model))
    return Network(model, (*doubles, *singles))


def _fuse(*layers: object) -> nn.Linear:
    """The layers as one, and the layers as its rows."""
    linears = cast("tuple[nn.Linear, ...]", layers)
    one = nn.Linear(linears[0].in_features, sum(linear.out_features for linear in linears), device="meta")
    with torch.no_grad():
        weight = torch.cat([linear.weight for linear in linears])
        bias = torch.cat([linear.bias for linear in linears])
        one.weight, one.bias = nn.Parameter(weight, requires_grad=False), nn.Parameter(bias, requires_grad=False)
        for linear, rows, values in zip(linears, weight.chunk(3), bias.chunk(3), strict=True):
            linear.weight.data, linear.bias.data = rows, values
    return one
