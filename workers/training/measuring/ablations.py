"""What each part of DreamO's training is worth: its stages with one thing changed, several seeds each.

    python -m workers.training.measuring.ablations [--out runs/ablations] [--seeds 3] [--count 100] [--only NAME]

trains the variants of `recipes/ablations.yaml` on its frozen base, a fresh adapter each time, measures them on held-out
two-reference scenes and prints means, spreads and differences to `reference`. A seed fixes the start, the records,
noise and times of every step and the scenes it is measured on, so variants differ in pairs.

Each (variant, seed) ends as one JSON row in the out directory; a row that is there is not made again, and a run that
was stopped or killed goes on from its checkpoint. Seeds are the outer loop: a campaign cut short holds whole pairs.
With the shipped recipe expect 10 minutes a row on one core (OMP_NUM_THREADS=1), half a minute of it for measuring: 2 to
3 hours in all.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from pydantic import BaseModel, ConfigDict, ValidationError

from model.errors import ModelError
from model.pipeline import Pipeline
from model.preprocessors.prepare import load_tools
from model.roles import ADDED_TOKENS
from model.weights.checkpoints import LoadedModel
from workers.training.failures import TrainingError
from workers.training.leaving import heed_signals
from workers.training.measuring.attending import peaks_inside
from workers.training.measuring.evaluate import TABLES, pictures
from workers.training.measuring.variants import ALL_TASKS, REFERENCE, VARIANTS, Run, planned
from workers.training.oracle.scores import score
from workers.training.oracle.tables import summarise
from workers.training.recipes import Recipe, RecipeError, load_recipe
from workers.training.reports import StepReport
from workers.training.start import prepare
from workers.training.stderr import say
from workers.training.stickerworld.scenes import Scene
from workers.training.stickerworld.world import scene
from workers.training.storage import StorageError
from workers.training.trainer import Trainer

app = typer.Typer(add_completion=False)

WINDOW = 50
"""The flow loss is a mean over so many steps at the end of the all-tasks stage, whose records all variants share."""

STOPPED = 3
"""Exit status of a campaign that was asked to stop and can be resumed."""


PICTURES: Mapping[str, str] = {
    "ΔE < 15": "dominant colour ΔE < 15",
    "shape": "shape class",
    "texture": "texture class",
    "all right": "all right, per sticker",
    "swapped": "swapped",
}
"""Columns read off the pictures → rows of `oracle.tables`."""

PEAKS, FLOW = "map peaks inside", "flow loss"
COLUMNS = (*PICTURES, PEAKS, FLOW)


class AblationError(Exception):
    """Rows that do not belong to this campaign, or cannot be read; the message names the file and the remedy."""


class Row(BaseModel):
    """One run and what it measured: `measures` by column, None where nothing spoke to it. `plan`: sha256 of its recipe
    and of how it was measured."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    variant: str
    seed: int
    plan: str
    measures: dict[str, float | None]


def campaign(recipe: Recipe, out: Path, names: Iterable[str], seeds: int, count: int, stop: threading.Event) -> bool:
    """Make the rows that are missing; False if asked to stop before the last. A made row's checkpoints are removed.

    Raises:
        RecipeError: see `varied`.
        AblationError: the directory holds rows of something else.
        ModelError, TrainingError, StorageError: see `start.prepare` and `Trainer`.
    """
    runs = planned(recipe, names, seeds, count)
    made = [read_row(out, run) is not None for run in runs]  # all of them first: one may not belong here
    for run, there in zip(runs, made, strict=True):
        began, directory = time.monotonic(), out / "runs" / run.name
        if not there:
            row = _made(run, directory, stop)
            if row is None:
                return False
            _write(out / f"{run.name}.json", row.model_dump_json(indent=1) + "\n")
            say(f"{run.name}: {(time.monotonic() - began) / 60:.1f} min")
        shutil.rmtree(directory, ignore_errors=True)
    return True


def read_row(out: Path, run: Run) -> Row | None:
    """The row of a run; None where it is still to be made.

    Raises:
        AblationError: it is not readable, or of another recipe or count.
    """
    file = out / f"{run.name}.json"
    if not file.is_file():
        return None
    try:
        row = Row.model_validate_json(file.read_bytes())
    except ValidationError as error:
        raise AblationError(f"{file} is not a row ({error.errors()[0]['msg']}): remove it to make it again") from error
    if row.plan != run.plan:
        raise AblationError(f"{file} is of another recipe or count: remove it, or name a new --out")
    return row


def _made(run: Run, directory: Path, stop: threading.Event) -> Row | None:
    """Train and measure; None if asked to stop before the end of training."""
    directory.mkdir(parents=True, exist_ok=True)
    log = _FlowLog(directory / "flow.jsonl", run)
    trainer = prepare(run.recipe, directory, log.step)
    trainer.stop = stop
    trainer.resume()
    log.rewind(trainer.step)
    if not trainer.run():
        return None
    seen = measured(trained_model(trainer), held_out(run), run.recipe.seed)
    return Row(variant=run.variant, seed=run.recipe.seed, plan=run.plan, measures={**seen, FLOW: log.mean()})


@torch.no_grad()
def trained_model(trainer: Trainer) -> LoadedModel:
    """The trainer's model as it would serve, with the adapter beside the base instead of in it."""
    model, learnt = trainer.model, trainer.objective.embeddings
    table = model.text.t5.get_input_embeddings().weight
    table[-len(ADDED_TOKENS) :] = learnt.placeholder_rows.to(table)
    old = model.tables
    tables = replace(old, type=learnt.type_rows.detach().to(old.type), index=learnt.index_rows.detach().to(old.index))
    return replace(model, tables=tables)


def held_out(run: Run) -> list[Scene]:
    """The scenes a run is measured on: its seed's first ones, of the size it was trained on."""
    sizes = {name: value for name, value in run.recipe.data.settings.items() if name in ("size", "reference_size")}
    settings = replace(TABLES["two-references"], split="held_out", **sizes)
    return [scene(run.recipe.seed, index, settings) for index in range(run.count)]


def measured(model: LoadedModel, scenes: Sequence[Scene], seed: int) -> dict[str, float | None]:
    """What a model's pictures of these scenes, and its response maps, show: the columns but the flow loss."""
    pipeline = Pipeline(model, load_tools("auto", "auto", str(model.transformer.device)))
    made = pictures(pipeline, scenes, seed=seed)
    rates = summarise(score(one, picture) for one, picture in zip(scenes, made, strict=True)).rates
    peaks = peaks_inside(model, [one.record() for one in scenes], seed=seed)
    read = {column: rates[row].value if row in rates else None for column, row in PICTURES.items()}
    return {**read, PEAKS: statistics.fmean(peaks) if peaks else None}


class _FlowLog:
    """The flow loss of each step, kept in a file because a run may be made in several parts."""

    def __init__(self, file: Path, run: Run) -> None:
        self._file = file
        self._run = run

    def step(self, report: StepReport) -> None:
        """Note one step."""
        flow = report.losses["flow"]
        with self._file.open("a") as file:
            file.write(json.dumps([report.step, flow]) + "\n")
        if report.step % 50 == 0:
            say(f"{self._run.name}: step {report.step}/{report.total_steps}, flow {flow:.3f}")

    def rewind(self, step: int) -> None:
        """Forget the steps after `step`, which are taken again."""
        kept = {number: flow for number, flow in self._read().items() if number <= step}
        _write(self._file, "".join(json.dumps([number, flow]) + "\n" for number, flow in kept.items()))

    def mean(self) -> float:
        """Over the last steps of the all-tasks stage.

        Raises:
            AblationError: the file lacks one of them.
        """
        flows, done = self._read(), 0
        for stage in self._run.recipe.stages:
            done += stage.steps
            if stage.name == ALL_TASKS:
                wanted = range(done - min(WINDOW, stage.steps) + 1, done + 1)
                if all(step in flows for step in wanted):
                    return statistics.fmean(flows[step] for step in wanted)
        raise AblationError(f"{self._file} lacks steps: remove {self._file.parent} to make the run again")

    def _read(self) -> dict[int, float]:
        flows: dict[int, float] = {}
        for line in self._file.read_text().splitlines() if self._file.is_file() else ():
            try:
                number, flow = json.loads(line)
            except ValueError:
                break  # cut short by the end of the process
            flows[int(number)] = float(flow)
        return flows


def comparison(rows: Sequence[Row]) -> str:
    """A Markdown table: mean ± standard deviation over seeds of each variant, then of its difference to `reference`
    over the seeds that both have."""
    by_name = {name: {row.seed: row.measures for row in rows if row.variant == name} for name in VARIANTS}
    made = {name: seeds for name, seeds in by_name.items() if seeds}
    reference = made.get(REFERENCE, {})
    lines = [["", "seeds", *COLUMNS], ["---"] * (len(COLUMNS) + 2)]
    for name, seeds in made.items():
        lines.append([name, str(len(seeds)), *(_spread(one[column] for one in seeds.values()) for column in COLUMNS)])
    for name, seeds in made.items():
        pairs = [(seeds[seed], reference[seed]) for seed in seeds if seed in reference]
        if name != REFERENCE and pairs:
            cells = [_spread((_minus(a[c], b[c]) for a, b in pairs), sign="+") for c in COLUMNS]
            lines.append([f"{name} − {REFERENCE}", str(len(pairs)), *cells])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _spread(values: Iterable[float | None], sign: str = "") -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    mean = f"{statistics.fmean(known):{sign}.3f}"
    return f"{mean} ± {statistics.stdev(known):.3f}" if len(known) > 1 else mean


def _write(file: Path, text: str) -> None:
    """Put a file there whole or not at all."""
    part = file.with_name(f".{file.name}.part")
    with part.open("w") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    part.replace(file)


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="For rows, and for checkpoints while a run lasts.")] = Path(
        "runs/ablations"
    ),
    seeds: Annotated[int, typer.Option(min=1, help="How many, from the recipe's on.")] = 3,
    count: Annotated[int, typer.Option(min=2, help="Held-out scenes per run.")] = 100,
    only: Annotated[
        list[str] | None, typer.Option(help=f"One of {', '.join(VARIANTS)}; again for more. Default: all.")
    ] = None,
    recipe: Annotated[str, typer.Option(help="The reference: a shipped recipe's name, or a YAML file.")] = "ablations",
) -> None:
    """Train the variants, measure them and print how they compare; SIGTERM and Ctrl-C checkpoint first."""
    stop = threading.Event()
    heed_signals(stop)
    try:
        if unknown := [name for name in only or () if name not in VARIANTS]:
            raise AblationError(f"no variant {unknown[0]!r}; there are {', '.join(VARIANTS)}")
        plan = load_recipe(recipe)
        finished = campaign(plan, out, only or VARIANTS, seeds, count, stop)
        rows = [read_row(out, run) for run in planned(plan, VARIANTS, seeds, count)]
    except (AblationError, RecipeError, ModelError, StorageError, TrainingError) as error:
        say(f"dreamserve ablations: {error}")
        raise typer.Exit(2) from error
    print(comparison([row for row in rows if row is not None]))
    if not finished:
        say("stopped: the same command goes on from here")
        raise typer.Exit(STOPPED)


if __name__ == "__main__":
    app(prog_name="python -m workers.training.measuring.ablations")
