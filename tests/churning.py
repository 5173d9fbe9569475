"""A directory in which another process is at work."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def churning(folder: Path) -> Generator[None]:
    """Meanwhile directories in it are written as `.part`, renamed, and removed with all that is in them."""
    done = threading.Event()

    def churn() -> None:
        while not done.is_set():
            for number in range(8):
                part = folder / f"{number}.part"
                (part / "deep").mkdir(parents=True)
                (part / "deep" / "file").write_bytes(b"x")
                part.rename(folder / str(number))
            for number in range(8):
                shutil.rmtree(folder / str(number))

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def plain_walk_fails(folder: Path) -> bool:
    """Whether a walk that minds nothing fell over what vanished before it: the negative control of a sweep."""
    try:
        for path in folder.rglob("*"):
            path.stat()
    except FileNotFoundError:
        return True
    return False
