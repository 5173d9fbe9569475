"""The one or two colours of a set of pixels."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from workers.training.stickerworld.colours import difference, lab

Pixels = NDArray[np.uint8]
Values = NDArray[np.float32]

TWO = 14.0
"""Least ΔE between two colours that are not taken for one: blur and noise make less."""

_SMALL = 0.1
_ROUNDS = 8


@dataclass(frozen=True, slots=True, eq=False)
class Palette:
    """The colours that something has.

    Attributes:
        colours: [n, 3] RGB, n = 1 or 2, the one with more pixels first.
        shares: [n], summing to 1.
        pure: [m, 3]: colours that no pixel need have, estimated from how two are mixed.
    """

    colours: Values
    shares: Values
    pure: Values = field(default_factory=lambda: np.empty((0, 3), dtype=np.float32))

    def error(self, colour: tuple[int, int, int], least_share: float = 0.2) -> float:
        """ΔE to `colour` from the nearest that is dominant: holds at least that share of the pixels."""
        dominant = np.concatenate([self.colours[self.shares >= least_share], self.pure])
        return float(difference(lab(dominant), lab(colour)).min())

    def sharpened(self, pixels: Values, shares: Values) -> Palette:
        """With the first of two colours estimated from pixels [n, 3], each holding shares [n] of the second.

        Not where the second holds nearly all.
        """
        centred = shares - shares.mean()
        slope = centred @ (pixels - pixels.mean(axis=0)) / (np.square(centred).sum() + 1e-6)
        pure = pixels.mean(axis=0) - shares.mean() * slope
        if shares.mean() > 1 - 0.2:
            return self
        return replace(self, pure=np.clip(pure, 0, 255)[None].astype(np.float32))


def dominant(pixels: Pixels) -> Palette:
    """The colours of pixels [n, 3]: two medians, or one where they are alike or one holds nearly all."""
    values = pixels.astype(np.float32)
    centred = values - values.mean(axis=0)
    axis = np.linalg.svd(centred, full_matrices=False)[2][0]
    along = centred @ axis
    second = along > (along.min() + along.max()) / 2
    for _ in range(_ROUNDS):
        if not 0 < second.sum() < len(second):
            break
        centres = values[~second].mean(axis=0), values[second].mean(axis=0)
        distances = [np.square(values - centre).sum(axis=1) for centre in centres]
        changed = distances[1] < distances[0]
        if (changed == second).all():
            break
        second = changed
    share = float(second.mean())
    if min(share, 1 - share) >= _SMALL:
        colours = np.stack([_purer(values[side], values[~side].mean(axis=0)) for side in (~second, second)])
        if difference(*lab(colours)) >= TWO:
            order = [1, 0] if share > 0.5 else [0, 1]
            shares = np.array([1 - share, share], dtype=np.float32)
            return Palette(colours[order], shares[order])
    return Palette(np.median(values, axis=0)[None], np.ones(1, dtype=np.float32))


def _purer(values: Values, other: Values) -> Values:
    """The median of the half that is farther from the other colour: a blur mixes the two where they meet."""
    distances = np.square(values - other).sum(axis=1)
    return np.median(values[distances >= np.median(distances)], axis=0)
