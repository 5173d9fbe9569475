"""What a request is made of: pictures with their roles, an adapter and how much of it, a webhook."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, Final, Literal

from service.client.values import UploadedReference

_Bytes = bytes
"""`Reference.bytes` hides the type's own name inside the class."""
Source = str | PathLike[str]
OnNoFace = Literal["fail", "subject"]
OutputFormat = Literal["png", "jpeg", "webp"]

_SIGNATURES: Final = ((b"\x89PNG", "image/png"), (b"\xff\xd8", "image/jpeg"), (b"RIFF", "image/webp"))


def media_type(data: bytes) -> str:
    """The media type of a picture, by its first bytes.

    Raises:
        ValueError: not a PNG, JPEG or WebP.
    """
    for signature, kind in _SIGNATURES:
        if data.startswith(signature):
            return kind
    raise ValueError("not a PNG, JPEG or WebP file")


def data_url(data: bytes) -> str:
    """A picture as a data URL.

    Raises:
        ValueError: not a PNG, JPEG or WebP.
    """
    return f"data:{media_type(data)};base64,{base64.b64encode(data).decode()}"


@dataclass(frozen=True, slots=True)
class Reference:
    """One picture the result shall take something from; made by `file`, `bytes`, `url` or `uploaded`.

    Attributes:
        image: a data URL, an https URL, or the id of an upload.
        role: what to take: `subject`, `garment`, `identity`, `style`, `content`.
        mask: as `image`, of the same size: what to keep.
        resolution: side of the square whose area it has inside the model, in pixels.
        on_no_face: an identity without a face fails the job, or is treated as a subject.
    """

    image: str
    role: str
    mask: str | None = None
    resolution: int | None = None
    on_no_face: OnNoFace = "fail"

    @classmethod
    def file(
        cls, path: Source, role: str, *, resolution: int | None = None, on_no_face: OnNoFace = "fail"
    ) -> Reference:
        """A picture on the disk, read now.

        Raises:
            OSError: it cannot be read. ValueError: not a PNG, JPEG or WebP.
        """
        return cls(data_url(Path(path).read_bytes()), role, None, resolution, on_no_face)

    @classmethod
    def url(cls, url: str, role: str, *, resolution: int | None = None, on_no_face: OnNoFace = "fail") -> Reference:
        """A picture at an https URL, which the service fetches once the job is accepted."""
        return cls(url, role, None, resolution, on_no_face)

    @classmethod
    def uploaded(
        cls,
        reference: str | UploadedReference,
        role: str,
        *,
        resolution: int | None = None,
        on_no_face: OnNoFace = "fail",
    ) -> Reference:
        """A picture that was uploaded, by its id."""
        name = reference if isinstance(reference, str) else reference.id
        return cls(name, role, None, resolution, on_no_face)

    @classmethod
    def bytes(
        cls, data: _Bytes, role: str, *, resolution: int | None = None, on_no_face: OnNoFace = "fail"
    ) -> Reference:
        """A picture in memory.

        Raises:
            ValueError: not a PNG, JPEG or WebP.
        """
        return cls(data_url(data), role, None, resolution, on_no_face)

    def masked(self, mask: _Bytes | Source | UploadedReference) -> Reference:
        """The same, of which only what the mask shows is kept (its alpha, or else its brightness).

        Args:
            mask: as large as the picture; its bytes, its file, or an upload.

        Raises:
            OSError, ValueError: as `file`.
        """
        if isinstance(mask, UploadedReference):
            return replace(self, mask=mask.id)
        return replace(self, mask=data_url(mask if isinstance(mask, _Bytes) else Path(mask).read_bytes()))

    def body(self) -> dict[str, Any]:
        """As the request has it."""
        return filled(
            image=self.image,
            role=self.role,
            mask=self.mask,
            resolution=self.resolution,
            on_no_face=None if self.on_no_face == "fail" else self.on_no_face,
        )


@dataclass(frozen=True, slots=True)
class AdapterUse:
    """A published adapter: 0 is the served model, 1 the adapter itself. `version`: the newest unless named."""

    name: str
    scale: float = 1.0
    version: str | None = None

    def body(self) -> dict[str, Any]:
        """As the request has it."""
        return filled(name=self.name, scale=self.scale, version=self.version)


@dataclass(frozen=True, slots=True)
class Webhook:
    """Where to tell of a job: of its end (`terminal`), or of each change (`status`)."""

    url: str
    events: Sequence[Literal["status", "terminal"]] = ("terminal",)

    def body(self) -> dict[str, Any]:
        """As the request has it."""
        return {"url": self.url, "events": list(self.events)}


def filled(**fields: Any) -> dict[str, Any]:
    """Those that say something."""
    return {name: value for name, value in fields.items() if value is not None}
