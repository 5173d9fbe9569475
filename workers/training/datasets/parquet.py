"""Rows of parquet files, through pyarrow where it is installed; the project does without it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from workers.training.datasets.faults import BadRowError, DatasetError, Fault, Where
from workers.training.datasets.rows import BrokenFile, RowFile


@dataclass(frozen=True, slots=True, eq=False)
class ParquetFile:
    """A parquet file. `ends` int64 [row groups]: the number of rows up to and with each group."""

    path: Path
    ends: NDArray[np.int64]

    @classmethod
    def at(cls, path: Path) -> RowFile:
        """Read the file's footer.

        Raises:
            DatasetError: `pyarrow_missing`.
        """
        if find_spec("pyarrow") is None:
            raise DatasetError("pyarrow_missing", path.name)
        try:
            footer = import_module("pyarrow.parquet").read_metadata(path)
            groups = [footer.row_group(index).num_rows for index in range(footer.num_row_groups)]
        except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
            return BrokenFile(Fault(Where(path.name), "", "file_unreadable", _first_line(error)))
        return cls(path, np.cumsum(groups, dtype=np.int64))

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def where(self, index: int) -> Where:
        return Where(self.path.name, index + 1)

    def row(self, index: int) -> Any:
        group = int(np.searchsorted(self.ends, index, side="right"))
        start = int(self.ends[group - 1]) if group else 0
        return self._ask(index, lambda: _group(self.path, group).slice(index - start, 1).to_pylist()[0])

    def columns(self, *names: str) -> list[Any]:
        """All rows, without their pictures: only the columns `names`, those that exist.

        Raises:
            BadRowError: the file is damaged.
        """

        def read() -> list[Any]:
            parquet = import_module("pyarrow.parquet")
            there = [name for name in names if name in parquet.read_schema(self.path).names]
            return parquet.read_table(self.path, columns=there).to_pylist()

        return self._ask(0, read)

    def _ask(self, index: int, read: Callable[[], Any]) -> Any:
        try:
            return read()
        except (OSError, ValueError, NotImplementedError) as error:
            raise BadRowError(Fault(self.where(index), "", "file_unreadable", _first_line(error))) from None


@lru_cache(maxsize=2)
def _group(path: Path, group: int) -> Any:
    """A row group's table. Neighbours are asked for together, and a group is what parquet reads anyhow."""
    return import_module("pyarrow.parquet").ParquetFile(path).read_row_group(group)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:200]
