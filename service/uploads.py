"""A picture that comes as a body of its own, raw or as the one file of a form: in pieces, straight to the disk.

    socket ─▶ (form) ─▶ store's unfinished file ─▶ header, bounds, whole decode ─▶ stored by sha256 ─▶ reference

At no time does more of it than a piece lie in memory before all of it, at most `max_bytes`, has arrived.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import AbstractContextManager, asynccontextmanager
from typing import Final, Protocol, TypeVar

import anyio
from anyio import CancelScope, to_thread
from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect

from service.problems import Fault, Problem
from workers.artifacts import Incoming
from workers.picture_headers import Format
from workers.picture_process import PictureProver
from workers.pictures import PictureError
from workers.references import References, UploadedReference

MEDIA_TYPES: Final[dict[str, Format]] = {"image/png": "png", "image/jpeg": "jpeg", "image/webp": "webp"}
FORM: Final = "multipart/form-data"
_FORM_BYTES: Final = 64 * 2**10
"""What a form may have around its file."""

T = TypeVar("T")


class Wrapping(Protocol):
    """How the picture lies in the body. `declared`: the format that the caller says it has."""

    @property
    def declared(self) -> Format | None: ...

    def unwrap(self, piece: bytes) -> bytes:
        """The picture's bytes in the next piece of the body."""
        ...

    def finish(self) -> None:
        """The body has ended."""
        ...


class Bare:
    """The body is the picture."""

    def __init__(self, declared: Format) -> None:
        self.declared: Format | None = declared

    def unwrap(self, piece: bytes) -> bytes:
        return piece

    def finish(self) -> None:
        """It may end anywhere: whether the picture is whole, its decoder says."""


class Form:
    """The body is multipart/form-data (RFC 7578) with exactly one part, a file; its field's name does not matter."""

    def __init__(self, boundary: bytes) -> None:
        """
        Raises:
            Problem: `malformed_form`.
        """
        self.declared: Format | None = None
        self._name = self._value = b""
        self._headers: dict[bytes, bytes] = {}
        self._files = 0
        self._ended = False
        self._found: list[bytes] = []
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_header_field": self._on_name,
                    "on_header_value": self._on_value,
                    "on_header_end": self._on_header_end,
                    "on_headers_finished": self._on_headers,
                    "on_part_data": self._on_data,
                    "on_end": self._on_end,
                },
            )
        except FormParserError:
            raise Problem("malformed_form") from None

    def unwrap(self, piece: bytes) -> bytes:
        """
        Raises:
            Problem: `malformed_form`.
        """
        self._found.clear()
        try:
            self._parser.write(piece)
        except FormParserError:
            raise Problem("malformed_form") from None
        return b"".join(self._found)

    def finish(self) -> None:
        """
        Raises:
            Problem: `malformed_form`: it is cut off, or had no file.
        """
        if not self._ended or self._files != 1:
            raise Problem("malformed_form")

    def _on_name(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def _on_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _on_header_end(self) -> None:
        self._headers[self._name.lower()] = self._value
        self._name = self._value = b""

    def _on_headers(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition"))
        self._files += 1
        if b"filename" not in options or self._files > 1:
            raise Problem("malformed_form")
        kind, _ = parse_options_header(self._headers.get(b"content-type"))
        self.declared = MEDIA_TYPES.get(kind.decode("latin-1").lower())

    def _on_data(self, data: bytes, start: int, end: int) -> None:
        self._found.append(data[start:end])

    def _on_end(self) -> None:
        self._ended = True


def wrapping_of(request: Request) -> Wrapping:
    """How the picture lies in a request's body.

    Raises:
        Problem: `unsupported_media_type`, `malformed_form`.
    """
    kind, options = parse_options_header(request.headers.get("content-type"))
    media_type = kind.decode("latin-1").lower()
    if request.headers.get("content-encoding", "identity") == "identity":
        if media_type in MEDIA_TYPES:
            return Bare(MEDIA_TYPES[media_type])
        if media_type == FORM:
            return Form(options.get(b"boundary", b""))
    accepted = ", ".join([*MEDIA_TYPES, FORM])
    detail = f"Send the picture as {accepted}, without a content encoding."
    raise Problem("unsupported_media_type", detail, headers={"Accept-Post": accepted})


async def receive(
    request: Request, wrapping: Wrapping, incoming: Incoming, *, max_bytes: int, timeout_s: float
) -> None:
    """Let the picture flow to the disk, refused as soon as it is known to be too long.

    Raises:
        Problem: `payload_too_large`, `request_timeout`, `malformed_form`.
        ArtifactError: `storage_unavailable`.
    """
    most = max_bytes + _FORM_BYTES
    declared = request.headers.get("content-length", "")
    if declared.isascii() and declared.isdecimal() and int(declared[:20]) > most:
        raise _too_large(max_bytes)
    came = 0
    try:
        with anyio.fail_after(timeout_s):
            async for piece in request.stream():
                came += len(piece)
                picture = wrapping.unwrap(piece)
                if came > most or incoming.size + len(picture) > max_bytes:
                    raise _too_large(max_bytes)
                await to_thread.run_sync(incoming.write, picture)
    except (TimeoutError, ClientDisconnect):
        raise Problem("request_timeout") from None
    wrapping.finish()


def admit(
    references: References, tenant: str, incoming: Incoming, declared: Format | None, prover: PictureProver
) -> tuple[UploadedReference, bool]:
    """Prove that what has come is a picture, keep it and make it known; whether it was not known before. Blocks.

    Raises:
        Problem: 422 `image_type_mismatch`, `image_too_large`, `image_undecodable`, `image_unsupported`.
        ArtifactError: `storage_unavailable`.
        redis.exceptions.RedisError: Redis is away.
    """
    data = incoming.read()
    try:
        info = prover.inspect(data)
        if declared not in (None, info.format):
            detail = "The content is not of the type that the upload declares."
            raise Problem.of_faults([Fault("", "image_type_mismatch", detail)])
        size = prover.check(data)
    except PictureError as error:
        raise Problem.of_faults([Fault("", error.code, error.message)]) from None
    return references.add(tenant, incoming.keep(), info.format, size, len(data))


@asynccontextmanager
async def in_threads(context: AbstractContextManager[T]) -> AsyncGenerator[T]:
    """A context whose entry and exit touch the disk, off the event loop; it is left even when the caller goes away."""
    value = await to_thread.run_sync(context.__enter__)
    try:
        yield value
    finally:
        with CancelScope(shield=True):
            await to_thread.run_sync(context.__exit__, None, None, None)


def _too_large(max_bytes: int) -> Problem:
    return Problem("payload_too_large", f"The picture exceeds {max_bytes} bytes: scale it down.")
