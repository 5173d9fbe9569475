"""Of a picture file, what its pixels follow from; the decoder gets to see nothing else.

EXIF, XMP, texts, thumbnails, further pictures and unknown parts stay outside: parsing them is where decoders spend
time and memory without need, and where they break. Of all that only the orientation is read, here.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from workers.picture_headers import SIZED_MARKERS, Format, Part, jpeg_segments, png_chunks, webp_chunks

_PNG_CHUNKS: Final = frozenset({b"IHDR", b"PLTE", b"tRNS", b"iCCP", b"IDAT", b"IEND"})
_CHANNELS: Final = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
"""Samples of a pixel by PNG's kind of colour."""
_ADAM7: Final = (
    (0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2),
)  # fmt: skip
"""Of each pass: the first column and row, and the steps to the next ones."""
_PIECE: Final = 2**18
_EXIF: Final = b"Exif\0\0"
_ICC: Final = b"ICC_PROFILE\0"
_ORIENTATION: Final = 0x0112
_SHORT: Final = 3


@dataclass(frozen=True, slots=True)
class Essence:
    """A file without what its pixels do not need. `orientation`: 1 to 8, as EXIF has it."""

    data: bytes
    orientation: int


def essence(data: bytes, format: Format) -> Essence:
    """What a decoder needs of a file.

    Raises:
        ValueError: its parts are damaged, cut off, or far too many.
    """
    try:
        if format == "png":
            return _png(data)
        if format == "jpeg":
            return _jpeg(data)
        return Essence(data, _first_orientation(data, _exif_of_webp(data)))  # libwebp passes over the rest by itself
    except struct.error as error:
        raise ValueError("the file is cut off") from error


def _png(data: bytes) -> Essence:
    """The chunks that colours depend on, if they are undamaged and hold all rows: Pillow looks at neither."""
    kept = [memoryview(data)[:8]]
    pixels: list[memoryview] = []
    exif: list[Part] = []
    for chunk in png_chunks(data):
        if chunk.name in _PNG_CHUNKS:
            (stated,) = struct.unpack_from(">I", data, chunk.body_end)
            if zlib.crc32(data[chunk.start + 4 : chunk.body_end]) != stated:
                raise ValueError("a chunk is damaged")
            if chunk.name == b"IHDR" and len(kept) > 1:
                raise ValueError("two headers")
            kept.append(memoryview(data)[chunk.start : chunk.end])
            if chunk.name == b"IDAT":
                pixels.append(memoryview(data)[chunk.body : chunk.body_end])
        elif chunk.name == b"eXIf":
            exif.append(chunk)
    if not _inflate_to(pixels, _raw_size(data[16:29])):
        raise ValueError("rows are missing")
    return Essence(b"".join(kept), _first_orientation(data, iter(exif)))


def _raw_size(header: bytes) -> int:
    """Bytes of all rows, each with its filter, before compression (RFC 2083 §2.3), by the body of IHDR."""
    width, height, depth, color, _, _, interlaced = struct.unpack(">IIBBBBB", header)
    if color not in _CHANNELS:
        raise ValueError("no such kind of colour")
    total = 0
    for left, top, right, down in _ADAM7 if interlaced else ((0, 0, 1, 1),):
        columns, rows = -(-(width - left) // right), -(-(height - top) // down)
        if columns > 0 and rows > 0:
            total += rows * (1 + (columns * _CHANNELS[color] * depth + 7) // 8)
    return total


def _inflate_to(pieces: Iterable[memoryview], size: int) -> bool:
    """Whether a zlib stream holds at least `size` bytes; no more than a piece of them is in memory at a time."""
    inflate, left = zlib.decompressobj(), size
    try:
        for piece in pieces:
            for start in range(0, len(piece), _PIECE):
                data: bytes | memoryview = piece[start : start + _PIECE]
                while data and left > 0:
                    left -= len(inflate.decompress(data, _PIECE))
                    data = inflate.unconsumed_tail
        return left - len(inflate.flush()) <= 0 if left > 0 else True
    except zlib.error:
        return False


def _jpeg(data: bytes) -> Essence:
    """Tables, frame and scans; of the application segments those that colours depend on: JFIF, Adobe, the profile."""
    kept = [memoryview(data)[:2]]
    exif: list[Part] = []
    frames = 0
    for segment in jpeg_segments(data):
        marker = segment.name[0]
        frames += marker in SIZED_MARKERS
        if frames > 1:
            raise ValueError("two frame headers")
        application = 0xE0 <= marker <= 0xEF
        profile = marker == 0xE2 and data.startswith(_ICC, segment.body)
        if marker in (0xE0, 0xEE) or profile or not (application or marker == 0xFE):
            kept.append(memoryview(data)[segment.start : segment.end])
        elif marker == 0xE1 and data.startswith(_EXIF, segment.body):
            exif.append(segment)
    return Essence(b"".join(kept), _first_orientation(data, iter(exif)))


def _exif_of_webp(data: bytes) -> Iterator[Part]:
    return (chunk for chunk in webp_chunks(data) if chunk.name == b"EXIF")


def _first_orientation(data: bytes, parts: Iterator[Part]) -> int:
    for part in parts:
        return exif_orientation(data[part.body : part.body_end])
    return 1


def exif_orientation(exif: bytes) -> int:
    """The orientation that a block of EXIF states in its first directory (TIFF 6.0 §2); 1 if it states none."""
    tiff = exif.removeprefix(_EXIF)
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return 1
    try:
        (offset,) = struct.unpack_from(order + "I", tiff, 4)
        (count,) = struct.unpack_from(order + "H", tiff, offset)
        for index in range(count):
            tag, kind, number, value = struct.unpack_from(order + "HHIH", tiff, offset + 2 + 12 * index)
            if tag == _ORIENTATION:
                return value if kind == _SHORT and number == 1 and 1 <= value <= 8 else 1
    except struct.error:
        return 1
    return 1
