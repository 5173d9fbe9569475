"""Which background, in which style, a picture is on: the nearest of all templates.

P pixels of one panel. Errors are mean absolute differences in levels, 0 … 255, each pixel's cut at `_CUT` so that what
stands before the background counts little.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray

from workers.training.stickerworld.backgrounds import BACKGROUNDS, backdrop
from workers.training.stickerworld.scenes import Panel, Scene
from workers.training.stickerworld.styles import STYLES, stylise

Pixels = NDArray[np.uint8]
Values = NDArray[np.float32]

TOLERANCE = 16.0
"""Largest error at which a background counts as right; noise of sigma 6 makes 5."""

TIE = 0.5
"""Templates within this of the best are equally right: some styles leave some backgrounds the same."""

_CUT = 48.0
_BLURS = (0.5, 0.8, 1.2)


@dataclass(frozen=True, slots=True)
class Ground:
    """What a panel's background was taken for.

    Attributes:
        background, style: the nearest template; `style` None is none.
        right: the expected background is as near as the nearest, and near enough.
        style_right: some template in the expected style is as near as the nearest.
    """

    panel: Panel
    background: str
    style: str | None
    right: bool
    style_right: bool


def recognise(scene: Scene, picture: Pixels, panel: Panel) -> Ground:
    """Compare one panel of a picture with all backgrounds, and in a styled scene with all their styles."""
    window = smoothed(picture[:, panel.left : panel.left + panel.width])
    styles = (None,) if scene.style is None else (None, *STYLES)
    shape = window.shape[0], window.shape[1]
    errors = {
        (background, style): _error(window, _template(background, style, *shape))
        for style in styles
        for background in BACKGROUNDS
    }
    best = min(errors, key=lambda template: errors[template])
    behind = scene.id_map[:, panel.left : panel.left + panel.width] == 0
    own = _error(window[behind], _template(panel.background, best[1], *shape)[behind])
    as_near = min(errors[panel.background, style] for style in styles) <= errors[best] + TIE
    in_style = min(errors[background, scene.style] for background in BACKGROUNDS) <= errors[best] + TIE
    return Ground(panel, best[0], best[1], as_near and own <= TOLERANCE, in_style)


def behind(scene: Scene, picture: Pixels, grounds: Sequence[Ground]) -> Values:
    """[H, W, 3]: the recognised background of the whole picture, as blurred as the picture is, and as light."""
    height = picture.shape[0]
    sharp = np.concatenate(
        [stylise(backdrop(one.background, height, one.panel.width), one.style) for one in grounds], axis=1
    ).astype(np.float32)
    free = cv2.erode((scene.id_map == 0).astype(np.uint8), np.ones((3, 3), dtype=np.uint8)) > 0
    blurred = [sharp, *(_blurred(sharp, sigma) for sigma in _BLURS)]
    values = min(blurred, key=lambda candidate: _error(picture[free], candidate[free]))
    for one in grounds:
        columns = slice(one.panel.left, one.panel.left + one.panel.width)
        offset = np.median((picture[:, columns] - values[:, columns])[free[:, columns]], axis=0)
        values[:, columns] += np.clip(offset, -20, 20)
    return values


def smoothed(picture: Pixels | Values) -> Values:
    """[H, W, 3]: softened, so that a slightly blurred picture is as near to its template as a sharp one."""
    return _blurred(picture.astype(np.float32), 0.8)


@lru_cache(maxsize=512)
def _template(background: str, style: str | None, height: int, width: int) -> Values:
    return smoothed(stylise(backdrop(background, height, width), style))


def _blurred(values: Values, sigma: float) -> Values:
    return cv2.GaussianBlur(values, (0, 0), sigma).astype(np.float32)


def _error(window: Pixels | Values, template: Values) -> float:
    return float(np.minimum(np.abs(window - template).mean(axis=-1), _CUT).mean())
