"""Batches with one thing wrong, for checks that must notice."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from model.packing import ReferenceTokens
from workers.training.batches import Batch, Example

Masks = Mapping[tuple[int, int], Tensor]


def each(batch: Batch, change: Callable[[Example], Example]) -> Batch:
    return replace(batch, examples=tuple(change(example) for example in batch.examples))


def swapped(batch: Batch) -> Masks:
    return {(n, 3 - slot if (n, 3 - slot) in batch.masks else slot): mask for (n, slot), mask in batch.masks.items()}


def shifted(batch: Batch) -> Masks:
    return {k: mask.reshape(batch.examples[k[0]].grid).roll(1, 1).flatten() for k, mask in batch.masks.items()}


def turned(batch: Batch) -> Masks:
    return {k: mask.reshape(batch.examples[k[0]].grid).T.flatten() for k, mask in batch.masks.items()}


def inverted(batch: Batch) -> Masks:
    return {key: 1 - mask for key, mask in batch.masks.items()}


def reordered(batch: Batch) -> Masks:
    last = len(batch.examples) - 1
    return {(last - number, slot): mask for (number, slot), mask in batch.masks.items()}


def first(thin: ReferenceTokens, whole: ReferenceTokens) -> ReferenceTokens:
    """As few tokens, but always the same ones."""
    count = len(thin.tokens)
    return replace(thin, kept=torch.arange(count), tokens=whole.tokens[:count])


def moved(thin: ReferenceTokens, whole: ReferenceTokens) -> ReferenceTokens:
    """The right tokens, each one place further."""
    assert thin.kept is not None
    return replace(thin, kept=(thin.kept + 1) % len(whole.tokens))
