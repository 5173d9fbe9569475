"""Encoded pictures to pixels and back, for input that may be hostile. Pillow only, no torch.

Bounds are checked on the header before Pillow sees a byte, and it sees no metadata (`picture_essence`). Pixels come out
upright (EXIF orientation), in sRGB, eight bits deep. Messages hold nothing of the picture.

At its peak Pillow takes 4 bytes a pixel for PNG, 7 for JPEG, 16 for WebP (measured on 4096² pixels); converting to
sRGB takes about twice as much again, which `check` leaves out.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

from workers.picture_essence import Essence, essence, evenly_sampled
from workers.picture_headers import Format, PictureInfo, read_header

__all__ = [
    "PictureCode",
    "PictureError",
    "PictureInfo",
    "PictureLimits",
    "check",
    "decode",
    "decode_mask",
    "encode",
    "inspect",
    "media_type",
    "undecodable",
]

PictureCode = Literal["image_undecodable", "image_too_large", "image_unsupported"]

_PILLOW_ERRORS: Final = (
    OSError,  # UnidentifiedImageError among them
    SyntaxError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    EOFError,
    AttributeError,
    AssertionError,
    NotImplementedError,
    OverflowError,
    MemoryError,
    RuntimeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
"""What Pillow is known to raise on damaged files; its own base class for that does not exist."""

_UPRIGHT: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What undoes each EXIF orientation."""
_MAX_PROFILE: Final = 4 * 2**20
"""Bytes; those of real profiles are at most a few hundred thousand."""
_SRGB: Final = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


class PictureError(Exception):
    """A picture that is not taken; `message` names the remedy and is safe to show."""

    def __init__(self, code: PictureCode, message: str) -> None:
        super().__init__(message)
        self.code: PictureCode = code
        self.message = message


@dataclass(frozen=True, slots=True)
class PictureLimits:
    """Caps that are checked before anything is decoded.

    `max_webp_pixels`: libwebp's decoder, as Pillow drives it, holds four canvases at a time.
    """

    max_bytes: int = 20 * 2**20
    max_pixels: int = 4096 * 4096
    max_webp_pixels: int = 4096 * 3072
    max_side: int = 16_384


def inspect(data: bytes, limits: PictureLimits) -> PictureInfo:
    """Format, stored size and alpha, from the header only.

    Raises:
        PictureError: any of its codes; `image_unsupported` for other formats and for animations.
    """
    if len(data) > limits.max_bytes:
        raise PictureError("image_too_large", f"More than {limits.max_bytes} bytes: scale the picture down.")
    try:
        info = read_header(data)
    except ValueError:
        raise undecodable() from None
    if info is None:
        raise PictureError("image_unsupported", "Only PNG, JPEG and WebP pictures are read.")
    if info.animated:
        raise PictureError("image_unsupported", "Animated pictures are not read: send a single frame.")
    if info.width < 1 or info.height < 1:
        raise undecodable()
    most = min(limits.max_pixels, limits.max_webp_pixels) if info.format == "webp" else limits.max_pixels
    if info.width * info.height > most or max(info.width, info.height) > limits.max_side:
        raise PictureError(
            "image_too_large", f"More than {most} pixels or a side above {limits.max_side}: scale it down."
        )
    return info


def check(data: bytes, limits: PictureLimits) -> tuple[int, int]:
    """Prove that a picture decodes, to the last pixel; height and width that `decode` would give.

    Raises:
        PictureError: any of its codes.
    """
    info = inspect(data, limits)
    with _opened(data, info) as (image, core):
        if not core.proven:
            if evenly_sampled(core.data, info.format):
                image.draft(None, (1, 1))  # every code is read all the same, but not made into all of its pixels
            image.load()
    return (info.width, info.height) if core.orientation >= 5 else (info.height, info.width)


def decode(data: bytes, limits: PictureLimits) -> NDArray[np.uint8]:
    """Pixels uint8 [h, w, 3], or [h, w, 4] with straight alpha if the picture has an alpha channel.

    Raises:
        PictureError: any of its codes.
    """
    with _opened(data, inspect(data, limits)) as (image, core):
        image.load()
        converted = _to_srgb(image)
        if core.orientation in _UPRIGHT:
            converted = converted.transpose(_UPRIGHT[core.orientation])
        return np.ascontiguousarray(converted)


@contextmanager
def _opened(data: bytes, info: PictureInfo) -> Generator[tuple[Image.Image, Essence]]:
    """The picture, not loaded yet, and what it was made of; whatever Pillow raises meanwhile: it is damaged."""
    try:
        core = essence(data, info.format)
        with Image.open(io.BytesIO(core.data), formats=(info.format.upper(),)) as image:
            if image.size != (info.width, info.height):
                raise undecodable()
            yield image, core
    except _PILLOW_ERRORS:
        raise undecodable() from None


def decode_mask(data: bytes, limits: PictureLimits) -> NDArray[np.uint8]:
    """A mask uint8 [h, w], 255 = keep: the alpha channel if it says anything, else the brightness.

    An alpha channel that is opaque everywhere says nothing; editors add one to black-and-white masks.

    Raises:
        PictureError: any of its codes.
    """
    pixels = decode(data, limits)
    if pixels.shape[2] == 4 and pixels[..., 3].min() < 255:
        return np.ascontiguousarray(pixels[..., 3])
    return np.asarray(Image.fromarray(pixels[..., :3].copy()).convert("L"))


def encode(pixels: NDArray[np.uint8], format: Format) -> bytes:
    """Pixels uint8 [h, w, 3] as a file without metadata; PNG is lossless, the others of quality 95."""
    buffer = io.BytesIO()
    options = {
        "png": {"compress_level": 4},
        "jpeg": {"quality": 95, "subsampling": 0},
        "webp": {"quality": 95},
    }
    Image.fromarray(pixels).save(buffer, format=format.upper(), **options[format])
    return buffer.getvalue()


def media_type(format: Format) -> str:
    """The MIME type of a format."""
    return f"image/{format}"


def _to_srgb(image: Image.Image) -> Image.Image:
    """The picture as RGB or RGBA in sRGB; a profile that cannot be used counts as absent."""
    if image.mode.startswith("I;16") or image.mode == "I":
        return _from_16_bit(image)
    alpha = image.has_transparency_data
    profile = image.info.get("icc_profile")
    plain = image.convert("RGBA" if alpha else "RGB")
    if not profile or len(profile) > _MAX_PROFILE:
        return plain
    # The profile describes the stored channels: those of CMYK and grey pictures must reach it unconverted.
    source = image if image.mode in ("CMYK", "L") else plain.convert("RGB")
    try:
        converted = ImageCms.profileToProfile(
            source, ImageCms.ImageCmsProfile(io.BytesIO(profile)), _SRGB, outputMode="RGB"
        )
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return plain
    if converted is None:
        return plain
    if alpha:
        converted.putalpha(plain.getchannel("A"))
    return converted


def _from_16_bit(image: Image.Image) -> Image.Image:
    """Grey of sixteen bits; the high byte is kept, as Pillow itself does for sixteen-bit RGB."""
    values = np.asarray(image)
    grey = Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey


def undecodable() -> PictureError:
    """What a file is that is damaged, or cannot be shown not to be."""
    return PictureError("image_undecodable", "The file is damaged or cut off: send a whole PNG, JPEG or WebP file.")
