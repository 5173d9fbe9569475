"""Finding a sticker in a picture without a network: its pixels, colours, shape and texture.

H, W picture; masks are booleans. Nothing here knows what the sticker should be: that is for `scores`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from workers.training.oracle.palettes import Palette, dominant
from workers.training.stickerworld.colours import difference, lab
from workers.training.stickerworld.scenes import Box
from workers.training.stickerworld.shapes import solid
from workers.training.stickerworld.textures import TEXTURES, pattern

Pixels = NDArray[np.uint8]
Values = NDArray[np.float32]
Mask = NDArray[np.bool_]

SEEN = 14.0
"""Least ΔE from the background of a pixel that something stands on."""

SPECK = 14
"""Components of fewer pixels are noise."""

_ONE = np.ones((3, 3), dtype=np.uint8)


@dataclass(frozen=True, slots=True, eq=False)
class Fit:
    """A shape laid over a mask: intersection over union, and the box."""

    iou: float
    top: int
    left: int
    side: int


@dataclass(frozen=True, slots=True, eq=False)
class Finding:
    """What stands at one place.

    Attributes:
        mask: [H, W].
        centre: row and column of the middle of its extent.
        extent: pixels of the longer side of its extent.
        fits: the best fit of each shape at the mask's own size.
        shape: the best of them.
    """

    mask: Mask
    centre: tuple[float, float]
    extent: int
    palette: Palette
    fits: Mapping[str, Fit]
    shape: str
    texture: str


def components(picture: Pixels, ground: Values) -> list[Mask]:
    """[H, W] masks of what stands before the background, connected, specks left out.

    A pixel belongs to something when it differs from the background; one that touches the background only when it
    differs at least half as much as its neighbours do, which puts a blurred edge where the sharp one was.
    """
    change = cv2.medianBlur(difference(lab(picture), lab(np.clip(ground, 0, 255))), 3)
    outside = cv2.erode(change, _ONE) <= SEEN
    seen = (change > SEEN) & ~(outside & (change <= 0.5 * cv2.dilate(change, _ONE)))
    count, labels = cv2.connectedComponents(seen.astype(np.uint8), connectivity=8)
    masks = [labels == number for number in range(1, count)]
    return [mask for mask in masks if mask.sum() >= SPECK]


def centroid(mask: Mask) -> tuple[float, float]:
    """Row and column of the middle of a mask's extent."""
    rows, columns = np.nonzero(mask)
    return (int(rows.min()) + int(rows.max()) + 1) / 2, (int(columns.min()) + int(columns.max()) + 1) / 2


def standing_in(things: Iterable[Mask], zones: Sequence[Box], margin: float) -> list[Mask | None]:
    """What stands in each zone, as one mask: a thing belongs to the zone nearest to its middle, if near enough."""
    groups: list[list[Mask]] = [[] for _ in zones]
    for thing in things:
        distances = [zone.distance(*centroid(thing)) for zone in zones]
        nearest = min(range(len(zones)), key=lambda number: distances[number])
        if distances[nearest] <= margin:
            groups[nearest].append(thing)
    return [np.logical_or.reduce(group) if group else None for group in groups]


def measure(picture: Pixels, ground: Values, rough: Mask, shapes: Iterable[str]) -> Finding | None:
    """What stands where `rough` says; None when too little is left once its edge is drawn exactly."""
    palette = dominant(picture[_core(rough)])
    mask = _refined(picture, ground, rough, palette)
    if mask.sum() < SPECK:
        return None
    palette = dominant(picture[_core(mask)])
    rows, columns = np.nonzero(mask)
    extent = int(max(np.ptp(rows), np.ptp(columns))) + 1
    fits = {shape: fit(mask, shape, _sides(shape, extent)) for shape in shapes}
    shape = max(fits, key=lambda name: fits[name].iou)
    texture, mixed = _texture(picture, mask, palette, fits[shape])
    return Finding(mask, centroid(mask), extent, mixed, fits, shape, texture)


def fit(mask: Mask, shape: str, sides: Sequence[int]) -> Fit:
    """The best place of a shape over a mask, among boxes of these sides centred on it, give or take a pixel."""
    row, column = centroid(mask)
    area, pad = float(mask.sum()), max(sides) + 2
    canvas = np.pad(mask, pad).astype(np.float32)
    best = Fit(-1.0, 0, 0, 0)
    for side in sides:
        model, middle = _model(shape, side)
        top, left = round(row - middle[0]) - 1, round(column - middle[1]) - 1
        around = canvas[top + pad : top + pad + side + 2, left + pad : left + pad + side + 2]
        shared = sliding_window_view(around, (side, side)).reshape(9, -1) @ model
        ious = shared / (area + model.sum() - shared)
        place = int(ious.argmax())
        if ious[place] > best.iou:
            best = Fit(float(ious[place]), top + place // 3, left + place % 3, side)
    return best


@lru_cache(maxsize=1024)
def _model(shape: str, side: int) -> tuple[Values, tuple[float, float]]:
    """The shape's pixels as [side · side] ones and zeros, and the middle of their extent."""
    return solid(shape, side).astype(np.float32).ravel(), centroid(solid(shape, side))


@lru_cache(maxsize=64)
def extent_share(shape: str, side: int) -> float:
    """How much of its box's side a shape spans, along the longer side of its extent."""
    rows, columns = np.nonzero(solid(shape, side))
    return float(max(np.ptp(rows), np.ptp(columns)) + 1) / side


def _sides(shape: str, extent: int) -> list[int]:
    """Sides to try. Blur takes more off the points of a star than it adds to a square."""
    side = round(extent / extent_share(shape, 48))
    return [max(side + change, 6) for change in (-1, 0, 1, 2)]


def _core(rough: Mask) -> Mask:
    """The mask without its edge, unless that leaves next to nothing."""
    inner = _eroded(rough)
    return inner if inner.sum() >= SPECK else rough


def _eroded(mask: Mask) -> Mask:
    return cv2.erode(np.pad(mask, 1).astype(np.uint8), _ONE)[1:-1, 1:-1] > 0


def _closed(mask: Mask) -> Mask:
    return cv2.morphologyEx(np.pad(mask, 2).astype(np.uint8), cv2.MORPH_CLOSE, _ONE)[2:-2, 2:-2] > 0


def _refined(picture: Pixels, ground: Values, rough: Mask, palette: Palette) -> Mask:
    """Pixels at least half covered by one of the sticker's colours, seen as a mixture of that with the background.

    Where two colours of a texture meet, their mixture may look like the background: inside, `rough` knows better.
    """
    # A faint stripe along the edge of a strong one is not seen at first: look two pixels farther.
    near = cv2.dilate(rough.astype(np.uint8), _ONE, iterations=2) > 0
    pixels, behind = picture[near].astype(np.float32), ground[near]
    shares, residuals = list[Values](), list[Values]()
    for colour in palette.colours:
        towards = colour - behind
        share = ((pixels - behind) * towards).sum(axis=-1) / np.maximum(np.square(towards).sum(axis=-1), 1)
        bounded = np.clip(share, 0, 1)
        shares.append(bounded)
        residuals.append(np.square(pixels - behind - bounded[:, None] * towards).sum(axis=-1))
    nearest = np.stack(residuals).argmin(axis=0)
    mask = np.zeros_like(rough)
    mask[near] = np.take_along_axis(np.stack(shares), nearest[None], axis=0)[0] >= 0.5
    mask |= _eroded(rough)
    return mask | (_closed(mask) & rough)


def _texture(picture: Pixels, mask: Mask, palette: Palette, at: Fit) -> tuple[str, Palette]:
    """The pattern that explains most of the light and dark inside the mask; plain where there is little to explain.

    With it comes the palette, sharpened: where stripes are as thin as pixels no pixel is pure, but the pattern says how
    much of each colour every pixel has.
    """
    if len(palette.colours) == 1:
        return "plain", palette
    rows, columns = np.nonzero(mask)
    pixels = picture[rows, columns].astype(np.float32)
    along = (pixels - pixels.mean(axis=0)) @ (palette.colours[1] - palette.colours[0])
    places = [(rows - at.top + y, columns - at.left + x) for y in (-1, 0, 1) for x in (-1, 0, 1)]
    best = max(
        (
            (_explained(along, share), texture, share)
            for texture in TEXTURES
            if texture != "plain"
            for y, x in places
            for share in [pattern(texture, at.side)[_inside(y, at.side), _inside(x, at.side)]]
        ),
        key=lambda one: one[0],
    )
    if best[0] <= 0.25 * float(np.square(along).sum()):
        return "plain", palette
    return best[1], palette.sharpened(pixels, best[2])


def _inside(places: NDArray[np.int64], side: int) -> NDArray[np.int64]:
    return np.clip(places, 0, side - 1)


def _explained(along: Values, share: Values) -> float:
    """Sum of squares that a linear fit on `share` takes away."""
    centred = share - share.mean()
    return float((along @ centred) ** 2 / (np.square(centred).sum() + 1e-6))
