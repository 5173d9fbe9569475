"""What a picture file says before any decoder has seen it: format, size, alpha, orientation, and of what parts it is.

A decoder allocates what the header promises (a WebP of 34 bytes can promise 4 GiB) and does as much work as there are
parts (a JPEG of 200 kB can ask for 2000 passes over 16 million pixels), so both are read first. Knows PNG (RFC 2083),
JPEG (ITU T.81) and WebP (RFC 9649).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

Format = Literal["png", "jpeg", "webp"]

_PNG: Final = b"\x89PNG\r\n\x1a\n"
SIZED_MARKERS: Final = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""JPEG's start-of-frame markers: C0–CF without the tables DHT, JPG and DAC."""
_MARKER: Final = re.compile(rb"\xff+([^\xff])", re.DOTALL)
_MARKER_IN_SCAN: Final = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]", re.DOTALL)
"""Inside entropy-coded data, where FF 00 is a byte and FF D0–D7 are restarts."""

MOST_PARTS: Final = 20_000
"""Chunks of a PNG or WebP, segments of a JPEG. A PNG of 20 MiB in libpng's chunks of 8 KiB has 2560."""
MOST_SCANS: Final = 50
"""Of a progressive JPEG; encoders write about ten."""


@dataclass(frozen=True, slots=True)
class PictureInfo:
    """What a header says. `width` and `height` are pixels as stored, before any EXIF orientation."""

    format: Format
    width: int
    height: int
    has_alpha: bool
    animated: bool = False


@dataclass(frozen=True, slots=True)
class Part:
    """A chunk or segment: `data[start:end]` with its frame, `data[body:body_end]` without."""

    name: bytes
    start: int
    body: int
    body_end: int
    end: int


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


def png_chunks(data: bytes) -> Iterator[Part]:
    """The chunks, IEND being the last.

    Raises:
        ValueError: too many; they are cut off; there is no IEND.
    """
    offset = len(_PNG)
    for _ in range(MOST_PARTS):
        if offset + 12 > len(data):
            raise ValueError("the file is cut off")
        size, name = struct.unpack_from(">I4s", data, offset)
        end = offset + 12 + size
        if end > len(data):
            raise ValueError("the file is cut off")
        yield Part(name, offset, offset + 8, end - 4, end)
        if name == b"IEND":
            return
        offset = end
    raise ValueError("too many chunks")


def jpeg_segments(data: bytes) -> Iterator[Part]:
    """The segments from SOI to EOI, which some cameras leave out; that of a scan includes its entropy-coded data.

    Named by the marker's byte.

    Raises:
        ValueError: too many; no marker where one must be; they are cut off.
    """
    offset, scans = 2, 0
    for _ in range(MOST_PARTS):
        match = _MARKER.match(data, offset)
        if match is None or match[1] == b"\0":
            raise ValueError("no marker where one must be")
        name, offset, body = match[1], match.end() - 2, match.end()  # fill bytes belong to nobody
        if name in (b"\xd9", b"\x01") or 0xD0 <= name[0] <= 0xD8:  # markers without a body
            yield Part(name, offset, body, body, body)
            if name == b"\xd9":
                return
            offset = body
            continue
        (length,) = struct.unpack_from(">H", data, body)
        end = body_end = body + length
        if length < 2 or end > len(data):
            raise ValueError("a segment is cut off")
        if name == b"\xda":
            scans += 1
            if scans > MOST_SCANS:
                raise ValueError("too many scans")
            following = _MARKER_IN_SCAN.search(data, end)
            end = following.start() if following else len(data)
        yield Part(name, offset, body + 2, body_end, end)
        if name == b"\xda" and end == len(data):
            return
        offset = end
    raise ValueError("too many segments")


def webp_chunks(data: bytes) -> Iterator[Part]:
    """The chunks of the container.

    Raises:
        ValueError: too many; they are cut off.
    """
    offset = 12
    for _ in range(MOST_PARTS):
        if offset + 8 > len(data):
            return
        name, size = struct.unpack_from("<4sI", data, offset)
        body_end = offset + 8 + size
        if body_end > len(data):
            raise ValueError("the file is cut off")
        end = body_end + size % 2
        yield Part(name, offset, offset + 8, body_end, end)
        offset = end
    raise ValueError("too many chunks")


def _png(data: bytes) -> PictureInfo:
    """IHDR comes first; acTL (animation) and tRNS (alpha) come before the first IDAT."""
    length, kind, width, height, _depth, color = struct.unpack_from(">I4sIIBB", data, 8)
    if kind != b"IHDR" or length != 13:
        raise ValueError("no IHDR")
    if width == 0 or height == 0:
        raise ValueError("no pixels")
    names: set[bytes] = set()
    offset = 8
    for _ in range(MOST_PARTS):  # only as far as the header goes: what follows may be cut off
        if offset + 8 > len(data):
            break
        size, name = struct.unpack_from(">I4s", data, offset)
        names.add(name)
        if name == b"IDAT":
            break
        offset += 12 + size
    else:
        raise ValueError("too many chunks")
    return PictureInfo("png", width, height, color in (4, 6) or b"tRNS" in names, b"acTL" in names)


def _jpeg(data: bytes) -> PictureInfo:
    for segment in jpeg_segments(data):
        if segment.name in (b"\xd9", b"\xda"):
            break
        if segment.name[0] in SIZED_MARKERS:
            height, width = struct.unpack_from(">HH", data, segment.body + 1)
            return PictureInfo("jpeg", width, height, has_alpha=False)
    raise ValueError("no frame header before the scan")


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
