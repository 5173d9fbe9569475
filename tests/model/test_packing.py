"""The sequence builder: every token has one place, and each place its attributes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.packing import Condition, Kind, Layout, ReferenceTokens, lay_out, pack
from model.positions import Grid
from model.roles import Role

grids = st.tuples(st.integers(1, 6), st.integers(1, 6))
slots = st.lists(st.integers(1, 9), max_size=3, unique=True).map(sorted)


@st.composite
def conditions(draw: st.DrawFn) -> Condition:
    references = tuple(
        ReferenceTokens(slot, draw(st.sampled_from(Role)), torch.zeros(0), draw(grids)) for slot in draw(slots)
    )
    return Condition(
        torch.zeros(draw(st.integers(1, 5)), 4), torch.zeros(4), draw(grids), references, draw(st.booleans())
    )


def condition(target: Grid, references: dict[int, Grid]) -> Condition:
    return Condition(
        torch.zeros(3, 4),
        torch.zeros(4),
        target,
        tuple(ReferenceTokens(s, Role.SUBJECT, torch.ones(g[0] * g[1], 64), g) for s, g in references.items()),
    )


@given(st.lists(conditions(), min_size=1, max_size=4))
@settings(max_examples=60)
def test_segments_tile_the_sequence(requests: list[Condition]) -> None:
    """Segments lie back to back in request order and in each stream; boundaries fall between requests."""
    layout = lay_out(requests)
    position, streams = 0, {Kind.TEXT: 0, Kind.TARGET: 0}
    for segment in layout.segments:
        stream = Kind.TEXT if segment.kind is Kind.TEXT else Kind.TARGET
        assert (segment.start, segment.stream_start) == (position, streams[stream])
        assert layout.boundaries[segment.request] <= segment.start
        assert segment.start + segment.length <= layout.boundaries[segment.request + 1]
        position += segment.length
        streams[stream] += segment.length
    assert position == layout.boundaries[-1] == len(layout.ids)
    assert layout.num_text == streams[Kind.TEXT]


@given(st.lists(conditions(), min_size=2, max_size=4))
@settings(max_examples=60)
def test_orders_are_inverse_and_keep_attributes(requests: list[Condition]) -> None:
    """Going to request order and back loses nothing, and modulation rows follow their tokens."""
    layout = lay_out(requests)
    assert layout.order is not None
    assert layout.inverse is not None
    size = len(layout.ids)
    assert torch.equal(layout.order[layout.inverse], torch.arange(size))
    streams = torch.cat([layout.text_rows, layout.image_rows])
    assert torch.equal(streams[layout.order], layout.joint_rows)


@given(conditions())
@settings(max_examples=60)
def test_references_share_no_row_and_no_column(request: Condition) -> None:
    """The diagonal rule: neither with the target nor with each other."""
    image = [s for s in lay_out([request]).segments if s.kind is not Kind.TEXT]
    for axis in (1, 2):
        seen: set[float] = set()
        for segment in image:
            values = set(segment.ids[:, axis].tolist())
            assert not values & seen
            seen |= values


def rows_of(layout: Layout) -> list[tuple[int | None, int | None]]:
    return [(s.type_row, s.index_row) for s in layout.segments if s.kind is not Kind.TEXT]


def test_slots_are_not_compacted() -> None:
    """An empty slot takes no tokens and no position space, but those after it keep their number."""
    with_gap = lay_out([condition((4, 4), {2: (2, 3), 4: (1, 1)})])
    without = lay_out([condition((4, 4), {1: (2, 3), 2: (1, 1)})])
    assert rows_of(with_gap) == [(1, None), (0, 2), (0, 4)]
    assert rows_of(without) == [(1, None), (0, 1), (0, 2)]
    assert torch.equal(with_gap.ids, without.ids)


def test_dropped_tokens_leave_the_others_in_place() -> None:
    """Token drop removes tokens from the sequence; the rest keep their ids, and later references their origin."""
    whole = condition((4, 4), {1: (3, 3), 2: (2, 2)})
    first, second = whole.references
    kept = torch.tensor([0, 4, 8])
    thinned = replace(whole, references=(replace(first, tokens=first.tokens[kept], kept=kept), second))
    ids, all_ids = lay_out([thinned]).ids, lay_out([whole]).ids
    start = 3 + 16
    assert torch.equal(ids[start : start + 3], all_ids[start + kept])
    assert torch.equal(ids[start + 3 :], all_ids[start + 9 :])


def test_the_negative_branch_adds_nothing() -> None:
    """`embedded=False` leaves every image token without type and index vector."""
    layout = lay_out([Condition(torch.zeros(3, 4), torch.zeros(4), (4, 4), embedded=False)])
    assert rows_of(layout) == [(None, None)]
    assert int(layout.type_rows.sum()) == int(layout.index_rows.sum()) == 0


def test_a_wrong_target_is_refused() -> None:
    """Latents of another size than the layout's grid cannot slip in."""
    request = condition((4, 4), {})
    with pytest.raises(ValueError, match="4x4 target needs 16 tokens"):
        pack(lay_out([request]), [request], [torch.zeros(15, 64)], [torch.tensor(1.0)], [3.5])
