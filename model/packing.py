"""Builds the one sequence the DiT sees: `[text | target | reference …]` of each request, requests one after another.

`Layout` is what does not change between denoise steps: where each segment lies, its position ids, which learned
vectors are added to it, which modulation row it uses. `PackedSequence` is a layout filled with tokens and times.
Nothing is padded: requests of different sizes, numbers of references and timesteps share a forward, and attention
stays within a request (`Layout.boundaries`).

Shapes: R requests, T text tokens and I image tokens in all (targets and references), S = T + I, M modulation rows.
Two orders exist. *Stream order* is all text then all image tokens, which FLUX's double blocks need; *request order*
is what attention and the single blocks run in. For one request the two are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch

from model.positions import Grid, diagonal_origins, grid_ids
from model.roles import RULES, TARGET, Role, SegmentRule


class Kind(StrEnum):
    TEXT = "text"
    TARGET = "target"
    REFERENCE = "reference"


@dataclass(frozen=True, slots=True)
class ReferenceTokens:
    """One reference as the DiT takes it.

    Attributes:
        slot: 1-based and never compacted.
        tokens: [rows * columns, 64]; [len(kept), 64] where only some are present.
        kept: [n] which tokens of the grid are present, in row-major order; None for all. Training drops tokens; the
            rest keep their positions.
    """

    slot: int
    role: Role
    tokens: torch.Tensor
    grid: Grid
    kept: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Condition:
    """Everything a request's forward depends on but the noisy target and the time.

    Attributes:
        text: [T, Ct] from T5. pooled: [Cp] from CLIP.
        embedded: whether type and index embeddings are added. The negative branch of true CFG is plain FLUX: no
            references and nothing added. A request without references is not: its target keeps its type embedding.
    """

    text: torch.Tensor
    pooled: torch.Tensor
    target_grid: Grid
    references: tuple[ReferenceTokens, ...] = ()
    embedded: bool = True


@dataclass(frozen=True, slots=True)
class Segment:
    """A contiguous span of the packed sequence.

    Attributes:
        slot: 1-based slot of a reference, 0 otherwise.
        start: first token in request order. stream_start: first token in its own stream (text or image).
        row: which of the M modulation rows its tokens use.
        type_row, index_row: rows of the embedding tables added to its tokens; None adds nothing.
        ids: [length, 3] position ids.
    """

    request: int
    kind: Kind
    slot: int
    start: int
    stream_start: int
    length: int
    row: int
    type_row: int | None
    index_row: int | None
    ids: torch.Tensor


@dataclass(frozen=True, slots=True)
class ModulationRow:
    """Which request's time, guidance and pooled prompt make a row; `clean` rows stand at t = 0."""

    request: int
    clean: bool


@dataclass(frozen=True, slots=True)
class Layout:
    """The segment table and the index tensors derived from it.

    Attributes:
        boundaries: R + 1 offsets of the requests in request order.
        rows: the M modulation rows.
        ids: [S, 3] float32 in request order.
        order: [S] stream index of each token in request order; None when the orders coincide (R = 1).
        inverse: [S] the inverse permutation of `order`.
        text_rows [T], image_rows [I], joint_rows [S]: modulation row of each token.
        type_rows, index_rows: [I] embedding row + 1 of each image token, 0 for none.
        targets: per request, the slice of its target tokens in the image stream. joint_targets: in request order.
    """

    segments: tuple[Segment, ...]
    boundaries: tuple[int, ...]
    rows: tuple[ModulationRow, ...]
    ids: torch.Tensor
    order: torch.Tensor | None
    inverse: torch.Tensor | None
    text_rows: torch.Tensor
    image_rows: torch.Tensor
    joint_rows: torch.Tensor
    type_rows: torch.Tensor
    index_rows: torch.Tensor
    targets: tuple[slice, ...]
    joint_targets: tuple[slice, ...]

    @property
    def num_text(self) -> int:
        """T, the number of text tokens."""
        return self.text_rows.shape[0]


@dataclass(frozen=True, slots=True)
class PackedSequence:
    """A layout filled for one forward.

    Attributes:
        text: [T, Ct]. image: [I, 64], noisy targets and clean references.
        timestep: [M], t in [0, 1] (1 = noise). guidance: [M]. pooled: [M, Cp].
    """

    layout: Layout
    text: torch.Tensor
    image: torch.Tensor
    timestep: torch.Tensor
    guidance: torch.Tensor
    pooled: torch.Tensor


class _Table:
    """Grows the segment table of `lay_out`, one segment at a time."""

    def __init__(self) -> None:
        self.segments: list[Segment] = []
        self.rows: list[ModulationRow] = []
        self.ends = {Kind.TEXT: 0, Kind.TARGET: 0}
        self.position = 0

    def row(self, request: int, clean: bool) -> int:
        wanted = ModulationRow(request, clean)
        if wanted not in self.rows:
            self.rows.append(wanted)
        return self.rows.index(wanted)

    def add(self, request: int, kind: Kind, ids: torch.Tensor, rule: SegmentRule | None, slot: int = 0) -> None:
        stream = Kind.TEXT if kind is Kind.TEXT else Kind.TARGET
        self.segments.append(
            Segment(
                request,
                kind,
                slot,
                start=self.position,
                stream_start=self.ends[stream],
                length=len(ids),
                row=self.row(request, clean=rule is not None and rule.clean_time),
                type_row=None if rule is None else rule.type_row,
                index_row=slot if rule is not None and rule.indexed else None,
                ids=ids,
            )
        )
        self.position += len(ids)
        self.ends[stream] += len(ids)


def lay_out(conditions: Sequence[Condition]) -> Layout:
    """Lay the requests' segments out, following `model.roles`. Index tensors are made on the text's device."""
    table = _Table()
    boundaries = [0]
    for request, condition in enumerate(conditions):
        table.add(request, Kind.TEXT, torch.zeros(len(condition.text), 3), rule=None)
        table.add(request, Kind.TARGET, grid_ids(condition.target_grid), TARGET if condition.embedded else None)
        for reference, ids in zip(condition.references, _reference_ids(condition), strict=True):
            table.add(request, Kind.REFERENCE, ids, RULES[reference.role], reference.slot)
        boundaries.append(table.position)
    return _index(table, tuple(boundaries), conditions[0].text.device)


def _reference_ids(condition: Condition) -> list[torch.Tensor]:
    diagonal = [r for r in condition.references if RULES[r.role].positions == "diagonal"]
    origins = iter(diagonal_origins(condition.target_grid, [r.grid for r in diagonal]))
    whole = [
        grid_ids(r.grid, next(origins) if RULES[r.role].positions == "diagonal" else (0, 0))
        for r in condition.references
    ]
    return [
        ids if r.kept is None else ids[r.kept.to(ids.device)]
        for ids, r in zip(whole, condition.references, strict=True)
    ]


def _index(table: _Table, boundaries: tuple[int, ...], device: torch.device) -> Layout:
    segments = tuple(table.segments)
    text = [s for s in segments if s.kind is Kind.TEXT]
    image = [s for s in segments if s.kind is not Kind.TEXT]
    num_text = table.ends[Kind.TEXT]

    def spread(values: Sequence[tuple[int, int]]) -> torch.Tensor:
        """One value per segment → one per token."""
        value, length = zip(*values, strict=True)
        return torch.repeat_interleave(torch.tensor(value), torch.tensor(length)).to(device)

    order = inverse = None
    if len(boundaries) > 2:
        order = torch.cat(
            [torch.arange(s.length) + s.stream_start + (0 if s.kind is Kind.TEXT else num_text) for s in segments]
        ).to(device)
        inverse = torch.argsort(order)
    return Layout(
        segments=segments,
        boundaries=boundaries,
        rows=tuple(table.rows),
        ids=torch.cat([s.ids for s in segments]).to(device),
        order=order,
        inverse=inverse,
        text_rows=spread([(s.row, s.length) for s in text]),
        image_rows=spread([(s.row, s.length) for s in image]),
        joint_rows=spread([(s.row, s.length) for s in segments]),
        type_rows=spread([(0 if s.type_row is None else s.type_row + 1, s.length) for s in image]),
        index_rows=spread([(0 if s.index_row is None else s.index_row + 1, s.length) for s in image]),
        targets=tuple(slice(s.stream_start, s.stream_start + s.length) for s in image if s.kind is Kind.TARGET),
        joint_targets=tuple(slice(s.start, s.start + s.length) for s in image if s.kind is Kind.TARGET),
    )


def pack(
    layout: Layout,
    conditions: Sequence[Condition],
    latents: Sequence[torch.Tensor],
    timesteps: Sequence[torch.Tensor],
    guidances: Sequence[float],
) -> PackedSequence:
    """Fill a layout made from the same `conditions`.

    Args:
        latents: per request, its noisy target [rows * columns, 64].
        timesteps: per request, t in [0, 1] as a scalar tensor in the model's dtype.
        guidances: per request, the distilled guidance scale.
    """
    for condition, noisy in zip(conditions, latents, strict=True):
        rows, columns = condition.target_grid
        if noisy.shape[0] != rows * columns:
            raise ValueError(f"a {rows}x{columns} target needs {rows * columns} tokens, got {noisy.shape[0]}")
    image = [
        tokens
        for condition, noisy in zip(conditions, latents, strict=True)
        for tokens in (noisy, *(reference.tokens for reference in condition.references))
    ]
    dtype, device = latents[0].dtype, latents[0].device
    guidance = torch.tensor([guidances[row.request] for row in layout.rows], dtype=torch.float32)
    return PackedSequence(
        layout=layout,
        text=torch.cat([condition.text for condition in conditions]),
        image=torch.cat(image),
        timestep=torch.stack([timesteps[row.request] * (0.0 if row.clean else 1.0) for row in layout.rows]).to(device),
        guidance=guidance.to(dtype=dtype, device=device),
        pooled=torch.stack([conditions[row.request].pooled for row in layout.rows]),
    )
