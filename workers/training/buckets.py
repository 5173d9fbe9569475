"""Aspect buckets: real pictures of any size brought to sizes the model trains at, cut as little as needed."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import cv2
import numpy as np

from model.preprocessors.prepare import resize_area
from workers.training.records import Pixels, Record, RecordReference

Size = tuple[int, int]
"""(height, width)."""


@cache
def bucket_sizes(resolution: int, cell: int) -> tuple[Size, ...]:
    """Up to 31 sizes of about resolution² pixels, aspects 4^(k/15) from 1:4 to 4:1, snapped to the cell.

    DreamOmni trains on 31 buckets between these aspects and does not list them; at 512 and 1024 all 31 differ.
    """
    sizes: dict[Size, None] = {}
    for step in range(-15, 16):
        aspect = 4 ** (step / 15)
        height = max(cell, round(resolution * aspect**-0.5 / cell) * cell)
        width = max(cell, round(resolution * aspect**0.5 / cell) * cell)
        sizes[height, width] = None
    return tuple(sizes)


def nearest_bucket(height: int, width: int, resolution: int, cell: int) -> Size:
    """The bucket whose aspect is nearest, by ratio."""
    aspect = np.log(width / height)
    return min(bucket_sizes(resolution, cell), key=lambda size: abs(np.log(size[1] / size[0]) - aspect))


def bucketed(record: Record, resolution: int, reference_resolution: int, cell: int) -> Record:
    """The record with its target, its masks and its references at sizes that the model takes."""
    height, width = record.target.shape[:2]
    size = nearest_bucket(height, width, resolution, cell)
    references = tuple(
        RecordReference(
            reference.slot,
            reference.role,
            resize_area(reference.pixels, reference_resolution, cell, slot=reference.slot),
            None if reference.target_mask is None else _fitted(reference.target_mask, size),
        )
        for reference in record.references
    )
    return replace(record, target=_fitted(record.target, size), references=references)


def _fitted(pixels: Pixels, size: Size) -> Pixels:
    """Scaled to cover `size`, the rest cut evenly from both sides."""
    height, width = pixels.shape[:2]
    scale = max(size[0] / height, size[1] / width)
    scaled = (max(size[1], round(width * scale)), max(size[0], round(height * scale)))
    kind = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    resized = cv2.resize(pixels, scaled, interpolation=kind)
    top, left = (resized.shape[0] - size[0]) // 2, (resized.shape[1] - size[1]) // 2
    return np.ascontiguousarray(resized[top : top + size[0], left : left + size[1]], dtype=np.uint8)
