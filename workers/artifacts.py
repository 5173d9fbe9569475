"""Stored bytes: references by their sha256, finished pictures by job, token and number.

Writing is temp file → fsync → rename → directory fsync, so a name either holds all of its bytes or does not
exist. Only a ledger commit makes a picture's name known; whatever never got that far is swept away by age.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import time
from pathlib import Path
from typing import Final

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
    """Artifacts in a directory, which is made when it is first written to."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._references = root / "references"
        self._pictures = root / "pictures"

    def put(self, data: bytes) -> str:
        """Store bytes under their sha256 (hex), which is returned; stored ones only become younger.

        Raises:
            ArtifactError: `storage_unavailable`.
        """
        key = hashlib.sha256(data).hexdigest()
        path = self._references / key[:2] / key
        try:
            if path.is_file() and path.read_bytes() == data:
                os.utime(path)
            else:
                _write(path, data)
        except OSError as error:
            raise _unavailable(error) from error
        return key

    def read(self, key: str) -> bytes:
        """The bytes behind a sha256.

        Raises:
            ArtifactError: `artifact_missing`, `artifact_corrupt`, `storage_unavailable`.
        """
        if not _KEY.fullmatch(key):
            raise _missing()
        return _read(self._references / key[:2] / key, key)

    def require(self, key: str) -> None:
        """Make sure that something is stored behind a sha256, without reading it.

        Raises:
            ArtifactError: `artifact_missing`, `storage_unavailable`.
        """
        if not _KEY.fullmatch(key):
            raise _missing()
        try:
            (self._references / key[:2] / key).stat()
        except FileNotFoundError:
            raise _missing() from None
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

    def sweep(self, max_age_s: float) -> int:
        """Remove artifacts not written or asked for within `max_age_s`, and unfinished files after an hour.

        Returns:
            How many were removed.
        """
        removed = 0
        now = time.time()
        for path in self.root.rglob("*"):
            try:
                age = now - path.stat().st_mtime
                if path.is_file() and age > (_TEMPORARY_AGE_S if path.suffix == _TEMPORARY else max_age_s):
                    path.unlink()
                    removed += 1
            except OSError:
                continue  # another sweeper was faster
        return removed


def _write(path: Path, data: bytes) -> None:
    reach("before_file")
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=_TEMPORARY)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        reach("before_rename")
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    reach("renamed")
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _read(path: Path, sha256: str) -> bytes:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise _missing() from None
    except OSError as error:
        raise _unavailable(error) from error
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ArtifactError("artifact_corrupt", "A stored file no longer has the bytes it was stored with.")
    return data


def _missing() -> ArtifactError:
    return ArtifactError("artifact_missing", "A stored file is not there any more: send it again.")


def _unavailable(error: OSError) -> ArtifactError:
    reason = error.strerror or type(error).__name__  # never the path
    return ArtifactError("storage_unavailable", f"The artifact store cannot be used ({reason}): try again later.")
