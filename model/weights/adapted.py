"""Adapters by job: a network that shares every weight with the served one and adds a low-rank change to some layers.

    W = W_served + scale · Δ

A plain LoRA is a change of its own: Δ = Δ_T. A whole DreamO adapter, with task, index and placeholder embeddings, was
trained on the plain base, where the served model has DreamO's main file fused in: Δ = Δ_T − Δ_D. So at scale 1 it
stands in that file's place, at 0 the model is the served one, and its embeddings lie between in the same way.

Nothing is switched in modules that others use: an adapter at a scale is another `Network`, whose changed layers stand
in copies of the modules around them, and a run belongs to one of them.

Shapes: r rank, in and out a layer's features.
"""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from model.errors import AdapterError, WeightsError
from model.text import check_rows
from model.transformer import EmbeddingTables, Network
from model.weights.adapters import Adapter, LowRank, read_adapter
from model.weights.changes import changes_by_layer
from model.weights.checkpoints import LoadedModel, check_embeddings

_LOG = logging.getLogger(__name__)
_MISMATCH = (
    "The adapter is made for another base model than the one that is served: name another adapter, or train it anew on "
    "this base."
)


class ChangedLinear(nn.Module):
    """A linear layer, in whatever precision, and a low-rank change of it: [N, in] → [N, out].

    The change is computed in the input's dtype and added in float32, rounded once.
    """

    down: Tensor
    up: Tensor

    def __init__(self, base: nn.Module, change: LowRank, scale: float) -> None:
        """
        Args:
            change: its own scale is 1.
        """
        super().__init__()
        self.base, self.scale = base, scale
        self.register_buffer("down", change.down.t())
        self.register_buffer("up", change.up.t())

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.base(x), x @ self.down, self.up, alpha=self.scale)


@dataclass(frozen=True, slots=True, eq=False)
class Adaptation:
    """An adapter at one scale, as runs are begun with it.

    Attributes:
        placeholders: [10, Ct] embedding rows of the added T5 tokens; None: the text encoder's own.
        prompts: names what prompts are encoded with; empty: the text encoder as it is.
    """

    network: Network
    tables: EmbeddingTables
    placeholders: Tensor | None = None
    prompts: str = ""


@dataclass(frozen=True, slots=True)
class Embeddings:
    """A whole DreamO adapter's vectors: type [2, D], index [10, D], placeholder rows [10, Ct]; the text encoder's own
    rows beside them.
    """

    type: Tensor
    index: Tensor
    placeholders: Tensor
    own_placeholders: Tensor


class LoadedAdapter:
    """An adapter on the device, at any scale. A scale's network is the same one for as long as a run holds it, so that
    runs that were begun apart share forwards.

    Attributes:
        nbytes: that it holds there.
    """

    def __init__(
        self,
        served: Adaptation,
        changes: Mapping[nn.Module, LowRank],
        embeddings: Embeddings | None = None,
    ) -> None:
        """
        Args:
            changes: by layer of the served network, on its device, in its dtype.
            embeddings: of a whole DreamO adapter.
        """
        self._served = served
        self._changes = changes
        self._embeddings = embeddings
        self._networks: WeakValueDictionary[float, Network] = WeakValueDictionary()
        storages = {part.untyped_storage() for change in changes.values() for part in (change.down, change.up)}
        self.nbytes = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    def at(self, scale: float) -> Adaptation:
        """The served model with this change."""
        network = self._networks.get(scale)
        if network is None:
            layers = {layer: ChangedLinear(layer, change, scale) for layer, change in self._changes.items()}
            network = self._networks.setdefault(scale, changed(self._served.network, layers))
        return self._dressed(network, scale)

    def _dressed(self, network: Network, scale: float) -> Adaptation:
        tables, theirs = self._served.tables, self._embeddings
        if theirs is None:
            return Adaptation(network, tables)
        rows = _between(theirs.own_placeholders, theirs.placeholders, scale)
        digest = hashlib.sha256(rows.float().cpu().numpy().tobytes()).hexdigest()
        return Adaptation(
            network,
            EmbeddingTables(_between(tables.type, theirs.type, scale), _between(tables.index, theirs.index, scale)),
            rows,
            digest,
        )


def load_adapter(model: LoadedModel, served: Adaptation, file: Path, made_for: str | None = None) -> LoadedAdapter:
    """Read an adapter for a model that is served.

    Args:
        made_for: fingerprint of the base that it was trained on; None: nobody knows, and its shapes alone tell.

    Raises:
        AdapterError: `adapter_mismatch`, `adapter_corrupt` (the file is no adapter), `adapter_base_missing`.
    """
    if made_for is not None and model.base is not None and made_for != model.base:
        raise AdapterError("adapter_mismatch", _MISMATCH)
    try:
        adapter = read_adapter(file)
        main = _main(model) if adapter.embeddings else None
        changes = changes_by_layer(served.network, adapter, main)
        embeddings = _embeddings(model, adapter) if adapter.embeddings else None
    except WeightsError as error:
        _LOG.warning("an adapter cannot be used (%s): %s", error.code, error.message)
        if error.code in ("weights_key_missing", "weights_shape"):
            raise AdapterError("adapter_mismatch", _MISMATCH) from error
        raise AdapterError("adapter_corrupt", "The adapter's file cannot be read: register it again.") from error
    device, dtype = served.tables.type.device, served.tables.type.dtype
    moved = {
        layer: LowRank(change.down.to(device, dtype), change.up.to(device, dtype)) for layer, change in changes.items()
    }
    return LoadedAdapter(served, moved, embeddings)


def changed(network: Network, layers: Mapping[nn.Module, nn.Module]) -> Network:
    """The network with other layers in the place of some. Modules around them are copied, everything else is shared."""
    model = network.model
    kept: dict[int, object] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    kept |= {id(module): module for module in model.modules() if not any(m in layers for m in module.modules())}
    kept |= {id(layer): other for layer, other in layers.items()}
    projections = tuple(tuple(layers.get(layer, layer) for layer in block) for block in network.projections)
    return replace(network, model=copy.deepcopy(model, kept), projections=projections)


def _main(model: LoadedModel) -> Adapter:
    """DreamO as the served transformer has it fused in.

    Raises:
        AdapterError: `adapter_base_missing`: it is not at hand.
    """
    try:
        main = read_adapter(model.main) if model.main else None
        if main is not None and _is_served(model, main):
            return main
    except WeightsError as error:
        _LOG.warning("DreamO's main file cannot be read (%s): %s", error.code, error.message)
    raise AdapterError(
        "adapter_base_missing",
        "This server runs a model with DreamO fused in, without DreamO's own files, which whole DreamO adapters are to "
        "stand in for: its operator has to set DREAMSERVE_DREAMO to where they lie.",
    )


def _is_served(model: LoadedModel, main: Adapter) -> bool:
    """Whether a main file is the one that was fused, by its embeddings."""
    theirs, own = _embeddings(model, main), model.tables
    pairs = ((theirs.type, own.type), (theirs.index, own.index), (theirs.placeholders, theirs.own_placeholders))
    return all(torch.equal(one, other) for one, other in pairs)


def _embeddings(model: LoadedModel, adapter: Adapter) -> Embeddings:
    """A whole adapter's vectors, on the device, in the model's dtype."""
    found = check_embeddings(adapter.source, dict(adapter.embeddings), model.transformer)
    own = model.text.placeholders
    return Embeddings(
        found["dreamo_task_embedding"].to(model.tables.type),
        found["dreamo_idx_embedding"].to(model.tables.index),
        check_rows(found["dreamo_t5_embedding"], own.shape[1]).to(own),
        own,
    )


def _between(own: Tensor, theirs: Tensor, scale: float) -> Tensor:
    """Own rows at 0, theirs at 1, to the bit."""
    return torch.lerp(own.float(), theirs.float(), scale).to(own)
