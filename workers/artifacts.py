"""Stored bytes: references by tenant and sha256, finished pictures by job, token and number.

Writing is temp file → fsync → rename → directory fsync, so a name either holds all of its bytes or does not
exist. Only a ledger commit makes a picture's name known; whatever never got that far is swept away by age.

Each tenant's references lie in a directory of their own: the same bytes of two tenants are two files, so nobody finds,
deletes, or learns by the time that storing takes, what another has stored.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import IO, Final

from workers.failpoints import reach

_KEY = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}\.[0-9]{1,20}\.[0-9]{1,3}\.(png|jpeg|webp)")
_TEMPORARY: Final = ".part"
_TEMPORARY_AGE_S: Final = 3600.0


class ArtifactError(Exception):
    """Codes: `artifact_missing`, `artifact_corrupt`, `storage_unavailable` (disk full, not writable).

    The message is safe to show to the caller.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class ArtifactStore:
    """Artifacts in a directory, which is made when it is first written to.

    Args:
        reserve_bytes: free space below which no tenant's bytes are taken, so that finished pictures still have room.
    """

    def __init__(self, root: Path, reserve_bytes: int = 0) -> None:
        self.root = root
        self._reserve_bytes = reserve_bytes
        self._references = root / "references"
        self._pictures = root / "pictures"

    def put(self, tenant: str, data: bytes) -> str:
        """Store a tenant's bytes under their sha256 (hex), which is returned; stored ones only become younger.

        Raises:
            ArtifactError: `storage_unavailable`; with less than the reserve free, too.
        """
        key = hashlib.sha256(data).hexdigest()
        path = self._reference(tenant, key)
        try:
            if path.is_file() and path.read_bytes() == data:
                os.utime(path)
            else:
                home = self._home(tenant)
                home.mkdir(parents=True, exist_ok=True)
                _require_room(home, self._reserve_bytes)
                _write(path, data)
        except OSError as error:
            raise _unavailable(error) from error
        return key

    @contextmanager
    def receive(self, tenant: str) -> Generator[Incoming]:
        """Bytes that come in pieces; what is not kept by the end is gone. The calls on it block.

        Raises:
            ArtifactError: `storage_unavailable`; with less than the reserve free, too.
        """
        home = self._home(tenant)
        try:
            home.mkdir(parents=True, exist_ok=True)
            _require_room(home, self._reserve_bytes)
            handle, temporary = tempfile.mkstemp(dir=home, suffix=_TEMPORARY)
        except OSError as error:
            raise _unavailable(error) from error
        with os.fdopen(handle, "wb", buffering=0) as file:  # a buffer would be written again by closing
            try:
                yield Incoming(file, Path(temporary), home, self._reserve_bytes)
            finally:
                Path(temporary).unlink(missing_ok=True)

    def read(self, tenant: str, key: str) -> bytes:
        """The bytes behind a tenant's sha256.

        Raises:
            ArtifactError: `artifact_missing`, `artifact_corrupt`, `storage_unavailable`.
        """
        return _read(self._reference(tenant, key), key)

    def require(self, tenant: str, key: str) -> None:
        """Make sure that something is stored behind a tenant's sha256, without reading it.

        Raises:
            ArtifactError: `artifact_missing`, `storage_unavailable`.
        """
        with _found():
            self._reference(tenant, key).stat()

    def renew(self, tenant: str, key: str) -> None:
        """Make what is stored behind a tenant's sha256 young again, so that the next sweeps spare it.

        Raises:
            ArtifactError: `artifact_missing`, `storage_unavailable`.
        """
        with _found():
            os.utime(self._reference(tenant, key))

    def delete(self, tenant: str, key: str) -> None:
        """Remove what is stored behind a tenant's sha256; absent is as good. A file that is being read is read on.

        Raises:
            ArtifactError: `artifact_missing`: no sha256; `storage_unavailable`: it is still there.
        """
        path = self._reference(tenant, key)
        try:
            path.unlink()
            _sync_directory(path.parent)
        except FileNotFoundError:
            return
        except OSError as error:
            raise _unavailable(error) from error

    def publish(self, name: str, data: bytes) -> str:
        """Store a finished picture as `<job id>.<token>.<n>.<extension>` and return its sha256.

        Raises:
            ArtifactError: `storage_unavailable`.
        """
        try:
            _write(self.path(name), data)
        except OSError as error:
            raise _unavailable(error) from error
        return hashlib.sha256(data).hexdigest()

    def read_picture(self, name: str, sha256: str) -> bytes:
        """A published picture, checked against the digest that its job's record holds.

        Raises:
            ArtifactError: `artifact_missing`, `artifact_corrupt`, `storage_unavailable`.
        """
        return _read(self.path(name), sha256)

    def discard(self, name: str) -> None:
        """Remove a picture that no commit has made known; absent is as good."""
        try:
            self.path(name).unlink(missing_ok=True)
        except OSError:
            return  # the sweep will find it

    def path(self, name: str) -> Path:
        """Where a picture lies, whether or not it exists.

        Raises:
            ArtifactError: `artifact_missing`: not a picture's name.
        """
        if not _NAME.fullmatch(name):
            raise _missing()
        return self._pictures / name

    def check_writable(self) -> None:
        """Write, sync and remove a file.

        Raises:
            ArtifactError: `storage_unavailable`.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.root, suffix=_TEMPORARY) as file:
                file.write(b"writable")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise _unavailable(error) from error

    def _home(self, tenant: str) -> Path:
        """A tenant's directory; its name is a digest, because a tenant's own may be anything."""
        return self._references / hashlib.sha256(tenant.encode()).hexdigest()[:32]

    def _reference(self, tenant: str, key: str) -> Path:
        if not _KEY.fullmatch(key):
            raise _missing()
        return self._home(tenant) / key[:2] / key

    def sweep(self, max_age_s: float) -> int:
        """Remove artifacts not written or asked for within `max_age_s`, and unfinished files after an hour.

        Returns:
            How many were removed.
        """
        removed = 0
        now = time.time()
        for folder, _, names in os.walk(self.root):  # which passes over directories that vanish before it
            for path in (Path(folder, name) for name in names):
                try:
                    age = now - path.stat().st_mtime
                    if path.is_file() and age > (_TEMPORARY_AGE_S if path.suffix == _TEMPORARY else max_age_s):
                        path.unlink()
                        removed += 1
                except OSError:
                    continue  # another sweeper was faster
        return removed


class Incoming:
    """A reference on its way in. Nothing of it has a name until `keep`."""

    def __init__(self, file: FileIO, path: Path, home: Path, reserve_bytes: int) -> None:
        self._file = file
        self._path = path
        self._home = home
        self._reserve_bytes = reserve_bytes
        self._digest = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> None:
        """Append.

        Raises:
            ArtifactError: `storage_unavailable`; with less than the reserve free, too: others write at the same time.
        """
        rest = memoryview(data)
        try:
            _require_room(self._file.fileno(), self._reserve_bytes)
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise _unavailable(error) from error
        self._digest.update(data)
        self.size += len(data)

    def read(self) -> bytes:
        """All that has come.

        Raises:
            ArtifactError: `storage_unavailable`, `artifact_corrupt`: the disk gives other bytes back.
        """
        return _read(self._path, self._digest.hexdigest())

    def keep(self) -> str:
        """Store it under its sha256 (hex), which is returned; what lies there already is replaced by the same bytes.

        Raises:
            ArtifactError: `storage_unavailable`.
        """
        key = self._digest.hexdigest()
        path = self._home / key[:2] / key
        try:
            path.parent.mkdir(exist_ok=True)
            _settle(self._file, self._path, path)
        except OSError as error:
            raise _unavailable(error) from error
        return key


def _require_room(place: Path | int, reserve_bytes: int) -> None:
    """OSError if the file system that a path or an open file lies on has less free than the reserve."""
    if shutil.disk_usage(place).free < reserve_bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _write(path: Path, data: bytes) -> None:
    reach("before_file")
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=_TEMPORARY)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            _settle(file, Path(temporary), path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _settle(file: IO[bytes] | FileIO, temporary: Path, path: Path) -> None:
    """Give a file that is not buffered any more its name, for good."""
    os.fsync(file.fileno())
    reach("before_rename")
    temporary.replace(path)
    reach("renamed")
    _sync_directory(path.parent)


def _sync_directory(path: Path) -> None:
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _read(path: Path, sha256: str) -> bytes:
    with _found():
        data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ArtifactError("artifact_corrupt", "A stored file no longer has the bytes it was stored with.")
    return data


@contextmanager
def _found() -> Generator[None]:
    """What the file system says of a file that should be there, in this store's words."""
    try:
        yield
    except FileNotFoundError:
        raise _missing() from None
    except OSError as error:
        raise _unavailable(error) from error


def _missing() -> ArtifactError:
    return ArtifactError("artifact_missing", "A stored file is not there any more: send it again.")


def _unavailable(error: OSError) -> ArtifactError:
    reason = error.strerror or type(error).__name__  # never the path
    return ArtifactError("storage_unavailable", f"The artifact store cannot be used ({reason}): try again later.")
