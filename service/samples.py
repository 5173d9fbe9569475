"""Pictures of the demonstration: two references, and the sheet that shows them beside the result."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

SAMPLES = Path("docs/samples")
TILE = 288
"""Pixels of a tile's side on the contact sheet."""
_MARGIN = 24
_CAPTION = 28
_INK = (34, 34, 34)


def star(side: int = 256) -> bytes:
    """A red five-pointed star sticker with a white rim on pale yellow; PNG."""
    image = Image.new("RGB", (side, side), (250, 236, 190))
    draw = ImageDraw.Draw(image)
    for scale, colour in ((0.46, (255, 255, 255)), (0.40, (214, 40, 46))):
        points = [_star_corner(corner, side, scale) for corner in range(10)]
        draw.polygon(points, fill=colour)
    return _png(image)


def mug(side: int = 256) -> bytes:
    """A white mug with blue stripes on white; PNG."""
    image = Image.new("RGB", (side, side), (255, 255, 255))
    draw = ImageDraw.Draw(image)
    unit = side / 16
    draw.ellipse((9.5 * unit, 5.5 * unit, 14 * unit, 11 * unit), outline=(30, 74, 160), width=round(unit))
    body = (3 * unit, 3 * unit, 11 * unit, 13.5 * unit)
    rim = max(1, round(unit / 3))
    draw.rounded_rectangle(body, radius=unit, fill=(238, 243, 250), outline=(30, 74, 160), width=rim)
    for row in (4.5, 7.5, 10.5):
        draw.rectangle((3 * unit, row * unit, 11 * unit, (row + 1.5) * unit), fill=(44, 104, 206))
    return _png(image)


def sample(name: str) -> bytes:
    """`docs/samples/<name>.png` where it exists, else the drawing of that name (`star` or `mug`)."""
    file = SAMPLES / f"{name}.png"
    return file.read_bytes() if file.is_file() else {"star": star, "mug": mug}[name]()


def contact_sheet(tiles: Sequence[tuple[str, bytes]]) -> bytes:
    """Pictures side by side over their captions, small ones enlarged pixel by pixel; PNG."""
    width = _MARGIN + len(tiles) * (TILE + _MARGIN)
    sheet = Image.new("RGB", (width, TILE + _CAPTION + 2 * _MARGIN), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=16)
    for index, (caption, data) in enumerate(tiles):
        left = _MARGIN + index * (TILE + _MARGIN)
        with Image.open(io.BytesIO(data)) as picture:
            tile = _fit(picture.convert("RGB"))
        sheet.paste(tile, (left + (TILE - tile.width) // 2, _MARGIN + (TILE - tile.height) // 2))
        draw.text((left, _MARGIN + TILE + 8), caption, fill=_INK, font=font)
    return _png(sheet)


def _fit(picture: Image.Image) -> Image.Image:
    """Enlarged by the largest whole factor that fits, or scaled down to fit."""
    factor = TILE // max(picture.size)
    if factor >= 1:
        return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    picture.thumbnail((TILE, TILE), Image.Resampling.LANCZOS)
    return picture


def _star_corner(corner: int, side: int, scale: float) -> tuple[float, float]:
    """Corner 0 points up; odd corners lie inside."""
    radius = side * scale * (1.0 if corner % 2 == 0 else 0.45)
    angle = math.pi * (corner / 5 - 0.5)
    return side / 2 + radius * math.cos(angle), side * 0.52 + radius * math.sin(angle)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
