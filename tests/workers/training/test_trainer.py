"""A run of a recipe: it learns, stops and goes on exactly, and leaves an adapter that serves."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from model.pipeline import Pipeline, PreparedReference
from model.preprocessors.prepare import load_tools
from model.requests import ImageRequest
from model.roles import Role
from model.transformer import EmbeddingTables
from model.weights.checkpoints import LoadedModel, ModelSource, load_model, load_plain
from tests.workers.training.squares import Squares
from workers.training.adapting import Embeddings, fresh_tables
from workers.training.batches import step_generator
from workers.training.failures import TrainingError
from workers.training.recipes import Recipe
from workers.training.reports import StepReport
from workers.training.snapshots import SnapshotError
from workers.training.start import prepare
from workers.training.trainer import Trainer

STAGE = {"name": "one", "steps": 6, "batch": 3, "mixture": {"single": 1}, "optimizer": {"lr": 1e-3}}


def recipe(**changes: object) -> Recipe:
    fields = {
        "name": "test",
        "lora": {"rank": 4},
        "save_every": 2,
        "stages": [STAGE, {**STAGE, "name": "two", "steps": 4, "ema": 0.5, "plain_text": 0.5, "token_drop": 0.5}],
    }
    return Recipe.model_validate(fields | changes)


def trainer(directory: Path, plan: Recipe, source: object = None, reports: list[StepReport] | None = None) -> Trainer:
    seen: list[StepReport] = [] if reports is None else reports
    model = load_model(ModelSource(device="cpu", dtype="float32"))
    return Trainer(plan, model, fresh_embeddings(model), source or Squares(), directory, seen.append)


def fresh_embeddings(model: LoadedModel) -> Embeddings:
    table = model.text.t5.get_input_embeddings().weight
    return Embeddings(
        {
            "dreamo_task_embedding": model.tables.type,
            "dreamo_idx_embedding": model.tables.index,
            "dreamo_t5_embedding": table[-10:],
        }
    )


def weights(run: Trainer) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in run.objective.named_parameters() if "lora_" in n or "embeddings" in n}


def same(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, torch.Tensor], list[StepReport]]:
    reports: list[StepReport] = []
    run = trainer(tmp_path_factory.mktemp("run"), recipe(), reports=reports)
    assert run.run()
    return weights(run), reports


def test_a_stopped_run_ends_as_an_undisturbed_one(
    tmp_path: Path, undisturbed: tuple[dict[str, torch.Tensor], list[StepReport]]
) -> None:
    """Stopped after an odd step, in the second stage too, and resumed by new processes: the same bits, losses too."""
    wanted, reports = undisturbed
    losses: list[float] = []
    for stop_after in (3, 7, 9, 99):
        seen: list[StepReport] = []
        run = trainer(tmp_path, recipe(), reports=seen)
        assert run.resume() == (stop_after > 3)

        def watch(report: StepReport, run: Trainer = run, seen: list[StepReport] = seen, at: int = stop_after) -> None:
            seen.append(report)
            if report.step == at:
                run.stop.set()

        run.report = watch
        assert run.run() == (stop_after == 99)
        losses += [report.loss for report in seen]
    assert losses == [report.loss for report in reports]
    assert same(weights(run), wanted)


def test_a_killed_run_goes_on_from_its_checkpoint(
    tmp_path: Path, undisturbed: tuple[dict[str, torch.Tensor], list[StepReport]]
) -> None:
    """A process that dies without a word loses the steps since the last checkpoint, and nothing else."""

    class Killed(BaseException):
        pass

    def die(report: StepReport) -> None:
        if report.step == 5:
            raise Killed

    run = trainer(tmp_path, recipe())
    run.report = die
    with pytest.raises(Killed):
        run.run()
    again = trainer(tmp_path, recipe())
    assert again.resume()
    assert again.step == 4
    assert again.run()
    assert same(weights(again), undisturbed[0])


def test_averages_are_resumed_where_the_weights_are(tmp_path: Path) -> None:
    """A checkpoint is read into the CPU's memory; the averages follow the weights to another device. Torch's device
    without data stands in for a GPU here: it refuses to mix devices as a GPU does."""
    plan = recipe(stages=[{**STAGE, "steps": 4, "ema": 0.5}])
    first = trainer(tmp_path, plan)
    first.report = lambda _: first.stop.set()
    assert not first.run()
    second = trainer(tmp_path, plan)
    second.objective.to("meta")
    assert second.resume()
    averages = second._now.averages
    assert averages and {average.device.type for average in averages.values()} == {"meta"}
    second._average(plan.stages[0])


@pytest.mark.gpu
def test_a_run_with_averages_goes_on_on_a_gpu(tmp_path: Path) -> None:
    """Stopped inside a stage that keeps averages, and resumed: averages and weights are on one device."""
    plan = recipe(stages=[{**STAGE, "steps": 4, "ema": 0.5}])
    for stop_after in (2, 99):
        model = load_model(ModelSource(device="cuda", dtype="float32"))
        run = Trainer(plan, model, fresh_embeddings(model), Squares(), tmp_path, lambda _: None)
        assert run.resume() == (stop_after > 2)

        def stop(report: StepReport, run: Trainer = run, at: int = stop_after) -> None:
            if report.step == at:
                run.stop.set()

        run.report = stop
        assert run.run() == (stop_after == 99)
    assert run.step == 4


def test_prodigy_goes_on_exactly_too(tmp_path: Path) -> None:
    """An optimizer with numbers of its own per run: they are part of a checkpoint."""
    stage = {**STAGE, "optimizer": {"name": "prodigy", "lr": 1.0}}
    whole = trainer(tmp_path / "whole", recipe(stages=[stage]))
    assert whole.run()
    first = trainer(tmp_path / "parts", recipe(stages=[stage]))
    first.report = lambda report: first.stop.set() if report.step == 3 else None
    assert not first.run()
    second = trainer(tmp_path / "parts", recipe(stages=[stage]))
    assert second.resume()
    assert second.run()
    assert same(weights(second), weights(whole))


def test_trainings_of_different_precision_run_in_one_process(tmp_path: Path) -> None:
    """A training worker runs one after the other: each computes in its own precision, whatever came before."""
    losses: list[float] = []
    for number, precision in enumerate(("float32", "bfloat16", "float32")):
        reports: list[StepReport] = []
        plan = recipe(stages=[{**STAGE, "steps": 1}], precision=precision)
        run = trainer(tmp_path / str(number), plan, reports=reports)
        assert run.run()
        assert all(parameter.dtype == torch.float32 for parameter in run.objective.parameters())
        losses += [report.loss for report in reports]
    assert losses[0] == losses[2] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_training_lowers_the_losses(tmp_path: Path) -> None:
    """On a handful of records, flow, routing and placeholder loss all fall."""
    reports: list[StepReport] = []
    stage = {**STAGE, "steps": 40, "batch": 8, "optimizer": {"lr": 5e-3}, "time": {"kind": "uniform"}}
    # The base alone: the shipped adapter has nothing left to learn about placeholders.
    base = load_plain(ModelSource(device="cpu"), fresh_tables(192, 128, seed=0))
    plan = recipe(stages=[stage], save_every=100)
    run = Trainer(plan, base, fresh_embeddings(base), Squares(), tmp_path, reports.append)
    assert run.run()
    for name in ("flow", "route", "holder"):
        first = np.mean([report.losses[name] for report in reports[:8]])
        last = np.mean([report.losses[name] for report in reports[-8:]])
        assert last < 0.97 * first, name


def test_a_base_stage_trains_the_base_and_an_adapter_stage_does_not(tmp_path: Path) -> None:
    """Stages train what they say: base first with the adapter out of the way, then the adapter on a frozen base."""
    base = {**STAGE, "name": "base", "steps": 2, "train": "base", "losses": {"route": 0, "holder": 0}}
    plan = recipe(stages=[base, {**STAGE, "steps": 2}])
    run = trainer(tmp_path, plan)
    names = {n for n, _ in run.objective.named_parameters()}
    start = {n: p.detach().clone() for n, p in run.objective.named_parameters()}
    middle: dict[str, torch.Tensor] = {}

    def watch(report: StepReport) -> None:
        if report.step == 2:
            middle.update({n: p.detach().clone() for n, p in run.objective.named_parameters()})

    run.report = watch
    assert run.run()
    end = dict(run.objective.named_parameters())
    adapter = {n for n in names if "lora_" in n or n.startswith("embeddings")}
    assert all(torch.equal(start[n], middle[n]) for n in adapter)
    assert any(not torch.equal(start[n], middle[n]) for n in names - adapter)
    assert all(torch.equal(middle[n], end[n]) for n in names - adapter)
    assert any(not torch.equal(middle[n], end[n]) for n in adapter)
    resumed = trainer(tmp_path, plan)
    assert resumed.resume()
    assert all(torch.equal(p, end[n]) for n, p in resumed.objective.named_parameters() if n in names - adapter)


def test_every_part_of_a_step_has_randomness_of_its_own() -> None:
    """No two of seeds, steps and processes draw the same noise, and the same ones always do."""
    parts = [(seed, step, process) for seed in (0, 1, 11) for step in (0, 1, 11) for process in (0, 1, 11)]
    draws = [float(torch.rand((), generator=step_generator(*part), dtype=torch.float64)) for part in parts]
    assert len(set(draws)) == len(parts)
    assert draws == [float(torch.rand((), generator=step_generator(*part), dtype=torch.float64)) for part in parts]


def test_a_checkpoint_from_before_a_field_was_added_is_resumed(tmp_path: Path) -> None:
    """What an older checkpoint does not say about its recipe counts as the default."""
    plan = recipe(stages=[{**STAGE, "steps": 4}])
    first = trainer(tmp_path, plan)
    first.report = lambda _: first.stop.set()
    assert not first.run()
    (file,) = (tmp_path / "checkpoints").glob("*/state.json")
    state = json.loads(file.read_text())
    del state["facts"]["recipe"]["pictures_every"], state["facts"]["recipe"]["gradient_checkpointing"]
    file.write_text(json.dumps(state))
    assert trainer(tmp_path, plan).resume()
    with pytest.raises(TrainingError, match="another recipe"):
        trainer(tmp_path, recipe(stages=[{**STAGE, "steps": 4}], gradient_checkpointing=True)).resume()
    file.write_text(json.dumps({**state, "facts": {"recipe": {"name": "no recipe"}}}))
    with pytest.raises(TrainingError, match="another recipe"):
        trainer(tmp_path, plan).resume()


def test_another_recipe_is_not_resumed(tmp_path: Path) -> None:
    """A changed recipe would give a run that is neither; a damaged checkpoint is named."""
    run = trainer(tmp_path, recipe(stages=[{**STAGE, "steps": 2}]))
    run.run()
    with pytest.raises(TrainingError, match="another recipe"):
        trainer(tmp_path, recipe(seed=1, stages=[{**STAGE, "steps": 2}])).resume()
    (file,) = (tmp_path / "checkpoints").glob("*/state.safetensors")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(SnapshotError, match="is damaged"):
        trainer(tmp_path, recipe(stages=[{**STAGE, "steps": 2}])).resume()


def test_the_exported_adapter_serves_as_it_was_trained(tmp_path: Path) -> None:
    """`dreamserve fuse` takes the file that training leaves, and what a worker then loads makes the unfused peft
    model's picture, to a thousandth of its range."""
    plan = recipe(stages=[{**STAGE, "steps": 3, "mixture": {"single_subject": 1}, "optimizer": {"lr": 1e-2}}])
    plan = plan.model_copy(update={"model": plan.model.model_copy(update={"placeholders": "spare"})})
    run = prepare(plan, tmp_path / "run", lambda _: None)
    before = picture(in_training(run))
    assert run.run()
    exported = run.export()
    command = ["--dreamo", str(exported.directory), "--version", "main", "--dtype", "float32"]
    subprocess.run(
        [sys.executable, "-m", "model.weights.fuse", "--out", str(tmp_path / "fused"), *command],
        check=True,
        timeout=240,
    )
    served = load_model(ModelSource(fused=tmp_path / "fused", device="cpu"))
    trained = picture(in_training(run))
    torch.testing.assert_close(picture(served), trained, rtol=0, atol=1e-3)
    assert (trained - before).abs().max() > 0.02, "three steps show"


def in_training(run: Trainer) -> LoadedModel:
    """The model with its peft layers, and the embeddings in the place where serving looks for them."""
    embeddings = run.objective.embeddings
    with torch.no_grad():
        run.model.text.t5.get_input_embeddings().weight[-10:] = embeddings.placeholder_rows
    tables = EmbeddingTables(embeddings.type_rows.detach(), embeddings.index_rows.detach())
    return replace(run.model, tables=tables)


def picture(model: LoadedModel) -> torch.Tensor:
    """[3, 64, 64] in [0, 1], before it is rounded to a file's 256 levels."""
    pipeline = Pipeline(model, load_tools("auto", "auto", "cpu"))
    pixels = np.full((32, 32, 3), (200, 30, 60), np.uint8)
    request = ImageRequest("a square [ref#1] on the left", "", (), 64, 64, 3, 4.5, 4.5)
    run = pipeline.start(pipeline.encode(request, [PreparedReference(1, Role.SUBJECT, pixels)]), seed=1)
    while not run.done:
        (run,) = pipeline.step([run])
    return model.codec.decode(run.latents, run.condition.target_grid)
