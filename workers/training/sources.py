"""Records by number, for a recipe: StickerWorld's endless list, or a dataset shuffled anew in each epoch.

The same number always gives the same record, so a run that is resumed sees what it would have seen.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from model.errors import UnusableReferenceError
from workers.training.buckets import bucketed
from workers.training.datasets.faults import BadRowError, DatasetError
from workers.training.datasets.formats import detect, open_training
from workers.training.datasets.source import Source as Dataset
from workers.training.recipes import DataPart, RecipeError, Stage
from workers.training.records import Record
from workers.training.stickerworld.orders import Misfit, misfits, misplaced
from workers.training.stickerworld.settings import Settings, UnknownSettingError
from workers.training.stickerworld.world import sample

_LARGEST: Final = 4096


@dataclass(frozen=True, slots=True)
class StickerSource:
    """StickerWorld with a recipe's settings; a stage's mixture and settings replace theirs. `cell`: the model's."""

    settings: Settings
    seed: int
    cell: int

    def record(self, index: int, stage: Stage) -> Record:
        settings = replace(self.settings.changed(stage.settings), mixture=tuple(stage.mixture.items()))
        return sample(self.seed, index, settings)


@dataclass(frozen=True, slots=True)
class DirectorySource:
    """A dataset: a task is drawn by the mixture, then the task's records in an order that differs by epoch.

    Attributes:
        resolution: side of the square whose area a target has, after bucketing. reference_resolution: of references.
    """

    dataset: Dataset[Record]
    by_task: Mapping[str, tuple[int, ...]]
    seed: int
    cell: int
    resolution: int
    reference_resolution: int

    def record(self, index: int, stage: Stage) -> Record:
        """The record at a place of the mixture's endless list.

        Raises:
            RecipeError: the row cannot be read, or its pictures not be scaled.
        """
        names = list(stage.mixture)
        weights = np.array(list(stage.mixture.values()))
        random = np.random.default_rng([self.seed, index])
        task = names[int(random.choice(len(names), p=weights / weights.sum()))]
        members = self.by_task[task]
        epoch, place = divmod(index, len(members))
        order = np.random.default_rng([self.seed, epoch, len(members)]).permutation(len(members))
        try:
            record = self.dataset[members[int(order[place])]]
        except BadRowError as error:
            raise RecipeError(f"{error}: run `dreamserve dataset check` and mend what it finds") from error
        try:
            return bucketed(record, self.resolution, self.reference_resolution, self.cell)
        except UnusableReferenceError as error:
            raise RecipeError(f"record {record.key}: {error.message}") from error


def open_source(
    data: DataPart, seed: int, *, cell: int, resolution: int, reference_resolution: int
) -> StickerSource | DirectorySource:
    """The records of a recipe.

    Args:
        cell, resolution, reference_resolution: the model's, for records of any size.

    Raises:
        RecipeError: settings that do not exist, or a directory that is no dataset.
    """
    if data.path is None:
        try:
            return StickerSource(Settings().changed(data.settings), seed, cell)
        except UnknownSettingError as error:
            raise RecipeError(f"data.settings.{error.name}: {error}") from error
        except ValueError as error:
            raise RecipeError(f"data.settings: {error}") from error
    unknown = data.settings.keys() - {"resolution", "reference_resolution"}
    if unknown:
        raise RecipeError(f"data.settings: a directory has no setting {sorted(unknown)[0]!r}")
    try:
        dataset = open_training(data.path, detect(data.path))
        by_task: dict[str, list[int]] = defaultdict(list)
        for index in range(len(dataset)):
            by_task[dataset.task(index)].append(index)
    except (DatasetError, BadRowError) as error:
        raise RecipeError(f"{data.path}: {error}: run `dreamserve dataset check {data.path}`") from error
    return DirectorySource(
        dataset,
        {task: tuple(indices) for task, indices in by_task.items()},
        seed,
        cell,
        side_of(data, "resolution", resolution),
        side_of(data, "reference_resolution", reference_resolution),
    )


def side_of(data: DataPart, name: str, default: int) -> int:
    """A resolution that a directory is read at.

    Raises:
        RecipeError: it is none.
    """
    side: Any = data.settings.get(name, default)
    if type(side) is not int or not 1 <= side <= _LARGEST:
        raise RecipeError(f"data.settings.{name}: must be a whole number of pixels, 1 to {_LARGEST}")
    return side


def check_stages(source: StickerSource | DirectorySource, stages: Iterable[Stage]) -> None:
    """Refuse a stage that asks for records of a task there are none of, or changes a setting that does not exist.

    Raises:
        RecipeError: naming the stage and what there is.
    """
    for stage in stages:
        for path, detail in _misfits(source, stage):
            raise RecipeError(f"stage {stage.name}: {'.'.join(path)}: {detail}")


def _misfits(source: StickerSource | DirectorySource, stage: Stage) -> Iterator[Misfit]:
    if isinstance(source, StickerSource):
        yield from misfits(source.settings, stage.settings, stage.mixture, stage.batch)
        yield from misplaced(source.settings, stage.settings, source.cell)
        return
    for task in stage.mixture:
        if task not in source.by_task:
            yield ("mixture", task), f"there are no records of this task; there are {', '.join(source.by_task)}"
