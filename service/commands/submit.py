"""What a person at a terminal types and reads, for the client: its words to a request, its errors to sentences."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

from service.client import (
    AdapterUse,
    Client,
    DreamserveError,
    Job,
    JobFailedError,
    NoAnswerError,
    Reference,
)
from service.client.references import OutputFormat

POLL_S = 0.2
RETRY_FOR_S = 2.0
"""Long enough for a gateway that is started again; then somebody at a terminal wants to know."""
EMPTY_SLOT = "none"


class SubmitError(Exception):
    """What to tell the person at the terminal: a sentence, and one line for each fault with its pointer."""

    def __init__(self, message: str, faults: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.faults = tuple(faults)


def reference(text: str) -> Reference | None:
    """One `ROLE=FILE` of the command line; `none` is an empty slot.

    Raises:
        SubmitError: no such form, no such file, or not a picture that the service reads.
    """
    if text == EMPTY_SLOT:
        return None
    role, separator, name = text.partition("=")
    if not separator:
        raise SubmitError(f"a reference is ROLE=FILE or {EMPTY_SLOT}, not {text!r}")
    try:
        return Reference.file(name, role)
    except OSError as error:
        raise SubmitError(f"cannot read {name}: {error.strerror}") from error
    except ValueError as error:
        raise SubmitError(f"{name} is {error}") from error


def size(text: str | None) -> tuple[int | None, int | None]:
    """`WIDTHxHEIGHT` in pixels; the model's for None.

    Raises:
        SubmitError: not of that form.
    """
    if text is None:
        return None, None
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise SubmitError(f"a size is WIDTHxHEIGHT, not {text!r}")
    return int(width), int(height)


def adapter(text: str | None) -> AdapterUse | None:
    """`NAME` or `NAME:SCALE`; none for None.

    Raises:
        SubmitError: not of that form.
    """
    if text is None:
        return None
    name, _, scale = text.partition(":")
    try:
        number = float(scale or 1)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise SubmitError(f"an adapter is NAME or NAME:SCALE, not {text!r}")
    return AdapterUse(name, number)


def output_format(file: Path) -> OutputFormat:
    """The format that a file's name asks for.

    Raises:
        SubmitError: a name that asks for another.
    """
    kinds: dict[str, OutputFormat] = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
    if file.suffix.lower() not in kinds:
        raise SubmitError(f"write to a .png, .jpg or .webp file, not {file.name!r}")
    return kinds[file.suffix.lower()]


def file_names(file: Path, count: int) -> list[Path]:
    """`file` itself for one picture, else `name-0.ext`, `name-1.ext`, ..."""
    return [file] if count == 1 else [file.with_stem(f"{file.stem}-{index}") for index in range(count)]


def check_room(file: Path) -> None:
    """Make sure before a job is submitted that its pictures can be put where they are wanted.

    Raises:
        SubmitError: they cannot.
    """
    folder = file.parent
    if not folder.is_dir():
        raise SubmitError(f"there is no folder {folder}: make it, or name another file")
    if file.is_dir() or not os.access(folder, os.W_OK):
        raise SubmitError(f"cannot write {file}: name another file")


def write(job: Job, file: Path, pictures: Sequence[bytes]) -> Generator[Path]:
    """Write a job's pictures, each to a file of its own by `file_names`; these are told as they are written.

    Raises:
        SubmitError: one cannot be written; it names the job, which still has them.
    """
    for name, data in zip(file_names(file, len(pictures)), pictures, strict=True):
        try:
            name.write_bytes(data)
        except OSError as error:
            kept = [f"/v1/jobs/{job.id}/images/{number} has picture {number}" for number in range(len(pictures))]
            raise SubmitError(
                f"cannot write {name}: {error.strerror}; the service keeps what job {job.id} made", kept
            ) from error
        yield name


@contextmanager
def service_at(url: str, key: str | None = None) -> Generator[Client]:
    """The service at `url`, for somebody who reads sentences.

    Raises:
        SubmitError: of whatever the client raises.
    """
    try:
        client = Client(url, key, timeout=60.0, retry_for=RETRY_FOR_S)
    except ValueError as error:
        raise SubmitError(f"cannot ask {url}: {error}") from error
    try:
        with client:
            yield client
    except NoAnswerError as error:
        what = type(error.__cause__).__name__
        raise SubmitError(f"no answer from {url} ({what}): is `dreamserve serve` running?") from error
    except JobFailedError as error:
        raise SubmitError(error.detail, [f"job {error.job.id}"]) from error
    except DreamserveError as error:
        faults = [f"{fault.pointer}: {fault.detail} ({fault.code})" for fault in error.faults]
        raise SubmitError(str(error), faults) from error


def follow(job: Job, on_job: Callable[[Job], None]) -> Job:
    """The job once it has succeeded; `on_job` sees it every moment, for its place in the queue too.

    It is asked to cancel if this is interrupted.

    Raises:
        DreamserveError: it failed, or nobody answers.
    """
    try:
        on_job(job)
        while not job.ended:
            time.sleep(POLL_S)
            job = job.refresh()
            on_job(job)
    except KeyboardInterrupt:
        job.cancel()
        raise
    return job.wait()
