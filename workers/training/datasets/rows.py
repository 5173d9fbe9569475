"""Rows of JSON, one at a time, each with its place; nothing of a file but an index stays in memory where it is large.

A file that cannot be read at all counts as one row that says so: whoever walks the rows meets every fault.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

import numpy as np
import orjson
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from workers.training.datasets.faults import BadRowError, Code, DatasetError, Fault, Where

MAX_ROW_BYTES: Final = 2**20
MAX_LIST_BYTES: Final = 2**30
_BOM: Final = b"\xef\xbb\xbf"


class NativeModel(BaseModel):
    """Base of our own rows: a field that we do not know is a spelling mistake."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


class ForeignModel(BaseModel):
    """Base of other people's rows: they may hold more than we read."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")


Model = TypeVar("Model", bound=BaseModel)


class RowFile(Protocol):
    """A file of rows; indices count from 0."""

    def __len__(self) -> int: ...

    def where(self, index: int) -> Where:
        """The row's place."""
        ...

    def row(self, index: int) -> Any:
        """The row as parsed, of any type.

        Raises:
            BadRowError: it cannot be parsed.
        """
        ...


@dataclass(frozen=True, slots=True, eq=False)
class JsonlFile:
    """One JSON object per line; blank lines are no rows. Opened anew for each row, so that processes may share it.

    Attributes:
        spans: int64 [rows, 3]: offset and length in bytes, line number from 1.
    """

    path: Path
    spans: NDArray[np.int64]

    @classmethod
    def at(cls, path: Path) -> RowFile:
        """Index the file's lines."""
        spans: list[tuple[int, int, int]] = []
        try:
            with path.open("rb") as handle:
                offset, line = 0, 1
                while piece := handle.readline(MAX_ROW_BYTES + 1):
                    blank, length = not piece.strip(), len(piece)
                    while not piece.endswith(b"\n") and (piece := handle.readline(MAX_ROW_BYTES)):
                        blank, length = blank and not piece.strip(), length + len(piece)
                    if not blank:
                        spans.append((offset, length, line))
                    offset, line = offset + length, line + 1
        except OSError as error:
            return BrokenFile(Fault(Where(path.name), "", "file_unreadable", str(error.strerror)))
        return cls(path, np.array(spans, dtype=np.int64).reshape(-1, 3))

    def __len__(self) -> int:
        return len(self.spans)

    def where(self, index: int) -> Where:
        return Where(self.path.name, int(self.spans[index, 2]))

    def row(self, index: int) -> Any:
        offset, length, _line = (int(number) for number in self.spans[index])
        if length > MAX_ROW_BYTES:
            raise _bad_json(self.where(index), f"more than {MAX_ROW_BYTES} bytes in a line")
        try:
            with self.path.open("rb") as handle:
                handle.seek(offset)
                text = handle.read(length)
        except OSError as error:
            raise BadRowError(Fault(self.where(index), "", "file_unreadable", str(error.strerror))) from None
        try:
            return orjson.loads(text.removeprefix(_BOM) if offset == 0 else text)
        except orjson.JSONDecodeError as error:
            raise _bad_json(self.where(index), error.msg, error.colno) from None


@dataclass(frozen=True, slots=True, eq=False)
class JsonListFile:
    """A JSON list of objects, held in memory."""

    name: str
    rows: Sequence[Any]

    @classmethod
    def at(cls, path: Path) -> RowFile:
        """Parse the whole file."""
        where = Where(path.name)
        try:
            if path.stat().st_size > MAX_LIST_BYTES:
                found = f"more than {MAX_LIST_BYTES} bytes: write it as .jsonl"
                return BrokenFile(Fault(where, "", "bad_json", found))
            data = path.read_bytes()
        except OSError as error:
            return BrokenFile(Fault(where, "", "file_unreadable", str(error.strerror)))
        try:
            rows = orjson.loads(data.removeprefix(_BOM))
        except orjson.JSONDecodeError as error:
            found = f"line {error.lineno}, column {error.colno}: {error.msg}"
            return BrokenFile(Fault(where, "", "bad_json", found))
        if not isinstance(rows, list):
            return BrokenFile(Fault(where, "", "bad_json", "not a list"))
        return cls(path.name, rows)

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, index: int) -> Where:
        return Where(self.name, index + 1)

    def row(self, index: int) -> Any:
        return self.rows[index]


@dataclass(frozen=True, slots=True)
class BrokenFile:
    """A file, or the rest of one, that cannot be read: one row that says why."""

    fault: Fault

    def __len__(self) -> int:
        return 1

    def where(self, index: int) -> Where:  # noqa: ARG002 - there is one row
        return self.fault.where

    def row(self, index: int) -> Any:  # noqa: ARG002 - as above
        raise BadRowError(self.fault)


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """The rows of several files, one after the other. `ends[i]` is the number of rows up to and with file i."""

    files: tuple[RowFile, ...]
    ends: tuple[int, ...]

    @classmethod
    def of(cls, files: Iterable[RowFile], name: str) -> Rows:
        """Chain files; `name` is the dataset's, for the message.

        Raises:
            DatasetError: `dataset_empty`.
        """
        chained = tuple(files)
        ends = tuple(accumulate(len(file) for file in chained))
        if not ends or not ends[-1]:
            raise DatasetError("dataset_empty", name)
        return cls(chained, ends)

    def __len__(self) -> int:
        return self.ends[-1]

    def locate(self, index: int) -> tuple[RowFile, int]:
        """The file that holds the row, and the row's index there."""
        number = bisect.bisect_right(self.ends, range(len(self))[index])
        return self.files[number], index - (self.ends[number] - len(self.files[number]))

    def where(self, index: int) -> Where:
        """The row's place."""
        file, row = self.locate(index)
        return file.where(row)

    def key(self, index: int) -> str:
        """A name that stays the same as long as the files do: `list.jsonl:12`."""
        where = self.where(index)
        return f"{where.file}:{where.row or 0}"

    def raw(self, index: int) -> Any:
        """The row as parsed.

        Raises:
            BadRowError: as `RowFile.row`.
        """
        file, row = self.locate(index)
        return file.row(row)

    def row(self, index: int, model: type[Model]) -> Model:
        """The row as a checked value.

        Raises:
            BadRowError: with everything that does not fit.
        """
        return validate(model, self.raw(index), self.where(index))


def open_rows(path: Path) -> RowFile:
    """A .json list, or else a .jsonl."""
    return JsonListFile.at(path) if path.suffix.lower() == ".json" else JsonlFile.at(path)


def validate(model: type[Model], raw: Any, where: Where) -> Model:
    """A parsed row as a `model`.

    Raises:
        BadRowError: with everything that does not fit.
    """
    if not isinstance(raw, dict):
        raise BadRowError(Fault(where, "", "wrong_type", f"a {type(raw).__name__} where an object belongs"))
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        details = error.errors(include_url=False, include_input=False, include_context=False)
        raise BadRowError(
            *(Fault(where, _field(item["loc"]), _code(item["type"], item["loc"]), item["msg"]) for item in details)
        ) from None


def _field(location: tuple[int | str, ...]) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return text.removeprefix(".")


def _code(kind: str, location: tuple[int | str, ...]) -> Code:
    if location and location[-1] == "role" and kind != "missing":
        return "unknown_role"
    if kind == "missing":
        return "missing_field"
    if kind == "extra_forbidden":
        return "unknown_field"
    if location and location[-1] == "references" and kind == "too_long":
        return "too_many_references"
    return "wrong_type" if kind.endswith("_type") else "invalid_value"


def _bad_json(where: Where, message: str, column: int | None = None) -> BadRowError:
    return BadRowError(Fault(where, "", "bad_json", message if column is None else f"column {column}: {message}"))
