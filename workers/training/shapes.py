"""The shapes of each stage's first batch, without a weight: real records, drops and packing, blank latents."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from model.packing import Condition, Layout, ReferenceTokens, lay_out
from model.roles import PLACEHOLDERS, Role
from model.spec import ModelSpec, flux_spec, load_spec
from model.vae import LatentCodec
from model.weights.checkpoints import SHIPPED
from workers.training.batches import Example, compose, step_generator
from workers.training.buckets import bucketed
from workers.training.recipes import Recipe, Stage
from workers.training.records import Record, RecordReference
from workers.training.sources import side_of
from workers.training.start import records_of
from workers.training.trainer import Source

_FLUX_CELL = 16
_ROLES: Mapping[str, tuple[Role, ...]] = {
    "text_to_image": (),
    "multi_subject": (Role.SUBJECT, Role.SUBJECT),
    "two_column": (Role.SUBJECT, Role.SUBJECT),
    "identity": (Role.IDENTITY,),
    "try_on": (Role.GARMENT,),
    "style": (Role.STYLE,),
}
"""References of an example of a task; of any other task one subject."""


def first_batches(recipe: Recipe) -> tuple[str, list[list[str]]]:
    """Where the records come from, and for each stage lines on its first batch, by one process.

    A dataset that does not exist is replaced by examples; a base that is not here is taken to be FLUX.1-dev.

    Raises:
        RecipeError: the records, as at the start of a run.
        WeightsError: the base's configuration.
    """
    base = recipe.model.base or str(SHIPPED)
    known = Path(base).exists()
    spec = load_spec(base) if known else flux_spec(Path(base).name, _FLUX_CELL, version="v1.1", turbo=False)
    source, said = _source(recipe, spec)
    lines: list[list[str]] = []
    step = 0
    for stage in recipe.stages:
        try:
            lines.append(_first_batch(source, stage, recipe.seed, step, spec))
        except ValueError as error:
            remedy = "" if known else f"; {base} is not here: name the base with --base"
            lines.append([f"first batch: its pictures do not fit the model's tokens: {error}{remedy}"])
        step += stage.steps
    return said, lines


def _source(recipe: Recipe, spec: ModelSpec) -> tuple[Source, str]:
    path = recipe.data.path
    if path is None:
        # What does not fill the model's tokens is said by stage: the base may be a guess.
        return records_of(recipe, replace(spec, cell=1)), "records of StickerWorld"
    if path.exists():
        return records_of(recipe, spec), f"records of {path}"
    sizes = {"resolution": spec.width.default, "reference_resolution": spec.reference_resolution.default}
    chosen = {name: side_of(recipe.data, name, int(size)) for name, size in sizes.items()}
    return _Examples(recipe.seed, spec.cell, **chosen), f"{path} does not exist, so these are examples of each task"


def _first_batch(source: Source, stage: Stage, seed: int, step: int, spec: ModelSpec) -> list[str]:
    """The same records and draws as the trainer's, in process 0 of 1."""
    records = [source.record(step * stage.batch + number, stage) for number in range(stage.batch)]
    batch = compose(records, stage, _BlankCodec(spec.cell), step_generator(seed, step, 0))
    layout = _layout(batch.examples, spec)
    spans = zip(layout.boundaries[:-1], layout.boundaries[1:], strict=True)
    said = [_line(e, end - start, spec) for e, (start, end) in zip(batch.examples, spans, strict=True)]
    head = f"first batch: {len(said)} samples, {layout.boundaries[-1]:,} tokens in one sequence"
    return [head, *(f"{count} x {line}" for line, count in Counter(said).items())]


def _layout(examples: Sequence[Example], spec: ModelSpec) -> Layout:
    text, pooled = torch.empty(spec.text_tokens, 1), torch.empty(1)
    return lay_out([Condition(text, pooled, example.grid, example.references) for example in examples])


def _line(example: Example, length: int, spec: ModelSpec) -> str:
    rows, columns = example.grid
    parts = [f"target {rows * spec.cell}x{columns * spec.cell} = {rows * columns:,} tokens"]
    parts += [_reference(reference, spec.cell) for reference in example.references]
    return f"{example.task}: {', '.join(parts)}, text {spec.text_tokens}; sequence {length:,}"


def _reference(reference: ReferenceTokens, cell: int) -> str:
    (rows, columns), kept = reference.grid, len(reference.tokens)
    left = f" of {rows * columns:,}" if kept < rows * columns else ""
    return f"[{reference.slot}] {reference.role} {rows * cell}x{columns * cell} = {kept:,}{left}"


class _BlankCodec(LatentCodec):
    """Grids and token counts of a VAE, with latents of one channel that are all zero."""

    def __init__(self, cell: int) -> None:
        self.factor, self.channels = cell // 2, 1
        self._scale, self._shift = 1.0, 0.0

    def batch_moments(self, pixels: torch.Tensor) -> torch.Tensor:
        rows, columns = self.grid(*pixels.shape[2:])
        return torch.zeros(len(pixels), 2, 2 * rows, 2 * columns)


@dataclass(frozen=True, slots=True)
class _Examples:
    """Square blank records of the default sizes, by a stage's mixture."""

    seed: int
    cell: int
    resolution: int
    reference_resolution: int

    def record(self, index: int, stage: Stage) -> Record:
        names, weights = list(stage.mixture), np.array(list(stage.mixture.values()))
        random = np.random.default_rng([self.seed, index])
        task = names[int(random.choice(len(names), p=weights / weights.sum()))]
        blank = np.zeros((self.resolution, self.resolution, 3), np.uint8)
        roles = _ROLES.get(task, (Role.SUBJECT,))
        references = tuple(RecordReference(slot, role, blank) for slot, role in enumerate(roles, start=1))
        prompt = " ".join(PLACEHOLDERS[: len(roles)])
        record = Record(f"example/{index}", task, prompt, references, blank)
        return bucketed(record, self.resolution, self.reference_resolution, self.cell)
