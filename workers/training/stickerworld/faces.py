"""Procedural faces: what makes a person (kept from picture to picture) and what changes (the expression).

A face is drawn in a box whose [-1, 1] plane holds head, hair and a neck down to the lower edge.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from workers.training.stickerworld.colours import RGB
from workers.training.stickerworld.shapes import Inside, Plane, Predicate, supersampled

HEADS = ("round", "square", "long")
HAIR_STYLES = ("short", "long", "mohawk", "bun")
EYES = (0.2, 0.32, 0.44)
SKINS: tuple[RGB, ...] = ((255, 222, 196), (228, 182, 142), (190, 138, 98), (140, 92, 58), (88, 56, 38))
HAIRS: tuple[RGB, ...] = (
    (30, 26, 26),
    (105, 62, 28),
    (232, 198, 80),
    (190, 70, 20),
    (165, 165, 172),
    (45, 80, 205),
    (40, 150, 80),
    (235, 90, 170),
    (120, 50, 170),
)
EXPRESSIONS = ("smiling", "frowning", "surprised")

DARK: RGB = (28, 24, 30)
LIPS: RGB = (170, 35, 50)

IDENTITY = ("head", "skin", "hair", "hair_style", "eyes", "glasses", "beard")
"""The fields of `Face` that a reference carries; `expression` is the prompt's."""


@dataclass(frozen=True, slots=True)
class Face:
    """A person with an expression: 3 · 5 · 9 · 4 · 3 · 2 · 2 = 6,480 people. `eyes` is half their distance."""

    head: str
    skin: RGB
    hair: RGB
    hair_style: str
    eyes: float
    glasses: bool
    beard: bool
    expression: str


@lru_cache(maxsize=4096)
def face_layers(
    head: str, hair_style: str, eyes: float, glasses: bool, beard: bool, expression: str, side: int
) -> NDArray[np.float32]:
    """[side, side, 4]: the share of skin, hair, dark and lips in each pixel; what remains is the ground. Read-only."""
    skin, hair, dark, lips = range(4)
    face = _head(head)
    layers: list[tuple[int, Predicate]] = [(skin, _neck)]
    if hair_style == "long":
        layers.insert(0, (hair, _oval(0.86, 0.92, 0.02, below=0.72)))
    layers += [(skin, face), *((hair, part) for part in _hair(hair_style, face))]
    if beard:
        layers.append((hair, lambda u, v: face(u, v) & (v > 0.3)))
    layers += [(dark, _disc(sign * eyes, 0.0, 0.12)) for sign in (-1, 1)]
    if glasses:
        layers += [(dark, _frame(sign * eyes)) for sign in (-1, 1)]
        layers.append((dark, lambda u, v: (np.abs(v) < 0.05) & (np.abs(u) < 0.72)))
    layers.append((lips, _mouth(expression)))
    shares = np.zeros((side, side, 4), dtype=np.float32)
    for slot, predicate in layers:
        cover = supersampled(predicate, side)[..., None]
        shares = shares * (1 - cover)
        shares[..., slot] += cover[..., 0]
    shares.setflags(write=False)
    return shares


def _head(kind: str) -> Predicate:
    width, height, power = {"round": (0.68, 0.72, 2), "square": (0.62, 0.7, 6), "long": (0.5, 0.82, 2.4)}[kind]
    return lambda u, v: np.abs(u / width) ** power + np.abs((v - 0.06) / height) ** power <= 1


def _hair(style: str, face: Predicate) -> list[Predicate]:
    def cap(u: Plane, v: Plane) -> Inside:
        return face(u / 1.12, v / 1.06) & (v < -0.3)

    if style == "mohawk":
        return [lambda u, v: (np.abs(u) < 0.2) & (v < -0.3) & (v > -0.98)]
    if style == "bun":
        return [cap, _disc(0.0, -0.74, 0.26)]
    return [cap]


def _neck(u: Plane, v: Plane) -> Inside:
    return (np.abs(u) < 0.22) & (v > 0.4)


def _oval(width: float, height: float, middle: float, below: float) -> Predicate:
    return lambda u, v: ((u / width) ** 2 + ((v - middle) / height) ** 2 <= 1) & (v < below)


def _disc(x: float, y: float, radius: float) -> Predicate:
    return lambda u, v: (u - x) ** 2 + (v - y) ** 2 <= radius**2


def _frame(x: float) -> Predicate:
    def inside(u: Plane, v: Plane) -> Inside:
        far = np.maximum(np.abs(u - x), np.abs(v))
        return (far < 0.27) & (far > 0.18)

    return inside


def _mouth(expression: str) -> Predicate:
    bend: dict[str, Callable[[Plane], Plane]] = {
        "smiling": lambda u: 0.58 - 1.7 * u**2,
        "frowning": lambda u: 0.4 + 1.7 * u**2,
    }
    if expression == "surprised":
        return lambda u, v: (u / 0.15) ** 2 + ((v - 0.5) / 0.19) ** 2 <= 1
    line = bend[expression]
    return lambda u, v: (np.abs(v - line(u)) < 0.085) & (np.abs(u) < 0.34)
