"""Several sources as one."""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from itertools import accumulate

from workers.training.datasets.source import Source
from workers.training.records import Record


@dataclass(frozen=True, slots=True, eq=False)
class Combined:
    """Sources one after the other. Keys are the sources' own: they must not share any.

    Attributes:
        ends: the number of samples up to and with each source. `row_ends`: of rows.
    """

    sources: tuple[Source[Record], ...]
    ends: tuple[int, ...]
    row_ends: tuple[int, ...]

    @classmethod
    def of(cls, *sources: Source[Record]) -> Combined:
        """Chain at least one source."""
        ends = tuple(accumulate(len(source) for source in sources))
        return cls(sources, ends, tuple(accumulate(source.num_rows for source in sources)))

    @property
    def num_rows(self) -> int:
        """Of all sources."""
        return self.row_ends[-1]

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> Record:
        source, own = self._locate(index)
        return source[own]

    def key(self, index: int) -> str:
        """As the source has it."""
        source, own = self._locate(index)
        return source.key(own)

    def task(self, index: int) -> str:
        """As the source has it."""
        source, own = self._locate(index)
        return source.task(own)

    def samples_of(self, row: int) -> tuple[Record, ...]:
        """As the source has it."""
        number = bisect.bisect_right(self.row_ends, range(self.num_rows)[row])
        return self.sources[number].samples_of(row - (self.row_ends[number - 1] if number else 0))

    def _locate(self, index: int) -> tuple[Source[Record], int]:
        place = range(len(self))[index]
        number = bisect.bisect_right(self.ends, place)
        return self.sources[number], place - (self.ends[number - 1] if number else 0)
