"""Colours: the ten that prompts name, the continuous ones that only references carry, and distances in CIE Lab.

RGB is sRGB 0 … 255. ΔE is the Euclidean distance in Lab (CIE 1976, D65).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from workers.training.stickerworld.backgrounds import BACKGROUNDS, backdrop
from workers.training.stickerworld.draws import Draws

Lab = NDArray[np.float32]
RGB = tuple[int, int, int]

NAMED: dict[str, RGB] = {
    "red": (215, 35, 40),
    "orange": (245, 135, 25),
    "yellow": (245, 220, 50),
    "green": (40, 150, 60),
    "blue": (35, 75, 215),
    "purple": (125, 45, 170),
    "pink": (245, 135, 190),
    "brown": (115, 65, 30),
    "black": (25, 25, 25),
    "white": (246, 246, 246),
}
"""GenEval's ten."""

BINS = tuple(NAMED)
SHEET: RGB = (255, 255, 255)
"""What references lie on."""

CONTRAST = 24.0
"""Least ΔE between a sticker's colours and what it lies on, and between its two colours."""

_STEP = 8
_WHITE_POINT = np.array([0.95047, 1.0, 1.08883])
_TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)


def lab(rgb: ArrayLike) -> Lab:
    """[..., 3] RGB to [..., 3] Lab."""
    value = np.asarray(rgb, dtype=np.float64) / 255
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    xyz = linear @ _TO_XYZ.T / _WHITE_POINT
    f = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    fx, fy, fz = f[..., 0], f[..., 1], f[..., 2]
    return np.stack([116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)], axis=-1).astype(np.float32)


def difference(one: Lab, other: Lab) -> NDArray[np.float32]:
    """ΔE over the last axis of two Lab arrays."""
    return np.sqrt(np.square(one - other).sum(axis=-1))


def second(rgb: ArrayLike) -> NDArray[np.float32]:
    """[..., 3]: the second colour of a texture: a dark shade of a light colour, a light tint of a dark one."""
    value = np.asarray(rgb, dtype=np.float32)
    light = value @ np.array([0.299, 0.587, 0.114], dtype=np.float32) > 105
    return np.where(light[..., None], value * 0.38, value + 0.62 * (255 - value))


@lru_cache(maxsize=65536)
def colour_bin(rgb: RGB) -> str:
    """The named colour that is nearest to the middle of this colour's cell of 8³ values."""
    middle = [channel // _STEP * _STEP + _STEP // 2 for channel in rgb]
    return BINS[int(difference(lab(middle), lab(list(NAMED.values()))).argmin())]


@dataclass(frozen=True, slots=True)
class Palette:
    """Usable colours by background.

    Attributes:
        cells: (background, bin) → corner colours of the usable cells, possibly none; each also shows on white.
        named: background → names of colours that show on it.
    """

    cells: dict[tuple[str, str], tuple[RGB, ...]]
    named: dict[str, tuple[str, ...]]

    def draw(self, draws: Draws, background: str, bin_name: str) -> RGB:
        """A colour of that bin that shows on that background and on white."""
        red, green, blue = draws.pick(self.cells[background, bin_name])
        return red + draws.below(_STEP), green + draws.below(_STEP), blue + draws.below(_STEP)


@cache
def palette() -> Palette:
    """The table of usable colours; made at first use."""
    levels = np.arange(0, 256, _STEP)
    corners = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)
    middles = corners + _STEP // 2
    nearest = np.stack([difference(lab(middles), lab(colour)) for colour in NAMED.values()]).argmin(axis=0)
    usable = _shows(middles, _ground(None))
    cells: dict[tuple[str, str], tuple[RGB, ...]] = {}
    named: dict[str, tuple[str, ...]] = {}
    for background in BACKGROUNDS:
        ground = _ground(background)
        shows = usable & _shows(middles, ground)
        for number, name in enumerate(BINS):
            chosen = corners[shows & (nearest == number)]
            cells[background, name] = tuple((int(r), int(g), int(b)) for r, g, b in chosen)
        named[background] = tuple(np.array(BINS)[_shows(np.array(list(NAMED.values())), ground)].tolist())
    return Palette(cells, named)


def shows(colour: RGB, background: str) -> bool:
    """Whether a colour by itself stands out from a background."""
    return bool((difference(lab(colour), _ground(background)) >= CONTRAST).all())


def _ground(background: str | None) -> Lab:
    """[n, 3]: colours of a background from dark to light, or of the sheet."""
    if background is None:
        return lab([SHEET])
    pixels = backdrop(background, 72, 72).reshape(-1, 3)
    order = pixels.sum(axis=1, dtype=np.int64).argsort(kind="stable")
    return lab(pixels[order[np.linspace(0, len(order) - 1, 5).astype(int)]])


def _shows(rgb: NDArray[np.int64], ground: Lab) -> NDArray[np.bool_]:
    main, other = lab(rgb), lab(second(rgb))
    shows = difference(main, other) >= CONTRAST
    for colour in ground:
        shows &= (difference(main, colour) >= CONTRAST) & (difference(other, colour) >= CONTRAST)
    return shows
