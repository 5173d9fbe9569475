"""Adapters by name and version, each a directory that is whole or not there. No torch.

    <root>/<name>/<sha256 of its file>/   dreamo.safetensors, or lora.safetensors where it is a plain LoRA,
                                          adapter_model.safetensors (peft's keys), if it was trained here,
                                          adapter.json (what it is, or was trained by), published.json (when)
    <root>/.tenants/<tenant>/<name>/…     what a tenant trained, for that tenant alone

What lies on top is the operator's, and the only tenant's where there are no keys: everybody sees it. A version is its
content's digest, so publishing the same adapter again changes nothing, whoever does it, unless the bytes here are no
longer those: then it mends them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from workers.tenants import SOLE_TENANT

MAIN: Final = "dreamo.safetensors"
LORA: Final = "lora.safetensors"
CARD: Final = "adapter.json"
NAME = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?")
"""Names of adapters: they are directories and parts of URLs."""

_PUBLISHED: Final = "published.json"
_VERSION = re.compile(r"[0-9a-f]{64}")
_BLOCK = 2**20
_PART: Final = ".part-"
_ABANDONED_S: Final = 24 * 3600.0
"""A copy that is not finished after this is of a process that has been killed."""


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
        version: sha256 (hex) of its file. published_at: Unix seconds.
        card: what it is, or was trained by.
        owner: the tenant that alone may use it; `SOLE_TENANT`: everybody may.
    """

    name: str
    version: str
    published_at: float
    directory: Path
    card: dict[str, Any]
    owner: str = SOLE_TENANT

    @property
    def base(self) -> str | None:
        """Fingerprint of the base model that it was trained on; None of what was trained elsewhere or earlier."""
        base: Any = self.card.get("base")
        return base if isinstance(base, str) else None

    def fits(self, bases: Collection[str]) -> bool:
        """Whether it may be made for one of these base models: it is, or of either nothing is known."""
        return not bases or self.base is None or self.base in bases

    @property
    def file(self) -> Path:
        """What the version is the digest of."""
        return _file_in(self.directory) or self.directory / MAIN


class Registry:
    """A tenant's adapters and those for everybody, in a directory that is made when the first is published."""

    def __init__(self, root: Path, tenant: str = SOLE_TENANT) -> None:
        self.root = root
        self.tenant = tenant

    def of(self, tenant: str) -> Self:
        """The same, as another tenant sees it."""
        return type(self)(self.root, tenant)

    @property
    def home(self) -> Path:
        """Where this tenant's own lie."""
        return self.root if self.tenant == SOLE_TENANT else self.root / ".tenants" / self.tenant

    def publish(self, name: str, source: Path) -> PublishedAdapter:
        """Copy an exported adapter in under its digest; a version that is there already stays, if its file is whole.

        Raises:
            RegistryError: `storage_unavailable`, `adapter_unknown` (no name, or nothing exported in `source`).
        """
        file = _file_in(source)
        if not NAME.fullmatch(name) or file is None:
            raise _unknown()
        try:
            version = digest_of(file)
            target = self.home / name / version
            _sweep(self.home)
            if not _is_whole(target):
                _copy_whole(source, target)
            return self._read(name, target, self.tenant)
        except OSError as error:
            reason = error.strerror or type(error).__name__  # never the path
            raise RegistryError(
                "storage_unavailable", f"The adapter registry cannot be written ({reason}): make room and try again."
            ) from error

    def add(self, name: str, file: Path, *, whole: bool, card: Mapping[str, Any]) -> PublishedAdapter:
        """Copy a file in under its digest.

        Args:
            whole: whether it is a DreamO adapter with embeddings of its own, not a plain LoRA.

        Raises:
            RegistryError: see `publish`.
        """
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder)
            (source / (MAIN if whole else LORA)).symlink_to(file.resolve())
            (source / CARD).write_text(json.dumps(card, indent=1, sort_keys=True) + "\n")
            return self.publish(name, source)

    def versions(self, name: str | None = None) -> list[PublishedAdapter]:
        """All versions, of one adapter or of all, newest first; of the same bytes the tenant's own."""
        return sorted(self._all(name), key=lambda adapter: adapter.published_at, reverse=True)

    def find(self, name: str, version: str | None = None) -> PublishedAdapter:
        """A version, by default the newest, its file checked against its digest.

        Raises:
            RegistryError: `adapter_unknown`, `adapter_corrupt`.
        """
        adapter = self.locate(name, version)
        check(adapter)
        return adapter

    def locate(self, name: str, version: str | None = None, bases: Collection[str] = ()) -> PublishedAdapter:
        """As `find`, without reading the adapter's file.

        Args:
            bases: rather one that fits them than a newer one; if none does, the newest all the same.

        Raises:
            RegistryError: `adapter_unknown`.
        """
        found = [adapter for adapter in self.versions(name) if version in (None, adapter.version)]
        if not found:
            raise _unknown()
        return next((adapter for adapter in found if adapter.fits(bases)), found[0])

    def _all(self, name: str | None) -> Iterator[PublishedAdapter]:
        seen: set[tuple[str, str]] = set()
        for root, owner in dict.fromkeys(((self.home, self.tenant), (self.root, SOLE_TENANT))):
            names = _names(root) if name is None else [name] if NAME.fullmatch(name) else []
            for one in names:
                for version in _names(root / one):
                    if _VERSION.fullmatch(version) and (one, version) not in seen:
                        seen.add((one, version))
                        with suppress(FileNotFoundError):  # somebody is removing it
                            yield self._read(one, root / one / version, owner)

    def _read(self, name: str, directory: Path, owner: str) -> PublishedAdapter:
        try:
            published_at = _published_at(directory)
            card = json.loads((directory / CARD).read_bytes())
        except (ValueError, KeyError, TypeError, FileNotFoundError):
            published_at, card = directory.stat().st_mtime, {}
        return PublishedAdapter(name, directory.name, published_at, directory, card, owner)


def check(adapter: PublishedAdapter) -> None:
    """Refuse an adapter whose file is not the one that was published.

    Raises:
        RegistryError: `adapter_corrupt`, `adapter_unknown` (it has gone), `storage_unavailable`.
    """
    try:
        digest = digest_of(adapter.file)
    except FileNotFoundError:
        raise _unknown() from None
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise RegistryError("storage_unavailable", f"The adapter cannot be read ({reason}): try again.") from error
    if digest != adapter.version:
        raise RegistryError(
            "adapter_corrupt", "The adapter's file is not the one published: train or register it again."
        )


def digest_of(file: Path) -> str:
    """sha256 of a file's bytes, hex."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _is_whole(version: Path) -> bool:
    """Whether a version is there, and its file the one it is the digest of."""
    file = _file_in(version)
    return file is not None and digest_of(file) == version.name


def _copy_whole(source: Path, target: Path) -> None:
    """Copy beside the target, sync, rename: the target holds everything or does not exist.

    A target that is there is not whole; it makes room for the copy, which is as old as it was.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part, aside = (Path(tempfile.mkdtemp(dir=target.parent, prefix=_PART)) for _ in range(2))
    try:
        for file in sorted(source.iterdir()):
            shutil.copyfile(file, part / file.name)
        try:
            published_at = _published_at(target)
        except (ValueError, KeyError, TypeError, OSError):
            published_at = round(time.time(), 3)
        (part / _PUBLISHED).write_text(json.dumps({"published_at": published_at}) + "\n")
        for file in part.iterdir():
            _sync(file)
        if digest_of(_file_in(part) or part / MAIN) != target.name:
            raise RegistryError(
                "storage_unavailable", "The adapter's copy is not what was exported: check the disk and try again."
            )
        part.chmod(0o755)
        _put(part, target, aside)
    finally:
        for folder in (part, aside):
            shutil.rmtree(folder, ignore_errors=True)
    _sync(target.parent)


def _put(part: Path, target: Path, aside: Path) -> None:
    """Give the copy its name; what bore it goes aside, so that nobody who reads it now is disturbed."""
    for in_the_way in (False, True):
        if in_the_way:
            with suppress(FileNotFoundError):  # somebody else mends it too
                target.rename(aside / target.name)
        try:
            part.rename(target)
            return
        except OSError:
            if _is_whole(target):
                return  # somebody else published the same bytes
            if in_the_way or not target.is_dir():
                raise


def _sweep(home: Path) -> None:
    """Remove copies that a killed process has left."""
    for part in home.glob(f"*/{_PART}*"):
        with suppress(FileNotFoundError):  # it has just been finished
            if time.time() - part.stat().st_mtime > _ABANDONED_S:
                shutil.rmtree(part, ignore_errors=True)


def _published_at(version: Path) -> float:
    return float(json.loads((version / _PUBLISHED).read_bytes())["published_at"])


def _file_in(directory: Path) -> Path | None:
    return next((file for file in (directory / MAIN, directory / LORA) if file.is_file()), None)


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
