"""The ablation campaign on a small random base: what a variant changes, what is made once, what the table says."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from model.fabricate import Shape, write_model
from model.pipeline import Pipeline
from model.preprocessors.prepare import load_tools
from model.spec import SPEC_FILE
from model.weights.checkpoints import LoadedModel, ModelSource, load_model
from workers.training.measuring.ablations import (
    COLUMNS,
    FLOW,
    AblationError,
    Row,
    app,
    campaign,
    comparison,
    trained_model,
)
from workers.training.measuring.evaluate import TABLES, pictures
from workers.training.measuring.variants import REFERENCE, VARIANTS, planned, varied
from workers.training.recipes import Recipe, RecipeError, load_recipe
from workers.training.start import prepare
from workers.training.stickerworld.scenes import Scene
from workers.training.stickerworld.world import scene

COUNT, SEEDS = 2, 2
NAMES = (REFERENCE, "no-quality")
STEPS = 3 + 2
"""Of one seed: reference and no-quality."""


class After(threading.Event):
    """Asks to stop after so many steps; the trainer looks before each."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps
        self.taken = 0

    def is_set(self) -> bool:
        if self.taken == self.steps:
            return True
        self.taken += 1
        return False


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A step a stage, on a base of two narrow blocks."""
    base = tmp_path_factory.mktemp("base")
    write_model(base, Shape(double_blocks=1, single_blocks=1, heads=2))
    steps = {"minimum": 1, "maximum": 4, "step": 1, "default": 2}
    (base / SPEC_FILE).write_text(json.dumps({"spec": {"num_inference_steps": steps, "text_tokens": 48}}))
    stage = {"steps": 1, "batch": 2, "optimizer": {"lr": 1e-2}, "mixture": {"multi_subject": 1}}
    return Recipe.model_validate(
        {
            "name": "short",
            "model": {"base": str(base), "version": "main"},
            "data": {"settings": {"size": 48, "reference_size": 16}},
            "lora": {"rank": 2},
            "stages": [
                {**stage, "name": "warm-up", "mixture": {"single_subject": 1}},
                {**stage, "name": "all-tasks"},
                {
                    **stage,
                    "name": "quality",
                    "mixture": {"self_reconstruction": 1},
                    "losses": {"route": 0, "holder": 0},
                },
            ],
        }
    )


@pytest.fixture(scope="module")
def undisturbed(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out")
    assert campaign(recipe, out, NAMES, SEEDS, COUNT, threading.Event())
    return out


def rows(out: Path) -> dict[str, Row]:
    return {file.stem: Row.model_validate_json(file.read_bytes()) for file in out.glob("*.json")}


def test_a_campaign_leaves_a_row_for_each_run_and_nothing_else(undisturbed: Path) -> None:
    """Variant × seed; checkpoints are gone. Variants of one seed share start, records and noise, seeds do not: without
    the quality stage the flow loss before it is the same to the bit."""
    made = rows(undisturbed)
    assert set(made) == {f"{name}-{seed}" for name in NAMES for seed in range(SEEDS)}
    assert {path.name for path in undisturbed.rglob("*")} == {"runs", *(f"{name}.json" for name in made)}
    assert all(set(row.measures) == set(COLUMNS) for row in made.values())
    flows = {name: row.measures[FLOW] for name, row in made.items()}
    assert flows["reference-0"] == flows["no-quality-0"]
    assert flows["reference-1"] == flows["no-quality-1"]
    assert flows["reference-0"] != flows["reference-1"]


def test_a_row_that_is_there_is_not_made_again(recipe: Recipe, undisturbed: Path) -> None:
    """With one row deleted, its steps alone are taken, and the same row comes back."""
    before = rows(undisturbed)
    kept = {file: file.stat().st_mtime_ns for file in undisturbed.glob("*.json") if file.stem != "reference-1"}
    (undisturbed / "reference-1.json").unlink()
    watch = After(99)
    assert campaign(recipe, undisturbed, NAMES, SEEDS, COUNT, watch)
    assert watch.taken == 3
    assert rows(undisturbed) == before
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    assert campaign(recipe, undisturbed, NAMES, SEEDS, COUNT, After(0))


def test_a_stopped_campaign_goes_on_from_its_checkpoint(recipe: Recipe, undisturbed: Path, tmp_path: Path) -> None:
    """Whole pairs first; the run at hand is resumed, not begun anew, and the rows are those of an undisturbed one."""
    assert not campaign(recipe, tmp_path, NAMES, SEEDS, COUNT, After(STEPS + 2))
    assert set(rows(tmp_path)) == {"reference-0", "no-quality-0"}
    log = tmp_path / "runs" / "reference-1" / "flow.jsonl"
    assert len(log.read_text().splitlines()) == 2
    with log.open("a") as file:
        file.write("[3, 0.1")  # a step after the checkpoint, cut short
    watch = After(99)
    assert campaign(recipe, tmp_path, NAMES, SEEDS, COUNT, watch)
    assert watch.taken == STEPS - 2
    assert rows(tmp_path) == rows(undisturbed)


def test_what_is_measured_is_what_would_serve(recipe: Recipe, tmp_path: Path) -> None:
    """The trained model in memory makes the pictures of its exported adapter, loaded and fused like any other; with the
    embeddings it began with it would not."""
    settings = replace(TABLES["two-references"], plain=0.0, size=48, reference_size=16)
    scenes = [scene(1, index, settings) for index in range(4)]
    trainer = prepare(recipe, tmp_path, lambda _: None)
    assert trainer.run()
    with torch.no_grad():
        for learnt in trainer.objective.embeddings.parameters():
            learnt.add_(0.5)  # further than three steps take them
    begun = shown(trainer.model, scenes)
    assert trainer.export().directory == tmp_path / "adapter"
    source = ModelSource(str(recipe.model.base), dreamo=tmp_path / "adapter", version="main", device="cpu")
    served = shown(load_model(source), scenes)
    assert np.abs(shown(trained_model(trainer), scenes) - served).max() <= 1
    assert np.abs(begun - served).max() > 5


def shown(model: LoadedModel, scenes: list[Scene]) -> np.ndarray:
    pipeline = Pipeline(model, load_tools("auto", "auto", "cpu"))
    return np.stack(pictures(pipeline, scenes, seed=0)).astype(int)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda text: text[:40], "is not a row .*: remove it"),
        (lambda text: text.replace('"plan": "', '"plan": "0'), "is of another recipe or count"),
    ],
    ids=["cut short", "another recipe"],
)
def test_rows_of_something_else_are_not_mixed_in(
    recipe: Recipe, undisturbed: Path, tmp_path: Path, spoil: Callable[[str], str], message: str
) -> None:
    """Before anything is trained, and naming the file."""
    file = tmp_path / "no-quality-1.json"
    file.write_text(spoil((undisturbed / file.name).read_text()))
    with pytest.raises(AblationError, match=rf"no-quality-1\.json {message}"):
        campaign(recipe, tmp_path, NAMES, SEEDS, COUNT, threading.Event())
    assert list(tmp_path.iterdir()) == [file]


# --- variants of the shipped recipe


def test_each_variant_changes_what_its_name_says() -> None:
    """One thing, beside the recipe's name; `at-once` sees as many samples, the full mixture from the first step on."""
    plan = load_recipe("ablations")
    made = {name: varied(plan, name) for name in VARIANTS}
    warm_up, all_tasks, quality = plan.stages
    assert made[REFERENCE].stages == plan.stages
    for part in ("route", "holder"):
        stages = made[f"no-{part}"].stages
        assert all(getattr(stage.losses, part) == 0 for stage in stages)
        restored = [s.model_copy(update={"losses": old.losses}) for s, old in zip(stages, plan.stages, strict=True)]
        assert tuple(restored) == plan.stages
        others = {"route", "holder"} - {part}
        assert all(getattr(stages[0].losses, other) == getattr(warm_up.losses, other) > 0 for other in others)
    assert made["no-quality"].stages == (warm_up, all_tasks)
    everything, last = made["at-once"].stages
    assert last == quality
    assert everything.steps * everything.batch == warm_up.steps * warm_up.batch + all_tasks.steps * all_tasks.batch
    assert everything.mixture == all_tasks.mixture
    assert everything.rate(0) == warm_up.rate(0) < everything.rate(100) == all_tasks.rate(100)
    assert {(stage.batch, stage.train) for stage in plan.stages} == {(16, "adapter")}
    assert plan.model.base is None


def test_seeds_are_the_outer_loop() -> None:
    """A campaign cut short has whole pairs."""
    runs = planned(load_recipe("ablations"), VARIANTS, 3, 100)
    assert [run.name for run in runs] == [f"{name}-{seed}" for seed in range(3) for name in VARIANTS]
    assert [run.recipe.seed for run in runs[:6]] == [0] * 5 + [1]
    assert len({run.plan for run in runs}) == 15
    assert runs[0].plan not in {run.plan for run in planned(load_recipe("ablations"), VARIANTS, 3, 99)}


def test_a_recipe_of_other_stages_is_refused(recipe: Recipe) -> None:
    """A base stage would train another base for each variant; samples that do not divide would not be as many."""
    base = recipe.stages[0].model_copy(update={"train": "base"})
    with pytest.raises(RecipeError, match="vary adapter stages"):
        varied(recipe.model_copy(update={"stages": (base, *recipe.stages[1:])}), REFERENCE)
    odd = recipe.stages[0].model_copy(update={"batch": 3})
    with pytest.raises(RecipeError, match="do not divide"):
        varied(recipe.model_copy(update={"stages": (odd, *recipe.stages[1:])}), "at-once")


def test_an_unknown_variant_is_named() -> None:
    """Before anything is loaded."""
    run = CliRunner().invoke(app, ["--only", "no-such-variant"])
    assert run.exit_code == 2
    assert "no variant 'no-such-variant'; there are reference, no-route" in run.stderr


# --- the table


def made_up(values: np.ndarray, name: str, seeds: list[int]) -> list[Row]:
    """[seeds, columns] as rows."""
    return [
        Row(variant=name, seed=seed, plan="", measures=dict(zip(COLUMNS, map(float, row), strict=True)))
        for seed, row in zip(seeds, values, strict=True)
    ]


def cells(table: str) -> dict[str, list[str]]:
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return {line[0]: line[1:] for line in lines}


@given(st.integers(0, 2**32 - 1), st.integers(2, 5), st.integers(1, 5))
@settings(max_examples=30)
def test_the_table_s_arithmetic(seed: int, one: int, other: int) -> None:
    """Mean and sample deviation over seeds, and of differences over the seeds that both have, against numpy."""
    random = np.random.default_rng(seed)
    a, b = random.random((one, len(COLUMNS))), random.random((other, len(COLUMNS)))
    shuffled = [int(s) for s in random.permutation(one)]
    table = cells(comparison(made_up(b, "no-route", list(range(other))) + made_up(a[shuffled], REFERENCE, shuffled)))
    both = min(one, other)
    for name, values, sign in (
        (REFERENCE, a, ""),
        ("no-route", b, ""),
        ("no-route − reference", b[:both] - a[:both], "+"),
    ):
        mean, spread = values.mean(0), values.std(0, ddof=1) if len(values) > 1 else None
        wanted = [
            f"{m:{sign}.3f}" if spread is None else f"{m:{sign}.3f} ± {spread[c]:.3f}" for c, m in enumerate(mean)
        ]
        assert table[name] == [str(len(values)), *wanted]
    assert list(table) == ["", "---", REFERENCE, "no-route", "no-route − reference"]


def test_what_is_not_there_is_not_compared() -> None:
    """A measure that no picture speaks to is a dash; without a reference there are no differences."""
    row = made_up(np.ones((1, len(COLUMNS))), "no-holder", [0])[0]
    mute = Row(variant=REFERENCE, seed=0, plan="", measures={**row.measures, "swapped": None})
    at = 1 + COLUMNS.index("swapped")
    assert list(cells(comparison([row]))) == ["", "---", "no-holder"]
    table = cells(comparison([row, mute]))
    assert table[REFERENCE][at] == table["no-holder − reference"][at] == "–"
    assert table["no-holder"][at] == "1.000"
