"""Recipes, their records and the command: what is refused, and that a run goes from YAML to an adapter."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.roles import Role
from model.weights.adapters import read_adapter
from tests.conftest import ROOT
from workers.training.buckets import bucket_sizes, bucketed, nearest_bucket
from workers.training.recipes import Recipe, RecipeError, load_recipe
from workers.training.records import Record, RecordReference
from workers.training.start import records_of

TINY = """
name: try
data: {settings: {size: 72, reference_size: 24}}
lora: {rank: 2}
save_every: 2
stages:
  - {name: one, steps: 3, batch: 2, mixture: {single_subject: 1, multi_subject: 1}}
"""


def test_the_shipped_recipe_says_what_the_paper_says() -> None:
    """20k, 90k, 3k steps at lr 4e-5, batch 8, rank 128; half plain text; at last 95 % token drop, no routing loss."""
    plan = load_recipe("dreamo-flux-dev")
    assert [stage.steps for stage in plan.stages] == [20_000, 90_000, 3_000]
    assert {(stage.optimizer.lr, stage.batch, stage.plain_text) for stage in plan.stages} == {(4e-5, 8, 0.5)}
    assert (plan.lora.rank, plan.lora.targets) == (128, "released")
    last = plan.stages[-1]
    assert (last.token_drop, last.losses.route, list(last.mixture)) == (0.95, 0, ["self_reconstruction"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stages: [", "is not YAML"),
        ("name: x", "stages: Field required"),
        (TINY.replace("rank: 2", "rank: 0"), "lora.rank"),
        (TINY.replace("steps: 3", "step: 3"), r"stages.0.steps: Field required; stages.0.step: Extra inputs"),
        (TINY + TINY.split("stages:\n")[1], "stage names must differ"),
        (
            TINY.replace("settings:", "path: here, settings:"),
            "a directory source needs a path, StickerWorld takes none",
        ),
        (TINY.replace("single_subject: 1", "single_subject: -1"), "mixture"),
        (TINY.replace("single_subject: 1, multi_subject: 1", ""), "stages.0.mixture: .*at least 1 item"),
        (TINY.replace("single_subject: 1", "single_subject: 1.0e+308"), "mixture.single_subject"),
        (TINY.replace("rank: 2", "rank: 100000"), "lora.rank"),
        (TINY.replace("steps: 3,", "steps: 3, optimizer: {betas: [0.9, 1.0]},"), "stages.0.optimizer.betas.1"),
        (TINY.replace("batch: 2", "batch: 100000"), "stages.0.batch"),
        (TINY.replace("steps: 3", "steps: 1000000000"), "stages.0.steps"),
    ],
)
def test_a_wrong_recipe_names_the_field(tmp_path: Path, text: str, message: str) -> None:
    """Every field is checked before anything is loaded."""
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError, match=message):
        load_recipe(str(file))


def test_an_unknown_recipe_names_the_known_ones() -> None:
    """A slip in the name shows what there is."""
    with pytest.raises(RecipeError, match="dreamo-flux-dev"):
        load_recipe("no-such-recipe")


def test_a_task_without_records_is_refused() -> None:
    """A mixture is checked against the source before the first step."""
    stage = {"name": "one", "steps": 1, "batch": 1, "mixture": {"no_such_task": 1}}
    with pytest.raises(RecipeError, match=r"stage one: .*no_such_task.*multi_subject"):
        records_of(Recipe.model_validate({"name": "x", "stages": [stage]}))
    with pytest.raises(RecipeError, match=r"data\.settings"):
        data = {"settings": {"no_such_setting": 1}}
        records_of(
            Recipe.model_validate({"name": "x", "stages": [{**stage, "mixture": {"two_column": 1}}], "data": data})
        )


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"settings": {"size": 2048}}, "settings: size"),
        ({"settings": {"no_such_setting": 1}}, "settings.no_such_setting"),
        ({"settings": {"mixture": [["style_text", 1.0]]}}, "settings.mixture: .* the mixture is the stage's own"),
        ({"settings": {"split": "heldout"}}, "settings: split must be train or held_out"),
        ({"settings": {"placement": 5}}, "settings: placement must be grid9 or free"),
        ({"settings": {"sizes": []}}, "settings: sizes must be fixed or named"),
        ({"settings": {"size": "big"}}, "settings: size must be a whole number"),
        ({"settings": {"plain": "often"}}, r"settings: plain must lie in \[0, 1\]"),
        ({"settings": {"size": 76}}, "settings.size: must be a multiple of 8"),
        ({"settings": {"size": 1024}, "batch": 65}, "batch: at most 64 samples of size 1024"),
    ],
)
def test_a_stage_asks_for_what_there_is(changes: dict[str, Any], field: str) -> None:
    """What StickerWorld cannot give is refused by name before a record is made, for a stage as for all of them."""
    stage = {"name": "one", "steps": 1, "batch": 1, "mixture": {"two_column": 1}}
    recipe = {"name": "x", "stages": [{**stage, **changes}]}
    with pytest.raises(RecipeError, match=f"stage one: {field}"):
        records_of(Recipe.model_validate(recipe))
    if "batch" not in changes:
        field = field if "multiple" in field else field.replace("settings", r"data\.settings")
        with pytest.raises(RecipeError, match=field):
            records_of(Recipe.model_validate({"name": "x", "stages": [stage], "data": changes}))


def test_another_dataset_is_read_as_the_first(tmp_path: Path) -> None:
    """`--data` and a training's dataset change where records lie, not how large they are read; nor do they let through
    what a recipe file could not say, so a run that is begun can be gone on with."""
    stage = {"name": "one", "steps": 1, "batch": 1, "mixture": {"single_subject": 1}}
    there = {"source": "directory", "path": "a", "settings": {"resolution": 512}, "cache_gib": 3}
    plan = Recipe.model_validate({"name": "x", "stages": [stage], "data": there})
    changed = plan.with_overrides(base="other", data=tmp_path)
    assert changed.data == plan.data.model_copy(update={"path": tmp_path})
    assert changed.model.base == "other" and changed == Recipe.model_validate(changed.model_dump(mode="json"))
    stickers = {"name": "x", "stages": [stage], "data": {"settings": {"size": 96}}}
    moved = Recipe.model_validate(stickers).with_overrides(data=tmp_path)
    assert (moved.data.source, moved.data.settings) == ("directory", {}), "StickerWorld's settings mean nothing here"
    own = Recipe.model_validate({"name": "x", "stages": [{**stage, "settings": {"size": 96}}]})
    with pytest.raises(RecipeError, match="a stage can change StickerWorld's settings alone"):
        own.with_overrides(data=tmp_path)
    assert own.with_overrides() == own


def a_dataset(folder: Path, target: tuple[int, int], reference: tuple[int, int]) -> Recipe:
    """One record with pictures of these sizes (width, height), and a recipe of it."""
    from PIL import Image

    Image.new("RGB", target, (9, 99, 200)).save(folder / "target.png")
    Image.new("RGB", reference, (9, 99, 200)).save(folder / "reference.png")
    row = {"key": "the-row", "task": "single_subject", "prompt": "a thing [ref#1]", "target": "target.png"}
    row["references"] = [{"slot": 1, "role": "subject", "image": "reference.png"}]
    (folder / "rows.jsonl").write_text(json.dumps(row) + "\n")
    stage = {"name": "a", "steps": 1, "batch": 1, "mixture": {"single_subject": 1.0}}
    return Recipe.model_validate({"name": "x", "data": {"source": "directory", "path": folder}, "stages": [stage]})


@pytest.mark.parametrize(
    ("target", "reference", "message"),
    [
        ((64, 64), (4000, 3), r"rows\.jsonl:1: image_too_thin: references\[0\] \(4000×3\)"),
        ((16000, 1), (64, 64), r"rows\.jsonl:1: image_too_thin: target \(16000×1\)"),
        ((64, 64), (900, 30), r"record the-row: references\[0\] is 900x30 pixels, too thin"),
    ],
)
def test_a_picture_too_thin_is_named_by_its_record(
    tmp_path: Path, target: tuple[int, int], reference: tuple[int, int], message: str
) -> None:
    """Who has a million rows must find the one: what no model takes by file and row, as `dataset check` does, what is
    too thin for this model's small references by its key."""
    plan = a_dataset(tmp_path, target, reference)
    with pytest.raises(RecipeError, match=message):
        records_of(plan).record(0, plan.stages[0])


@pytest.mark.parametrize("value", ["big", 0, 10**6, True, 1.5])
def test_a_directory_has_sane_resolutions(tmp_path: Path, value: Any) -> None:
    """A slip in what a dataset is read at is said before the first record."""
    plan = a_dataset(tmp_path, (64, 64), (64, 64))
    for name in ("resolution", "reference_resolution"):
        data = plan.data.model_copy(update={"settings": {name: value}})
        with pytest.raises(RecipeError, match=rf"data\.settings\.{name}: must be a whole number of pixels"):
            records_of(plan.model_copy(update={"data": data}))


def test_a_directory_is_shuffled_anew_each_epoch(tmp_path: Path) -> None:
    """Each record once per epoch, in another order, at the model's sizes; the same number gives the same record."""
    from PIL import Image

    rows: list[str] = []
    for number in range(5):
        for name in ("target", "ref"):
            colour = (40 * number, 255 - 40 * number, 128)
            Image.new("RGB", (90, 60), colour).save(tmp_path / f"{number}-{name}.png")
        references = [{"slot": 1, "role": "subject", "image": f"{number}-ref.png"}]
        rows.append(
            json.dumps(
                {"key": f"r{number}", "task": "single_subject", "prompt": "a thing [ref#1]"}
                | {"references": references, "target": f"{number}-target.png"}
            )
        )
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    mixture = {"single_subject": 1.0}
    plan = Recipe.model_validate(
        {"name": "x", "data": {"source": "directory", "path": tmp_path}}
        | {"stages": [{"name": "a", "steps": 1, "batch": 1, "mixture": mixture}]}
    )
    source = records_of(plan)
    epochs = [[source.record(5 * epoch + place, plan.stages[0]) for place in range(5)] for epoch in range(3)]
    orders = [[record.key for record in epoch] for epoch in epochs]
    assert all(len(set(order)) == 5 for order in orders)
    assert len({tuple(order) for order in orders}) > 1
    assert all(record.target.shape[0] % 8 == 0 == record.target.shape[1] % 8 for record in epochs[0])
    assert source.record(7, plan.stages[0]).key == epochs[1][2].key


@given(st.integers(8, 3000), st.integers(8, 3000))
@settings(max_examples=80)
def test_buckets_fit(height: int, width: int) -> None:
    """The nearest bucket lies on the grid, and no other fits the aspect better."""
    size = nearest_bucket(height, width, 512, 16)
    assert size in bucket_sizes(512, 16)
    aspect = np.log(width / height)
    assert all(
        abs(np.log(size[1] / size[0]) - aspect) <= abs(np.log(w / h) - aspect) + 1e-12 for h, w in bucket_sizes(512, 16)
    )


@pytest.mark.parametrize("resolution", [512, 1024])
def test_there_are_31_buckets(resolution: int) -> None:
    """As many as DreamOmni trains on, from 1:4 to 4:1, with areas within 3 %."""
    sizes = bucket_sizes(resolution, 16)
    assert len(sizes) == 31
    assert all(abs(h * w / resolution**2 - 1) < 0.03 for h, w in sizes)


def test_a_mask_follows_its_target_into_the_bucket() -> None:
    """Target and mask are scaled and cut alike."""
    target = np.zeros((120, 90, 3), np.uint8)
    target[40:80, 30:60] = 255
    record = Record("k", "t", "p", (RecordReference(1, Role.SUBJECT, target, target[..., 0].copy()),), target)
    fitted = bucketed(record, 64, 32, 8)
    mask = fitted.references[0].target_mask
    assert mask is not None
    assert mask.shape == fitted.target.shape[:2]
    assert np.abs(mask.astype(int) - fitted.target[..., 0]).max() <= 2


def command(*arguments: str, folder: Path) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", "workers.training", *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_from_yaml_to_an_adapter(tmp_path: Path) -> None:
    """The command trains on StickerWorld, refuses to overwrite a run, and leaves a file that loads."""
    (tmp_path / "try.yaml").write_text(TINY)
    first = command("try.yaml", "--out", "run", folder=tmp_path)
    out, err = first.communicate(timeout=240)
    assert first.returncode == 0, err
    assert "wrote run/adapter" in out
    assert len(read_adapter(tmp_path / "run" / "adapter" / "dreamo.safetensors").changes) == 2 * 8 + 4 * 4
    again = command("try.yaml", "--out", "run", folder=tmp_path)
    assert again.wait(240) == 2
    assert "holds a run already" in (again.stderr.read() if again.stderr else "")


def test_sigterm_checkpoints_and_resume_goes_on(tmp_path: Path) -> None:
    """Asked to stop, the command writes a checkpoint and exits 3; --resume finishes the run."""
    (tmp_path / "try.yaml").write_text(
        TINY.replace("steps: 3", "steps: 400").replace("save_every: 2", "save_every: 20")
    )
    first = command("try.yaml", "--out", "run", folder=tmp_path)
    while not list(tmp_path.glob("run/checkpoints/step-*")):
        assert first.poll() is None
        time.sleep(0.02)
    first.send_signal(signal.SIGTERM)
    _, err = first.communicate(timeout=240)
    assert first.returncode == 3, err
    assert "--resume" in err
    (done,) = (
        json.loads(path.read_text())["step"] for path in sorted(tmp_path.glob("run/checkpoints/*/state.json"))[-1:]
    )
    assert 20 <= done < 400
    assert f"stopped after step {done}" in err


def test_a_dry_run_counts_flux() -> None:
    """FLUX.1-dev by its hub id, without downloading it: the published size of the adapter."""
    run = command("dreamo-flux-dev", "--dry-run", folder=ROOT)
    out, err = run.communicate(timeout=240)
    assert run.returncode == 0, err
    assert "304 matrices, 239.1 M  <- trained" in out
    assert "11,901.4 M parameters" in out
