"""Pictures of few bytes that ask for gigabytes or minutes."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import Image

from tests.fuzz.pictures import Case, chunk, save

PNG, JPEG, WEBP = "image/png", "image/jpeg", "image/webp"
MIB = 2**20
SIZES = (
    *((4097, 4097), (5000, 5000), (9000, 9000), (13_000, 13_000), (20_000, 20_000), (65_535, 65_535)),
    *((16_385, 1), (1, 16_385), (65_535, 257), (60_000, 4000)),
)
"""Width and height, beyond the limits in pixels or on a side, as far as a JPEG can say."""


def png(width: int, height: int, depth: int, color: int, *parts: bytes, interlaced: int = 0) -> bytes:
    """A PNG of zeros that has all its rows, with further chunks before them."""
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[color]
    row = bytes(1 + (width * channels * depth + 7) // 8)
    deflate = zlib.compressobj(1)
    body = b"".join(deflate.compress(row) for _ in range(height)) + deflate.flush()
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, interlaced)
    return _png(chunk(b"IHDR", header), *parts, chunk(b"IDAT", body))


def bombs() -> Iterator[Case]:
    """All of them: 100 and more to be refused, and some good pictures in bad company, which are taken."""
    yield from promises()
    yield from _real_sizes()
    yield from _frames()
    yield from _walls()
    yield from _profiles_and_texts()
    yield from _streams()
    yield from at_the_limit()


def promises() -> Iterator[Case]:
    """Headers that promise, with nearly nothing behind them."""
    for width, height in (*SIZES, (2**31 - 1, 1), (2**31 - 1, 2**31 - 1), (2**24, 2**24)):
        for depth, color in ((8, 2), (16, 6), (1, 0)):
            header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
            data = _png(chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(bytes(99))))
            yield Case(f"png {width}x{height} {color}", PNG, data)
    for width, height in SIZES:
        for marker in (0xC0, 0xC2, 0xC9):
            frame = struct.pack(">BBHBHHB", 0xFF, marker, 17, 8, height, width, 3) + b"\1\x22\0\2\x11\1\3\x11\1"
            yield Case(f"jpeg {width}x{height} {marker:x}", JPEG, b"\xff\xd8" + frame + bytes(20) + b"\xff\xd9")
    for width, height in (*((w, h) for w, h in SIZES if max(w, h) < 2**14), (16_383, 16_383), (8192, 8192)):
        yield Case(f"vp8 {width}x{height}", WEBP, _webp(_vp8(width, height)))
        yield Case(f"vp8l {width}x{height}", WEBP, _webp(_vp8l(width, height)))
    for width, height in (*SIZES, (2**24, 2**24)):
        yield Case(f"vp8x {width}x{height}", WEBP, _webp(_vp8x(width, height), _vp8l(16, 16)))


def _real_sizes() -> Iterator[Case]:
    """Whole, valid pictures that are too large: what they promise, a decoder would get."""
    for width, height, depth, color in ((4097, 4097, 8, 2), (13_000, 13_000, 1, 0), (9000, 9000, 8, 2)):
        yield Case(f"whole png {width}", PNG, png(width, height, depth, color))
    yield Case("whole jpeg 6000", JPEG, save(Image.new("RGB", (6000, 6000)), "JPEG", progressive=True))
    yield Case("whole webp 4096", WEBP, save(Image.new("RGB", (4096, 4096)), "WEBP", lossless=True))
    # What 34 bytes can ask for: a picture of one colour, every symbol of no bits.
    yield Case("whole vp8l 16384", WEBP, _webp(_vp8l(16_384, 16_384)))


def _frames() -> Iterator[Case]:
    frames = [Image.new("RGB", (32, 32), (n % 256, n // 256, 9)) for n in range(600)]
    for kind, media_type in (("PNG", PNG), ("WEBP", WEBP)):
        yield Case(f"{kind} frames", media_type, save(frames[0], kind, save_all=True, append_images=frames[1:]))
    yield Case("jpeg pictures", JPEG, save(frames[0], "JPEG") * 2000, fate="taken")
    mpo = save(frames[0], "MPO", save_all=True, append_images=frames[1:200])
    yield Case("mpo pictures", JPEG, mpo, fate="taken")


def _walls() -> Iterator[Case]:
    """Parts without end, for decoders that go through them one by one."""
    small = png(64, 64, 8, 2)
    at = small.index(b"IDAT") - 4
    for name in (b"abCd", b"tEXt", b"iTXt", b"IDAT", b"tRNS"):
        wall = chunk(name, b"") * (18 * MIB // 12)
        yield Case(f"chunks {name.decode()}", PNG, small[:at] + wall + small[at:])
        yield Case(f"chunks {name.decode()} behind", PNG, small[:-12] + wall + small[-12:])
    photo = save(Image.new("RGB", (64, 64)), "JPEG")
    for marker in (0xFE, 0xE1, 0xE2, 0xDB, 0xDD):
        wall = bytes([0xFF, marker, 0, 2]) * (18 * MIB // 4)
        yield Case(f"segments {marker:x}", JPEG, photo[:2] + wall + photo[2:])
    yield Case("restarts", JPEG, photo[:2] + b"\xff\xd0" * (9 * MIB) + photo[2:])
    yield Case("fill", JPEG, photo[:2] + b"\xff" * (18 * MIB) + photo[2:], fate="taken")
    scans = save(Image.new("RGB", (4096, 4096)), "JPEG", progressive=True)
    last = scans.rindex(b"\xff\xda")
    for number in (100, 2000, 20_000):
        yield Case(f"scans {number}", JPEG, scans[:-2] + scans[last:-2] * number + b"\xff\xd9")
    webp = _vp8x(64, 64) + (b"abcd" + bytes(4)) * (18 * MIB // 8)
    yield Case("webp chunks", WEBP, _webp(webp, _vp8l(64, 64)))


def _profiles_and_texts() -> Iterator[Case]:
    """What inflates, or is parsed, beside the pixels."""
    gigabyte = zlib.compressobj(9)
    inflating = b"".join(gigabyte.compress(bytes(MIB)) for _ in range(1024)) + gigabyte.flush()
    yield Case("icc bomb", PNG, png(64, 64, 8, 2, chunk(b"iCCP", b"a\0\0" + inflating)))
    text = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(MIB - 1), 9))
    yield Case("texts", PNG, png(64, 64, 8, 2, *[text] * 2000), fate="taken")
    yield Case("text bomb", PNG, png(64, 64, 8, 2, chunk(b"zTXt", b"a\0\0" + inflating)), fate="taken")
    # A directory of 5,000 entries, each of which says to be nearly the whole block.
    entries = b"".join(struct.pack("<HHII", n, 7, 15 * MIB, 8) for n in range(5000))
    tiff = (b"II*\0\x08\0\0\0" + struct.pack("<H", 5000) + entries).ljust(16 * MIB, b"x")
    yield Case("exif", PNG, png(64, 64, 8, 2, chunk(b"eXIf", tiff)), fate="taken")
    yield Case("exif webp", WEBP, _webp(_vp8x(64, 64), _vp8l(64, 64), _riff(b"EXIF", tiff)), fate="taken")
    photo = save(Image.new("RGB", (64, 64)), "JPEG")
    profile = b"".join(
        struct.pack(">BBH12sBB", 0xFF, 0xE2, 65_535, b"ICC_PROFILE\0", n, 255) + bytes(65_519) for n in range(1, 256)
    )
    yield Case("profile", JPEG, photo[:2] + profile + photo[2:], fate="taken")
    deep = bytearray(bytes(128) + struct.pack(">I", 2**20) + b"A2B0\0\0\0\x84\xff\xff\xff\xff" * 2**20)
    deep[:4], deep[36:40] = struct.pack(">I", len(deep)), b"acsp"
    yield Case("profile webp", WEBP, _webp(_vp8x(64, 64), _riff(b"ICCP", bytes(deep)), _vp8l(64, 64)), fate="either")


def _streams() -> Iterator[Case]:
    """Pixel streams that hold far more than the picture."""
    deflate = zlib.compressobj(9)
    inflating = b"".join(deflate.compress(bytes(MIB)) for _ in range(4096)) + deflate.flush()
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 16, 16, 8, 2, 0, 0, 0))
    yield Case("stream", PNG, _png(header, chunk(b"IDAT", inflating)), fate="taken")
    pieces = [chunk(b"IDAT", inflating[n : n + 300]) for n in range(0, len(inflating), 300)]
    yield Case("stream in pieces", PNG, _png(header, *pieces), fate="taken")
    yield Case("stream without an end", PNG, _png(header, chunk(b"IDAT", b"\x78\x9c" + b"\0" * (18 * MIB))))
    noise = np.random.default_rng(1).integers(0, 256, 19 * MIB, dtype=np.uint8).tobytes()
    yield Case("noise", PNG, _png(header, chunk(b"IDAT", b"\x78\x9c" + noise)))
    yield Case("noise behind", JPEG, save(Image.new("RGB", (9, 9)), "JPEG") + noise, fate="taken")
    yield Case(
        "noise only", WEBP, _webp(_riff(b"VP8L", b"\x2f" + struct.pack("<I", 15 | 15 << 14) + noise)), fate="either"
    )


def at_the_limit() -> Iterator[Case]:
    """Pictures as large as is allowed, which cost the most that is allowed."""
    for depth, color in ((8, 6), (16, 0), (16, 2), (1, 0)):
        yield Case(f"limit png {depth} {color}", PNG, png(4096, 4096, depth, color), fate="taken")
    yield Case("limit png 16384x1", PNG, png(16_384, 1, 8, 2), fate="taken")
    flat = Image.new("CMYK", (4096, 4096))
    yield Case("limit jpeg", JPEG, save(flat, "JPEG"), fate="taken")
    yield Case("limit jpeg scans", JPEG, save(flat.convert("RGB"), "JPEG", progressive=True), fate="taken")
    for mode in ("RGB", "RGBA"):
        canvas = Image.new(mode, (4096, 3072), 1)
        yield Case(f"limit webp {mode}", WEBP, save(canvas, "WEBP", lossless=True), fate="taken")


def _png(*parts: bytes) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IEND", b"")


def _riff(name: bytes, body: bytes) -> bytes:
    return name + struct.pack("<I", len(body)) + body + bytes(len(body) % 2)


def _webp(*chunks: bytes) -> bytes:
    body = b"WEBP" + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _vp8(width: int, height: int) -> bytes:
    return _riff(b"VP8 ", b"\x10\x02\0\x9d\x01\x2a" + struct.pack("<HH", width, height) + bytes(20))


def _vp8l(width: int, height: int) -> bytes:
    """A lossless picture of one colour: no transforms, no cache, five codes of one symbol each."""
    bits = (width - 1) | (height - 1) << 14
    code = 0b0001  # simple, one symbol of one bit: 0
    body = sum(code << (3 + 4 * n) for n in range(5))
    return _riff(b"VP8L", b"\x2f" + struct.pack("<I", bits) + body.to_bytes(5, "little"))


def _vp8x(width: int, height: int) -> bytes:
    return _riff(b"VP8X", bytes(4) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little"))
