"""What stands between the losses and a recipe: pictures, masks, slots and time, checked on batches as training
makes them; and that each check fails on the broken thing.

The losses' own formulas are in tests/model/test_losses.py and test_routing_learning.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from model.losses import noised
from model.packing import Condition
from model.sampling import Guidance, Sampler
from model.transformer import Network
from model.vae import LatentCodec
from model.weights.checkpoints import LoadedModel
from tests.workers.training.shipped import NAMED, seeded, stage_of
from tests.workers.training.spoiling import Masks, each, inverted, reordered, shifted, swapped, turned
from tests.workers.training.squares import Squares
from tests.workers.training.test_trainer import fresh_embeddings
from workers.training.batches import Batch, compose
from workers.training.measuring.attending import peaks_inside
from workers.training.objective import Objective
from workers.training.records import Record
from workers.training.stickerworld.world import sample

pytestmark = pytest.mark.usefixtures("one_thread")


# --- flow: sign and direction of time


def flow_is_what_the_sampler_follows(loss: float, model: LoadedModel, batch: Batch) -> None:
    """One Euler step of the service's sampler from x_t to t = 0 misses the latents by t times what the loss squares."""
    misses: list[Tensor] = []
    sampler = Sampler(Network(model.transformer), model.tables)
    for example, time, guidance in zip(batch.examples, batch.times, batch.guidances, strict=True):
        embeds = model.text.encode(example.prompt)
        condition = Condition(embeds.text, embeds.pooled, example.grid, example.references)
        start = noised(example.latents, example.noise, time)
        scale = Guidance(float(guidance), float(guidance))
        run = sampler.begin(condition, None, scale, torch.stack([time, torch.zeros(())]), start)
        (end,) = sampler.advance([run])
        misses.append(((end.latents - example.latents) / time).square().mean())
    assert loss == pytest.approx(float(torch.stack(misses).mean()), rel=1e-3)


def flow_batch(model: LoadedModel) -> Batch:
    stage = stage_of("tiny", "warm-up")
    return compose([sample(5, index, NAMED) for index in range(3)], stage, model.codec, seeded(1))


def flow_of(model: LoadedModel, batch: Batch) -> float:
    objective = Objective(model, fresh_embeddings(model), checkpointing=False)
    with torch.no_grad():
        losses, _ = objective(batch, stage_of("tiny", "quality").losses)
    return float(losses.flow.value)


def test_training_regresses_what_sampling_follows(model: LoadedModel) -> None:
    """Sign, direction of time, guidance, prompt and references of training are those of the service."""
    batch = flow_batch(model)
    flow_is_what_the_sampler_follows(flow_of(model, batch), model, batch)


@pytest.mark.parametrize(
    "broken",
    [
        lambda batch: each(batch, lambda one: replace(one, noise=-one.noise)),
        lambda batch: each(batch, lambda one: replace(one, noise=one.latents, latents=one.noise)),
        lambda batch: replace(batch, times=1 - batch.times),
        lambda batch: replace(batch, guidances=batch.guidances + 2),
        lambda batch: each(batch, lambda one: replace(one, references=())),
        lambda batch: each(batch, lambda one: replace(one, prompt="")),
    ],
    ids=["sign", "ends swapped", "time reversed", "guidance", "references", "prompt"],
)
def test_training_on_something_else_is_noticed(model: LoadedModel, broken: Callable[[Batch], Batch]) -> None:
    """The loss of a batch that differs in one thing does not pass for the sampler's."""
    batch = flow_batch(model)
    with pytest.raises(AssertionError):
        flow_is_what_the_sampler_follows(flow_of(model, broken(batch)), model, batch)


# --- routing: masks of the right sample, slot and place


def masks_lie_on_their_references(batch: Batch, codec: LatentCodec) -> None:
    """Exactly the target's tokens of a reference's colour are in its mask, and every reference has one."""
    wanted = {(n, r.slot): r for n, example in enumerate(batch.examples) for r in example.references}
    assert batch.masks.keys() == wanted.keys()
    for (number, slot), mask in batch.masks.items():
        example, reference = batch.examples[number], wanted[number, slot]
        picture = codec.decode(example.latents, example.grid)
        tokens = torch.nn.functional.avg_pool2d(picture, codec.cell).flatten(1).T
        colour = codec.decode(reference.tokens, reference.grid).mean((1, 2))
        assert torch.equal((tokens - colour).abs().amax(1) < 0.07, mask > 0.5)


def masked_batch(codec: LatentCodec) -> Batch:
    """Coloured squares; samples with one and with two references, so that sorting by length moves them."""
    stage = stage_of("tiny", "warm-up")
    records = [Squares().record(index, stage) for index in (0, 1, 2, 3, 4)]
    assert len({len(record.references) for record in records}) == 2
    return compose(records, stage, codec, seeded(2))


def test_a_mask_lies_where_its_reference_is(model: LoadedModel) -> None:
    """From pixels to token masks and back through the VAE: sample, slot and place agree."""
    masks_lie_on_their_references(masked_batch(model.codec), model.codec)


@pytest.mark.parametrize("broken", [swapped, shifted, turned, inverted, reordered])
def test_a_mask_elsewhere_is_noticed(model: LoadedModel, broken: Callable[[Batch], Masks]) -> None:
    """Each way of getting a mask wrong fails the same check."""
    batch = masked_batch(model.codec)
    with pytest.raises(AssertionError):
        masks_lie_on_their_references(replace(batch, masks=dict(broken(batch))), model.codec)


def maps_peak_inside(model: LoadedModel, records: Sequence[Record]) -> None:
    """What the routing loss was for, on scenes that training never showed."""
    peaks = peaks_inside(model, records, seed=0)
    assert len(peaks) == 2 * len(records)
    assert np.mean(peaks) >= 0.8


def held_out() -> list[Record]:
    settings = replace(NAMED, split="held_out", size=72, reference_size=24, plain=0.5)
    return [sample(0, index, settings) for index in range(12)]


def test_the_shipped_model_s_maps_peak_inside_their_subjects(model: LoadedModel) -> None:
    """A reference's response map points at its own sticker, with and without placeholders in the prompt."""
    maps_peak_inside(model, held_out())


@pytest.mark.parametrize("broken", ["wrong slot", "shifted"])
def test_maps_that_peak_elsewhere_are_noticed(model: LoadedModel, broken: str) -> None:
    """Against the other reference's mask, or one a sticker's width off, the same maps fail."""

    def spoilt(record: Record) -> Record:
        masks = [reference.target_mask for reference in record.references]
        moved = masks[::-1] if broken == "wrong slot" else [np.roll(m, 24, 1) for m in masks if m is not None]
        return replace(
            record,
            references=tuple(replace(r, target_mask=m) for r, m in zip(record.references, moved, strict=True)),
        )

    with pytest.raises(AssertionError):
        maps_peak_inside(model, [spoilt(record) for record in held_out()])
