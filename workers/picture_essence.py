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
_PALETTE: Final = 3
_LAST_FILTER: Final = 4
_HUFFMAN: Final = (0xC0, 0xC1, 0xC2)
"""JPEG's baseline, extended and progressive frames."""
_PIECE: Final = 2**18
_EXIF: Final = b"Exif\0\0"
_ICC: Final = b"ICC_PROFILE\0"
_ORIENTATION: Final = 0x0112
_SHORT: Final = 3


@dataclass(frozen=True, slots=True)
class Essence:
    """A file without what its pixels do not need.

    Attributes:
        orientation: 1 to 8, as EXIF has it.
        proven: decoding it cannot fail, as far as that has been looked at here already; see `_Rows.proven`.
    """

    data: bytes
    orientation: int
    proven: bool = False


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
    names: list[bytes] = []
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
            names.append(chunk.name)
            if chunk.name == b"IDAT":
                pixels.append(memoryview(data)[chunk.body : chunk.body_end])
        elif chunk.name == b"eXIf":
            exif.append(chunk)
    rows = _Rows(data[16:29])
    rows.read(pixels)
    if rows.left > 0:
        raise ValueError("rows are missing")
    if rows.color == _PALETTE and b"PLTE" not in names:
        raise ValueError("the palette is missing")
    plain = names == [b"IHDR", *[b"iCCP"] * (b"iCCP" in names), *[b"IDAT"] * len(pixels), b"IEND"]
    return Essence(b"".join(kept), _first_orientation(data, iter(exif)), proven=plain and rows.proven)


class _Rows:
    """The rows of a PNG, each with its filter in front, inflated once by pieces and not kept.

    `left`: bytes that are missing. `proven`: every row begins with a filter that exists, and with the last row the
    stream ends, its checksum right; then all that a decoder still has to do to grey or true colour is to add bytes.
    """

    def __init__(self, header: bytes) -> None:
        """From the body of IHDR (RFC 2083 §2.3).

        Raises:
            ValueError: there is no such kind of colour.
        """
        width, height, depth, self.color, _, _, interlaced = struct.unpack(">IIBBBBB", header)
        if self.color not in _CHANNELS:
            raise ValueError("no such kind of colour")
        bits = _CHANNELS[self.color] * depth
        self.size = 0
        for left, top, right, down in _ADAM7 if interlaced else ((0, 0, 1, 1),):
            columns, rows = -(-(width - left) // right), -(-(height - top) // down)
            if columns > 0 and rows > 0:
                self.size += rows * (1 + (columns * bits + 7) // 8)
        self.left = self.size
        self.proven = header[10:] == bytes(3) and self.color != _PALETTE and depth in (8, 16)
        self._stride = 1 + (width * bits + 7) // 8

    def read(self, pieces: Iterable[memoryview]) -> None:
        """Inflate as much as there should be; no more than a piece of it is in memory at a time."""
        inflate = zlib.decompressobj()
        try:
            for piece in pieces:
                for start in range(0, len(piece), _PIECE):
                    data: bytes | memoryview = piece[start : start + _PIECE]
                    while data and self.left >= 0:
                        self._take(inflate.decompress(data, _PIECE))
                        data = inflate.unconsumed_tail
            if self.left > 0:
                self._take(inflate.flush())
        except zlib.error:
            self.proven = False
        self.proven = self.proven and self.left == 0 and inflate.eof and not inflate.unused_data

    def _take(self, data: bytes) -> None:
        done = self.size - self.left
        filters = data[-done % self._stride :: self._stride]
        self.proven = self.proven and (not filters or max(filters) <= _LAST_FILTER)
        self.left -= len(data)


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


def evenly_sampled(data: bytes, format: Format) -> bool:
    """Whether a picture is a JPEG that libjpeg decodes alike at every scale: Huffman codes, 8 bits, and colours whose
    resolutions divide one another. Others it refuses at some scales, or makes larger than it was asked to.
    """
    frame = (
        next((part for part in jpeg_segments(data) if part.name[0] in SIZED_MARKERS), None)
        if format == "jpeg"
        else None
    )
    if frame is None or frame.name[0] not in _HUFFMAN:
        return False
    depth, _, _, count = struct.unpack_from(">BHHB", data, frame.body)
    sampling = data[frame.body + 7 : frame.body_end : 3]
    across, down = [each >> 4 for each in sampling], [each & 15 for each in sampling]
    if depth != 8 or len(sampling) != count or 0 in across or 0 in down:
        return False
    return not any(max(across) % each for each in across) and not any(max(down) % each for each in down)


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
