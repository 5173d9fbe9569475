"""The caller's side of the REST contract: write a request, follow its job, fetch its pictures."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

_SIGNATURES = ((b"\x89PNG", "image/png"), (b"\xff\xd8", "image/jpeg"), (b"RIFF", "image/webp"))
_TERMINAL = frozenset({"succeeded", "failed", "canceled", "expired"})
POLL_S = 0.2
EMPTY_SLOT = "none"


class SubmitError(Exception):
    """What to tell the person at the terminal: a sentence, and one line for each fault with its pointer."""

    def __init__(self, message: str, faults: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.faults = tuple(faults)


@dataclass(frozen=True, slots=True)
class Finished:
    """A job that succeeded: its body and the bytes of its pictures."""

    job: dict[str, Any]
    images: tuple[bytes, ...]


def reference(text: str) -> dict[str, str] | None:
    """One `ROLE=FILE` of the command line as an entry of `references`; `none` is an empty slot.

    Raises:
        SubmitError: no such form, no such file, or not a picture that the service reads.
    """
    if text == EMPTY_SLOT:
        return None
    role, separator, name = text.partition("=")
    if not separator:
        raise SubmitError(f"a reference is ROLE=FILE or {EMPTY_SLOT}, not {text!r}")
    try:
        data = Path(name).read_bytes()
    except OSError as error:
        raise SubmitError(f"cannot read {name}: {error.strerror}") from error
    return {"role": role, "image": data_url(data, name)}


def data_url(data: bytes, name: str) -> str:
    """`data` as a data URL, typed by its first bytes; `name` is for the message.

    Raises:
        SubmitError: not a PNG, JPEG or WebP.
    """
    for signature, media_type in _SIGNATURES:
        if data.startswith(signature):
            return f"data:{media_type};base64,{base64.b64encode(data).decode()}"
    raise SubmitError(f"{name} is not a PNG, JPEG or WebP file")


def size(text: str | None) -> dict[str, int]:
    """`WIDTHxHEIGHT` as fields of the request; none for None.

    Raises:
        SubmitError: not of that form.
    """
    if text is None:
        return {}
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise SubmitError(f"a size is WIDTHxHEIGHT, not {text!r}")
    return {"width": int(width), "height": int(height)}


def output_format(file: Path) -> str:
    """The format that a file's name asks for.

    Raises:
        SubmitError: a name that asks for another.
    """
    kinds = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
    if file.suffix.lower() not in kinds:
        raise SubmitError(f"write to a .png, .jpg or .webp file, not {file.name!r}")
    return kinds[file.suffix.lower()]


def file_names(file: Path, count: int) -> list[Path]:
    """`file` itself for one picture, else `name-0.ext`, `name-1.ext`, ..."""
    return [file] if count == 1 else [file.with_stem(f"{file.stem}-{index}") for index in range(count)]


def customize(url: str, body: dict[str, Any], on_job: Callable[[dict[str, Any]], None]) -> Finished:
    """Submit `body`, call `on_job` with every body of the job, and fetch the pictures.

    A job is asked to cancel if this is interrupted.

    Raises:
        SubmitError: refused, failed, canceled, or the service cannot be reached.
    """
    try:
        # A proxy from the environment is for the world outside, not for a service on this machine.
        local = httpx2.URL(url).host in ("127.0.0.1", "localhost", "::1")
        with httpx2.Client(base_url=url, timeout=60.0, trust_env=not local) as client:
            job = _read(client.post("/v1/customize", json=body))
            try:
                job = _follow(client, job, on_job)
            except KeyboardInterrupt:
                client.post(job["urls"]["cancel"])
                raise
            images = tuple(_fetch(client, image["url"]) for image in job["images"])
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        raise SubmitError(f"no answer from {url} ({type(error).__name__}): is `dreamserve serve` running?") from error
    return Finished(job, images)


def model_about(url: str) -> str:
    """What the service says of its model; empty if nothing.

    Raises:
        SubmitError: it does not answer.
    """
    try:
        return _read(httpx2.get(f"{url}/v1/models", trust_env=False))["models"][0]["about"]
    except httpx2.HTTPError as error:
        raise SubmitError(f"no answer from {url} ({type(error).__name__})") from error


def _follow(client: httpx2.Client, job: dict[str, Any], on_job: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    on_job(job)
    while job["status"] not in _TERMINAL:
        time.sleep(POLL_S)
        job = _read(client.get(job["urls"]["self"]))
        on_job(job)
    if job["status"] != "succeeded":
        error = job["error"] or {}
        raise SubmitError(error.get("message") or f"the job ended as {job['status']}", [f"job {job['id']}"])
    return job


def _fetch(client: httpx2.Client, url: str) -> bytes:
    answer = client.get(url)
    if answer.status_code != 200:
        _read(answer)
    return answer.content


def _read(answer: httpx2.Response) -> dict[str, Any]:
    """The body of a success; a problem becomes a `SubmitError` with its pointers."""
    try:
        body = answer.json()
    except ValueError:
        raise SubmitError(
            f"the service answered {answer.status_code} without JSON: is this the right address?"
        ) from None
    if answer.is_success and isinstance(body, dict):
        return body
    if not isinstance(body, dict) or "code" not in body:
        raise SubmitError(f"the service answered {answer.status_code}")
    faults = [f"{fault['pointer']}: {fault['detail']} ({fault['code']})" for fault in body.get("errors", [])]
    raise SubmitError(f"{body['detail']} ({body['code']})", faults)
