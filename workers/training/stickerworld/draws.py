"""Random draws of one record: a counter-based stream keyed by (seed, index), so any worker can make any record."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")
_BLOCK = 64


class Draws:
    """A stream of uniform numbers, drawn in blocks: one numpy call a number would cost more than the drawing."""

    __slots__ = ("_generator", "_next", "_values")

    def __init__(self, seed: int, index: int) -> None:
        """Start the stream of record `index`; both must fit 64 bits, unsigned."""
        if not (0 <= seed < 2**64 and 0 <= index < 2**64):
            raise ValueError("seed and index must be 0 to 2**64 - 1")
        self._generator = np.random.Generator(np.random.Philox(key=seed | index << 64))
        self._values: list[float] = []
        self._next = _BLOCK

    def uniform(self) -> float:
        """In [0, 1)."""
        if self._next == _BLOCK:
            self._values = self._generator.random(_BLOCK).tolist()
            self._next = 0
        value = self._values[self._next]
        self._next += 1
        return value

    def chance(self, probability: float) -> bool:
        """True with that probability."""
        return self.uniform() < probability

    def below(self, count: int) -> int:
        """One of 0 … count - 1."""
        return int(self.uniform() * count)

    def between(self, low: int, high: int) -> int:
        """One of low … high, both included."""
        return low + self.below(high - low + 1)

    def pick(self, values: Sequence[T]) -> T:
        """One of them, each as likely."""
        return values[int(self.uniform() * len(values))]

    def shuffled(self, values: Sequence[T], count: int | None = None) -> list[T]:
        """`count` of them (all by default) in random order, none twice."""
        pool = list(values)
        count = len(pool) if count is None else count
        for place in range(count):
            other = place + self.below(len(pool) - place)
            pool[place], pool[other] = pool[other], pool[place]
        return pool[:count]

    def weighted(self, pairs: Sequence[tuple[T, float]]) -> T:
        """One of the values, each as likely as its weight."""
        left = self.uniform() * sum(weight for _, weight in pairs)
        for value, weight in pairs:
            left -= weight
            if left < 0:
                return value
        return next(value for value, weight in reversed(pairs) if weight > 0)
