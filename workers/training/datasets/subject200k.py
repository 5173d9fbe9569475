"""Subject200K (OminiControl): wide pictures of two tiles that show one subject; each pair serves in both directions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from model.roles import Role
from workers.training.datasets.faults import BadRowError, DatasetError, UnusableFileError
from workers.training.datasets.folder import Folder, row_files
from workers.training.datasets.parquet import ParquetFile
from workers.training.datasets.prompts import place_after
from workers.training.datasets.rows import ForeignModel, RowFile, Rows, open_rows
from workers.training.datasets.source import LIMITS, Assembly
from workers.training.records import Pixels, Record, RecordReference

_TASK: Final = "single_subject"
_BLANK: Final = np.zeros((0, 0, 3), np.uint8)


@dataclass(frozen=True, slots=True)
class Tiles:
    """Where the two pictures lie in the wide one, in pixels; the defaults are the published ones."""

    side: int = 512
    padding: int = 8

    def crop(self, wide: Pixels, number: int) -> Pixels:
        """Tile 0 (left) or 1 (right) of [h, w, 3], as [side, side, 3]."""
        left = self.padding + number * (self.side + self.padding)
        return np.ascontiguousarray(wide[self.padding : self.padding + self.side, left : left + self.side])

    @property
    def needed(self) -> tuple[int, int]:
        """The least height and width of the wide picture."""
        return self.padding + self.side, 2 * (self.padding + self.side)


class Quality(ForeignModel):
    """Scores from 0 to 5; a missing one counts as 0."""

    composite_structure: int | None = Field(None, alias="compositeStructure")
    object_consistency: int | None = Field(None, alias="objectConsistency")
    image_quality: int | None = Field(None, alias="imageQuality")

    @property
    def lowest(self) -> int:
        """The worst of the three."""
        return min(self.composite_structure or 0, self.object_consistency or 0, self.image_quality or 0)


class Description(ForeignModel):
    """`description_0` tells of the left tile, `description_1` of the right one."""

    item: str = Field(min_length=1)
    description_0: str = Field(min_length=1)
    description_1: str = Field(min_length=1)
    category: str | None = None
    description_valid: bool | None = None


class Judgement(ForeignModel):
    """What the filter looks at."""

    quality_assessment: Quality | None = None
    description: Description


class ParquetPicture(ForeignModel):
    """A picture inside a parquet file, as Hugging Face's `datasets` writes it."""

    content: bytes | None = Field(None, alias="bytes")
    path: str | None = None


class ParquetRow(Judgement):
    """A row of the distributed form."""

    image: ParquetPicture


class FileRow(Judgement):
    """A row of the unpacked form. `mask_0` and `mask_1`, ours: files that mark the subject in each tile."""

    image: str
    mask_0: str | None = None
    mask_1: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Subject200K:
    """Pairs as single-subject records, two for each pair that passes the filter.

    Attributes:
        kept: int64 [pairs]: the rows that pass, and those that cannot be judged and fail when read.
        categories: of each pair; empty where none is given.
        placeholders: whether `[ref#1]` is put after the subject's noun, where the description has it.
    """

    rows: Rows
    images: Folder
    kept: NDArray[np.int64]
    categories: tuple[str, ...]
    tiles: Tiles
    placeholders: bool

    @classmethod
    def at(
        cls,
        path: Path,
        *,
        images: Path | None = None,
        minimum_quality: int = 5,
        tiles: Tiles | None = None,
        placeholders: bool = True,
    ) -> Subject200K:
        """Open a directory or file: parquet, or .jsonl/.json rows beside their pictures.

        Args:
            path: the directory, or one of its files.
            images: where names of pictures start; default: beside the rows.
            minimum_quality: pairs with any of the three scores below it are left out, as are invalid descriptions.
            tiles: the layout of the wide pictures; default: the published one.
            placeholders: see above.

        Raises:
            DatasetError: `path_missing`, `dataset_empty`, `pyarrow_missing`, `all_filtered`.
        """
        files = row_files(path, ".parquet", ".jsonl", ".json")
        rows = Rows.of((_open(file) for file in files), str(path))
        kept: list[int] = []
        categories: list[str] = []
        for index, raw in enumerate(_judged(rows)):
            passes, category = _judge(raw, minimum_quality)
            if passes:
                kept.append(index)
                categories.append(category)
        if not kept:
            found = f"{len(rows)} rows, none with all three scores at {minimum_quality} or above"
            raise DatasetError("all_filtered", str(path), found)
        folder = Folder.at(images or path)
        return cls(rows, folder, np.array(kept, np.int64), tuple(categories), tiles or Tiles(), placeholders)

    @property
    def num_rows(self) -> int:
        """Filtered ones too."""
        return len(self.rows)

    def __len__(self) -> int:
        return 2 * len(self.kept)

    def __getitem__(self, index: int) -> Record:
        pair, direction = divmod(range(len(self))[index], 2)
        return self._samples(int(self.kept[pair]))[direction]

    def key(self, index: int) -> str:
        """`FILE:ROW/DIRECTION`."""
        pair, direction = divmod(range(len(self))[index], 2)
        return f"{self.rows.key(int(self.kept[pair]))}/{direction}"

    def task(self, index: int) -> str:  # noqa: ARG002 - all are alike
        """`single_subject`."""
        return _TASK

    def samples_of(self, row: int) -> tuple[Record, ...]:
        """Both directions; none if the row is filtered out."""
        place = int(np.searchsorted(self.kept, row))
        return self._samples(row) if place < len(self.kept) and self.kept[place] == row else ()

    def _samples(self, index: int) -> tuple[Record, Record]:
        assembly = Assembly(self.rows.where(index))
        raw = self.rows.raw(index)
        embedded = isinstance(raw, dict) and isinstance(raw.get("image"), dict)
        row = self.rows.row(index, ParquetRow if embedded else FileRow)
        tiles = self._tiles(assembly, row.image)
        masks: tuple[Pixels | None, Pixels | None] = (None, None)
        if isinstance(row, FileRow):
            masks = self._mask(assembly, "mask_0", row.mask_0), self._mask(assembly, "mask_1", row.mask_1)
        made = [
            Record(
                key=f"{self.rows.key(index)}/{direction}",
                task=_TASK,
                prompt=self._prompt(row.description, direction),
                references=(RecordReference(1, Role.SUBJECT, tiles[1 - direction], masks[direction]),),
                target=tiles[direction],
            )
            for direction in range(2)
        ]
        try:
            first = assembly.finish(made[0])
        except BadRowError as error:
            # Both directions share their pictures: what is wrong with them is said once.
            raise BadRowError(*dict.fromkeys(error.faults)) from None
        return first, assembly.finish(made[1])

    def _prompt(self, description: Description, direction: int) -> str:
        text = (description.description_0, description.description_1)[direction]
        return place_after(text, description.item, 1) if self.placeholders else text

    def _tiles(self, assembly: Assembly, image: ParquetPicture | str) -> tuple[Pixels, Pixels]:
        wide = assembly.picture("image", self._load(image))
        if not wide.size:
            return _BLANK, _BLANK
        height, width = self.tiles.needed
        if wide.shape[0] < height or wide.shape[1] < width:
            found = f"{wide.shape[1]}×{wide.shape[0]}, two tiles need {width}×{height}"
            assembly.fault("image", "image_too_narrow", found)
            return _BLANK, _BLANK
        return self.tiles.crop(wide, 0), self.tiles.crop(wide, 1)

    def _load(self, image: ParquetPicture | str) -> Callable[[], bytes]:
        def load() -> bytes:
            if isinstance(image, str):
                return self.images.read(image, LIMITS.max_bytes)
            if image.content is not None:
                return image.content
            if image.path is None:
                raise UnusableFileError("file_missing", "neither bytes nor a path")
            return self.images.read(image.path, LIMITS.max_bytes)

        return load

    def _mask(self, assembly: Assembly, name: str, file: str | None) -> Pixels | None:
        return None if file is None else assembly.mask(name, lambda: self.images.read(file, LIMITS.max_bytes))


def _open(path: Path) -> RowFile:
    return ParquetFile.at(path) if path.suffix.lower() == ".parquet" else open_rows(path)


def _judged(rows: Rows) -> Iterator[Any]:
    """Each row's text, pictures left alone; None for a row that cannot be read."""
    for file in rows.files:
        if isinstance(file, ParquetFile):
            try:
                yield from file.columns("quality_assessment", "description")
            except BadRowError:
                yield from [None] * len(file)
            continue
        for index in range(len(file)):
            try:
                yield file.row(index)
            except BadRowError:
                yield None


def _judge(raw: Any, minimum: int) -> tuple[bool, str]:
    """Whether the row passes, and its category. What does not parse passes, to be refused aloud when read."""
    quality = raw.get("quality_assessment") if isinstance(raw, dict) else None
    try:
        lowest = Quality.model_validate(quality or {}).lowest
        description = raw.get("description") if isinstance(raw, dict) else None
        if isinstance(raw, dict) and lowest < minimum:
            return False, ""
        judged = Description.model_validate(description)
    except ValidationError:
        return True, ""
    return judged.description_valid is not False, judged.category or ""
