"""Hostile pictures of our own making: malformed ones by damage to whole PNG, JPEG and WebP files, seeded."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image

Fate = Literal["refused", "taken", "either"]
Damage = Callable[[bytes, random.Random], bytes]


@dataclass(frozen=True, slots=True)
class Case:
    """A file that must do no harm. `fate`: either, if nobody can say beforehand whether it is still a picture."""

    name: str
    media_type: str
    data: bytes
    fate: Fate = "refused"


def save(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(name: bytes, body: bytes) -> bytes:
    """A PNG chunk with its right CRC."""
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def whole() -> dict[str, list[bytes]]:
    """Good pictures of every kind, by media type."""
    noise = np.random.default_rng(1).integers(0, 256, (40, 48, 4), dtype=np.uint8)
    rgb, rgba = Image.fromarray(noise[..., :3]), Image.fromarray(noise)
    grey, palette, ink = rgb.convert("L"), rgb.quantize(16), rgb.convert("CMYK")
    wide = Image.fromarray(noise[..., 0].astype(np.uint16) * 257)
    return {
        "image/png": [save(each, "PNG") for each in (rgb, rgba, grey, palette, wide)],
        "image/jpeg": [
            *(save(each, "JPEG") for each in (rgb, grey, ink)),
            save(rgb, "JPEG", progressive=True),
            save(rgb, "JPEG", subsampling=0, restart_marker_blocks=2),
        ],
        "image/webp": [
            save(rgb, "WEBP"),
            save(rgb, "WEBP", lossless=True),
            save(rgba, "WEBP"),
            save(rgba, "WEBP", lossless=True, exif=Image.Exif()),
        ],
    }


# Damage to any file.


def cut_off(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(8, len(data) * 3 // 4)]


def signature(data: bytes, rng: random.Random) -> bytes:
    """One of the bytes by which the format is known."""
    at = rng.choice([0, 1, 2] if data[:2] == b"\xff\xd8" else [0, 1, 2, 3])
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def flips(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice([1, 3, 30])):
        out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def shuffled(data: bytes, rng: random.Random) -> bytes:
    """A piece is left out, doubled or overwritten."""
    start = rng.randrange(2, len(data) - 2)
    end = min(len(data), start + rng.choice([1, 4, 64, 512]))
    piece = rng.choice([b"", data[start:end] * 2, rng.randbytes(end - start), b"\xff" * (end - start)])
    return data[:start] + piece + data[end:]


# Damage to PNG.


def png_chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    chunks: list[tuple[bytes, bytes]] = []
    at = 8
    while at < len(data):
        size, name = struct.unpack_from(">I4s", data, at)
        chunks.append((name, data[at + 8 : at + 8 + size]))
        at += 12 + size
    return chunks


def png_of(chunks: list[tuple[bytes, bytes]]) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in chunks)


def png_header(data: bytes, rng: random.Random) -> bytes:
    """Fields of IHDR that no PNG has, the CRC being right."""
    (name, header), *rest = png_chunks(data)
    width, height, depth, color, *_ = struct.unpack(">IIBBBBB", header)
    wrong = rng.choice(
        [
            (0, height, depth, color),
            (width, 0, depth, color),
            (width, height, rng.choice([0, 3, 5, 7, 32, 255]), color),
            (width, height, depth, rng.choice([1, 5, 7, 255])),
            (width, height + rng.randrange(1, 99), depth, color),
            (2**32 - rng.randrange(1, 9), height, depth, color),
        ]
    )
    return png_of([(name, struct.pack(">IIBBBBB", *wrong, 0, 0, 0)), *rest])


def png_without(data: bytes, rng: random.Random) -> bytes:
    """A chunk that must be there is not."""
    chunks = png_chunks(data)
    needed = sorted({name for name, _ in chunks} & {b"IHDR", b"IDAT", b"IEND"})
    gone = rng.choice(needed)
    return png_of([each for each in chunks if each[0] != gone])


def png_checksum(data: bytes, rng: random.Random) -> bytes:
    """A bit of a chunk or of its CRC has changed."""
    bounds = [8]
    for _, body in png_chunks(data):
        bounds.append(bounds[-1] + 12 + len(body))
    index = rng.randrange(len(bounds) - 1)
    out = bytearray(data)
    out[rng.randrange(bounds[index] + 8, bounds[index + 1])] ^= 1 << rng.randrange(8)
    return bytes(out)


def png_length(data: bytes, rng: random.Random) -> bytes:
    """A chunk says that it is longer than it is."""
    at = 8
    for _ in range(rng.randrange(len(png_chunks(data)))):
        at += 12 + struct.unpack_from(">I", data, at)[0]
    (size,) = struct.unpack_from(">I", data, at)
    wrong = size + rng.choice([1, 4, 2**16, 2**31, 2**32 - 1 - size])
    return data[:at] + struct.pack(">I", wrong & 0xFFFFFFFF) + data[at + 4 :]


def png_stream(data: bytes, rng: random.Random) -> bytes:
    """Pixels that do not inflate, or are too few, in a chunk with its right CRC."""
    chunks = png_chunks(data)
    body = b"".join(body for name, body in chunks if name == b"IDAT")
    raw = zlib.decompress(body)
    wrong = rng.choice(
        [
            rng.randbytes(len(body)),
            body[: rng.randrange(len(body) // 2)],
            zlib.compress(raw[: rng.randrange(len(raw) * 3 // 4)]),
            b"",
            b"\x78\x9c" + b"\xff" * len(body),
        ]
    )
    kept = [each for each in chunks if each[0] != b"IDAT"]
    return png_of([*kept[:-1], (b"IDAT", wrong), kept[-1]])


def png_twice(data: bytes, rng: random.Random) -> bytes:
    """A second IHDR, of another size, before the pixels."""
    first, *rest = png_chunks(data)
    other = struct.pack(">II", rng.randrange(1, 10**6), rng.randrange(1, 10**6)) + first[1][8:]
    return png_of([first, (b"IHDR", other), *rest])


# Damage to JPEG.


def jpeg_segments(data: bytes) -> list[tuple[int, int, int]]:
    """Marker, start and end of what lies before the scan."""
    found: list[tuple[int, int, int]] = []
    at = 2
    while data[at + 1] != 0xDA:
        end = at + 2 + struct.unpack_from(">H", data, at + 2)[0]
        found.append((data[at + 1], at, end))
        at = end
    return found


def jpeg_frame(data: bytes, rng: random.Random) -> bytes:
    """Fields of the frame header that no JPEG has."""
    start = next(start for marker, start, _ in jpeg_segments(data) if marker in (0xC0, 0xC2))
    out = bytearray(data)
    at, value = rng.choice(
        [
            (start + 4, rng.choice([0, 1, 7, 16, 255])),  # precision
            (start + 5, b"\0\0"),  # height
            (start + 7, b"\0\0"),  # width
            (start + 9, rng.choice([0, 2, 5, 255])),  # components
            (start + 11, rng.choice([0x00, 0x01, 0x10, 0x55, 0xFF])),  # sampling
            (start + 12, rng.choice([4, 9, 255])),  # quantization table
        ]
    )
    piece = value if isinstance(value, bytes) else bytes([value])
    out[at : at + len(piece)] = piece
    return bytes(out)


def jpeg_without(data: bytes, rng: random.Random) -> bytes:
    """No frame header, no quantization table, or no scan."""
    segments = jpeg_segments(data)
    gone = rng.choice([{0xC0, 0xC2}, {0xDB}, None])
    if gone is None:
        return data[: segments[-1][2]] + rng.choice([b"", b"\xff\xd9", rng.randbytes(99)])
    kept = b"".join(data[start:end] for marker, start, end in segments if marker not in gone)
    return data[:2] + kept + data[segments[-1][2] :]


def jpeg_length(data: bytes, rng: random.Random) -> bytes:
    """A segment that is shorter than its own length, or reaches behind the file."""
    _, start, _ = rng.choice(jpeg_segments(data))
    return data[: start + 2] + struct.pack(">H", rng.choice([0, 1, 0xFFFF])) + data[start + 4 :]


def jpeg_twice(data: bytes, rng: random.Random) -> bytes:
    """A second frame header, of another size."""
    start, end = next((start, end) for marker, start, end in jpeg_segments(data) if marker in (0xC0, 0xC2))
    other = data[start : start + 5] + struct.pack(">HH", rng.randrange(1, 65535), rng.randrange(1, 65535))
    return data[:end] + other + data[start + 9 : end] + data[end:]


# Damage to WebP.


def webp_length(data: bytes, rng: random.Random) -> bytes:
    """The first chunk reaches behind the file, or ends within its own header."""
    wrong = rng.choice([0, 1, 4, len(data), 2**20, 2**31, 2**32 - 1])
    return data[:16] + struct.pack("<I", wrong) + data[20:]


def webp_kind(data: bytes, rng: random.Random) -> bytes:
    """A first chunk that no WebP begins with."""
    return data[:12] + rng.choice([b"vp8 ", b"VP8Z", b"ALPH", b"EXIF", b"\0\0\0\0", rng.randbytes(4)]) + data[16:]


def webp_canvas(data: bytes, rng: random.Random) -> bytes:
    """A canvas of another size around the picture."""
    width, height = rng.randrange(49, 3000), rng.randrange(41, 3000)
    canvas = bytes(4) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = data[30:] if data[12:16] == b"VP8X" else data[12:]
    extended = b"VP8X" + struct.pack("<I", 10) + canvas + body
    return b"RIFF" + struct.pack("<I", 4 + len(extended)) + b"WEBP" + extended


DAMAGES: dict[str, list[tuple[Damage, Fate]]] = {
    "image/png": [
        *((each, "refused") for each in (cut_off, signature, png_header, png_without, png_checksum, png_length)),
        *((each, "refused") for each in (png_stream, png_twice)),
        *((each, "either") for each in (flips, shuffled)),
    ],
    "image/jpeg": [
        *((each, "refused") for each in (cut_off, signature, jpeg_frame, jpeg_without, jpeg_length, jpeg_twice)),
        *((each, "either") for each in (flips, shuffled)),
    ],
    "image/webp": [
        *((each, "refused") for each in (cut_off, signature, webp_length, webp_kind, webp_canvas)),
        *((each, "either") for each in (flips, shuffled)),
    ],
}


def malformed(seed: int, rounds: int) -> Iterator[Case]:
    """Every damage to every whole picture, `rounds` times: 118 cases a round, 90 of them to be refused."""
    rng = random.Random(seed)
    pictures = whole()
    for number in range(rounds):
        for media_type, damages in DAMAGES.items():
            for index, data in enumerate(pictures[media_type]):
                for damage, fate in damages:
                    name = f"{damage.__name__} {media_type} {index}.{number}"
                    yield Case(name, media_type, damage(data, rng), fate)
