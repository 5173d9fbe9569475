"""Proofs that a picture decodes which take less than decoding it: they say what decoding it says."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.workers.test_pictures import COLORS, LIMITS, SMOOTH, chunk, png, png_header, save
from workers.picture_essence import essence, evenly_sampled
from workers.pictures import PictureError, PictureLimits, check, decode


def raw_png(rows: bytes, *, side: int = 4, color: int = 2, after: bytes = b"", **changes: bytes) -> bytes:
    """A PNG of 8 bits with these rows, its chunks undamaged; `stream` instead of their compression."""
    ihdr = struct.pack(">IIBBBBB", side, side, 8, color, 0, 0, 0)
    body = chunk(b"IDAT", changes.get("stream", zlib.compress(rows)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", ihdr) + body + after + chunk(b"IEND", b"")


def rows_of(filters: bytes, channels: int = 3) -> bytes:
    """A row for each filter, as wide as there are."""
    return b"".join(bytes([each]) + bytes(range(channels * len(filters))) for each in filters)


PLAIN = rows_of(b"\0\1\2\3\4"[:4])


@pytest.mark.parametrize(
    ("file", "proven"),
    [
        (raw_png(PLAIN), True),
        (raw_png(rows_of(b"\4\4\4\4", 4), color=6), True),
        (raw_png(rows_of(b"\0\0\5\0")), False),
        (raw_png(rows_of(b"\0\0\0\xff")), False),
        (raw_png(PLAIN + b"\0"), False),
        (raw_png(PLAIN, stream=zlib.compress(PLAIN)[:-4]), False),
        (raw_png(PLAIN, stream=zlib.compress(PLAIN)[:-1] + b"\0"), None),
        (raw_png(PLAIN, stream=zlib.compress(PLAIN) + b"\0"), False),
        (raw_png(PLAIN, after=chunk(b"tRNS", b"\0")), False),
        (raw_png(PLAIN, after=chunk(b"IDAT", b"")), True),
        (raw_png(rows_of(b"\0\0\0\0", 1), color=3), None),
        (png_header(9, 9), None),
    ],
    ids=[
        *("true colour", "with alpha", "no such filter", "no such filter, last", "more than rows", "no checksum"),
        *("wrong checksum", "more than a stream", "a chunk behind", "a chunk of nothing", "no palette", "no rows"),
    ],
)
def test_only_what_cannot_fail_is_taken_without_decoding(file: bytes, proven: bool | None) -> None:
    """A PNG is proven only if nothing is left that Pillow could stumble over; `check` says what `decode` says."""
    if proven is None:
        with pytest.raises(ValueError, match=r"missing|cut off"):
            essence(file, "png")
    else:
        assert essence(file, "png").proven is proven
    assert taken(check, file) == taken(decode, file)
    assert not proven or taken(check, file)


def taken(read: Callable[[bytes, PictureLimits], object], file: bytes) -> bool:
    try:
        read(file, LIMITS)
    except PictureError:
        return False
    return True


@settings(max_examples=300)
@given(
    filters=st.binary(min_size=1, max_size=12),
    color=st.sampled_from([0, 2, 4, 6]),
    cut=st.integers(-3, 3),
    place=st.integers(0, 40),
    change=st.integers(0, 255),
)
def test_check_and_decode_agree_on_any_png(filters: bytes, color: int, cut: int, place: int, change: int) -> None:
    """Whatever is damaged inside chunks whose checksums are right: what one takes, the other takes."""
    rows = rows_of(bytes(each % 6 for each in filters), {0: 1, 2: 3, 4: 2, 6: 4}[color])
    stream = bytearray(zlib.compress(rows[:cut] if cut < 0 else rows + bytes(cut)))
    if place < len(stream):
        stream[place] ^= change
    file = raw_png(rows, side=len(filters), color=color, stream=bytes(stream))
    assert taken(check, file) == taken(decode, file)


JPEGS = [
    save(image, "JPEG", **options)
    for image in (
        Image.fromarray(SMOOTH),
        Image.fromarray(SMOOTH).convert("L"),
        Image.fromarray(SMOOTH).convert("CMYK"),
    )
    for options in ({}, {"progressive": True}, {"subsampling": 0}, {"subsampling": 1}, {"restart_marker_blocks": 1})
]


@settings(max_examples=400)
@given(which=st.sampled_from(JPEGS), place=st.integers(0, 2000), change=st.integers(0, 255), cut=st.integers(0, 60))
def test_check_and_decode_agree_on_any_jpeg(which: bytes, place: int, change: int, cut: int) -> None:
    """A check at an eighth of the size reads the same codes: what one refuses, the other refuses."""
    damaged = bytearray(which[: len(which) - cut])
    if place < len(damaged):
        damaged[place] ^= change
    assert taken(check, bytes(damaged)) == taken(decode, bytes(damaged))


@pytest.mark.parametrize("sampling", [*range(0x11, 0x45, 0x11), 0x12, 0x21, 0x31, 0x13, 0x41, 0x14, 0x32, 0x00, 0x51])
def test_check_and_decode_agree_on_any_sampling(sampling: int) -> None:
    """libjpeg refuses some ratios of resolution at one scale and not at another; then the whole size is checked."""
    file = bytearray(save(Image.fromarray(SMOOTH), "JPEG", subsampling=0))
    frame = file.index(b"\xff\xc0")
    for component in range(3):
        changed = bytearray(file)
        changed[frame + 11 + 3 * component] = sampling
        assert taken(check, bytes(changed)) == taken(decode, bytes(changed))


def test_check_reads_a_jpeg_at_an_eighth() -> None:
    """The control: it is the short way that the tests above compare, wherever it can be."""
    ways = [evenly_sampled(file, "jpeg") for file in JPEGS]
    assert all(ways)
    assert not evenly_sampled(JPEGS[2].replace(b"\xff\xc0", b"\xff\xc9"), "jpeg"), "arithmetic codes"
    assert not evenly_sampled(png(COLORS), "png")
