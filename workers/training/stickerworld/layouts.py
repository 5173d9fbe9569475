"""Where things go: cells of a 3×3 grid that have names, and boxes that do not overlap."""

from __future__ import annotations

from dataclasses import dataclass

from workers.training.stickerworld.draws import Draws
from workers.training.stickerworld.scenes import Box
from workers.training.stickerworld.settings import Settings

PLACES = (
    "top left",
    "top",
    "top right",
    "left",
    "centre",
    "right",
    "bottom left",
    "bottom",
    "bottom right",
)
"""Names of the cells, row by row."""

COLUMNS = (3, 4, 5)
"""The cells whose names a figure takes: it stands on the ground in that column."""

_ATTEMPTS = 40


@dataclass(frozen=True, slots=True)
class Spot:
    """Where one thing goes: its box, the cell its centre has to lie in, and that cell's name."""

    box: Box
    zone: Box
    place: str


def lay_out(draws: Draws, settings: Settings, sides: list[int]) -> list[Spot]:
    """Spots for stickers of these sides (at most three) in one square panel; boxes do not overlap."""
    for _ in range(_ATTEMPTS):
        cells = draws.shuffled(range(9), len(sides))
        spots = [_spot(draws, settings, cell, side) for cell, side in zip(cells, sides, strict=True)]
        if all(_apart(one.box, other.box) for k, one in enumerate(spots) for other in spots[:k]):
            return spots
    # Two large ones in neighbouring cells may never fit: corners always do, a box being less than half the side.
    corners = draws.shuffled((0, 2, 6, 8), len(sides))
    fixed = [_zone(settings.size, corner) for corner in corners]
    return [
        Spot(_corner_box(settings.size, corner, side), zone, PLACES[corner])
        for corner, zone, side in zip(corners, fixed, sides, strict=True)
    ]


def figure_spots(draws: Draws, settings: Settings) -> tuple[Spot, Spot]:
    """Head and garment of a figure that stands on the lower edge, in one of three columns."""
    side, size = settings.reference_size, settings.size
    cell = draws.pick(COLUMNS)
    left = _on_grid(size, side, cell % 3)
    head, garment = (Box(size - k * side, left, size - (k - 1) * side, left + side) for k in (2, 1))
    return Spot(head, head, PLACES[cell]), Spot(garment, garment, PLACES[cell])


def _zone(size: int, cell: int) -> Box:
    row, column = divmod(cell, 3)
    edges = [round(size * k / 3) for k in range(4)]
    return Box(edges[row], edges[column], edges[row + 1], edges[column + 1])


def _spot(draws: Draws, settings: Settings, cell: int, side: int) -> Spot:
    zone, size = _zone(settings.size, cell), settings.size
    if settings.placement == "grid9":
        top, left = (_on_grid(size, side, place) for place in divmod(cell, 3))
    else:
        top, left = (_free(draws, size, side, *span) for span in ((zone.top, zone.bottom), (zone.left, zone.right)))
    return Spot(Box(top, left, top + side, left + side), zone, PLACES[cell])


def _on_grid(size: int, side: int, place: int) -> int:
    """Where a box centred on the cell starts, moved into the picture if need be."""
    return min(max(round(size * (2 * place + 1) / 6 - side / 2), 0), size - side)


def _free(draws: Draws, size: int, side: int, start: int, end: int) -> int:
    """Where a box starts whose centre is drawn well inside start … end and that lies in the picture."""
    # A crescent's middle is not its box's: what is seen must lie in the cell as clearly as the box does.
    inset = side // 8 + 1
    low, high = max(start + inset - side // 2, 0), min(end - inset - side // 2, size - side)
    return draws.between(low, high) if low < high else min(max(low, 0), size - side)


def _corner_box(size: int, corner: int, side: int) -> Box:
    top, left = (0 if place == 0 else size - side for place in divmod(corner, 3))
    return Box(top, left, top + side, left + side)


def _apart(one: Box, other: Box) -> bool:
    return one.bottom <= other.top or other.bottom <= one.top or one.right <= other.left or other.right <= one.left
