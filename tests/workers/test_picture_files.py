"""What a picture file holds besides its pixels: passed over, and refused where it is made to cost time."""

from __future__ import annotations

import struct
import time
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.workers.test_pictures import COLORS, LIMITS, chunk, code_of, png, save
from workers.picture_essence import exif_orientation
from workers.pictures import check, decode, encode


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\xff" * 40,
        b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x09\0\0",  # there is no orientation 9
        b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x02\0\x06\0\x06",  # two of them
        b"MM\0*\xff\xff\xff\xff",
        b"II*",
        b"",
    ],
)
def test_damaged_exif_does_not_matter(exif: bytes) -> None:
    """Cameras write odd EXIF: the picture is still good."""
    plain = png(COLORS)
    at = plain.index(b"IDAT") - 4
    data = plain[:at] + chunk(b"eXIf", exif) + plain[at:]
    np.testing.assert_array_equal(decode(data, LIMITS), COLORS)


@settings(max_examples=200)
@given(st.binary(max_size=80), st.sampled_from([b"", b"II*\0", b"MM\0*", b"Exif\0\0II*\0\x08\0\0\0"]))
def test_orientation_is_always_one_of_eight(data: bytes, start: bytes) -> None:
    """Any bytes for EXIF: an orientation, never an exception."""
    assert 1 <= exif_orientation(start + data) <= 8


def wall(kind: str, parts: int) -> bytes:
    """A small picture in a wall of parts, each of which costs a decoder time."""
    plain, photo = png(COLORS), encode(COLORS, "jpeg")
    at = plain.index(b"IDAT") - 4
    match kind:
        case "chunks":
            return plain[:at] + chunk(b"abCd", b"") * parts + plain[at:]
        case "chunks behind":
            return plain[:-12] + chunk(b"abCd", b"") * parts + plain[-12:]
        case "segments":
            return photo[:2] + b"\xff\xfe\0\2" * parts + photo[2:]
        case "scans":
            scan = save(Image.fromarray(COLORS), "JPEG", progressive=True)
            return scan[:-2] + scan[scan.rindex(b"\xff\xda") : -2] * (parts // 500) + b"\xff\xd9"
        case _:
            webp = encode(COLORS, "webp")
            extended = b"VP8X" + struct.pack("<II", 10, 0) + bytes([29, 0, 0, 19, 0, 0])
            body = b"WEBP" + extended + b"abcd\0\0\0\0" * parts + webp[12:]
            return b"RIFF" + struct.pack("<I", len(body)) + body


@pytest.mark.parametrize("kind", ["chunks", "chunks behind", "segments", "scans", "webp chunks"])
def test_walls_of_parts_are_refused(kind: str) -> None:
    """A file that is all seams costs next to nothing. The control, with a hundredth of them, is a picture."""
    assert check(wall(kind, 10**4), LIMITS) == (20, 30)
    data = wall(kind, 10**6)
    started = time.thread_time()
    assert code_of(lambda: check(data, LIMITS)) == "image_undecodable"
    assert time.thread_time() - started < 1


def test_what_pixels_do_not_need_costs_nothing() -> None:
    """Texts, EXIF, comments, fill and what lies behind the picture are passed over, however much they hold."""
    plain, photo = png(COLORS), encode(COLORS, "jpeg")
    at = plain.index(b"IDAT") - 4
    bomb = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**22), 9))
    np.testing.assert_array_equal(decode(plain[:at] + bomb * 200 + plain[at:] + b"behind", LIMITS), COLORS)
    expected = decode(photo, LIMITS)
    comment = b"\xff\xfe\xff\xff" + bytes(2**16 - 3)
    for data in (
        photo[:2] + b"\xff" * 10**6 + photo[2:],
        photo[:2] + comment * 100 + photo[2:],
        photo + photo,
        photo[:-2],  # without EOI, as some cameras write it
    ):
        np.testing.assert_array_equal(decode(data, LIMITS), expected)


def interlaced(pixels: np.ndarray, drop: int = 0) -> bytes:
    """A PNG in Adam7's seven passes (RFC 2083 §2.6), without its last `drop` bytes of rows; Pillow writes none."""
    height, width, _ = pixels.shape
    passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    raw = b"".join(b"\0" + row.tobytes() for x, y, dx, dy in passes for row in pixels[y::dy, x::dx] if row.size)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 1)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw[: len(raw) - drop])) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@settings(max_examples=60)
@given(height=st.integers(1, 20), width=st.integers(1, 20), drop=st.integers(0, 5))
def test_every_row_must_be_there(height: int, width: int, drop: int) -> None:
    """A PNG whose rows end early is damaged, though Pillow would fill in black; whole ones pass, interlaced or not."""
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    raw = b"".join(b"\0" + row.tobytes() for row in pixels)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw[: len(raw) - drop])) + chunk(b"IEND", b"")
    for data in (b"\x89PNG\r\n\x1a\n" + body, interlaced(pixels, drop)):
        if drop:
            assert code_of(lambda data=data: check(data, LIMITS)) == "image_undecodable"
        else:
            np.testing.assert_array_equal(decode(data, LIMITS), pixels)


def test_damage_that_a_checksum_shows() -> None:
    """One bit of a PNG's pixels is enough to refuse it; in what is passed over it does not matter."""
    data = bytearray(png(COLORS))
    at = data.index(b"IDAT") + 200
    data[at] ^= 1
    assert code_of(lambda: check(bytes(data), LIMITS)) == "image_undecodable"
    data[at] ^= 1
    place = data.index(b"IDAT") - 4
    data[place:place] = b"\0\0\0\2tEXtab\0\0\0\0"
    assert check(bytes(data), LIMITS) == (20, 30)
