"""Pictures from strangers: golden conversions, bounds by header, and one error type for all damage."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageCms

from workers.picture_headers import PictureInfo, read_header
from workers.pictures import PictureError, PictureLimits, check, decode, decode_mask, encode, inspect

LIMITS = PictureLimits()
RNG = np.random.default_rng(3)
COLORS = RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8)
SMOOTH = np.stack(np.meshgrid(np.linspace(0, 255, 30), np.linspace(255, 0, 20)) * 2, -1)[..., :3].astype(np.uint8)


def save(image: Image.Image, format_: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_, **options)
    return buffer.getvalue()


def png(pixels: NDArray[Any], **options: Any) -> bytes:
    return save(Image.fromarray(pixels), "PNG", **options)


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_header(width: int, height: int, *extra: bytes) -> bytes:
    """A PNG that promises a size and holds almost nothing."""
    ihdr = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", ihdr) + b"".join(extra) + chunk(b"IDAT", zlib.compress(b"\0" * 99))


def webp_header(width: int, height: int, kind: str) -> bytes:
    if kind == "VP8X":
        body = struct.pack("<I", 0) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    elif kind == "VP8L":
        body = b"\x2f" + struct.pack("<I", (width - 1) | (height - 1) << 14) + b"\0" * 8
    else:
        body = b"\x10\x02\x00\x9d\x01\x2a" + struct.pack("<HH", width, height) + b"\0" * 8
    data = kind.ljust(4).encode() + struct.pack("<I", len(body)) + body
    return b"RIFF" + struct.pack("<I", 4 + len(data)) + b"WEBP" + data


def code_of(read: Callable[[], object]) -> str:
    with pytest.raises(PictureError) as error:
        read()
    return error.value.code


@pytest.mark.parametrize("format_", ["png", "jpeg", "webp"])
def test_encode_and_decode(format_: Any) -> None:
    """PNG gives back the very pixels; the lossy formats nearly; nothing but the picture is in the file."""
    data = encode(COLORS if format_ == "png" else SMOOTH, format_)
    back = decode(data, LIMITS)
    info = inspect(data, LIMITS)
    assert (info.format, info.width, info.height, info.has_alpha) == (format_, 30, 20, False)
    if format_ == "png":
        np.testing.assert_array_equal(back, COLORS)
    else:
        assert np.abs(back.astype(int) - SMOOTH).mean() < 2
    with Image.open(io.BytesIO(data)) as image:
        assert not image.getexif() and "icc_profile" not in image.info


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    """All eight orientations come out upright, against numpy's own turns and flips."""
    upright = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],
        8: lambda a: np.rot90(a, 1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    for image in (Image.fromarray(COLORS), Image.fromarray(COLORS).quantize(16).convert("RGBA")):
        expected = upright(np.asarray(image))
        for data in (save(image, "PNG", exif=exif), save(image, "WEBP", lossless=True, exact=True, exif=exif)):
            np.testing.assert_array_equal(decode(data, LIMITS)[..., :3], expected[..., :3])
            assert check(data, LIMITS) == expected.shape[:2]
    smooth = save(Image.fromarray(SMOOTH), "JPEG", quality=100, exif=exif)
    assert np.abs(decode(smooth, LIMITS).astype(int) - upright(SMOOTH)).mean() < 2
    assert check(smooth, LIMITS) == upright(SMOOTH).shape[:2]


def test_cmyk_jpeg() -> None:
    """Ink becomes light: pure cyan ink is cyan, no ink is white, also in Adobe's inverted files."""
    inks = np.zeros((16, 32, 4), np.uint8)
    inks[:, 16:, 0] = 255
    back = decode(save(Image.fromarray(inks, "CMYK"), "JPEG", quality=100), LIMITS)
    assert back.shape == (16, 32, 3)
    np.testing.assert_allclose(back[8, 4], [255, 255, 255], atol=3)
    np.testing.assert_allclose(back[8, 28], [0, 255, 255], atol=3)


def test_sixteen_bits() -> None:
    """Grey of sixteen bits keeps its high byte; it is not clipped to white."""
    values = np.linspace(0, 65535, 600, dtype=np.uint16).reshape(20, 30)
    back = decode(png(values), LIMITS)
    np.testing.assert_array_equal(back, np.repeat((values >> 8).astype(np.uint8)[..., None], 3, 2))


def png_16(color: int, pixels: NDArray[np.uint16]) -> bytes:
    """A PNG of sixteen bits, which Pillow cannot write: `color` 2 RGB, 4 grey with alpha, 6 RGBA."""
    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    ihdr = struct.pack(">IIBBBBB", width, height, 16, color, 0, 0, 0)
    parts = chunk(b"IHDR", ihdr) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


@pytest.mark.parametrize(("color", "channels"), [(2, [0, 1, 2]), (4, [0, 0, 0, 1]), (6, [0, 1, 2, 3])])
def test_sixteen_bits_of_every_kind(color: int, channels: list[int]) -> None:
    """Colour and alpha of sixteen bits become their high bytes."""
    wide = np.random.default_rng(5).integers(0, 65536, (9, 7, max(channels) + 1), dtype=np.uint16)
    back = decode(png_16(color, wide), LIMITS)
    np.testing.assert_array_equal(back, (wide >> 8).astype(np.uint8)[..., channels])


def test_grey_and_black_and_white() -> None:
    """One channel becomes three equal ones."""
    grey = COLORS[..., 0]
    np.testing.assert_array_equal(decode(png(grey), LIMITS), np.repeat(grey[..., None], 3, 2))
    bits = np.asarray(Image.fromarray(grey).convert("1"))
    np.testing.assert_array_equal(decode(png(bits), LIMITS)[..., 0], np.where(bits, 255, 0))


def test_alpha_of_every_kind() -> None:
    """Straight alpha, a palette with transparency, a transparent colour, grey with alpha: all become RGBA."""
    alpha = COLORS[..., 1]
    straight = np.dstack([COLORS, alpha])
    np.testing.assert_array_equal(decode(png(straight), LIMITS), straight)

    palette = Image.fromarray(COLORS).quantize(8)
    back = decode(save(palette, "PNG", transparency=3), LIMITS)
    indices = np.asarray(palette)
    np.testing.assert_array_equal(back[..., 3], np.where(indices == 3, 0, 255))
    np.testing.assert_array_equal(back[..., :3], np.asarray(palette.convert("RGB")))

    keyed = decode(png(COLORS, transparency=tuple(int(value) for value in COLORS[0, 0])), LIMITS)
    assert keyed[0, 0, 3] == 0 and (keyed[..., 3] == 255).sum() > 500

    grey = decode(png(np.dstack([alpha, COLORS[..., 2]])), LIMITS)
    np.testing.assert_array_equal(grey, np.dstack([alpha, alpha, alpha, COLORS[..., 2]]))

    wide = np.full((4, 4), 1000, np.uint16)
    wide[0, 0] = 77
    assert decode(png(wide, transparency=77), LIMITS)[..., 3].tolist()[0][:2] == [0, 255]

    for data, has in ((png(straight), True), (png(COLORS), False), (save(palette, "PNG", transparency=3), True)):
        assert inspect(data, LIMITS).has_alpha is has
    webp = save(Image.fromarray(straight), "WEBP", lossless=True, exact=True)
    assert inspect(webp, LIMITS).has_alpha
    np.testing.assert_array_equal(decode(webp, LIMITS), straight)


def test_profile_is_converted_to_srgb() -> None:
    """Pixels with another profile change as lcms says; an sRGB or a broken profile leaves them as they are."""
    lab = ImageCms.createProfile("LAB")
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert np.abs(decode(png(COLORS, icc_profile=srgb), LIMITS).astype(int) - COLORS).max() <= 1
    for broken in (b"no profile", srgb[:200], ImageCms.ImageCmsProfile(lab).tobytes()):
        np.testing.assert_array_equal(decode(png(COLORS, icc_profile=broken), LIMITS), COLORS)
    linear = linear_profile(srgb)
    back = decode(png(np.full((4, 4, 3), 128, np.uint8), icc_profile=linear), LIMITS)
    # 128/255 of linear light is 0.735 in sRGB (IEC 61966-2-1).
    np.testing.assert_allclose(back, 188, atol=2)
    with_alpha = np.dstack([np.full((4, 4, 3), 128, np.uint8), np.full((4, 4), 9, np.uint8)])
    np.testing.assert_allclose(decode(png(with_alpha, icc_profile=linear), LIMITS)[0, 0], [188, 188, 188, 9], atol=2)


def test_profile_of_other_channels() -> None:
    """A grey picture's and an ink picture's profile describe their own channels, before these become RGB.

    The oracle is lcms, asked directly. The control: without the profile the colours are others.
    """
    grey = np.full((8, 8), 128, np.uint8)
    profile = grey_profile(gamma=1.0)
    back = decode(png(grey, icc_profile=profile), LIMITS)
    np.testing.assert_allclose(back, 188, atol=2)
    assert decode(png(grey), LIMITS)[0, 0, 0] == 128
    inks = np.full((16, 16, 4), (200, 30, 60, 10), np.uint8)
    plain = save(Image.fromarray(inks, "CMYK"), "JPEG", quality=100)
    # An ink profile that lcms will not take for CMYK counts as absent, as every unusable one does.
    with_wrong = save(Image.fromarray(inks, "CMYK"), "JPEG", quality=100, icc_profile=profile)
    np.testing.assert_array_equal(decode(with_wrong, LIMITS), decode(plain, LIMITS))


def grey_profile(gamma: float) -> bytes:
    """A minimal ICC v2 profile of a grey device (ICC.1:2001-04 §6.3.2): a white point and one curve."""

    def tag(name: bytes, data: bytes) -> tuple[bytes, bytes]:
        return name, data + bytes(-len(data) % 4)

    xyz = struct.pack(">4sIiii", b"XYZ ", 0, 63190, 65536, 54061)
    curve = struct.pack(">4sIIH", b"curv", 0, 1, round(gamma * 256))
    text = b"desc" + struct.pack(">II", 0, 2) + b"g\0" + bytes(78)
    tags = [tag(b"desc", text), tag(b"cprt", b"text\0\0\0\0-\0"), tag(b"wtpt", xyz), tag(b"kTRC", curve)]
    table, body, offset = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, data in tags:
        table += struct.pack(">4sII", name, offset + len(body), len(data))
        body += data
    size = offset + len(body)
    head = struct.pack(">I4sI4s4s4s", size, b"\0\0\0\0", 0x02400000, b"mntr", b"GRAY", b"XYZ ")
    head += struct.pack(">6H4s4s", 2020, 1, 1, 0, 0, 0, b"acsp", b"\0\0\0\0").ljust(44, b"\0")
    head += struct.pack(">iii", 63190, 65536, 54061)
    return head.ljust(128, b"\0") + table + body


def test_palette_with_a_profile() -> None:
    """A palette's colours are converted as well, and its transparency stays."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 128, 128, 128])
    back = decode(save(palette, "PNG", icc_profile=linear_profile(srgb), transparency=0), LIMITS)
    np.testing.assert_allclose(back[0, 0], [188, 188, 188, 255], atol=2)


def linear_profile(srgb: bytes) -> bytes:
    """sRGB's primaries with linear tone curves: every `para` or `curv` tag's data becomes a gamma of one."""
    data = bytearray(srgb)
    (count,) = struct.unpack_from(">I", data, 128)
    for index in range(count):
        name, offset, _size = struct.unpack_from(">4sII", data, 132 + 12 * index)
        if name in (b"rTRC", b"gTRC", b"bTRC"):
            struct.pack_into(">4sIHHi", data, offset, b"para", 0, 0, 0, 1 << 16)
    return bytes(data)


def test_masks() -> None:
    """Alpha if it says anything, else brightness: an opaque alpha channel says nothing."""
    mask = np.zeros((20, 30), np.uint8)
    mask[5:10] = 255
    white_on_black = np.repeat(mask[..., None], 3, 2)
    np.testing.assert_array_equal(decode_mask(png(mask), LIMITS), mask)
    np.testing.assert_array_equal(decode_mask(png(white_on_black), LIMITS), mask)
    np.testing.assert_array_equal(decode_mask(png(np.dstack([COLORS, mask])), LIMITS), mask)
    opaque = np.dstack([white_on_black, np.full((20, 30), 255, np.uint8)])
    np.testing.assert_array_equal(decode_mask(png(opaque), LIMITS), mask)


@pytest.mark.parametrize(
    "bomb",
    [
        png_header(20_000, 20_000),
        png_header(2**31 - 1, 2**31 - 1),
        png_header(17_000, 1),
        webp_header(16_383, 16_383, "VP8X"),
        webp_header(2**24, 2**24, "VP8X"),
        webp_header(16_384, 16_384, "VP8L"),
        webp_header(16_383, 16_383, "VP8 "),
        b"\xff\xd8\xff\xc0\x00\x11\x08\xff\xff\xff\xff\x03" + b"\0" * 20,
    ],
)
def test_bombs_are_refused_by_their_header(bomb: bytes) -> None:
    """Files of a few bytes that promise gigapixels are refused by it: a decoder would call them broken."""
    assert code_of(lambda: inspect(bomb, LIMITS)) == "image_too_large"
    assert code_of(lambda: decode(bomb, LIMITS)) == "image_too_large"


def test_webp_has_fewer_pixels() -> None:
    """Its decoder takes four times the memory of the others, so its cap is its own."""
    limits = PictureLimits(max_webp_pixels=599)
    assert code_of(lambda: check(encode(COLORS, "webp"), limits)) == "image_too_large"
    assert check(encode(COLORS, "png"), limits) == check(encode(COLORS, "webp"), LIMITS) == (20, 30)


def test_limits_are_inclusive() -> None:
    """Exactly the limit passes, one more does not."""
    data = png(COLORS)
    assert inspect(data, PictureLimits(len(data), 600, 30)).width == 30
    for limits in (PictureLimits(len(data) - 1), PictureLimits(max_pixels=599), PictureLimits(max_side=29)):
        assert code_of(lambda limits=limits: inspect(data, limits)) == "image_too_large"


def test_animations_are_refused() -> None:
    """APNG and animated WebP are not silently cut to their first frame."""
    frames = [Image.fromarray(COLORS), Image.fromarray(255 - COLORS)]
    for format_ in ("PNG", "WEBP"):
        data = save(frames[0], format_, save_all=True, append_images=frames[1:])
        assert code_of(lambda data=data: decode(data, LIMITS)) == "image_unsupported"


def test_other_formats_are_refused() -> None:
    """Formats that Pillow could read but nobody promised, and text, are named as unsupported."""
    image = Image.fromarray(COLORS)
    for data in (*(save(image, name) for name in ("GIF", "BMP", "TIFF", "PPM")), b"", b"%PDF-1.7", b"<svg/>"):
        assert code_of(lambda data=data: decode(data, LIMITS)) == "image_unsupported"


def test_phone_photos_with_a_second_picture() -> None:
    """A JPEG with a preview inside (MPO), as phones write it, is its first picture."""
    image = Image.fromarray(SMOOTH)
    data = save(image, "MPO", save_all=True, append_images=[image.resize((8, 8))], quality=100)
    assert np.abs(decode(data, LIMITS).astype(int) - SMOOTH).mean() < 3


@pytest.mark.parametrize("format_", ["png", "jpeg", "webp"])
def test_cut_off_files(format_: Any) -> None:
    """A file cut off anywhere is undecodable (or not even of its format); no other exception, no half picture."""
    data = encode(COLORS, format_)
    last = {"png": 12, "jpeg": 2, "webp": 0}[format_]  # trailers without which decoders can do
    for end in [*range(40), *range(40, len(data) - last, 17)]:
        assert code_of(lambda end=end: decode(data[:end], LIMITS)) in ("image_undecodable", "image_unsupported")


SEEDS = [
    png(COLORS),
    png(np.dstack([COLORS, COLORS[..., 0]])),
    save(Image.fromarray(COLORS).quantize(8), "PNG", transparency=3),
    encode(COLORS, "jpeg"),
    save(Image.fromarray(COLORS), "JPEG", progressive=True, exif=Image.Exif()),
    encode(COLORS, "webp"),
    save(Image.fromarray(COLORS), "WEBP", lossless=True),
]


@settings(max_examples=400)
@given(data=st.data())
def test_damage_has_one_error_type(data: st.DataObject) -> None:
    """Bytes changed, cut out or put in: pixels of the promised size come out, or a PictureError, nothing else."""
    raw = bytearray(data.draw(st.sampled_from(SEEDS)))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        match data.draw(st.integers(0, 2)):
            case 0:
                raw[at] = data.draw(st.integers(0, 255))
            case 1:
                del raw[at : at + data.draw(st.integers(1, 8))]
            case _:
                raw[at:at] = data.draw(st.binary(min_size=1, max_size=8))
    small = PictureLimits(max_pixels=256 * 256)
    try:
        size = check(bytes(raw), small)
    except PictureError as error:
        assert code_of(lambda: decode(bytes(raw), small)) == error.code
        return
    pixels = decode(bytes(raw), small)  # what passed the check does not fail later
    assert pixels.shape[:2] == size
    assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] in (3, 4)
    assert pixels.shape[0] * pixels.shape[1] <= 256 * 256


@settings(max_examples=300)
@given(data=st.binary(max_size=64), start=st.sampled_from([b"", *(seed[:12] for seed in SEEDS)]))
def test_header_parser_never_surprises(data: bytes, start: bytes) -> None:
    """Any bytes: a header, None, or ValueError."""
    with suppress(ValueError):
        assert isinstance(read_header(start + data), PictureInfo | None)


def test_header_agrees_with_pillow() -> None:
    """The oracle for sizes and alpha is Pillow itself."""
    for seed in SEEDS:
        info = read_header(seed)
        assert info is not None
        with Image.open(io.BytesIO(seed)) as image:
            assert (info.width, info.height) == image.size
            assert info.has_alpha == image.has_transparency_data


def test_no_torch() -> None:
    """The gateway imports this and its neighbours: torch must not come along."""
    modules = "jobs, ledger, queues, artifacts, pictures, settings, redis_process"
    script = f"import sys; from workers import {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
