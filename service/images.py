"""Pictures on their way in: data URL → bytes → proof that they decode → content-addressed artifact.

Decoding takes time and memory: everything here belongs in a worker thread, never on the event loop.
"""

from __future__ import annotations

import binascii
from dataclasses import dataclass, field

import pybase64

from service.problems import Fault
from workers import pictures
from workers.pictures import PictureError, PictureLimits

_PREFIXES = {
    "data:image/png;base64,": "png",
    "data:image/jpeg;base64,": "jpeg",
    "data:image/webp;base64,": "webp",
}
_NO_DATA_URL = "Send a data URL: data:image/png;base64, (or jpeg, webp) and strict base64 with padding."


@dataclass(frozen=True, slots=True)
class Picture:
    """Bytes that are known to decode. `size` is (height, width) as decoded, orientation applied."""

    data: bytes
    size: tuple[int, int]


@dataclass(slots=True)
class PictureGate:
    """Reads the pictures of one request, each distinct one once."""

    limits: PictureLimits
    faults: list[Fault] = field(default_factory=list[Fault])
    seen: dict[str, Picture] = field(default_factory=dict[str, Picture])

    def read(self, url: str, pointer: str, *, mask: bool = False) -> Picture | None:
        """The picture of a data URL; None after adding a fault.

        Fault codes: `not_enabled`, `image_url_invalid`, `image_type_mismatch`, `image_too_large`,
        `image_undecodable`, `image_unsupported`.
        """
        key = f"{mask}{url}" if mask else url
        if key not in self.seen:
            try:
                self.seen[key] = self._open(url, mask=mask)
            except _RefusedError as refused:
                self.faults.append(Fault(pointer, refused.code, refused.detail))
                return None
            except PictureError as error:
                self.faults.append(Fault(pointer, error.code, error.message))
                return None
        return self.seen[key]

    def _open(self, url: str, *, mask: bool) -> Picture:
        data, declared = _decode_url(url, self.limits.max_bytes)
        info = pictures.inspect(data, self.limits)
        if info.format != declared:
            raise _RefusedError("image_type_mismatch", "The content is not of the type that the data URL declares.")
        pixels = pictures.decode_mask(data, self.limits) if mask else pictures.decode(data, self.limits)
        return Picture(data, (pixels.shape[0], pixels.shape[1]))


class _RefusedError(Exception):
    def __init__(self, code: str, detail: str) -> None:
        super().__init__(code)
        self.code = code
        self.detail = detail


def _decode_url(url: str, max_bytes: int) -> tuple[bytes, str]:
    """Bytes and declared format of a data URL; the length is checked before anything is decoded."""
    if url[:8].lower() == "https://":
        raise _RefusedError("not_enabled", "Fetching https URLs is not enabled on this server: send a data URL.")
    if url.startswith("ref_"):
        raise _RefusedError("not_enabled", "Uploaded references are not enabled on this server: send a data URL.")
    comma = url.find(",", 0, 64) + 1
    declared = _PREFIXES.get(url[:comma].lower())
    if declared is None:
        if url[:11].lower() == "data:image/" and ";base64," in url[:64].lower():
            raise _RefusedError("image_unsupported", "Only image/png, image/jpeg and image/webp are read.")
        raise _RefusedError("image_url_invalid", _NO_DATA_URL)
    if len(url) - comma > (max_bytes + 2) // 3 * 4:
        raise _RefusedError("image_too_large", f"More than {max_bytes} bytes: scale it down.")
    try:
        return pybase64.b64decode(url[comma:], validate=True), declared
    except (binascii.Error, ValueError):
        raise _RefusedError("image_url_invalid", _NO_DATA_URL) from None
