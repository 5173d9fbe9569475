"""Our own format: JSON lines beside picture files, or the same packed into tar shards (see docs/datasets.md)."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import orjson
from pydantic import Field

from model.roles import PLACEHOLDERS, Role
from workers.training.datasets.faults import BadRowError, Fault, UnusableFileError, Where
from workers.training.datasets.folder import Folder, row_files
from workers.training.datasets.rows import MAX_ROW_BYTES, BrokenFile, JsonlFile, NativeModel, RowFile, Rows, validate
from workers.training.datasets.shards import Member, ShardSample, index_shard, read_member
from workers.training.datasets.source import LIMITS, Assembly
from workers.training.records import Record, RecordReference

Slot = Annotated[int, Field(ge=1, le=len(PLACEHOLDERS))]
NativeRole = Annotated[Role, Field(strict=False)]
"""Strict validation would ask for the enum's member where the file has its name."""

_SHARD_SUFFIX: Final = ".tar"


class ShardReference(NativeModel):
    """A reference in a shard; its picture and mask are the members `KEY.refSLOT.png` and `KEY.maskSLOT.png`."""

    slot: Slot
    role: NativeRole


class LineReference(ShardReference):
    """A reference in a line: also the files of its picture and of its mask in the target."""

    image: str
    target_mask: str | None = None


class ShardRow(NativeModel):
    """`KEY.json`. The target is the member `KEY.target.png`."""

    task: str = Field(min_length=1)
    prompt: str
    references: list[ShardReference] = Field(default=[], max_length=len(PLACEHOLDERS))


class LineRow(NativeModel):
    """One line of a .jsonl."""

    key: str = Field(min_length=1)
    task: str = Field(min_length=1)
    prompt: str
    target: str
    references: list[LineReference] = Field(default=[], max_length=len(PLACEHOLDERS))


@dataclass(frozen=True, slots=True, eq=False)
class Shard:
    """A tar file as a file of rows."""

    path: Path
    samples: tuple[ShardSample, ...]

    def __len__(self) -> int:
        return len(self.samples)

    def where(self, index: int) -> Where:
        return Where(self.path.name, self.samples[index].row)

    def row(self, index: int) -> Any:
        sample, where = self.samples[index], self.where(index)
        member = sample.members.get("json")
        if member is None:
            raise BadRowError(*sample.faults, Fault(where, f"{sample.base}.json", "file_missing"))
        try:
            return orjson.loads(read_member(self.path, member, MAX_ROW_BYTES))
        except UnusableFileError as error:
            raise BadRowError(*sample.faults, Fault(where, member.name, "bad_json", error.found)) from None
        except orjson.JSONDecodeError as error:
            raise BadRowError(*sample.faults, Fault(where, member.name, "bad_json", str(error))) from None


@dataclass(frozen=True, slots=True, eq=False)
class Native:
    """Records of the native format.

    Attributes:
        keys: of every row; a row without a usable one goes by its place.
        tasks: of every row; empty where the row does not say.
        repeated: rows whose key an earlier one has.
    """

    rows: Rows
    images: Folder
    keys: tuple[str, ...]
    tasks: tuple[str, ...]
    repeated: frozenset[int]

    @classmethod
    def at(cls, path: Path, *, images: Path | None = None) -> Native:
        """Open a directory of .jsonl and .tar files, or one of them. Reads every row once, for keys and tasks.

        Args:
            path: the directory, or the file.
            images: where the names of pictures start; default: beside the rows.

        Raises:
            DatasetError: `path_missing`, `dataset_empty`.
        """
        files = row_files(path, ".jsonl", _SHARD_SUFFIX)
        rows = Rows.of((part for file in files for part in _open(file)), str(path))
        seen: set[str] = set()
        keys: list[str] = []
        tasks: list[str] = []
        repeated: set[int] = set()
        for index in range(len(rows)):
            key, task = _key_and_task(rows, index)
            if key in seen:
                repeated.add(index)
            seen.add(key)
            keys.append(key)
            tasks.append(sys.intern(task))
        return cls(rows, Folder.at(images or path), tuple(keys), tuple(tasks), frozenset(repeated))

    @property
    def num_rows(self) -> int:
        """As many as samples."""
        return len(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def key(self, index: int) -> str:
        """As the data has it."""
        return self.keys[index]

    def task(self, index: int) -> str:
        """As the data has it."""
        return self.tasks[index] or self[index].task

    def samples_of(self, row: int) -> tuple[Record, ...]:
        """One sample."""
        return (self[row],)

    def __getitem__(self, index: int) -> Record:
        file, number = self.rows.locate(index)
        assembly = Assembly(self.rows.where(index))
        if index in self.repeated:
            assembly.fault("key", "duplicate_key", self.keys[index])
        if isinstance(file, Shard):
            return self._packed(file, number, assembly)
        return self._line(self.rows.row(index, LineRow), assembly)

    def _line(self, row: LineRow, assembly: Assembly) -> Record:
        def load(name: str) -> bytes:
            return self.images.read(name, LIMITS.max_bytes)

        references: list[RecordReference] = []
        for place, each in enumerate(row.references):
            field = f"references[{place}]"
            pixels = assembly.picture(f"{field}.image", lambda name=each.image: load(name))
            mask = None
            if each.target_mask is not None:
                mask = assembly.mask(f"{field}.target_mask", lambda name=each.target_mask: load(name))
            references.append(RecordReference(each.slot, each.role, pixels, mask))
        target = assembly.picture("target", lambda: load(row.target))
        return assembly.finish(Record(row.key, row.task, row.prompt, tuple(references), target))

    def _packed(self, shard: Shard, number: int, assembly: Assembly) -> Record:
        sample = shard.samples[number]
        assembly.faults.extend(sample.faults)
        raw = shard.row(number)
        try:
            row = validate(ShardRow, raw, assembly.where)
        except BadRowError as error:
            raise BadRowError(*assembly.faults, *error.faults) from None

        def load(part: str) -> bytes:
            member = sample.members.get(part)
            if member is None:
                raise UnusableFileError("file_missing", f"{sample.base}.{part}.png")
            return read_member(shard.path, member, LIMITS.max_bytes)

        references: list[RecordReference] = []
        for each in row.references:
            name, mask_name = f"ref{each.slot}", f"mask{each.slot}"
            pixels = assembly.picture(name, lambda part=name: load(part))
            mask = assembly.mask(mask_name, lambda part=mask_name: load(part)) if mask_name in sample.members else None
            references.append(RecordReference(each.slot, each.role, pixels, mask))
        for part in _unnamed(sample.members, row):
            assembly.fault(part, "unknown_field", f"{sample.base}.json has no reference in that slot")
        target = assembly.picture("target", lambda: load("target"))
        return assembly.finish(Record(sample.key, row.task, row.prompt, tuple(references), target))


def _unnamed(members: dict[str, Member], row: ShardRow) -> list[str]:
    """Pictures and masks of slots that the row does not have."""
    slots = {str(each.slot) for each in row.references}
    return [part for part in members if part not in ("json", "target") and part[-1] not in slots]


def _open(path: Path) -> list[RowFile]:
    if path.suffix.lower() != _SHARD_SUFFIX:
        return [JsonlFile.at(path)]
    samples, fault = index_shard(path)
    return [Shard(path, tuple(samples)), *([BrokenFile(fault)] if fault else [])]


def _key_and_task(rows: Rows, index: int) -> tuple[str, str]:
    """What an unchecked row says of itself; reading it will tell what is wrong with it."""
    file, number = rows.locate(index)
    key = file.samples[number].key if isinstance(file, Shard) else None
    try:
        raw = file.row(number)
    except BadRowError:
        raw = None
    fields: dict[str, Any] = raw if isinstance(raw, dict) else {}
    key = fields.get("key") if key is None else key
    task = fields.get("task")
    return key if isinstance(key, str) else rows.key(index), task if isinstance(task, str) else ""
