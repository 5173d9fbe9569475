"""What training reads of the attention inside the blocks: DreamO's response maps (§3.2, equations 2 and 4).

A `Capture` says what is wanted, a `Probe` where it lies in one pack, each block returns a `Response`, and
`ResponseMaps` holds those of all layers. Layers are kept apart, not summed: the squared errors of equations 3 and 4
are taken layer by layer. That is small: FLUX's 57 layers are 0.9 MB for a reference and a 1024 × 1024 target.

Shapes: as in `kernels.response_map`; Λ captured layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import torch
from tokenizers import Tokenizer
from torch import Tensor

from kernels.response_map import GroupResponse as Response
from kernels.response_map import Heads, Reading, Sites, plan_reading, respond
from model.packing import Kind, Layout, Segment
from model.roles import PLACEHOLDERS

ReferenceKey = tuple[int, int]
"""(request, slot): names a reference of a pack."""

Positions = Mapping[int, Sequence[int]]
"""Slot → where its placeholder stands in the request's T5 tokens; empty for a prompt without placeholders."""


@dataclass(frozen=True, slots=True)
class Capture:
    """What a forward returns besides the velocity.

    Attributes:
        layers: block numbers, double blocks first, then single ones; DreamO's authors use all.
        route: the maps of equation 2. holder: the softmax of equation 4.
        heads: what becomes of the heads' maps. `holder` always averages them.
        stage: read queries and keys with the rotary embedding, as attention sees them, or before it.
        scaled: whether the products of `holder` are divided by sqrt(d), which the paper does not show.
    """

    layers: tuple[int, ...] | Literal["all"] = "all"
    route: bool = True
    holder: bool = True
    heads: Heads = "mean"
    stage: Literal["post_rope", "pre_rope"] = "post_rope"
    scaled: bool = True


@dataclass(frozen=True, slots=True)
class Probe:
    """A `Capture` for one layout. keys: per group of equal requests, its references' names, [R][n]."""

    capture: Capture
    layers: tuple[int, ...]
    reading: Reading
    keys: tuple[tuple[tuple[ReferenceKey, ...], ...], ...]


@dataclass(frozen=True, slots=True)
class GroupMaps:
    """A `Response` of all layers: route [Λ, R, n, l] or [Λ, R, n, H, l], holder n × [Λ, R, l_j, n]; wide floats."""

    keys: tuple[tuple[ReferenceKey, ...], ...]
    route: Tensor | None
    holder: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class ResponseMaps:
    """All that was captured, grouped by requests of the same shape; requests without references are in no group."""

    layers: tuple[int, ...]
    groups: tuple[GroupMaps, ...]

    def route(self, request: int, slot: int) -> Tensor:
        """One reference's map in every captured layer: [Λ, l], or [Λ, H, l] for `per_head`.

        Raises:
            KeyError: nothing was captured for it.
        """
        for group in self.groups:
            for row, keys in enumerate(group.keys):
                if (request, slot) in keys and group.route is not None:
                    return group.route[:, row, keys.index((request, slot))]
        raise KeyError((request, slot))


def plan(layout: Layout, capture: Capture, num_layers: int, positions: Sequence[Positions] | None) -> Probe | None:
    """Where in a pack lies what `capture` wants; None if the pack holds nothing of it.

    A request takes part in `holder` if it has two references or more, and the placeholder of each is among its tokens.

    Args:
        num_layers: how many blocks the model has.
        positions: one for each request; only `holder` needs them.

    Raises:
        ValueError: a layer the model does not have, or `holder` without positions for each request.
    """
    layers = tuple(range(num_layers)) if capture.layers == "all" else tuple(sorted(set(capture.layers)))
    if unknown := [layer for layer in layers if not 0 <= layer < num_layers]:
        raise ValueError(f"the model has {num_layers} blocks; there is no layer {unknown[0]}")
    if capture.holder and (positions is None or len(positions) != len(layout.boundaries) - 1):
        raise ValueError("holder maps need the placeholder positions of every request")
    groups: dict[object, list[_Request]] = {}
    for number, segments in groupby(layout.segments, key=lambda segment: segment.request):
        named = positions[number] if capture.holder and positions is not None else {}
        request = _read_request(tuple(segments), named)
        if request.references and (capture.route or request.placeholders):
            groups.setdefault(request.shape, []).append(request)
    if not groups or not layers:
        return None
    device = layout.ids.device
    sites = [_sites(requests, capture.route, device) for requests in groups.values()]
    keys = tuple(tuple(request.keys for request in requests) for requests in groups.values())
    return Probe(capture, layers, plan_reading(sites), keys)


def observe(probe: Probe, query: Tensor, key: Tensor) -> tuple[Response, ...]:
    """Read one block's queries and keys, [S, H, d] in request order, after the QK norm: one response a group."""
    return respond(query, key, probe.reading, probe.capture.heads, scaled=probe.capture.scaled)


def collect(probe: Probe | None, responses: Sequence[tuple[Response, ...]]) -> ResponseMaps:
    """Stack what the layers returned, in their order."""
    if probe is None:
        return ResponseMaps((), ())
    groups = tuple(
        GroupMaps(
            keys=keys,
            route=None if layers[0].route is None else torch.stack([r.route for r in layers if r.route is not None]),
            holder=tuple(torch.stack(parts) for parts in zip(*(r.holder for r in layers), strict=True)),
        )
        for keys, layers in zip(probe.keys, zip(*responses, strict=True), strict=True)
    )
    return ResponseMaps(probe.layers, groups)


def placeholder_ids(tokenizer: Tokenizer) -> dict[int, int]:
    """T5 token id → slot, for a tokenizer that knows the placeholders (`PromptEncoder.add_placeholders`).

    Raises:
        ValueError: it does not know them.
    """
    ids = [tokenizer.token_to_id(placeholder) for placeholder in PLACEHOLDERS]
    if None in ids:
        raise ValueError("this tokenizer lacks the placeholders; add them first")
    return {number: slot for slot, number in enumerate(ids, start=1) if number is not None}


def placeholder_positions(tokens: Sequence[int], slots: Mapping[int, int]) -> dict[int, tuple[int, ...]]:
    """Where each placeholder stands, by token id: T5's output has one row per token, and pieces around a placeholder
    vary with its neighbours, so places in the text would not do.

    Args:
        tokens: a request's T5 ids as truncated (`PromptTokens.t5`). slots: from `placeholder_ids`.
    """
    found: dict[int, tuple[int, ...]] = {}
    for position, token in enumerate(tokens):
        if token in slots:
            found[slots[token]] = (*found.get(slots[token], ()), position)
    return found


@dataclass(frozen=True, slots=True)
class _Request:
    """A request's segments, and the token numbers of each reference's placeholders (empty where `holder` is not)."""

    text: Segment
    target: Segment
    references: tuple[Segment, ...]
    placeholders: tuple[tuple[int, ...], ...]

    @property
    def keys(self) -> tuple[ReferenceKey, ...]:
        return tuple((reference.request, reference.slot) for reference in self.references)

    @property
    def shape(self) -> object:
        """Requests that agree in it are read together."""
        return self.target.length, tuple(r.length for r in self.references), bool(self.placeholders)


def _read_request(segments: tuple[Segment, ...], named: Positions) -> _Request:
    (text,) = (s for s in segments if s.kind is Kind.TEXT)
    (target,) = (s for s in segments if s.kind is Kind.TARGET)
    references = tuple(s for s in segments if s.kind is Kind.REFERENCE)
    placeholders = tuple(
        tuple(text.start + p for p in named.get(r.slot, ()) if 0 <= p < text.length) for r in references
    )
    usable = len(references) > 1 and all(placeholders)
    return _Request(text, target, references, placeholders if usable else ())


def _sites(requests: Sequence[_Request], route: bool, device: torch.device) -> Sites:
    def numbers(segments: Sequence[Segment]) -> Tensor:
        starts = torch.tensor([segment.start for segment in segments])
        return (starts[:, None] + torch.arange(segments[0].length)).to(device)

    references = tuple(numbers(column) for column in zip(*(r.references for r in requests), strict=True))
    target = numbers([request.target for request in requests]) if route else None
    if not requests[0].placeholders:
        return Sites(references, target)
    most = max(len(tokens) for request in requests for tokens in request.placeholders)
    if most == 1:
        return Sites(references, target, torch.tensor([request.placeholders for request in requests]).to(device))
    # Filling repeats the first placeholder with a share of zero.
    filled = [[[*t, *[t[0]] * (most - len(t))] for t in request.placeholders] for request in requests]
    shares = [[[1 / len(t)] * len(t) + [0.0] * (most - len(t)) for t in request.placeholders] for request in requests]
    counts = torch.tensor(shares, dtype=torch.float64, device=device)
    return Sites(references, target, torch.tensor(filled, device=device), counts)
