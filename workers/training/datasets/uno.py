"""UNO's lists: DreamBench prompts with reference pictures, for evaluation, and UNO-1M's pairs, for training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from model.roles import Role
from workers.training.datasets.folder import Folder, row_files
from workers.training.datasets.rows import ForeignModel, Model, Rows, open_rows
from workers.training.datasets.source import LIMITS, Assembly, EvaluationItem, subject_task
from workers.training.records import Record, RecordReference


class UnoRow(ForeignModel):
    """One element of a list."""

    prompt: str = Field(min_length=1)
    image_paths: list[str] = Field(min_length=1)


class UnoPairRow(UnoRow):
    """An element with a target."""

    image_tgt_path: str


@dataclass(frozen=True, slots=True, eq=False)
class _List:
    """What both kinds of list share: where rows and pictures lie."""

    rows: Rows
    images: Folder

    @property
    def num_rows(self) -> int:
        """As many as samples."""
        return len(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def key(self, index: int) -> str:
        """`FILE:ELEMENT`."""
        return self.rows.key(index)

    def task(self, index: int) -> str:
        """By the number of references."""
        return subject_task(len(self.rows.row(index, UnoRow).image_paths))

    def _open(self, index: int, model: type[Model]) -> tuple[Model, Assembly]:
        return self.rows.row(index, model), Assembly(self.rows.where(index))

    def _references(self, assembly: Assembly, files: list[str]) -> tuple[RecordReference, ...]:
        return tuple(
            RecordReference(
                slot,
                Role.SUBJECT,
                assembly.picture(
                    f"image_paths[{slot - 1}]", lambda name=file: self.images.read(name, LIMITS.max_bytes)
                ),
            )
            for slot, file in enumerate(files, 1)
        )


@dataclass(frozen=True, slots=True, eq=False)
class UnoList(_List):
    """An evaluation list. A target that a row may name is not read: in UNO's lists it repeats a reference."""

    @classmethod
    def at(cls, path: Path, *, images: Path | None = None) -> UnoList:
        """Open a .json list, or a directory of them; names of pictures start beside it, or at `images`.

        Raises:
            DatasetError: `path_missing`, `dataset_empty`.
        """
        return cls(*_open_list(path, images))

    def __getitem__(self, index: int) -> EvaluationItem:
        row, assembly = self._open(index, UnoRow)
        return assembly.finish(EvaluationItem(self.key(index), row.prompt, self._references(assembly, row.image_paths)))

    def samples_of(self, row: int) -> tuple[EvaluationItem, ...]:
        """One item."""
        return (self[row],)


@dataclass(frozen=True, slots=True, eq=False)
class UnoPairs(_List):
    """A training list: UNO-1M's labels after UNO's own conversion, with `image_tgt_path` in every row."""

    @classmethod
    def at(cls, path: Path, *, images: Path | None = None) -> UnoPairs:
        """As `UnoList.at`."""
        return cls(*_open_list(path, images))

    def __getitem__(self, index: int) -> Record:
        row, assembly = self._open(index, UnoPairRow)
        references = self._references(assembly, row.image_paths)
        target = assembly.picture("image_tgt_path", lambda: self.images.read(row.image_tgt_path, LIMITS.max_bytes))
        return assembly.finish(Record(self.key(index), subject_task(len(references)), row.prompt, references, target))

    def samples_of(self, row: int) -> tuple[Record, ...]:
        """One sample."""
        return (self[row],)


def _open_list(path: Path, images: Path | None) -> tuple[Rows, Folder]:
    rows = Rows.of((open_rows(file) for file in row_files(path, ".json", ".jsonl")), str(path))
    return rows, Folder.at(images or path)
