"""Two targets side by side, so that references of one kind must be told apart (DreamO's two-column data)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from workers.training.datasets.faults import DatasetError
from workers.training.datasets.prompts import TWO_COLUMNS, renumbered
from workers.training.datasets.subject200k import Subject200K
from workers.training.records import Pixels, Record, RecordReference

_TASK: Final = "two_column"


@dataclass(frozen=True, slots=True, eq=False)
class TwoColumn:
    """Stitched pairs. The choice of both columns follows from `seed` and the index alone.

    Attributes:
        length: the number of samples; there are far more combinations than anyone trains on.
        same_category: the share of samples whose two subjects are of one category; the paper gives none.
        order: int64 [pairs]: pairs sorted by category. `start`, `size`: the run of each pair's category in it.
    """

    pairs: Subject200K
    length: int
    seed: int
    same_category: float
    order: NDArray[np.int64]
    start: NDArray[np.int64]
    size: NDArray[np.int64]

    @classmethod
    def of(
        cls, pairs: Subject200K, *, length: int | None = None, seed: int = 0, same_category: float = 0.3
    ) -> TwoColumn:
        """Combine `pairs`; `length` defaults to theirs.

        Raises:
            DatasetError: `too_few_pairs`.
        """
        if len(pairs.categories) < 2:
            raise DatasetError("too_few_pairs", pairs.rows.where(0).file, str(len(pairs.categories)))
        order, start, size = _runs(pairs.categories)
        return cls(pairs, len(pairs) if length is None else length, seed, same_category, order, start, size)

    def __len__(self) -> int:
        return self.length

    @property
    def num_rows(self) -> int:
        """As many as samples."""
        return self.length

    def __getitem__(self, index: int) -> Record:
        left, right = self.columns(index)
        first, second = self.pairs[left], self.pairs[right]
        prompt = TWO_COLUMNS.format(
            left=_phrase(renumbered(first.prompt, 1)), right=_phrase(renumbered(second.prompt, 2))
        )
        references = (
            *_shifted(first.references, 1, 0, second.target.shape[1]),
            *_shifted(second.references, 2, first.target.shape[1], 0),
        )
        return Record(self.key(index), _TASK, prompt, references, np.hstack((first.target, second.target)))

    def key(self, index: int) -> str:
        """`LEFT|RIGHT`: the keys of both columns, so that equal combinations share caches."""
        left, right = self.columns(index)
        return f"{self.pairs.key(left)}|{self.pairs.key(right)}"

    def task(self, index: int) -> str:  # noqa: ARG002 - all are alike
        """`two_column`."""
        return _TASK

    def samples_of(self, row: int) -> tuple[Record, ...]:
        """One sample."""
        return (self[row],)

    def columns(self, index: int) -> tuple[int, int]:
        """Indices into `pairs` of the left and the right column; never of one pair."""
        random = np.random.Generator(np.random.Philox(key=[self.seed, range(self.length)[index]]))
        total = len(self.order)
        left = int(random.integers(total))
        start, size = int(self.start[left]), int(self.size[left])
        alike = bool(random.random() < self.same_category)
        if (alike and size > 1) or size == total:
            place = start + int(random.integers(size - 1))
            right = int(self.order[place])
            if right == left:  # the run's last stands in for the pair itself
                right = int(self.order[start + size - 1])
        else:
            place = int(random.integers(total - size))
            right = int(self.order[place if place < start else place + size])
        directions = random.integers(2, size=2)
        return 2 * left + int(directions[0]), 2 * right + int(directions[1])


def _runs(categories: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """(order, start, size), see `TwoColumn`. A pair without a category is alone in its own."""
    names = [name or f"\0{index}" for index, name in enumerate(categories)]
    _unique, numbers, counts = np.unique(names, return_inverse=True, return_counts=True)
    starts = np.cumsum(counts) - counts
    return np.argsort(numbers, kind="stable"), starts[numbers], counts[numbers]


def _phrase(prompt: str) -> str:
    return prompt.strip().rstrip(".")


def _shifted(
    references: tuple[RecordReference, ...], slot: int, before: int, after: int
) -> tuple[RecordReference, ...]:
    """References of one column as those of the whole picture: masks get `before` and `after` empty columns."""

    def widen(mask: Pixels | None) -> Pixels | None:
        return None if mask is None else np.pad(mask, ((0, 0), (before, after)))

    return tuple(replace(each, slot=slot, target_mask=widen(each.target_mask)) for each in references)
