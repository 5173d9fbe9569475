"""Prompts as training reads them: what truncation takes from the placeholder loss, and what is remembered."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model.weights.checkpoints import ModelSource, load_model
from tests.workers.training.squares import Squares
from tests.workers.training.test_trainer import STAGE, fresh_embeddings, recipe, trainer
from workers.training import objective
from workers.training.objective import _Prompts
from workers.training.recipes import Stage
from workers.training.records import Record
from workers.training.reports import StepReport

FILLING = " and a small green circle" * 20
"""More than the shipped model's 48 text tokens."""


class Written(Squares):
    """Squares that come again and again, under prompts of ours; `{1}` and `{2}` stand for the placeholders."""

    def __init__(self, *prompts: str, references: int = 2) -> None:
        self.prompts = prompts
        self.references = references
        own = (Squares.record(self, index, Stage.model_validate(STAGE)) for index in range(100))
        self.plain = next(record for record in own if len(record.references) == 2)

    def record(self, index: int, stage: Stage) -> Record:  # noqa: ARG002 (a source's signature)
        number = index % len(self.prompts)
        prompt = self.prompts[number].replace("{1}", "[ref#1]").replace("{2}", "[ref#2]")
        kept = self.plain.references[: self.references]
        return replace(self.plain, key=f"written-{number}", prompt=prompt, references=kept)


def run(folder: Path, source: Squares, **stage: object) -> list[StepReport]:
    reports: list[StepReport] = []
    plan = recipe(stages=[{**STAGE, "steps": 2, "batch": 2, **stage}])
    assert trainer(folder, plan, source, reports).run()
    return reports


def test_a_placeholder_cut_off_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Naming the record and the placeholder, without a word of the prompt; the loss indeed leaves the record out."""
    reports = run(tmp_path, Written("a square {1}" + FILLING + " beside a square {2}"))
    (record,) = caplog.records
    assert "record written-0: " in record.getMessage()
    assert "48 text tokens" in record.getMessage()
    assert "[ref#2] lies beyond" in record.getMessage()
    assert "green" not in caplog.text
    assert all(math.isnan(report.losses["holder"]) for report in reports)


@pytest.mark.parametrize(
    ("source", "stage"),
    [
        (Written("a square {1} beside a square {2}" + FILLING), {}),
        (Written("a square {1}" + FILLING), {}),
        (Written(FILLING + " {1}", references=1), {}),
        (Written("a square {1}" + FILLING + " {2}"), {"losses": {"holder": 0}}),
        (Written("a square {1} beside {2}" + FILLING + " {2}"), {}),
    ],
    ids=["both kept", "never named", "one reference", "no placeholder loss", "named twice"],
)
def test_nothing_is_said_where_nothing_is_lost(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, source: Squares, stage: dict[str, object]
) -> None:
    """Long prompts that the placeholder loss does not miss anything of."""
    run(tmp_path, source, **stage)
    assert caplog.records == []


def test_each_record_is_said_by_its_own_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Two long prompts, four appearances, two warnings."""
    run(tmp_path, Written("{1}" + FILLING + " {2}", "{1} and" + FILLING + " {2}"))
    assert sorted(record.getMessage().split(":")[0] for record in caplog.records) == [
        "record written-0",
        "record written-1",
    ]


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """By bytes, not by prompts: a thousand of FLUX's would take 4 GiB of the device."""
    model = load_model(ModelSource(device="cpu", dtype="float32"))
    one = model.text.features(["a cat"])[0]
    monkeypatch.setattr(objective, "_REMEMBERED_BYTES", 5 * (one.text.nbytes + one.pooled.nbytes))
    calls: list[int] = []
    model.text.clip.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
    prompts, embeddings = _Prompts(model.text, None), fresh_embeddings(model)
    names = [f"a cat in room {number}" for number in range(8)]
    for name in names:
        prompts.features([name], embeddings)
    last, first = prompts.features(names[-5:], embeddings), prompts.features(names[:1], embeddings)
    assert calls == [1] * 9
    assert torch.equal(first[0].text, model.text.features(names[:1])[0].text)
    assert len(last) == 5


def test_a_placeholder_in_other_letters_is_trained_too() -> None:
    """T5's tokenizer reads wide brackets as plain ones, so such a prompt hangs on the trained rows and is not kept."""
    model = load_model(ModelSource(device="cpu", dtype="float32"))
    wide = "a cat ［ref#1］"
    assert model.text.tokenize(wide).t5 == model.text.tokenize("a cat [ref#1]").t5
    prompts, embeddings = _Prompts(model.text, None), fresh_embeddings(model)
    before = prompts.features([wide], embeddings)[0].text
    with torch.no_grad():
        embeddings.placeholder_rows += 1
    assert not torch.equal(before, prompts.features([wide], embeddings)[0].text)
