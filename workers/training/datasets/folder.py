"""Files of a dataset, read without leaving its directory."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from workers.training.datasets.faults import DatasetError, UnusableFileError


@dataclass(frozen=True, slots=True)
class Folder:
    """A directory from which data may be read. `root` is resolved: no links, no `..`."""

    root: Path

    @classmethod
    def at(cls, path: Path) -> Folder:
        """The directory `path`, or the one that holds the file `path`.

        Raises:
            DatasetError: `path_missing`.
        """
        try:
            resolved = path.resolve(strict=True)
            root = resolved if resolved.is_dir() else resolved.parent
        except (OSError, ValueError, RuntimeError):
            raise DatasetError("path_missing", str(path)) from None
        return cls(root)

    def read(self, name: str, max_bytes: int) -> bytes:
        """A regular file's bytes.

        Args:
            name: relative to the directory.
            max_bytes: a larger file is not read.

        Raises:
            UnusableFileError: `path_escape`, `file_missing`, `file_unreadable`, `image_too_large`.
        """
        try:
            path = (self.root / name).resolve()
            if not path.is_relative_to(self.root):
                raise UnusableFileError("path_escape", name)
            # A FIFO would wait for its writer forever.
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):
                raise UnusableFileError("file_unreadable", f"{name}, not a regular file")
            if status.st_size > max_bytes:
                raise UnusableFileError("image_too_large", f"{name}, {status.st_size} bytes")
            return path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise UnusableFileError("file_missing", name) from None
        except ValueError:  # a null character
            raise UnusableFileError("path_escape", name) from None
        except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
            reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else "a loop of links"
            raise UnusableFileError("file_unreadable", f"{name}, {reason}") from None


def row_files(path: Path, *suffixes: str) -> list[Path]:
    """The files that hold rows: `path` itself, or the ones directly in it that end so, by name.

    Raises:
        DatasetError: `path_missing`, `dataset_empty`.
    """
    folder = Folder.at(path)
    try:
        if not path.is_dir():
            return [path.resolve()]
        # HF keeps parquet files one level down, in `data`.
        there = [folder.root, folder.root / "data"] if ".parquet" in suffixes else [folder.root]
        found = [file for place in there if place.is_dir() for file in sorted(place.iterdir())]
    except OSError:
        raise DatasetError("path_missing", str(path)) from None
    files = [file for file in found if file.suffix.lower() in suffixes and file.is_file()]
    if not files:
        raise DatasetError("dataset_empty", str(path), f"no {' or '.join(suffixes)} file")
    return files
