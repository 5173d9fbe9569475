"""Pictures on their way in: a data URL → bytes → proof that they decode; or the id of one that was uploaded before.

Decoding takes time and memory: everything here belongs in a worker thread, never on the event loop.
"""

from __future__ import annotations

import binascii
from collections.abc import Callable
from dataclasses import dataclass, field

import pybase64

from service.problems import Fault
from workers.picture_process import PictureProver
from workers.pictures import PictureError
from workers.references import UploadedReference

_PREFIXES = {
    "data:image/png;base64,": "png",
    "data:image/jpeg;base64,": "jpeg",
    "data:image/webp;base64,": "webp",
}
_NO_DATA_URL = "Send a data URL: data:image/png;base64, (or jpeg, webp) and strict base64 with padding."
_NO_URL = "Send an https URL, the id of an uploaded reference, or a data URL."


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture that is known to decode: bytes to be stored, or the sha256 of what is stored already.

    `size` is (height, width) as decoded, orientation applied.
    """

    content: bytes | str
    size: tuple[int, int]


@dataclass(slots=True)
class PictureGate:
    """Reads the pictures of one request, each distinct one once.

    `uploaded`: an uploaded reference of whoever asks, by id; being asked for here is a use of it.
    """

    prover: PictureProver
    uploaded: Callable[[str], UploadedReference | None]
    faults: list[Fault] = field(default_factory=list[Fault])
    seen: dict[str, Picture] = field(default_factory=dict[str, Picture])

    def read(self, source: str, pointer: str) -> Picture | None:
        """The picture of a data URL or an id; None after adding a fault.

        Fault codes: `not_enabled`, `reference_unknown`, `image_url_invalid`, `image_type_mismatch`, `image_too_large`,
        `image_undecodable`, `image_unsupported`.

        Raises:
            ArtifactError: `storage_unavailable`.
            redis.exceptions.RedisError: Redis is away.
        """
        if source not in self.seen:
            try:
                self.seen[source] = self._find(source) if source.startswith("ref_") else self._open(source)
            except _RefusedError as refused:
                self.faults.append(Fault(pointer, refused.code, refused.detail))
                return None
            except PictureError as error:
                self.faults.append(Fault(pointer, error.code, error.message))
                return None
        return self.seen[source]

    def _find(self, ref_id: str) -> Picture:
        reference = self.uploaded(ref_id)
        if reference is None:
            detail = "There is no such uploaded reference, or none any more: upload the picture again."
            raise _RefusedError("reference_unknown", detail)
        return Picture(reference.sha256, (reference.height, reference.width))

    def _open(self, url: str) -> Picture:
        data, declared = _decode_url(url, self.prover.limits.max_bytes)
        info = self.prover.inspect(data)
        if info.format != declared:
            raise _RefusedError("image_type_mismatch", "The content is not of the type that the data URL declares.")
        return Picture(data, self.prover.check(data))


class _RefusedError(Exception):
    def __init__(self, code: str, detail: str) -> None:
        super().__init__(code)
        self.code = code
        self.detail = detail


def _decode_url(url: str, max_bytes: int) -> tuple[bytes, str]:
    """Bytes and declared format of a data URL; the length is checked before anything is decoded."""
    if url[:8].lower() == "https://":
        raise _RefusedError("not_enabled", "A mask is not fetched from a URL: send a data URL, or upload it.")
    comma = url.find(",", 0, 64) + 1
    declared = _PREFIXES.get(url[:comma].lower())
    if declared is None:
        if url[:11].lower() == "data:image/" and ";base64," in url[:64].lower():
            raise _RefusedError("image_unsupported", "Only image/png, image/jpeg and image/webp are read.")
        raise _RefusedError("image_url_invalid", _NO_DATA_URL if url[:5].lower() == "data:" else _NO_URL)
    if len(url) - comma > (max_bytes + 2) // 3 * 4:
        raise _RefusedError("image_too_large", f"More than {max_bytes} bytes: scale it down.")
    try:
        return pybase64.b64decode(url[comma:], validate=True), declared
    except (binascii.Error, ValueError):
        raise _RefusedError("image_url_invalid", _NO_DATA_URL) from None
