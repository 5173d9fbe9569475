"""Pictures of the demonstration: two stickers to refer to, and the sheet that shows them beside the result."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from workers.training.stickerworld.looks import Sticker, alone

SAMPLES = Path("docs/samples")
TILE = 288
"""Pixels of a tile's side on the contact sheet."""
_MARGIN = 24
_CAPTION = 28
_INK = (34, 34, 34)


def star(side: int = 240) -> bytes:
    """A red star with dots, on white; PNG."""
    return _sticker(Sticker("star", "dots", (206, 44, 50)), side)


def ring(side: int = 240) -> bytes:
    """A blue ring with diagonal stripes, on white; PNG."""
    return _sticker(Sticker("ring", "diagonal", (44, 92, 204)), side)


def sample(name: str) -> bytes:
    """`docs/samples/<name>.png` where it exists, else the drawing of that name (`star` or `ring`)."""
    file = SAMPLES / f"{name}.png"
    return file.read_bytes() if file.is_file() else {"star": star, "ring": ring}[name]()


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


def _sticker(look: Sticker, side: int) -> bytes:
    return _png(Image.fromarray(alone(look, side)))


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
