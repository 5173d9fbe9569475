"""What an adapter's file changes of a model's layers, whatever they are: plain, fused, or in low precision."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from torch import Tensor, nn

from model.errors import WeightsError
from model.network import projected_layers
from model.precision import Fp8Linear, Int8Linear
from model.text import check_rows
from model.transformer import Network
from model.weights.adapters import Adapter, LowRank, read_adapter
from model.weights.checkpoints import check_embeddings, resolve_base


@dataclass(frozen=True, slots=True)
class Examined:
    """What an adapter's file holds. `whole`: DreamO's embeddings, too; it is no plain LoRA. `rank`: the highest."""

    whole: bool
    modules: int
    rank: int


def examine(file: Path, base_model: str) -> Examined:
    """Whether a file is an adapter for a base model, all of it; reads none of the base's weights.

    Raises:
        WeightsError: `weights_format` also where part of the file would be left out; `model_not_found`.
    """
    adapter, base = read_adapter(file), resolve_base(base_model)
    if adapter.unused:
        raise WeightsError(
            "weights_format",
            f"{file}: {len(adapter.unused)} of its tensors change something else than the transformer's linear layers, "
            f"{adapter.unused[0]} among them: remove them, for they would be left out",
        )
    with init_empty_weights():
        config: Any = FluxTransformer2DModel.load_config(str(base / "transformer"))
        transformer = cast("FluxTransformer2DModel", FluxTransformer2DModel.from_config(config))
    changes_by_layer(Network(transformer), adapter, None)
    if adapter.embeddings:
        rows = check_embeddings(str(file), dict(adapter.embeddings), transformer)["dreamo_t5_embedding"]
        width: int = json.loads((base / "text_encoder_2" / "config.json").read_bytes())["d_model"]
        check_rows(rows, width)
    numbers = (part for c in adapter.changes.values() for part in (c.down, c.up, torch.tensor(c.scale)))
    if not all(bool(part.isfinite().all()) for part in numbers):
        raise WeightsError("weights_format", f"{file} holds numbers that are not finite")
    ranks = [change.down.shape[0] for change in adapter.changes.values()]
    return Examined(bool(adapter.embeddings), len(ranks), max(ranks))


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a change goes: rows `part · out / parts` and on of a layer."""

    layer: nn.Module
    part: int = 0
    parts: int = 1

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in] of the part."""
        rows, columns = cast("Tensor", self.layer.weight).shape
        return rows // self.parts, columns


def _places(network: Network) -> dict[str, _Place]:
    """What can be changed, by diffusers' name. A module that is part of a fused projection is changed there."""
    fused = {id(layer) for layers in network.projections for layer in layers}
    own = {
        name: _Place(module)
        for name, module in network.model.named_modules()
        if isinstance(module, nn.Linear | Fp8Linear | Int8Linear) and id(module) not in fused
    }
    return own | {name: _Place(layer, third, 3) for name, (layer, third) in projected_layers(network).items()}


def changes_by_layer(network: Network, adapter: Adapter, main: Adapter | None) -> dict[nn.Module, LowRank]:
    """What an adapter changes of a network's layers, less what a main file that is fused in has changed of them.

    Returns:
        The change of each layer, with scale 1, in float32.

    Raises:
        WeightsError: `weights_key_missing`, `weights_shape`: it is made for another base model.
    """
    places, minus = _places(network), main.changes if main else {}
    parts: dict[nn.Module, dict[_Place, LowRank]] = {}
    for name in {**adapter.changes, **minus}:
        place = places.get(name)
        if place is None:
            raise WeightsError(
                "weights_key_missing",
                f"{adapter.source} changes {name}, which this model does not have: is it made for another base model?",
            )
        both = adapter.changes.get(name), minus.get(name)
        if any(change and (len(change.up), change.down.shape[1]) != place.shape for change in both):
            raise WeightsError(
                "weights_shape",
                f"{adapter.source}: {name} is {place.shape} in this model: is it made for another base model?",
            )
        difference = _difference(*both)
        if difference is not None:
            parts.setdefault(place.layer, {})[place] = difference
    return {layer: _together(by_place) for layer, by_place in parts.items()}


def _difference(plus: LowRank | None, minus: LowRank | None) -> LowRank | None:
    """Δ_plus − Δ_minus: factors beside each other. None if nothing is left, to the bit."""
    if plus is not None and minus is not None and _same(plus, minus):
        return None
    pairs = [(change, sign) for change, sign in ((plus, 1.0), (minus, -1.0)) if change is not None]
    return LowRank(
        torch.cat([change.down.float() for change, _ in pairs]),
        torch.cat([change.up.float() * (sign * change.scale) for change, sign in pairs], dim=1),
    )


def _same(one: LowRank, other: LowRank) -> bool:
    return one.scale == other.scale and torch.equal(one.down, other.down) and torch.equal(one.up, other.up)


def _together(changes: Mapping[_Place, LowRank]) -> LowRank:
    """Changes of a layer's parts as one of the layer. Parts that read the input alike share that factor."""
    downs: list[Tensor] = []
    blocks: list[tuple[_Place, int, Tensor]] = []
    for place, change in changes.items():
        number = next((n for n, down in enumerate(downs) if torch.equal(down, change.down)), len(downs))
        if number == len(downs):
            downs.append(change.down)
        blocks.append((place, number, change.up))
    ranks = [len(down) for down in downs]
    place = blocks[0][0]
    up = torch.zeros(place.parts * place.shape[0], sum(ranks))
    for place, number, block in blocks:
        row, column = place.part * place.shape[0], sum(ranks[:number])
        up[row : row + block.shape[0], column : column + block.shape[1]] = block
    return LowRank(torch.cat(downs), up)
