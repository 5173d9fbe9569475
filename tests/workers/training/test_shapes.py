"""The first batch's shapes that a dry run prints: those that the trainer then meets."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from model.errors import WeightsError
from model.weights.checkpoints import SHIPPED
from workers.training import trainer as trainer_module
from workers.training.batches import Batch
from workers.training.dry_run import describe
from workers.training.recipes import Recipe, RecipeError, load_recipe
from workers.training.shapes import first_batches
from workers.training.start import prepare

STAGES = [
    {"name": "one", "steps": 2, "batch": 6, "mixture": {"multi_subject": 1, "two_column": 1}, "reference_drop": 0.5},
    {"name": "two", "steps": 1, "batch": 8, "mixture": {"self_reconstruction": 1, "two_column": 1}, "token_drop": 0.95},
]
STAGES[1]["reference_drop"] = 0.5


def plan(**changes: object) -> Recipe:
    fields = {"name": "x", "seed": 4, "lora": {"rank": 2}, "stages": STAGES}
    return Recipe.model_validate(fields | {"data": {"settings": {"size": 72, "reference_size": 24}}} | changes)


def folder_of(path: Path, sizes: list[tuple[int, int]]) -> Path:
    """A dataset of one-reference records whose targets have these sizes (width, height)."""
    path.mkdir()
    for number, size in enumerate(sizes):
        Image.new("RGB", size, (number, 90, 90)).save(path / f"{number}.png")
    rows = [
        {"key": f"r{number}", "task": "single_subject", "prompt": "a cat [ref#1]", "target": f"{number}.png"}
        | {"references": [{"slot": 1, "role": "identity", "image": f"{number}.png"}]}
        for number in range(len(sizes))
    ]
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def met(recipe: Recipe, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[int, list[int]]]]:
    """Per step of a real run: each sample's target tokens and its references' tokens."""
    seen: list[Batch] = []
    compose = trainer_module.compose

    def watched(*arguments: object) -> Batch:
        seen.append(compose(*arguments))
        return seen[-1]

    monkeypatch.setattr(trainer_module, "compose", watched)
    assert prepare(recipe, folder, lambda _: None).run()
    return [[(len(e.latents), [len(r.tokens) for r in e.references]) for e in batch.examples] for batch in seen]


def said(lines: list[str]) -> list[tuple[int, list[int]]]:
    """The same, read from a stage's lines."""
    found: list[tuple[int, list[int]]] = []
    for line in lines[1:]:
        count, rest = re.fullmatch(r"(\d+) x (.*)", line).groups()
        target = int(re.findall(r"target \d+x\d+ = ([\d,]+)", rest)[0].replace(",", ""))
        references = [int(n.replace(",", "")) for n in re.findall(r"\] \w+ \d+x\d+ = ([\d,]+)", rest)]
        text, length = re.search(r"text (\d+); sequence ([\d,]+)", rest).groups()
        assert int(length.replace(",", "")) == target + sum(references) + int(text)
        found += [(target, references)] * int(count)
    return found


def test_the_trainer_meets_what_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """StickerWorld, with references and tokens dropped: sample by sample, the second stage by its own step."""
    recipe = plan()
    printed = [said(lines) for lines in first_batches(recipe)[1]]
    assert sum(not references for _, references in printed[0]) > 0
    assert (81, [4]) in printed[1]
    steps = met(recipe, tmp_path, monkeypatch)
    assert [sorted(lines) for lines in printed] == [sorted(steps[0]), sorted(steps[2])]


def test_a_dataset_shows_its_own_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes are those of the dataset's pictures after bucketing, the role is the record's."""
    data = {"source": "directory", "path": folder_of(tmp_path / "data", [(90, 60), (60, 90), (50, 50)])}
    stages = [{**STAGES[0], "steps": 1, "mixture": {"single_subject": 1}}]
    recipe = plan(data={**data, "settings": {"resolution": 64, "reference_resolution": 24}}, stages=stages)
    records, (lines,) = first_batches(recipe)
    assert records == f"records of {tmp_path / 'data'}"
    assert sorted(said(lines)) == sorted(met(recipe, tmp_path / "run", monkeypatch)[0])
    assert len(set(re.findall(r"target (\d+x\d+)", "\n".join(lines)))) > 1
    assert "[1] identity 24x24 = 9" in "\n".join(lines)


def test_flux_without_a_dataset_shows_examples() -> None:
    """1024-pixel targets, 512-pixel references, 512 text tokens: 4,096 + 1,024 a reference + 512; 5 % in stage 3."""
    recipe = load_recipe("dreamo-flux-dev").with_overrides(data=Path("no-such-directory"))
    text = describe(recipe)
    assert "304 matrices, 239.1 M  <- trained" in text
    assert "no-such-directory does not exist, so these are examples of each task" in text
    one = "single_subject: target 1024x1024 = 4,096 tokens, [1] subject 512x512 = 1,024, text 512; sequence 5,632"
    assert one in text
    assert "[2] subject 512x512 = 1,024, text 512; sequence 6,656" in text
    assert "8 x self_reconstruction: target 1024x1024 = 4,096 tokens, [1] subject 512x512 = 51 of 1,024" in text
    assert text.count("first batch: 8 samples") == 3


def test_no_weight_is_read(tmp_path: Path) -> None:
    """Shapes come from records and grids alone: a base of configurations without a single weight gives them too."""
    base = shutil.copytree(SHIPPED, tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    lines = describe(plan()).splitlines()
    assert describe(plan(model={"base": str(base)})).splitlines() == lines
    assert "records of StickerWorld" in lines[6]


def test_records_that_do_not_fit_are_said() -> None:
    """A base that is not here is taken for FLUX, whose tokens 72-pixel stickers do not fill; a slip in the task is
    refused as a run would."""
    _, (one, two) = first_batches(plan(model={"base": "no-such/base"}))
    assert one == two
    assert "not a multiple of 16; no-such/base is not here: name the base with --base" in one[0]
    with pytest.raises(WeightsError, match=r"\./no-such-start is not here: make it, or name one with --base"):
        describe(plan(model={"base": "./no-such-start"}))
    with pytest.raises(RecipeError, match=r"mixture\.no_such"):
        first_batches(plan(stages=[{**STAGES[0], "mixture": {"no_such": 1}}]))
