"""Format, size and alpha of a picture from its first bytes alone, before any decoder has seen it.

A decoder allocates what the header promises (a WebP of 34 bytes can promise 4 GiB), so the promise is read
first. Knows PNG, JPEG and WebP.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final, Literal

Format = Literal["png", "jpeg", "webp"]

_PNG: Final = b"\x89PNG\r\n\x1a\n"
_SIZED_MARKERS: Final = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""JPEG's start-of-frame markers: C0–CF without the tables DHT, JPG and DAC."""


@dataclass(frozen=True, slots=True)
class PictureInfo:
    """What a header says. `width` and `height` are pixels as stored, before any EXIF orientation."""

    format: Format
    width: int
    height: int
    has_alpha: bool
    animated: bool = False


def read_header(data: bytes) -> PictureInfo | None:
    """The header of a picture; None if the bytes are not in a known format.

    Raises:
        ValueError: they begin like one, but the header is damaged or cut off.
    """
    try:
        if data.startswith(_PNG):
            return _png(data)
        if data.startswith(b"\xff\xd8\xff"):
            return _jpeg(data)
        if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            return _webp(data)
    except (struct.error, IndexError) as error:
        raise ValueError("the header is cut off") from error
    return None


def _png(data: bytes) -> PictureInfo:
    """IHDR comes first; acTL (animation) and tRNS (alpha) come before the first IDAT."""
    length, kind, width, height, _depth, color = struct.unpack_from(">I4sIIBB", data, 8)
    if kind != b"IHDR" or length != 13:
        raise ValueError("no IHDR")
    names: set[bytes] = set()
    offset = 8
    while offset + 8 <= len(data):
        size, name = struct.unpack_from(">I4s", data, offset)
        names.add(name)
        if name == b"IDAT":
            break
        offset += 12 + size
    return PictureInfo("png", width, height, color in (4, 6) or b"tRNS" in names, b"acTL" in names)


def _jpeg(data: bytes) -> PictureInfo:
    offset = 2
    while True:
        if data[offset] != 0xFF:
            raise ValueError("no marker where one must be")
        marker = data[offset + 1]
        if marker == 0xFF:  # fill byte
            offset += 1
            continue
        if marker == 0x01 or 0xD0 <= marker <= 0xD8:  # markers without a body
            offset += 2
            continue
        if marker in (0xD9, 0xDA):
            raise ValueError("no frame header before the scan")
        if marker in _SIZED_MARKERS:
            height, width = struct.unpack_from(">HH", data, offset + 5)
            return PictureInfo("jpeg", width, height, has_alpha=False)
        offset += 2 + struct.unpack_from(">H", data, offset + 2)[0]


def _webp(data: bytes) -> PictureInfo:
    """Simple lossy (`VP8 `), simple lossless (`VP8L`) or extended (`VP8X`), which states a canvas."""
    kind = data[12:16]
    if kind == b"VP8 ":
        if data[23:26] != b"\x9d\x01\x2a":
            raise ValueError("no key frame")
        width, height = struct.unpack_from("<HH", data, 26)
        return PictureInfo("webp", width & 0x3FFF, height & 0x3FFF, has_alpha=False)
    if kind == b"VP8L":
        if data[20] != 0x2F:
            raise ValueError("no lossless signature")
        (bits,) = struct.unpack_from("<I", data, 21)
        return PictureInfo("webp", (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1, bool(bits >> 28 & 1))
    if kind == b"VP8X":
        (flags,) = struct.unpack_from("<I", data, 20)
        width = int.from_bytes(data[24:27], "little") + 1
        height = int.from_bytes(data[27:30], "little") + 1
        if len(data) < 30:
            raise ValueError("the header is cut off")
        return PictureInfo("webp", width, height, bool(flags & 0x10), bool(flags & 0x02))
    raise ValueError("no picture in the container")
