"""The FLUX forward over a packed sequence, on the parameters of diffusers' `FluxTransformer2DModel`.

One function for every task: what differs between target, references and requests is data in the `Layout`. Nothing of
diffusers is subclassed or patched; linear layers are called as modules, so peft adapters work. What a step needs that
is not the noisy target is computed before it: where it runs (`Site`), the embedded text and references, and all
modulation vectors in a row per step (`model.sampling`). Training reads response maps of the blocks (`model.routing`):
they are part of what a block returns, so gradient checkpointing keeps them.

Shapes: T text, I image tokens, S = T + I, M modulation rows, V values of all modulation layers together, D model width,
H heads, d head dimension (D = H·d).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ParamSpec, TypeVar, cast

import torch
from diffusers.models.transformers.transformer_flux import (
    FluxSingleTransformerBlock,
    FluxTransformer2DModel,
    FluxTransformerBlock,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as recomputed

from kernels.attention import make_pack
from kernels.modulation import modulate
from model.blocks import Last, Projections, Responses, Site, double_block, single_block, to_request_order
from model.packing import Layout, PackedSequence
from model.routing import Capture, Positions, Probe, ResponseMaps, collect, plan

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class EmbeddingTables:
    """DreamO's learned vectors: type [2, D] (row 1 target, 0 reference), index [10, D] (row = slot)."""

    type: Tensor
    index: Tensor

    def rows(self, layout: Layout) -> Tensor:
        """[I, D]: what is added to each image token after the input projection."""
        blank = torch.zeros_like(self.type[:1])
        return torch.cat([blank, self.type])[layout.type_rows] + torch.cat([blank, self.index])[layout.index_rows]


@dataclass(frozen=True, slots=True)
class Embedded:
    """A packed sequence after the input layers: text [T, D], image [I, D], modulation vectors [M, V]."""

    text: Tensor
    image: Tensor
    vectors: Tensor


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Network:
    """A transformer and how its blocks run.

    Attributes:
        projections: of each block; empty: by the model's own layers, as adapters in training need it.
        double, single: what runs a block, `double_block` and `single_block` or what was compiled of them.
    """

    model: FluxTransformer2DModel
    projections: tuple[Projections, ...] = ()
    double: Callable[..., tuple[Tensor, Tensor, Responses]] = double_block
    single: Callable[..., tuple[Tensor, Responses]] = single_block


def forward(network: Network, tables: EmbeddingTables, packed: PackedSequence, *, checkpoint: bool = False) -> Tensor:
    """Velocity (noise − latents) of the target tokens of all requests, in order: [Σ targets, 64].

    Args:
        checkpoint: for training: keep only each block's inputs and compute the block again in the backward pass.
    """
    site = site_of(network.model, packed.layout)
    return run(network, site, embed(network.model, tables, packed), checkpoint=checkpoint)[0]


def forward_with_maps(
    network: Network,
    tables: EmbeddingTables,
    packed: PackedSequence,
    capture: Capture,
    positions: Sequence[Positions] | None = None,
    *,
    checkpoint: bool = False,
) -> tuple[Tensor, ResponseMaps]:
    """`forward`, and the response maps of the captured blocks, part of the same graph.

    Args:
        positions: per request, where its placeholders stand; only `capture.holder` needs them.

    Raises:
        ValueError: see `routing.plan`.
    """
    probe = plan(packed.layout, capture, num_blocks(network.model), positions)
    site = site_of(network.model, packed.layout)
    velocity, responses = run(network, site, embed(network.model, tables, packed), probe, checkpoint=checkpoint)
    return velocity, collect(probe, responses)


def num_blocks(model: FluxTransformer2DModel) -> int:
    """Double and single blocks together; the layers of response maps are numbered so."""
    return len(model.transformer_blocks) + len(model.single_transformer_blocks)


def site_of(model: FluxTransformer2DModel, layout: Layout) -> Site:
    """What a forward over this layout needs besides tokens and times."""
    cos, sin = model.pos_embed(layout.ids)
    only = len(layout.rows) == 1
    device = layout.ids.device
    tokens = torch.cat([torch.arange(span.start, span.stop) for span in layout.joint_targets]).to(device)
    return Site(
        cos=cos,
        sin=sin,
        order=layout.order,
        inverse=layout.inverse,
        text_rows=None if only else layout.text_rows,
        image_rows=None if only else layout.image_rows,
        joint_rows=None if only else layout.joint_rows,
        pack=make_pack(layout.boundaries, device),
        last=Last(tokens, None if only else layout.joint_rows[tokens]),
    )


def embed(model: FluxTransformer2DModel, tables: EmbeddingTables, packed: PackedSequence) -> Embedded:
    """Input projections, the added type and index vectors, and the modulation vectors of each row."""
    return Embedded(
        text=model.context_embedder(packed.text),
        image=model.x_embedder(packed.image) + tables.rows(packed.layout),
        vectors=modulation_vectors(model, embed_time(model, packed.timestep, packed.guidance, packed.pooled)),
    )


def embed_time(model: FluxTransformer2DModel, timestep: Tensor, guidance: Tensor, pooled: Tensor) -> Tensor:
    """SiLU of the time embedding: timestep [M], guidance [M], pooled [M, Cp] → [M, D].

    Times and guidance are scaled by 1000 here, in the model's dtype, as in FLUX.
    """
    time = timestep * 1000
    if model.config["guidance_embeds"]:
        return F.silu(model.time_text_embed(time, guidance * 1000, pooled))
    return F.silu(model.time_text_embed(time, pooled))


def modulation_vectors(model: FluxTransformer2DModel, time: Tensor) -> Tensor:
    """All that the final norm and the blocks are modulated with: [M, D] → [M, V]; see `split_vectors`.

    FLUX keeps a quarter of its weights here. They are read once for all rows, so a request's steps belong in one call.
    """
    return torch.cat([layer(time) for layer in _modulation_layers(model)], dim=1)


def split_vectors(model: FluxTransformer2DModel, vectors: Tensor) -> tuple[Tensor, ...]:
    """[M, V] by layer: [M, 2·D] of the final norm, image then text [M, 6·D] of each double block, [M, 3·D] of each
    single one.

    The final norm's come first so that no block's vectors start as far in as they are long: torch.compile takes equal
    sizes for one symbol, and would make a graph for the first block alone.
    """
    doubles, singles = len(model.transformer_blocks), len(model.single_transformer_blocks)
    width = vectors.shape[1] // (12 * doubles + 3 * singles + 2)
    return vectors.split([2 * width] + [6 * width] * (2 * doubles) + [3 * width] * singles, dim=1)


def _modulation_layers(model: FluxTransformer2DModel) -> Iterator[nn.Module]:
    yield model.norm_out.linear
    for block in double_blocks(model):
        yield block.norm1.linear
        yield block.norm1_context.linear
    for block in single_blocks(model):
        yield block.norm.linear


def double_blocks(model: FluxTransformer2DModel) -> list[FluxTransformerBlock]:
    """The two-stream blocks."""
    return cast("list[FluxTransformerBlock]", list(model.transformer_blocks))


def single_blocks(model: FluxTransformer2DModel) -> list[FluxSingleTransformerBlock]:
    """The single-stream blocks."""
    return cast("list[FluxSingleTransformerBlock]", list(model.single_transformer_blocks))


def run(
    network: Network, site: Site, embedded: Embedded, probe: Probe | None = None, *, checkpoint: bool = False
) -> tuple[Tensor, list[Responses]]:
    """The blocks and the final projection: the targets' velocity, and what the blocks in `probe.layers` saw."""
    model = network.model
    doubles, singles = double_blocks(model), single_blocks(model)
    # What a probe sees is in no compiled graph.
    double, single = (double_block, single_block) if probe else (network.double, network.single)
    final, *by_layer = split_vectors(model, embedded.vectors)
    vectors = iter(by_layer)
    probes = iter([probe if probe and layer in probe.layers else None for layer in range(num_blocks(model))])
    fused = iter(network.projections or [()] * num_blocks(model))
    responses: list[Responses] = []
    text, image = embedded.text, embedded.image
    for block in doubles:
        modulations = next(vectors), next(vectors)
        text, image, seen = _call(checkpoint, double, block, text, image, *modulations, site, next(fused), next(probes))
        responses.append(seen)
    joint = to_request_order(torch.cat([text, image]), site)
    for number, block in enumerate(singles, start=1):
        last = site.last if number == len(singles) else None
        joint, seen = _call(checkpoint, single, block, joint, next(vectors), site, next(fused), next(probes), last)
        responses.append(seen)
    target = joint if singles else joint[site.last.tokens]
    return project(model, target, final, site), [seen for seen in responses if seen]


def _call(checkpoint: bool, block: Callable[P, T], *inputs: P.args, **named: P.kwargs) -> T:
    """Call a block. Recomputed or not, its outputs are those of the first call: maps are neither lost nor doubled."""
    if checkpoint and torch.is_grad_enabled():
        return cast("T", recomputed(block, *inputs, use_reentrant=False, **named))
    return block(*inputs, **named)


def project(model: FluxTransformer2DModel, target: Tensor, vectors: Tensor, site: Site) -> Tensor:
    """Final norm and projection of the target tokens: [Σ targets, D] → [Σ targets, 64]. vectors: [M, 2·D]."""
    scale, shift = vectors.chunk(2, dim=1)
    return model.proj_out(modulate(target, shift, scale, site.last.rows))
