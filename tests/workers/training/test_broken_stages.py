"""What a stage promises, checked on what it really makes of records; and that each check fails on the broken thing.

Batches and what the losses see of them are in test_broken_batches.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from model.packing import ReferenceTokens
from model.roles import PLACEHOLDERS
from model.vae import LatentCodec
from model.weights.checkpoints import LoadedModel, ModelSource, load_model
from tests.workers.training.shipped import NAMED, WORLDLY, adapter_stages, seeded, shipped, stage_of
from tests.workers.training.spoiling import first, moved
from tests.workers.training.test_trainer import fresh_embeddings
from workers.training.batches import Batch, Example, compose
from workers.training.objective import Objective
from workers.training.recipes import DataPart, Recipe, Stage, load_recipe
from workers.training.records import Record
from workers.training.reports import StepReport
from workers.training.start import records_of
from workers.training.stickerworld.settings import Settings
from workers.training.stickerworld.world import sample
from workers.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")


# --- the quality stage


def one_token_in_twenty_is_left(thin: Batch, whole: Batch) -> None:
    """Of each reference 5 % of the tokens, drawn anew for each, where they stood and as they were."""
    kept: list[Tensor] = []
    for example, full in zip(thin.examples, whole.examples, strict=True):
        for reference, before in zip(example.references, full.references, strict=True):
            assert reference.kept is not None
            assert len(reference.tokens) == round(0.05 * len(before.tokens)) > 0
            assert torch.equal(reference.tokens, before.tokens[reference.kept])
            kept.append(reference.kept)
    assert len(kept) >= len(thin.examples)
    assert len(set(torch.cat(kept).tolist())) > 0.5 * sum(map(len, kept))


def quality_batch(codec: LatentCodec, recipe: str, *, drop: float | None = None) -> Batch:
    stage = stage_of(recipe, "quality")
    if drop is not None:
        stage = stage.model_copy(update={"token_drop": drop})
    settings = Settings(mixture=tuple(stage.mixture.items()))
    return compose([sample(4, index, settings) for index in range(6)], stage, codec, seeded(3))


@pytest.mark.parametrize("recipe", [*WORLDLY, "dreamo-flux-dev"])
def test_the_quality_stage_drops_nineteen_tokens_in_twenty(model: LoadedModel, recipe: str) -> None:
    """Else the network would copy its reference instead of keeping the base's quality."""
    one_token_in_twenty_is_left(quality_batch(model.codec, recipe), quality_batch(model.codec, recipe, drop=0.0))


@pytest.mark.parametrize("drop", [0.0, 0.5, 0.9])
def test_another_drop_is_noticed(model: LoadedModel, drop: float) -> None:
    """A drop of 0 % above all."""
    whole = quality_batch(model.codec, "tiny", drop=0.0)
    with pytest.raises(AssertionError):
        one_token_in_twenty_is_left(quality_batch(model.codec, "tiny", drop=drop), whole)


@pytest.mark.parametrize("broken", [first, moved])
def test_tokens_out_of_place_are_noticed(
    model: LoadedModel, broken: Callable[[ReferenceTokens, ReferenceTokens], ReferenceTokens]
) -> None:
    """Always the same ones, or beside where they stood."""
    thin, whole = quality_batch(model.codec, "tiny"), quality_batch(model.codec, "tiny", drop=0.0)
    spoilt = [
        replace(one, references=tuple(map(broken, one.references, full.references)))
        for one, full in zip(thin.examples, whole.examples, strict=True)
    ]
    with pytest.raises(AssertionError):
        one_token_in_twenty_is_left(replace(thin, examples=tuple(spoilt)), whole)


def only_flow_counts(model: LoadedModel, stage: Stage) -> None:
    """Neither routing nor placeholder loss has a unit, though records have masks and placeholders for both."""
    batch = compose([sample(5, index, NAMED) for index in range(2)], stage, model.codec, seeded(1))
    assert batch.masks
    with torch.no_grad():
        losses, maps = Objective(model, fresh_embeddings(model), checkpointing=False)(batch, stage.losses)
    assert (losses.flow.count, losses.route.count, losses.holder.count) == (2, 0, 0)
    assert maps.groups == ()


@pytest.mark.parametrize("recipe", [*WORLDLY, "dreamo-flux-dev"])
def test_the_quality_stage_routes_nothing(model: LoadedModel, recipe: str) -> None:
    """A thinned reference has no map to speak of."""
    only_flow_counts(model, stage_of(recipe, "quality"))


@pytest.mark.parametrize("part", ["route", "holder"])
def test_routing_in_the_quality_stage_is_noticed(model: LoadedModel, part: str) -> None:
    """Either of the two losses left on fails the same check."""
    stage = stage_of("tiny", "quality")
    with pytest.raises(AssertionError):
        only_flow_counts(model, stage.model_copy(update={"losses": stage.losses.model_copy(update={part: 1.0})}))


# --- prompts


def half_are_plain(examples: Sequence[Example]) -> None:
    """Among samples with references; those that keep their placeholders name slots they have."""
    bound = [example for example in examples if example.references]
    named = [[token for token in PLACEHOLDERS if token in example.prompt] for example in bound]
    assert len(bound) > 60
    assert 0.36 < np.mean([not tokens for tokens in named]) < 0.64
    slots = [{PLACEHOLDERS[reference.slot - 1] for reference in example.references} for example in bound]
    assert all(set(tokens) <= has for tokens, has in zip(named, slots, strict=True))


def prompted(model: LoadedModel, recipe: str, stage: Stage, **settings: float) -> tuple[Example, ...]:
    """Samples of a stage, small ones; a directory's stand-in is StickerWorld with placeholders in every prompt."""
    if recipe in WORLDLY:
        plan = shipped(recipe)
        small = {**plan.data.settings, "size": 48, "reference_size": 16, **settings}
        source = records_of(plan.model_copy(update={"data": DataPart(settings=small)}))
        records = [source.record(index, stage) for index in range(80)]
    else:
        records = [sample(6, index, NAMED) for index in range(80)]
    return compose(records, stage, model.codec, seeded(4)).examples


PLAIN = [
    (recipe, stage.name) for recipe in (*WORLDLY, "dreamo-flux-dev") for stage in adapter_stages(load_recipe(recipe))
]


@pytest.mark.parametrize(("recipe", "stage"), PLAIN)
def test_half_of_the_prompts_are_plain(model: LoadedModel, recipe: str, stage: str) -> None:
    """In every stage, so that the model takes prompts of both kinds."""
    half_are_plain(prompted(model, recipe, stage_of(recipe, stage)))


@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize("stage", ["warm-up", "quality"])
def test_another_share_of_plain_prompts_is_noticed(model: LoadedModel, stage: str, share: float) -> None:
    """None or all of them stripped."""
    changed = stage_of("dreamo-flux-dev", stage).model_copy(update={"plain_text": share})
    with pytest.raises(AssertionError):
        half_are_plain(prompted(model, "dreamo-flux-dev", changed))


@pytest.mark.parametrize(("stripped", "plain"), [(0.5, 0.5), (0.0, 0.0)], ids=["twice", "never"])
def test_stickerworld_s_prompts_stripped_twice_or_never_are_noticed(
    model: LoadedModel, stripped: float, plain: float
) -> None:
    """Half of StickerWorld's prompts are plain already: a stage that strips half of the rest leaves a quarter."""
    changed = stage_of("tiny", "all-tasks").model_copy(update={"plain_text": stripped})
    with pytest.raises(AssertionError):
        half_are_plain(prompted(model, "tiny", changed, plain=plain))


# --- what a stage draws from and what it trains


def records_follow_the_mixture(records: Sequence[Record], stage: Stage) -> None:
    """Every task of the mixture and no other, about as often as it says."""
    tasks = [record.task for record in records]
    total = sum(stage.mixture.values())
    assert set(tasks) <= set(stage.mixture)
    for task, weight in stage.mixture.items():
        assert abs(tasks.count(task) / len(tasks) - weight / total) < 0.09


@pytest.mark.parametrize("recipe", WORLDLY)
def test_a_stage_shows_its_own_tasks(recipe: str) -> None:
    """Simple ones first, then all, then only itself: and another stage's records fail the same check."""
    plan = shipped(recipe)
    source = records_of(plan)
    drawn = {stage.name: [source.record(index, stage) for index in range(200)] for stage in plan.stages}
    for stage in plan.stages:
        records_follow_the_mixture(drawn[stage.name], stage)
    for stage, other in zip(plan.stages, plan.stages[1:] + plan.stages[:1], strict=True):
        if any(abs(weight - other.mixture.get(task, 0)) > 0.3 for task, weight in stage.mixture.items()):
            with pytest.raises(AssertionError):
                records_follow_the_mixture(drawn[other.name], stage)


def only_the_adapter_learns(recipe: Recipe, directory: Path) -> None:
    """After each stage the base is as it was to the bit, and the adapter and the embeddings are not."""
    model = load_model(ModelSource(device="cpu", dtype="float32"))
    seen: list[dict[str, Tensor]] = []

    def note(_: StepReport | None) -> None:
        seen.append({name: p.detach().clone() for name, p in trainer.objective.named_parameters()})

    trainer = Trainer(recipe, model, fresh_embeddings(model), records_of(recipe), directory, note)
    note(None)
    assert trainer.run()
    assert len(seen) == 1 + len(recipe.stages)
    for before, after in pairwise(seen):
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert changed
        assert all("lora_" in name or name.startswith("embeddings.") for name in changed)
        assert any("lora_B" in name for name in changed)


def short(recipe: str) -> Recipe:
    """The adapter stages with one step of two samples each."""
    plan = shipped(recipe)
    stages = tuple(stage.model_copy(update={"steps": 1, "batch": 2}) for stage in adapter_stages(plan))
    return plan.model_copy(update={"stages": stages, "precision": "float32"})


@pytest.mark.parametrize("recipe", WORLDLY)
def test_the_adapter_stages_leave_the_base_alone(recipe: str, tmp_path: Path) -> None:
    """All of them, DreamO's three and those between."""
    names = [stage.name for stage in load_recipe(recipe).stages if stage.train == "adapter"]
    assert {"warm-up", "all-tasks", "quality"} <= set(names)
    assert [stage.name for stage in short(recipe).stages] == names
    only_the_adapter_learns(short(recipe), tmp_path)


def test_a_stage_that_trains_the_base_is_noticed(tmp_path: Path) -> None:
    """The last stage, told to train every weight."""
    plan = short("tiny")
    stage = plan.stages[-1].model_copy(update={"train": "base"})
    with pytest.raises(AssertionError):
        only_the_adapter_learns(plan.model_copy(update={"stages": (stage,)}), tmp_path)
