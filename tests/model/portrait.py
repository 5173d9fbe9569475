"""A drawn portrait that face detectors find, with what is where in it."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

SUPERSAMPLING = 2
BACKGROUND = (150, 170, 190)
CLOTHES = (60, 60, 120)

Colour = tuple[int, int, int]
Ellipse = tuple[float, float, float, float, Colour]

# (x, y, radius x, radius y, colour) around the point between the eyes and the mouth, painted in this order.
_BODY: tuple[Ellipse, ...] = ((0, 140, 40, 60, (190, 150, 125)), (0, 240, 150, 80, CLOTHES))
_HAIR: Ellipse = (0, -15, 88, 125, (60, 40, 30))
_FACE: Ellipse = (0, 10, 72, 98, (225, 185, 160))
_FEATURES: tuple[Ellipse, ...] = (
    (0, -40, 60, 35, (232, 195, 170)),
    *((side * 40, 42, 22, 18, (235, 195, 172)) for side in (-1, 1)),
    *((side * 32, -7, 20, 10, (175, 130, 110)) for side in (-1, 1)),
    *((side * 32, -5, 14, 6, (245, 245, 240)) for side in (-1, 1)),
    *((side * 32, -5, 6, 6, (40, 30, 25)) for side in (-1, 1)),
    *((side * 32, -20, 20, 4, (70, 45, 35)) for side in (-1, 1)),
    (0, 15, 8, 26, (238, 200, 178)),
    (0, 36, 14, 6, (190, 140, 118)),
    (0, 68, 26, 7, (165, 70, 70)),
    (0, 82, 18, 4, (200, 155, 132)),
)
_EYES = ((-32.0, -5.0), (32.0, -5.0))


@dataclass(frozen=True, slots=True)
class Portrait:
    """A picture, the eyes' centres in it, and its head."""

    pixels: NDArray[np.uint8]  # [h, w, 3]
    eyes: NDArray[np.float32]  # [2, 2] of (x, y), left first
    head: NDArray[np.uint8]  # [h, w], 255 where face or hair is


def draw_portrait(
    height: int = 400,
    width: int = 360,
    centre: tuple[float, float] = (180, 190),
    scale: float = 1.0,
    degrees: float = 0.0,
    onto: NDArray[np.uint8] | None = None,
) -> Portrait:
    """Draw a frontal portrait; `degrees` tilts the head, `onto` is a picture to add it to."""
    fine = (width * SUPERSAMPLING, height * SUPERSAMPLING)
    if onto is None:
        canvas = np.full((fine[1], fine[0], 3), BACKGROUND, dtype=np.uint8)
    else:
        canvas = cv2.resize(onto, fine, interpolation=cv2.INTER_LINEAR).astype(np.uint8)
    head = np.zeros(canvas.shape[:2], dtype=np.uint8)
    turn = np.exp(1j * np.deg2rad(degrees)) * scale

    def place(x: float, y: float) -> complex:
        return complex(*centre) + complex(x, y) * turn

    def paint(target: NDArray[np.uint8], ellipse: Ellipse, colour: tuple[int, ...]) -> None:
        x, y, radius_x, radius_y, _ = ellipse
        point = place(x, y) * SUPERSAMPLING
        radii = (round(radius_x * scale * SUPERSAMPLING), round(radius_y * scale * SUPERSAMPLING))
        cv2.ellipse(target, (round(point.real), round(point.imag)), radii, degrees, 0, 360, colour, -1)

    for ellipse in (_HAIR, *_BODY, _FACE, *_FEATURES):
        paint(canvas, ellipse, ellipse[4])
    paint(head, _HAIR, (255,))
    for ellipse in _BODY:
        paint(head, ellipse, (0,))
    paint(head, _FACE, (255,))
    soft = cv2.GaussianBlur(canvas, (0, 0), 2.0 * SUPERSAMPLING)
    eyes = np.array([[place(*eye).real, place(*eye).imag] for eye in _EYES], dtype=np.float32)
    size = (width, height)
    return Portrait(
        cv2.resize(soft, size, interpolation=cv2.INTER_AREA).astype(np.uint8),
        eyes,
        cv2.resize(head, size, interpolation=cv2.INTER_AREA).astype(np.uint8),
    )
