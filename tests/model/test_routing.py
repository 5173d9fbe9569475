"""Response maps out of the blocks: what diffusers' attention would give, for each request alone, computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers.models.transformers import transformer_flux
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from model.losses import Losses, LossWeights, flow_loss, holder_loss, route_loss
from model.packing import PackedSequence
from model.routing import Capture, Positions, ResponseMaps, placeholder_ids, placeholder_positions
from model.transformer import Network, forward, forward_with_maps
from model.weights.checkpoints import LoadedModel
from tests.model.requests import Sample, packed, sample
from tests.model.test_transformer import stock

LAYERS = 6  # of the shipped model
DOUBLE = 2


def pair(model: LoadedModel, seed: int, **changes: Any) -> Sample:
    return sample(model, seed, (6, 5), {1: (4, 4), 3: (2, 3)}, **({"timestep": 0.6} | changes))


def mixed(model: LoadedModel) -> tuple[list[Sample], list[Positions]]:
    """0 to 3 references, two requests of one shape, one prompt without and one with repeated placeholders."""
    samples = [
        sample(model, 1, (6, 6), {}, timestep=1.0),
        pair(model, 2),
        sample(model, 3, (4, 4), {1: (3, 2)}, timestep=0.3, num_text=20),
        pair(model, 4, timestep=0.2, guidance=1.0),
        pair(model, 5),
        sample(model, 6, (6, 5), {1: (4, 4), 2: (2, 3), 5: (1, 1)}, timestep=0.9, num_text=20),
    ]
    positions: list[Positions] = [{}, {1: (2,), 3: (7,)}, {1: (4,)}, {}, {1: (3,), 3: (0, 11)}]
    return samples, [*positions, {1: (19,), 2: (5, 6, 8), 5: (1,)}]


@torch.inference_mode()
def observed(
    model: LoadedModel, samples: Sequence[Sample], positions: Sequence[Positions] | None = None, **options: Any
) -> tuple[Tensor, ResponseMaps]:
    capture = Capture(holder=positions is not None, **options)
    return forward_with_maps(Network(model.transformer), model.tables, packed(list(samples)), capture, positions)


def holder_of(maps: ResponseMaps, request: int) -> list[Tensor]:
    """Per reference of a request, [Λ, l_j, n]; empty if it does not take part."""
    for group in maps.groups:
        for row, keys in enumerate(group.keys):
            if keys[0][0] == request:
                return [part[:, row] for part in group.holder]
    return []


class Stock:
    """Queries and keys that diffusers' own attention of one request got, in order: S × H × d."""

    def __init__(self, model: LoadedModel, one: Sample, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[tuple[Tensor, Tensor]] = []
        real = transformer_flux.dispatch_attention_fn

        def recording(query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            self.seen.append((query[0], key[0]))
            return real(query, key, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(transformer_flux, "dispatch_attention_fn", recording)
            stock(model.transformer, model.tables, one)
        assert len(self.seen) == LAYERS


def test_maps_are_those_of_diffusers_attention(tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer's map is the mean row of the product of the queries and keys that stock diffusers attends with."""
    one = pair(tiny, 7)
    text, target, first = 12, 30, 16
    positions: Positions = {1: (4,), 3: (8, 9)}
    _, maps = observed(tiny, [one], [positions])
    for layer, (query, key) in enumerate(Stock(tiny, one, monkeypatch).seen):
        starts = {1: (text + target, first), 3: (text + target + first, 6)}
        scale = query.shape[-1] ** -0.5
        for number, (slot, (start, length)) in enumerate(starts.items()):
            span = query[start : start + length]
            wanted = scale * torch.einsum("qhd,xhd->hqx", span, key[text : text + target]).mean((0, 1))
            assert torch.allclose(maps.route(0, slot)[layer], wanted, atol=1e-5, rtol=0)
            named = torch.stack([key[4], (key[8] + key[9]) / 2])
            answer = (scale * torch.einsum("qhd,nhd->hqn", span, named).mean(0)).softmax(-1)
            assert torch.allclose(holder_of(maps, 0)[number][layer], answer, atol=1e-5, rtol=0)


@pytest.mark.parametrize("heads", ["mean", "per_head"])
def test_a_mixed_pack_equals_the_solo_runs(tiny: LoadedModel, heads: str) -> None:
    """Maps of a request do not depend on what it is packed with, in which group, or in which row."""
    samples, positions = mixed(tiny)
    _, together = observed(tiny, samples, positions, heads=heads)
    for request, one in enumerate(samples):
        _, alone = observed(tiny, [one], [positions[request]], heads=heads)
        for reference in one.condition.references:
            got, wanted = together.route(request, reference.slot), alone.route(0, reference.slot)
            assert got.shape[0] == LAYERS
            assert torch.allclose(got, wanted, atol=1e-5, rtol=0)
        for got, wanted in zip(holder_of(together, request), holder_of(alone, 0), strict=True):
            assert torch.allclose(got, wanted, atol=1e-5, rtol=0)
    takes_part = [bool(holder_of(together, request)) for request in range(len(samples))]
    assert takes_part == [False, True, False, False, True, True]
    with pytest.raises(KeyError):
        together.route(0, 1)


def test_requests_do_not_see_each_other(tiny: LoadedModel) -> None:
    """Another neighbour of the same shape leaves a request's maps alone; another reference of its own does not."""
    a, b, c = pair(tiny, 8), pair(tiny, 9), pair(tiny, 10)
    positions: list[Positions] = [{1: (1,), 3: (2,)}] * 2
    _, before = observed(tiny, [a, b], positions)
    _, after = observed(tiny, [a, c], positions)
    for slot in (1, 3):
        assert torch.allclose(before.route(0, slot), after.route(0, slot), atol=1e-6, rtol=0)
        assert (before.route(1, slot) - after.route(1, slot)).abs().max() > 1e-2


def test_the_velocity_is_forwards(tiny: LoadedModel) -> None:
    """Looking changes nothing: bit for bit the velocity of `forward`."""
    samples, positions = mixed(tiny)
    velocity, _ = observed(tiny, samples, positions)
    with torch.inference_mode():
        assert torch.equal(velocity, forward(Network(tiny.transformer), tiny.tables, packed(samples)))


def test_pre_rope_is_post_rope_without_positions(tiny: LoadedModel) -> None:
    """Layer 0 read before the rotary embedding equals layer 0 after one with all-zero ids, and not with others."""
    sequence = packed([pair(tiny, 11)])
    unplaced = replace(sequence, layout=replace(sequence.layout, ids=torch.zeros_like(sequence.layout.ids)))

    @torch.inference_mode()
    def first(pack: PackedSequence, stage: Any) -> Tensor:
        capture = Capture(layers=(0,), holder=False, stage=stage)
        return forward_with_maps(Network(tiny.transformer), tiny.tables, pack, capture)[1].route(0, 3)

    assert torch.allclose(first(sequence, "pre_rope"), first(unplaced, "post_rope"), atol=1e-6, rtol=0)
    assert (first(sequence, "pre_rope") - first(sequence, "post_rope")).abs().max() > 1e-2


def test_layers_are_numbered_through_both_kinds(tiny: LoadedModel) -> None:
    """A choice of layers gives those of the whole, in order; a layer the model lacks is refused."""
    one = pair(tiny, 12)
    _, every = observed(tiny, [one])
    _, some = observed(tiny, [one], layers=(5, 1, DOUBLE))
    assert some.layers == (1, DOUBLE, 5)
    assert torch.equal(some.route(0, 1), every.route(0, 1)[[1, DOUBLE, 5]])
    with pytest.raises(ValueError, match="no layer 6"):
        observed(tiny, [one], layers=(LAYERS,))


@pytest.mark.parametrize(
    ("positions", "takes_part"),
    [
        ({1: (3,), 3: (5,)}, True),
        ({1: (3,), 2: (4,), 3: (5, 6)}, True),
        ({1: (3,)}, False),
        ({1: (3,), 3: (12,)}, False),
        ({1: (3,), 2: (5,)}, False),
        ({}, False),
    ],
    ids=["both", "a spare one", "one missing", "truncated", "another slot", "plain text"],
)
def test_who_takes_part_in_the_placeholder_loss(tiny: LoadedModel, positions: Positions, takes_part: bool) -> None:
    """Two references, each named within the 12 text tokens; routing maps do not depend on it."""
    _, maps = observed(tiny, [pair(tiny, 13)], [positions])
    assert bool(holder_of(maps, 0)) is takes_part
    assert holder_loss(maps).count == (2 if takes_part else 0)
    assert maps.route(0, 1).shape == (LAYERS, 30)


def test_what_was_not_wanted_is_not_there(tiny: LoadedModel) -> None:
    """Packs without references give no maps, `route=False` no routing maps; holder maps need positions."""
    plain = sample(tiny, 14, (4, 4), {}, timestep=0.5)
    assert observed(tiny, [plain])[1].groups == ()
    _, maps = observed(tiny, [pair(tiny, 13)], [{1: (1,), 3: (2,)}], route=False)
    assert holder_of(maps, 0)
    with pytest.raises(KeyError):
        maps.route(0, 1)
    with pytest.raises(ValueError, match="positions of every request"):
        forward_with_maps(Network(tiny.transformer), tiny.tables, packed([plain]), Capture(), [])


class _Operations(TorchDispatchMode):
    """Counts tensor operations."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_layers_not_asked_compute_nothing(tiny: LoadedModel) -> None:
    """Operations of a forward: as many as `forward`'s when nothing is asked, and a few more for each layer asked."""
    sequence = packed([pair(tiny, 15)])

    def operations(*layers: int) -> int:
        with torch.no_grad(), _Operations() as mode:
            forward_with_maps(Network(tiny.transformer), tiny.tables, sequence, Capture(layers=layers, holder=False))
        return mode.count

    with torch.no_grad(), _Operations() as bare:
        forward(Network(tiny.transformer), tiny.tables, sequence)
    assert operations() == bare.count
    each = operations(0, 1) - operations(0)
    assert 0 < each < 30
    assert operations(0, 1, 5) - operations(0, 1) == each


@pytest.mark.parametrize("frozen", [False, True], ids=["all weights", "only queries and keys"])
def test_checkpointing_keeps_maps_and_gradients(tiny: LoadedModel, frozen: bool) -> None:
    """Blocks computed again in the backward pass neither lose nor double a map: same maps, losses, gradients."""
    samples, positions = mixed(tiny)
    sequence = packed(samples)
    masks = {(1, 1): torch.linspace(0, 1, 30), (2, 1): torch.ones(16), (5, 5): torch.linspace(1, 0, 30)}
    parameters = {
        name: parameter
        for name, parameter in tiny.transformer.named_parameters()
        if not frozen or any(part in name for part in ("to_q", "to_k", "add_k_proj"))
    }

    def step(checkpoint: bool) -> tuple[list[Tensor], dict[str, Tensor]]:
        velocity, maps = forward_with_maps(
            Network(tiny.transformer), tiny.tables, sequence, Capture(), positions, checkpoint=checkpoint
        )
        noise = [torch.ones_like(one.latents) for one in samples]
        losses = Losses(
            flow_loss(velocity, [one.latents for one in samples], noise, sequence.layout),
            route_loss(maps, masks),
            holder_loss(maps),
        )
        total = losses.total(LossWeights(flow=0.1, route=3.0, holder=2.0))
        gradients: list[Tensor | None] = list(torch.autograd.grad(total, list(parameters.values()), allow_unused=True))
        values = [total, *(group.route for group in maps.groups if group.route is not None)]
        return values, {name: g for name, g in zip(parameters, gradients, strict=True) if g is not None}

    try:
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        plain_values, plain = step(checkpoint=False)
        again_values, again = step(checkpoint=True)
    finally:
        tiny.transformer.requires_grad_(False)
    assert plain.keys() == again.keys()
    assert {name for name in parameters if "to_q" in name} <= plain.keys()
    for a, b in zip([*plain_values, *plain.values()], [*again_values, *again.values()], strict=True):
        # Not bit for bit: threaded matrix products may split their sums differently from call to call.
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_placeholders_are_found_by_token_id(tiny: LoadedModel) -> None:
    """Positions in T5's tokens, repeated, out of order, at the end, and those that truncation took away."""
    slots = placeholder_ids(tiny.text.t5_tokenizer)
    assert sorted(slots.values()) == list(range(1, 10))

    def found(prompt: str) -> dict[int, tuple[int, ...]]:
        return placeholder_positions(tiny.text.tokenize(prompt).t5, slots)

    prompt = "the dog [ref#2] and the cat [ref#1], a red hat[ref#2]"
    tokens = tiny.text.tokenize(prompt).t5
    positions = found(prompt)
    assert set(positions) == {1, 2}
    assert [tiny.text.t5_tokenizer.id_to_token(tokens[p]) for p in (*positions[1], *positions[2])] == [
        "[ref#1]",
        "[ref#2]",
        "[ref#2]",
    ]
    assert found("the dog on the table") == {}
    assert set(found("[ref#1] " + "red " * 80 + "[ref#2]")) == {1}
