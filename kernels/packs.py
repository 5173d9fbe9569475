"""Where the sequences of a pack lie and what their tokens may see, made once for all layers and steps of a layout.

Shapes: R sequences one after the other, S tokens in all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import torch
from torch import Tensor

ROWS: Final = 128
"""Tokens of a tile. What a program of a kernel works on is a tile or an equal part of one."""


@dataclass(frozen=True, slots=True)
class Visibility:
    """Which tokens of its own sequence a token attends to: q sees k iff bit kind[k] of sees[q] is set.

    A token that sees nothing gets zeros.

    Attributes:
        kind: int32 [S], 0 … 31. sees: int32 [S].
    """

    kind: Tensor
    sees: Tensor

    def mask(self, start: int, end: int) -> Tensor:
        """[s, s] of the tokens start … end; true where a row (query) sees a column (key)."""
        return ((self.sees[start:end, None] >> self.kind[None, start:end]) & 1).bool()


@dataclass(frozen=True, slots=True)
class Pack:
    """Sequences of different lengths, one after the other.

    Attributes:
        boundaries: R + 1 growing offsets; the first is 0, the last S.
        cu_seqlens: the same, int32 [R + 1] on the device.
        offsets: the same, int32 [R + 1] on the host. Graphs take a tensor as it comes; numbers would be part of them.
        longest: tokens of the longest sequence.
        tiles: int32 [n, 3], the first token of each tile and the bounds of its sequence. Tiles never span sequences.
            Those of long sequences come first: their programs run longest.
    """

    boundaries: tuple[int, ...]
    cu_seqlens: Tensor
    offsets: Tensor
    longest: int
    visibility: Visibility | None
    tiles: Tensor

    @property
    def alone(self) -> bool:
        """Whether there is only one sequence. Asked of a tensor's shape: a compiled graph then fits any length."""
        return self.cu_seqlens.shape[0] == 2


def make_pack(boundaries: Sequence[int], device: torch.device | str, visibility: Visibility | None = None) -> Pack:
    """A pack of the sequences between neighbouring boundaries. Copies to the device once, reads nothing back.

    Raises:
        ValueError: the boundaries do not start at 0 or do not grow, or the visibility is not of as many tokens.
    """
    spans = list(pairwise(boundaries))
    if not spans or boundaries[0] != 0 or any(start >= end for start, end in spans):
        raise ValueError("boundaries are offsets that start at 0 and grow")
    if visibility is not None and not len(visibility.kind) == len(visibility.sees) == boundaries[-1]:
        raise ValueError("kind and sees are given for each token of the pack")
    return Pack(
        boundaries=tuple(boundaries),
        cu_seqlens=torch.tensor(boundaries, dtype=torch.int32, device=device),
        offsets=torch.tensor(boundaries, dtype=torch.int32),
        longest=max(end - start for start, end in spans),
        visibility=visibility,
        tiles=torch.tensor(list(_tiles(spans)), dtype=torch.int32, device=device),
    )


def _tiles(spans: Sequence[tuple[int, int]]) -> Iterable[tuple[int, int, int]]:
    for start, end in sorted(spans, key=lambda span: span[0] - span[1]):
        yield from ((first, start, end) for first in range(start, end, ROWS))
