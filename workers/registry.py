"""Trained adapters by name and version, each a directory that is whole or not there. No torch.

    <root>/<name>/<sha256 of dreamo.safetensors>/   dreamo.safetensors, adapter_model.safetensors,
                                                    adapter.json (what it was trained by), published.json (when)

A version is its content's digest, so publishing the same adapter again changes nothing, whoever does it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

MAIN: Final = "dreamo.safetensors"
CARD: Final = "adapter.json"
NAME = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?")
"""Names of adapters: they are directories and parts of URLs."""

_PUBLISHED: Final = "published.json"
_VERSION = re.compile(r"[0-9a-f]{64}")
_BLOCK = 2**20


class RegistryError(Exception):
    """Codes: `adapter_unknown`, `adapter_corrupt`, `storage_unavailable`; the message is safe to show."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


@dataclass(frozen=True, slots=True)
class PublishedAdapter:
    """One version of an adapter.

    Attributes:
        version: sha256 (hex) of the file in released keys. published_at: Unix seconds.
        card: what it was trained by.
    """

    name: str
    version: str
    published_at: float
    directory: Path
    card: dict[str, Any]


class Registry:
    """Adapters in a directory, which is made when the first is published."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def publish(self, name: str, source: Path) -> PublishedAdapter:
        """Copy an exported adapter in under its digest; a version that is there already stays as it is.

        Raises:
            RegistryError: `storage_unavailable`, `adapter_unknown` (no name, or nothing exported in `source`).
        """
        if not NAME.fullmatch(name) or not (source / MAIN).is_file():
            raise _unknown()
        try:
            version = digest_of(source / MAIN)
            target = self.root / name / version
            if not target.is_dir():
                _copy_whole(source, target)
            return self._read(name, target)
        except OSError as error:
            reason = error.strerror or type(error).__name__  # never the path
            raise RegistryError(
                "storage_unavailable", f"The adapter registry cannot be written ({reason}): make room and try again."
            ) from error

    def versions(self, name: str | None = None) -> list[PublishedAdapter]:
        """All versions, of one adapter or of all, newest first."""
        return sorted(self._all(name), key=lambda adapter: adapter.published_at, reverse=True)

    def find(self, name: str, version: str | None = None) -> PublishedAdapter:
        """A version, by default the newest, its file checked against its digest.

        Raises:
            RegistryError: `adapter_unknown`, `adapter_corrupt`.
        """
        for adapter in self.versions(name):
            if version in (None, adapter.version):
                if digest_of(adapter.directory / MAIN) != adapter.version:
                    raise RegistryError(
                        "adapter_corrupt", "The adapter's file is not the one published: train it again."
                    )
                return adapter
        raise _unknown()

    def _all(self, name: str | None) -> Iterator[PublishedAdapter]:
        names = [name] if name is not None and NAME.fullmatch(name) else [] if name is not None else _names(self.root)
        for one in names:
            for version in _names(self.root / one):
                if _VERSION.fullmatch(version):
                    yield self._read(one, self.root / one / version)

    def _read(self, name: str, directory: Path) -> PublishedAdapter:
        try:
            published_at = float(json.loads((directory / _PUBLISHED).read_bytes())["published_at"])
            card = json.loads((directory / CARD).read_bytes())
        except (ValueError, KeyError, TypeError, FileNotFoundError):
            published_at, card = directory.stat().st_mtime, {}
        return PublishedAdapter(name, directory.name, published_at, directory, card)


def digest_of(file: Path) -> str:
    """sha256 of a file's bytes, hex."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _copy_whole(source: Path, target: Path) -> None:
    """Copy beside the target, sync, rename: the target holds everything or does not exist."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=target.parent, prefix=".part-"))
    try:
        for file in sorted(source.iterdir()):
            shutil.copyfile(file, part / file.name)
        (part / _PUBLISHED).write_text(json.dumps({"published_at": round(time.time(), 3)}) + "\n")
        for file in part.iterdir():
            _sync(file)
        part.chmod(0o755)
        try:
            part.rename(target)
        except OSError:
            if not target.is_dir():  # else somebody else published the same bytes
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    _sync(target.parent)


def _names(directory: Path) -> list[str]:
    """Entries that are not in the making; none where there is no directory."""
    if not directory.is_dir():
        return []
    return sorted(entry.name for entry in directory.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unknown() -> RegistryError:
    return RegistryError("adapter_unknown", "There is no such adapter: see GET /v1/adapters for what is published.")
