"""Pictures as cameras make them, as far as their statistics go: they compress like photographs, not like noise."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from functools import cache
from itertools import count

import numpy as np
import pybase64
from PIL import Image

SETTINGS = {"jpeg": ("JPEG", 832, {"quality": 88}), "png": ("PNG", 362, {})}
"""Side and encoding with which one takes about 300 kB."""


def photograph(side: int, seed: int) -> Image.Image:
    """Amplitudes that fall with the spatial frequency as those of natural scenes do, in correlated colours."""
    draw = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    frequency[0, 0] = 1.0

    def layer() -> np.ndarray:
        values = np.fft.irfft2(np.fft.rfft2(draw.standard_normal((side, side))) / frequency**1.2, (side, side))
        return (values - values.mean()) / values.std()

    light, warm, green = layer(), layer(), layer()
    channels = (light + 0.35 * warm, light - 0.2 * warm + 0.1 * green, light - 0.35 * green)
    return Image.fromarray((128 + 48 * np.stack(channels, -1)).clip(0, 255).astype(np.uint8))


@cache
def encoded(format: str, seed: int) -> bytes:
    """One of about 300 kB."""
    kind, side, options = SETTINGS[format]
    buffer = io.BytesIO()
    photograph(side, seed).save(buffer, kind, **options)
    return buffer.getvalue()


def distinct(format: str, kinds: int = 12) -> Iterator[bytes]:
    """Pictures without end, no two of the same bytes: of so many kinds, each with its number in a comment."""
    made = [encoded(format, seed) for seed in range(kinds)]
    return (_numbered(made[number % kinds], format, number) for number in count())


def _numbered(data: bytes, format: str, number: int) -> bytes:
    text = f"{number:016d}".encode()
    if format == "jpeg":
        return data[:2] + struct.pack(">BBH", 0xFF, 0xFE, 2 + len(text)) + text + data[2:]
    body = b"tEXtnumber\0" + text
    part = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    return data[:33] + part + data[33:]  # behind IHDR


def data_url(data: bytes, format: str) -> str:
    """As callers send it."""
    return f"data:image/{format};base64,{pybase64.b64encode(data).decode()}"
