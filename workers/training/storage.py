"""A run's files on a disk that may be full: the refusal is named, and nothing half-written stays."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


class StorageError(Exception):
    """A file of a run that cannot be written or read; the message names the place and the remedy."""


@contextmanager
def writing(what: str, directory: Path) -> Generator[None]:
    """Around all that writes `what` to a directory.

    Raises:
        StorageError: the disk is full or not writable.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors wraps the system's error in its own
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise StorageError(f"cannot write {what} to {directory}: {reason}; make room and --resume") from error


@contextmanager
def replaced(file: Path) -> Generator[Path]:
    """A name beside a file, whose place it takes once it is written, and not before."""
    part = file.with_name(f".{file.name}.part")
    try:
        yield part
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)
