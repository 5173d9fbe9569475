"""The training objective: each loss against its formula, and against what must not lower it."""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.losses import (
    LossCounts,
    Losses,
    LossTerm,
    LossWeights,
    Normalise,
    flow_loss,
    holder_loss,
    noised,
    route_loss,
    token_mask,
)
from model.packing import Condition, Kind, Layout, ReferenceTokens, lay_out
from model.positions import Grid
from model.roles import Role
from model.routing import Capture, GroupMaps, Positions, ResponseMaps, collect, observe, plan

HEADS, DIM = 2, 8
TARGET: Grid = (3, 4)
NAMED: Positions = {1: (0,), 2: (3, 4)}


@pytest.fixture(autouse=True)
def one_thread() -> Generator[None]:
    """Small tensors on several threads crawl when the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def layout_of(requests: Sequence[Mapping[int, Grid]], target: Grid = TARGET) -> Layout:
    """Requests with given references, five text tokens each."""
    return lay_out(
        [
            Condition(
                torch.zeros(5, 4),
                torch.zeros(4),
                target,
                tuple(ReferenceTokens(slot, Role.SUBJECT, torch.zeros(0), grid) for slot, grid in references.items()),
            )
            for references in requests
        ]
    )


PAIR = {1: (2, 2), 2: (1, 3)}


def maps_of(
    layout: Layout, layers: Sequence[tuple[Tensor, Tensor]], positions: Sequence[Positions], capture: Capture
) -> ResponseMaps:
    """Maps of made-up queries and keys, one pair a layer, by way of the blocks' own functions."""
    probe = plan(layout, capture, len(layers), positions)
    assert probe is not None
    return collect(probe, [observe(probe, query, key) for query, key in layers])


def routed(layout: Layout, masks: Mapping[tuple[int, int], Tensor], *, named: bool = True) -> tuple[Tensor, Tensor]:
    """Queries and keys of a network that routes as told: maps equal the masks, placeholders answer to their reference.

    Reference `slot` and its placeholder have channel `slot`; a target token has those of the subjects it belongs to.
    """
    query, key = torch.zeros(2, layout.boundaries[-1], HEADS, DIM, dtype=torch.float64)
    for segment in layout.segments:
        span = slice(segment.start, segment.start + segment.length)
        if segment.kind is Kind.REFERENCE:
            query[span, :, segment.slot] = DIM**0.5
        for (request, slot), mask in masks.items():
            if request == segment.request and segment.kind is Kind.TARGET:
                key[span, :, slot] = mask[:, None].double()
            if request == segment.request and segment.kind is Kind.TEXT and named:
                for position in NAMED[slot]:
                    key[segment.start + position, :, slot] = 40.0
    return query, key


def two_subjects() -> dict[tuple[int, int], Tensor]:
    left, right = torch.zeros(2, 3, 4)
    left[1:, 0], right[0, 2:] = 1, 1
    left[0, 0] = 0.25
    return {(0, 1): left.flatten(), (0, 2): right.flatten()}


def ideal() -> tuple[ResponseMaps, dict[tuple[int, int], Tensor]]:
    """Three layers that route perfectly, and the masks they route by."""
    layout, masks = layout_of([PAIR]), two_subjects()
    return maps_of(layout, [routed(layout, masks)] * 3, [NAMED], Capture()), masks


# --- flow


def flow_sample(seed: int) -> tuple[Layout, list[Tensor], list[Tensor], list[Tensor]]:
    """Two requests of different size: clean latents, noise and velocities in float64."""
    generator = torch.Generator().manual_seed(seed)
    conditions = [Condition(torch.zeros(2, 4), torch.zeros(4), grid) for grid in ((2, 3), (4, 4))]
    draws = [[torch.randn(length, 8, dtype=torch.float64, generator=generator) for length in (6, 16)] for _ in range(3)]
    return lay_out(conditions), draws[0], draws[1], draws[2]


def test_the_true_velocity_has_no_flow_loss_and_steps_to_the_latents() -> None:
    """noise − latents is the target, and one Euler step of −t along it ends at the clean latents."""
    layout, latents, noise, _ = flow_sample(0)
    true = torch.cat(noise) - torch.cat(latents)
    assert flow_loss(true, latents, noise, layout).value == 0
    for t in (0.1, 1.0):
        here = noised(torch.cat(latents), torch.cat(noise), t)
        assert torch.allclose(here - t * true, torch.cat(latents), atol=1e-12)
    assert flow_loss(-true, latents, noise, layout).value > 1
    assert flow_loss(true, noise, latents, layout).value > 1


def test_flow_is_the_paper_s_equation_one() -> None:
    """DreamO: z = t·z0 + (1 − t)·ε, regress z0 − ε. The same states and the same loss, with t reversed and −v."""
    layout, latents, noise, velocity = flow_sample(1)
    s = 0.3
    paper_state = [(1 - s) * z0 + s * epsilon for z0, epsilon in zip(latents, noise, strict=True)]
    ours = [noised(z0, epsilon, s) for z0, epsilon in zip(latents, noise, strict=True)]
    assert all(torch.allclose(a, b, atol=1e-14) for a, b in zip(paper_state, ours, strict=True))
    paper = [((-v) - (z0 - e)).pow(2).mean() for v, z0, e in zip(velocity, latents, noise, strict=True)]
    term = flow_loss(torch.cat(velocity), latents, noise, layout)
    assert term.count == 2
    assert torch.allclose(term.value, torch.stack(paper).mean(), atol=1e-14)


def test_flow_refuses_other_lengths() -> None:
    """Latents of another request cannot slip in."""
    layout, latents, noise, velocity = flow_sample(2)
    with pytest.raises(ValueError, match=r"\[6, 16\] tokens"):
        flow_loss(torch.cat(velocity), latents[::-1], noise[::-1], layout)


# --- masks


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 4), st.integers(1, 4), st.integers(0, 99))
@settings(max_examples=40)
def test_token_masks_are_area_shares(rows: int, columns: int, high: int, wide: int, seed: int) -> None:
    """Token (y, x), in the order of position ids, holds the mean of its own cell."""
    mask = np.random.default_rng(seed).integers(0, 256, (rows * high, columns * wide), dtype=np.uint8)
    got = token_mask(mask, (rows, columns))
    cells = [
        mask[y * high : (y + 1) * high, x * wide : (x + 1) * wide].mean() / 255
        for y in range(rows)
        for x in range(columns)
    ]
    assert torch.allclose(got, torch.tensor(cells, dtype=torch.float32), atol=1e-6)
    assert torch.equal(token_mask(mask, (rows, columns), threshold=0.5), (got >= 0.5).float())


def test_a_mask_that_does_not_fit_is_refused() -> None:
    """A grid that cuts through pixels has no exact areas."""
    with pytest.raises(ValueError, match="10x16 mask does not divide into 3x4 tokens"):
        token_mask(np.zeros((10, 16), np.uint8), (3, 4))


# --- routing loss


def test_routing_as_told_costs_nothing_and_anything_else_does() -> None:
    """Perfect maps have no loss. A mask one token off, references swapped, the wrong sign: each is penalised."""
    maps, masks = ideal()
    assert route_loss(maps, masks).value < 1e-24
    shifted = {key: mask.reshape(TARGET).roll(1, 1).flatten() for key, mask in masks.items()}
    swapped = {(0, 1): masks[0, 2], (0, 2): masks[0, 1]}
    (group,) = maps.groups
    assert group.route is not None
    inverted = replace(maps, groups=(replace(group, route=-group.route),))
    apart = torch.stack(list(masks.values()))
    for wrong_maps, wrong_masks, wanted in [
        (maps, shifted, (torch.stack(list(shifted.values())) - apart).square().mean()),
        (maps, swapped, (masks[0, 1] - masks[0, 2]).square().mean()),
        (inverted, masks, (2 * apart).square().mean()),
    ]:
        assert wanted > 0.05
        assert route_loss(wrong_maps, wrong_masks).value.item() == pytest.approx(wanted.item(), abs=1e-6)


def test_silent_maps_cost_the_area_of_the_subject() -> None:
    """With maps at zero the loss is mean(mask²): the area share of a hard mask, comparable with the flow loss."""
    layout, masks = layout_of([PAIR]), {key: mask.round() for key, mask in two_subjects().items()}
    silent = torch.zeros(2, layout.boundaries[-1], HEADS, DIM)
    maps = maps_of(layout, [(silent[0], silent[1])], [NAMED], Capture())
    area = torch.stack(list(masks.values())).mean()
    assert route_loss(maps, masks).value.item() == pytest.approx(area.item())


@pytest.mark.parametrize("heads", ["mean", "per_head"])
def test_route_loss_is_the_mean_of_squares_layer_by_layer(heads: str) -> None:
    """Equation 3 written out over layers, masked references and tokens, in a pack of unequal requests."""
    layout = layout_of([{2: (1, 2)}, PAIR, {}, PAIR])
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(3, 2, layout.boundaries[-1], HEADS, DIM, generator=generator, dtype=torch.float64)
    capture = Capture(holder=False, heads=heads)
    maps = maps_of(layout, [(query, key) for query, key in tokens], [{}] * 4, capture)
    masks = {key: torch.rand(12, generator=generator) for key in [(0, 2), (1, 1), (3, 1), (3, 2)]}
    errors = [
        (maps.route(*key)[layer] - mask.double()).square().mean() for key, mask in masks.items() for layer in range(3)
    ]
    term = route_loss(maps, masks)
    assert term.count == 4
    assert torch.allclose(term.value, torch.stack(errors).mean(), atol=1e-12)


def test_masks_find_their_reference_by_slot() -> None:
    """A mask for a slot, a request or a size that the pack does not have is a mistake, not a weight of zero."""
    maps, masks = ideal()
    assert route_loss(maps, {}).count == 0
    assert route_loss(maps, {(0, 2): masks[0, 2]}).count == 1
    for stray in [(0, 3), (1, 1)]:
        with pytest.raises(ValueError, match="1 masks were given, and 0 of them"):
            route_loss(maps, {stray: masks[0, 1]})
    with pytest.raises(ValueError, match="its target 12 tokens"):
        route_loss(maps, {(0, 1): torch.ones(9)})


@pytest.mark.parametrize("normalise", ["sigmoid", "minmax", "softmax"])
def test_normalised_maps(normalise: Normalise) -> None:
    """Each option has the optimum it claims, and prefers the right mask to a swapped one."""
    masks = {key: mask.round() for key, mask in two_subjects().items()}
    best = {
        "sigmoid": {key: 40 * mask - 20 for key, mask in masks.items()},
        "minmax": {key: 3 * mask - 7 for key, mask in masks.items()},
        "softmax": {key: 40 * mask for key, mask in masks.items()},
    }[normalise]
    layout = layout_of([PAIR])
    maps = maps_of(layout, [routed(layout, best)], [NAMED], Capture())
    assert route_loss(maps, masks, normalise=normalise).value < 1e-12
    swapped = {(0, 1): masks[0, 2], (0, 2): masks[0, 1]}
    assert route_loss(maps, swapped, normalise=normalise).value > 0.1
    assert route_loss(maps, masks, normalise="none").value > 0.1


# --- placeholder loss


def test_placeholders_that_answer_cost_nothing_and_swapped_ones_do() -> None:
    """A is one-hot in the reference's own column; with [ref#1] and [ref#2] exchanged it is one-hot in the other."""
    layout, masks = layout_of([PAIR]), two_subjects()
    layers = [routed(layout, masks)] * 2
    assert holder_loss(maps_of(layout, layers, [NAMED], Capture())).value < 1e-6
    swapped = maps_of(layout, layers, [{1: NAMED[2], 2: NAMED[1]}], Capture())
    assert holder_loss(swapped).value.item() == pytest.approx(1.0, abs=1e-3)
    unnamed = [routed(layout, masks, named=False)] * 2
    term = holder_loss(maps_of(layout, unnamed, [NAMED], Capture()))
    assert term.count == 2
    assert term.value.item() == pytest.approx(0.25)


def test_holder_loss_is_equation_four() -> None:
    """Written out over layers, references, queries and placeholders, for those requests that take part."""
    three = {1: (2, 2), 4: (1, 3), 2: (1, 1)}
    layout = layout_of([PAIR, {1: (2, 2)}, three, PAIR])
    named: list[Positions] = [NAMED, {1: (1,)}, {1: (0,), 4: (1, 2, 3), 2: (4,)}, {}]
    tokens = torch.randn(2, 2, layout.boundaries[-1], HEADS, DIM, dtype=torch.float64)
    maps = maps_of(layout, [(query, key) for query, key in tokens], named, Capture())
    starts = {(s.request, s.kind, s.slot): slice(s.start, s.start + s.length) for s in layout.segments}
    wanted: list[Tensor] = []
    for query, key in tokens:
        for request, slots in ((0, (1, 2)), (2, (1, 4, 2))):
            text = starts[request, Kind.TEXT, 0].start
            rows = torch.stack([key[[text + p for p in named[request][slot]]].mean(0) for slot in slots])
            for number, slot in enumerate(slots):
                products = torch.einsum("qhd,nhd->hqn", query[starts[request, Kind.REFERENCE, slot]], rows)
                answer = (products.mean(0) / DIM**0.5).softmax(-1)
                wanted.append((answer - torch.eye(len(slots))[number]).square().mean())
    term = holder_loss(maps)
    assert term.count == 5
    assert torch.allclose(term.value, torch.stack(wanted).mean(), atol=1e-12)


def test_one_reference_has_no_placeholder_loss() -> None:
    """A softmax over one placeholder is 1 whatever it reads: loss and gradient are exactly zero, so it is left out."""
    layout = layout_of([{1: (2, 2)}])
    query, key = torch.randn(2, layout.boundaries[-1], HEADS, DIM)
    left_out = maps_of(layout, [(query, key)], [{1: (0,)}], Capture())
    assert holder_loss(left_out).count == 0
    logits = torch.randn(1, 1, 4, 1, requires_grad=True)
    maps = ResponseMaps((0,), (GroupMaps((((0, 1),),), None, (logits.softmax(-1),)),))
    term = holder_loss(maps)
    (gradient,) = torch.autograd.grad(term.total, logits)
    assert term.value == 0
    assert not gradient.any()


# --- all three


@pytest.mark.parametrize("normalise", ["none", "sigmoid", "minmax", "softmax"])
def test_gradients_of_all_three(normalise: Normalise) -> None:
    """Finite differences in float64, from velocity, queries and keys to equation 5."""
    layout = layout_of([PAIR, {2: (1, 2)}], target=(2, 2))
    tokens = torch.randn(2, layout.boundaries[-1], 2, 2, dtype=torch.float64, requires_grad=True)
    velocity = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
    latents, noise = torch.randn(2, 2, 4, 3, dtype=torch.float64)
    masks = {(0, 1): torch.rand(4), (1, 2): torch.rand(4)}

    def total(tokens: Tensor, velocity: Tensor) -> Tensor:
        maps = maps_of(layout, [(tokens[0], tokens[1]), (tokens[1], tokens[0])], [NAMED, {}], Capture())
        losses = Losses(
            flow_loss(velocity, list(latents), list(noise), layout),
            route_loss(maps, masks, normalise=normalise),
            holder_loss(maps),
        )
        assert (losses.flow.count, losses.route.count, losses.holder.count) == (2, 2, 2)
        return losses.total(LossWeights(flow=1.0, route=0.7, holder=1.3))

    assert torch.autograd.gradcheck(total, (tokens, velocity))


def test_weights_and_counts() -> None:
    """λ scale their own part; a part with weight 0, or nothing to count, stays out of the graph."""
    values = torch.tensor([6.0, 4.0, 9.0], requires_grad=True)
    losses = Losses(LossTerm(values[0], 3), LossTerm(values[1], 2), LossTerm(values[2], 3))
    assert [term.value.item() for term in (losses.flow, losses.route, losses.holder)] == [2, 2, 3]
    assert losses.total(LossWeights()).item() == 7
    assert losses.total(LossWeights(flow=1, route=0.5, holder=2)).item() == 9
    without = losses.total(LossWeights(route=0))
    assert torch.autograd.grad(without, values)[0].tolist() == pytest.approx([1 / 3, 0, 1 / 3])
    empty = Losses(losses.flow, LossTerm(torch.zeros(()), 0), LossTerm(torch.tensor(math.nan), 0))
    assert empty.total(LossWeights()).item() == 2
    assert empty.route.value == 0


def test_averaged_processes_equal_one() -> None:
    """Two processes with unequal numbers of masks, their gradients averaged, against one that has all requests."""
    requests = [PAIR, {2: (1, 2)}, PAIR]
    named: list[Positions] = [NAMED, {}, NAMED]
    whole = layout_of(requests)
    tokens = torch.randn(2, whole.boundaries[-1], HEADS, DIM, dtype=torch.float64, requires_grad=True)
    masks = {(0, 1): torch.rand(12), (0, 2): torch.rand(12), (1, 2): torch.rand(12)}

    def losses(chosen: Sequence[int]) -> Losses:
        layout = layout_of([requests[r] for r in chosen])
        kept = torch.cat([torch.arange(whole.boundaries[r], whole.boundaries[r + 1]) for r in chosen])
        maps = maps_of(layout, [(tokens[0, kept], tokens[1, kept])], [named[r] for r in chosen], Capture())
        own = {(chosen.index(r), slot): mask for (r, slot), mask in masks.items() if r in chosen}
        velocity = [tokens[0, :12, 0] * (r + 1) for r in chosen]
        blank = [torch.zeros_like(v) for v in velocity]
        return Losses(flow_loss(torch.cat(velocity), blank, blank, layout), route_loss(maps, own), holder_loss(maps))

    def gradient(chosen: Sequence[int], counts: LossCounts | None = None) -> Tensor:
        return torch.autograd.grad(losses(chosen).total(LossWeights(), counts), tokens)[0]

    shares = [[0, 1], [2]]
    parts = [losses(share) for share in shares]
    counts = LossCounts(*(sum(getattr(p, name).count for p in parts) / 2 for name in ("flow", "route", "holder")))
    assert counts == LossCounts(1.5, 1.5, 2.0)
    averaged, naive = (sum((gradient(share, c) for share in shares), torch.zeros(())) / 2 for c in (counts, None))
    assert torch.allclose(averaged, gradient([0, 1, 2]), atol=1e-14)
    assert (naive - averaged).abs().max() > 1e-4
