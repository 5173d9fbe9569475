"""X2I and OmniGen's training lists: JSON lines with an instruction, input pictures and an output picture."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import Field

from model.roles import Role
from workers.training.datasets.folder import Folder, row_files
from workers.training.datasets.prompts import from_image_tags, without_placeholders
from workers.training.datasets.rows import ForeignModel, Rows, open_rows
from workers.training.datasets.source import LIMITS, Assembly, subject_task
from workers.training.records import Pixels, Record, RecordReference


class X2iRow(ForeignModel):
    """One line. `masks`, ours: for each input picture a file that marks its subject in the output, or null."""

    task_type: str | None = None
    instruction: str = Field(min_length=1)
    input_images: list[str] | None = None
    output_image: str
    masks: list[str | None] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class X2i:
    """Records of X2I's subject-driven lists.

    Attributes:
        role: of every reference; the format has none.
        placeholders: whether image tags become `[ref#k]`, or go.
    """

    rows: Rows
    images: Folder
    role: Role
    placeholders: bool

    @classmethod
    def at(cls, path: Path, *, images: Path | None = None, role: Role = Role.SUBJECT, placeholders: bool = True) -> X2i:
        """Open a directory of .jsonl files, or one of them; `images` is OmniGen's `--image_path`.

        Raises:
            DatasetError: `path_missing`, `dataset_empty`.
        """
        rows = Rows.of((open_rows(file) for file in row_files(path, ".jsonl")), str(path))
        return cls(rows, Folder.at(images or path), role, placeholders)

    @property
    def num_rows(self) -> int:
        """As many as samples."""
        return len(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def key(self, index: int) -> str:
        """`FILE:LINE`."""
        return self.rows.key(index)

    def task(self, index: int) -> str:
        """By the number of input pictures; the format's own `task_type` names other things."""
        return subject_task(len(self.rows.row(index, X2iRow).input_images or []))

    def samples_of(self, row: int) -> tuple[Record, ...]:
        """One sample."""
        return (self[row],)

    def __getitem__(self, index: int) -> Record:
        row = self.rows.row(index, X2iRow)
        assembly = Assembly(self.rows.where(index))
        files = row.input_images or []
        masks = row.masks if row.masks is not None else [None] * len(files)
        if len(masks) != len(files):
            assembly.fault("masks", "invalid_value", f"{len(masks)} masks for {len(files)} input_images")
            masks = [None] * len(files)
        references = tuple(
            RecordReference(
                slot,
                self.role,
                self._picture(assembly, f"input_images[{slot - 1}]", file),
                self._mask(assembly, f"masks[{slot - 1}]", mask),
            )
            for slot, (file, mask) in enumerate(zip(files, masks, strict=True), 1)
        )
        target = self._picture(assembly, "output_image", row.output_image)
        prompt = from_image_tags(row.instruction)
        record = assembly.finish(Record(self.key(index), subject_task(len(files)), prompt, references, target))
        return record if self.placeholders else replace(record, prompt=without_placeholders(prompt))

    def _picture(self, assembly: Assembly, name: str, file: str) -> Pixels:
        return assembly.picture(name, lambda: self.images.read(file, LIMITS.max_bytes))

    def _mask(self, assembly: Assembly, name: str, file: str | None) -> Pixels | None:
        return None if file is None else assembly.mask(name, lambda: self.images.read(file, LIMITS.max_bytes))
