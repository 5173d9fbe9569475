"""Which format a dataset is in, and opening it by name."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Final, Literal, get_args

from workers.training.datasets.combined import Combined
from workers.training.datasets.faults import BadRowError, DatasetError
from workers.training.datasets.folder import row_files
from workers.training.datasets.native import Native
from workers.training.datasets.rows import open_rows
from workers.training.datasets.source import EvaluationItem, Source
from workers.training.datasets.subject200k import Subject200K
from workers.training.datasets.two_column import TwoColumn
from workers.training.datasets.uno import UnoList, UnoPairs
from workers.training.datasets.x2i import X2i
from workers.training.records import Record

Format = Literal["native", "subject200k", "x2i", "uno"]
FORMATS: Final[tuple[Format, ...]] = get_args(Format)

_PROBED_ROWS: Final = 100
"""How far into each file a row is looked for that tells the format."""


def detect(path: Path) -> Format:
    """The format, by the files' endings and the fields of the first rows that parse.

    Raises:
        DatasetError: `path_missing`, `dataset_empty`, `unknown_format`.
    """
    files = row_files(path, ".tar", ".parquet", ".jsonl", ".json")
    for file in files:
        match file.suffix.lower():
            case ".tar":
                return "native"
            case ".parquet":
                return "subject200k"
            case _:
                for row in _first_rows(file):
                    known = _by_fields(row)
                    if known is not None:
                        return known
    raise DatasetError("unknown_format", str(path))


def open_training(path: Path, format: Format, *, images: Path | None = None) -> Source[Record]:
    """A dataset to train on, with the defaults of its format. Subject200K also gives two-column samples.

    Args:
        path: a directory, or one of its files of rows.
        format: see `detect`.
        images: where the names of pictures start; default: beside the rows.

    Raises:
        DatasetError: as the format's `at`.
    """
    match format:
        case "native":
            return Native.at(path, images=images)
        case "subject200k":
            pairs = Subject200K.at(path, images=images)
            return Combined.of(pairs, TwoColumn.of(pairs)) if len(pairs.categories) > 1 else pairs
        case "x2i":
            return X2i.at(path, images=images)
        case "uno":
            return UnoPairs.at(path, images=images)


def open_for_check(
    path: Path, format: Format, *, images: Path | None = None
) -> Source[Record] | Source[EvaluationItem]:
    """As `open_training`, but a UNO list whose first row has no target is one for evaluation."""
    if format == "subject200k":
        return Subject200K.at(path, images=images)
    if format != "uno":
        return open_training(path, format, images=images)
    pairs = UnoPairs.at(path, images=images)
    first = next((row for row in _first_rows(row_files(path, ".json", ".jsonl")[0]) if isinstance(row, dict)), {})
    return pairs if "image_tgt_path" in first else UnoList.at(path, images=images)


def _first_rows(path: Path) -> Iterator[Any]:
    rows = open_rows(path)
    for index in islice(range(len(rows)), _PROBED_ROWS):
        try:
            yield rows.row(index)
        except BadRowError:
            continue


def _by_fields(row: Any) -> Format | None:
    if not isinstance(row, dict):
        return None
    if "image_paths" in row:
        return "uno"
    if "output_image" in row or "instruction" in row:
        return "x2i"
    if "quality_assessment" in row or "description" in row:
        return "subject200k"
    return "native" if "target" in row and "prompt" in row else None
