"""Sheets of samples: what they show, and that training takes no notice of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from model.roles import Role
from model.weights.checkpoints import LoadedModel
from tests.workers.training.squares import Squares
from tests.workers.training.test_trainer import STAGE, fresh_embeddings, recipe, same, trainer, weights
from workers.training import sheets
from workers.training.log import TrainingLog
from workers.training.recipes import RecipeError, Stage
from workers.training.records import Pixels, Record, RecordReference
from workers.training.reports import StepReport

EMA = {**STAGE, "steps": 3, "ema": 0.5, "token_drop": 0.5}
"""Ends its three steps with averages that differ from the weights."""


def tiles(sheet: Pixels, row: int) -> list[Pixels]:
    """A row's tiles without the gaps."""
    pitch = sheets.TILE + 4
    across = range(4, sheet.shape[1] - 4, pitch)
    top = 4 + row * pitch
    return [sheet[top : top + sheets.TILE, left : left + sheets.TILE] for left in across]


def test_training_takes_no_notice(tmp_path: Path) -> None:
    """Pictures after every step and none at all: the same losses and weights bit for bit, in a stage with averages
    that are put in the weights' place for them. Torch's own generator is where it was."""
    seen: dict[int, tuple[list[float], dict[str, torch.Tensor], torch.Tensor]] = {}
    for every in (1, 0):
        torch.manual_seed(3)
        reports: list[StepReport] = []
        plan = recipe(stages=[EMA], pictures_every=every)
        run = trainer(tmp_path / str(every), plan, reports=reports)
        assert run.run()
        seen[every] = ([report.loss for report in reports], weights(run), torch.get_rng_state())
        assert [report.sheet is not None for report in reports] == [bool(every)] * 3
    assert seen[1][0] == seen[0][0]
    assert same(seen[1][1], seen[0][1])
    assert torch.equal(seen[1][2], seen[0][2])
    assert sorted(path.name for path in (tmp_path / "1" / "pictures").iterdir()) == [
        f"step-0000000{step}.png" for step in (1, 2, 3)
    ]
    assert not (tmp_path / "0" / "pictures").exists()


def test_pictures_can_be_switched_in_the_middle(tmp_path: Path) -> None:
    """How often they are drawn is no part of what a checkpoint belongs to; a run stopped and resumed with pictures
    ends as one without."""
    first = trainer(tmp_path, recipe(stages=[EMA], pictures_every=0))
    first.report = lambda _: first.stop.set()
    assert not first.run()
    second = trainer(tmp_path, recipe(stages=[EMA], pictures_every=2))
    assert second.resume()
    assert second.run()
    assert [path.name for path in (tmp_path / "pictures").iterdir()] == ["step-00000002.png"]
    whole = trainer(tmp_path / "whole", recipe(stages=[EMA], pictures_every=0))
    assert whole.run()
    assert same(weights(second), weights(whole))


def test_a_sheet_shows_the_averages(tmp_path: Path) -> None:
    """What is drawn at a stage's end are the weights that the stage leaves behind."""
    reports: list[StepReport] = []
    run = trainer(tmp_path, recipe(stages=[{**EMA, "optimizer": {"lr": 5e-2}}], pictures_every=3), reports=reports)
    assert run.run()  # the averages are the weights now
    records = [Squares().record(sheets.FIRST + number, run.recipe.stages[0]) for number in range(sheets.RECORDS)]
    after = sheets.draw(run.model, run.objective.embeddings, records)
    drawn = reports[-1].sheet
    assert drawn is not None
    assert np.array_equal(drawn, after)
    with torch.no_grad():
        for name, parameter in run.objective.named_parameters():
            if "lora_B" in name:
                parameter.mul_(1.5)
    assert not np.array_equal(drawn, sheets.draw(run.model, run.objective.embeddings, records))


def test_a_row_holds_references_truth_picture_and_responses(model: LoadedModel) -> None:
    """Columns stand where the docstring says, and a record with fewer references leaves grey."""
    stage = Stage(name="x", steps=1, batch=1, mixture={"single": 1})
    records = [Squares().record(index, stage) for index in range(8)]
    one = next(record for record in records if len(record.references) == 1)
    two = next(record for record in records if len(record.references) == 2)
    sheet = sheets.draw(model, fresh_embeddings(model), [one, two])
    grey, colours = (128, 128, 128), [tuple(r.pixels[0, 0].tolist()) for r in two.references]
    first, second = tiles(sheet, 0), tiles(sheet, 1)
    middles = [tuple(tile[sheets.TILE // 2, sheets.TILE // 2].tolist()) for tile in (*first, *second)]
    assert middles[0] == tuple(one.references[0].pixels[0, 0].tolist())
    assert middles[1] == middles[5] == grey
    assert middles[6:8] == colours
    scale = sheets.TILE // 48
    for row, record in ((first, one), (second, two)):
        assert np.array_equal(row[2][scale * 8 : scale * 40 : scale, ::scale], record.target)
        assert not np.array_equal(row[3], row[2])


def test_a_response_is_bright_where_it_is_large() -> None:
    """A map with one large token lights up that token alone, and the mask's outline is drawn in white."""
    response = np.zeros((4, 6), np.float32)
    response[1, 4] = 7.0
    mask = np.zeros((32, 48), np.uint8)
    mask[8:24, 8:24] = 255
    black = np.zeros((32, 48, 3), np.uint8)
    without, outlined = sheets.overlaid(response, black, None), sheets.overlaid(response, black, mask)
    top, side = 32, sheets.TILE // 6  # the tile is a square: 32 grey rows above a picture of 128
    tokens = without[top : top + 4 * side].reshape(4, side, 6, side, 3).mean((1, 3, 4))
    assert tokens[1, 4] > 60
    assert (tokens[:, :3] < 5).all()
    assert (tokens[3] < 5).all()
    white = (outlined != without).any(2)
    rows, columns = np.nonzero(white)
    edges = (top + side - 1, top + 3 * side, side - 1, 3 * side)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == edges
    assert (outlined[white] == 255).all()
    assert not white[top + 2 * side, 2 * side]


def test_a_record_without_references_has_a_truth_and_a_picture(model: LoadedModel) -> None:
    """Text-to-image stages have sheets too."""
    target = np.full((32, 32, 3), 90, np.uint8)
    sheet = sheets.draw(model, fresh_embeddings(model), [Record("k", "t", "a cat", (), target)])
    assert sheet.shape == (sheets.TILE + 8, 2 * (sheets.TILE + 4) + 4, 3)


def test_pictures_that_fail_do_not_end_a_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Records that cannot be read, memory that runs out while drawing, a directory that cannot be made: said, and
    the losses are those of a run without pictures."""

    class Broken(Squares):
        def record(self, index: int, stage: Stage) -> Record:
            if index >= sheets.FIRST and run.step == 1:
                raise RecipeError("r1: unreadable")
            return super().record(index, stage)

    def exhausted(*_: object) -> None:
        if run.step == 2 and not torch.is_grad_enabled():
            raise torch.OutOfMemoryError

    reports: list[StepReport] = []
    (tmp_path / "pictures").write_text("a file where the directory should be")
    run = trainer(tmp_path, recipe(stages=[EMA], pictures_every=1), Broken(), reports)
    run.model.transformer.x_embedder.register_forward_pre_hook(exhausted)
    assert run.run()
    assert [record.message.split(" (")[1].split(":")[0] for record in caplog.records] == [
        "RecipeError",
        "OutOfMemoryError",
        "FileExistsError",
    ]
    plain: list[StepReport] = []
    assert trainer(tmp_path / "plain", recipe(stages=[EMA], pictures_every=0), reports=plain).run()
    assert [report.loss for report in reports] == [report.loss for report in plain]


def test_tensorboard_gets_the_sheet(tmp_path: Path) -> None:
    """The event file holds the picture under `samples`, pixel for pixel."""
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    sheet = np.random.default_rng(1).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    with TrainingLog(tmp_path, 2) as log:
        log.step(StepReport(1, 2, "one", 0.5, {"flow": 0.5}, 3))
        log.step(StepReport(2, 2, "one", 0.5, {"flow": 0.5}, 3, sheet))
    seen = events.EventAccumulator(str(tmp_path / "log"))
    seen.Reload()
    (image,) = seen.Images("samples")
    assert image.step == 2
    (tmp_path / "x.png").write_bytes(image.encoded_image_string)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "x.png")), sheet)


def test_references_keep_all_their_tokens_on_a_sheet(model: LoadedModel) -> None:
    """A reference's picture counts in every token: changing one corner of it changes the sample."""
    pixels = np.full((16, 16, 3), 200, np.uint8)
    corner = pixels.copy()
    corner[:8, :8] = 0
    target = np.full((32, 32, 3), 90, np.uint8)
    rows = [
        Record("k", "t", "a cat [ref#1]", (RecordReference(1, Role.SUBJECT, picture),), target)
        for picture in (pixels, corner)
    ]
    pictures = [tiles(sheets.draw(model, fresh_embeddings(model), [row]), 0)[2] for row in rows]
    assert not np.array_equal(*pictures)
