"""What can be wrong with training data, and what to do about each: the codes that `dreamserve dataset check` prints.

DatasetError   the dataset as a whole cannot be opened
BadRowError    one row cannot become a sample; holds everything wrong with it
UnusableFileError  one file; internal, ends as a fault of the row that names it
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal

from model.roles import PLACEHOLDERS, Role

Code = Literal[
    "all_filtered",
    "bad_json",
    "dataset_empty",
    "duplicate_key",
    "duplicate_slot",
    "file_missing",
    "file_unreadable",
    "image_too_large",
    "image_too_narrow",
    "image_too_thin",
    "image_undecodable",
    "image_unsupported",
    "invalid_value",
    "mask_empty",
    "mask_size",
    "member_not_regular",
    "missing_field",
    "path_escape",
    "path_missing",
    "placeholder_without_reference",
    "pyarrow_missing",
    "shard_damaged",
    "too_few_pairs",
    "too_many_references",
    "unknown_field",
    "unknown_format",
    "unknown_role",
    "wrong_type",
]

REMEDIES: Final[Mapping[Code, str]] = MappingProxyType(
    {
        "all_filtered": "Every row was filtered out: lower the minimum quality, or score the pairs anew.",
        "bad_json": "Write one JSON object per line (.jsonl) or one list of objects (.json), in UTF-8.",
        "dataset_empty": "There are no rows: check the path, and that the lists or shards lie directly in it.",
        "duplicate_key": "Give each sample a key of its own, across all files: messages name it.",
        "duplicate_slot": "Give each reference of a sample a slot of its own.",
        "file_missing": "Put the file there, or correct its name; names are relative to PATH, or to --images.",
        "file_unreadable": "Make it a regular file that this user may read.",
        "image_too_large": "Scale the picture down: at most 4096 × 4096 pixels and 20 MiB.",
        "image_too_narrow": "Use the original wide picture, not a scaled or cropped one.",
        "image_too_thin": "Crop the picture nearer to a square: one side is over a thousand times the other.",
        "image_undecodable": "The picture is damaged or cut off: fetch or write it again.",
        "image_unsupported": "Convert it to a PNG, JPEG or WebP picture of one frame.",
        "invalid_value": "Use a value within the documented bounds.",
        "mask_empty": "The mask marks nothing: paint the subject white, or leave the mask out.",
        "mask_size": "Make the mask exactly as high and wide as the target.",
        "member_not_regular": "Pack plain files only: no links, devices or sparse files.",
        "missing_field": "Add the field.",
        "path_escape": "Keep files inside the directory, named relative to it; links out of it are not followed.",
        "path_missing": "Give a file or directory that exists and that this user may read.",
        "placeholder_without_reference": "Add that reference, or take the placeholder out of the prompt.",
        "pyarrow_missing": "Install pyarrow (pip install pyarrow), or unpack the parquet files: see docs/datasets.md.",
        "shard_damaged": "The tar file is damaged or cut off: fetch or write it again. Uncompress a compressed one.",
        "too_few_pairs": "Two columns need at least two pairs.",
        "too_many_references": f"Use at most {len(PLACEHOLDERS)} references in a sample.",
        "unknown_field": "Check the spelling, or remove it.",
        "unknown_format": "Say which format it is with --format; docs/datasets.md describes them.",
        "unknown_role": f"Use one of: {', '.join(Role)}.",
        "wrong_type": "Use the documented JSON type; nothing is coerced.",
    }
)
"""What to do, by code."""


@dataclass(frozen=True, slots=True)
class Where:
    """A place in a dataset. `row` counts from 1: the line of a .jsonl, the element of a list, the sample of a shard."""

    file: str
    row: int | None = None


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong.

    Attributes:
        field: which field of the row, like `references[0].role`, or which member of a shard; empty for the whole row.
        found: what was there: a file's name, a size, a parser's words. Comes from the data; escape it when printing.
    """

    where: Where
    field: str
    code: Code
    found: str = ""

    @property
    def remedy(self) -> str:
        """What to do about it."""
        return REMEDIES[self.code]

    def __str__(self) -> str:
        place = self.where.file if self.where.row is None else f"{self.where.file}:{self.where.row}"
        what = " ".join(part for part in (self.field, self.found and f"({self.found})") if part)
        return f"{place}: {self.code}: {what + ': ' if what else ''}{self.remedy}"


class DatasetError(Exception):
    """The dataset cannot be opened at all."""

    def __init__(self, code: Code, file: str, found: str = "") -> None:
        self.fault = Fault(Where(file), "", code, found)
        super().__init__(str(self.fault))


class BadRowError(Exception):
    """A row that cannot become a sample; `faults` has everything that is wrong with it, never empty."""

    def __init__(self, *faults: Fault) -> None:
        self.faults = faults
        super().__init__("\n".join(str(fault) for fault in faults))

    def __reduce__(self) -> tuple[type[BadRowError], tuple[Fault, ...]]:
        # Loader processes send it home; the default would call it with the message.
        return (BadRowError, self.faults)


class UnusableFileError(Exception):
    """One file that cannot be read."""

    def __init__(self, code: Code, found: str) -> None:
        super().__init__(code, found)
        self.code: Code = code
        self.found = found
