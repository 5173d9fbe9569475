"""Copies of kernels with a mistake in them: controls for the tests that compare kernels with their references."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from pathlib import Path
from types import ModuleType

numbers = itertools.count()


def broken(module: ModuleType, old: str, new: str, folder: Path, *, everywhere: bool = False) -> ModuleType:
    """The module with `old` written otherwise, and operations of its own.

    Args:
        everywhere: `old` may stand in more than one place; all are changed.
    """
    source = Path(module.__file__ or "").read_text()
    count = source.count(old)
    assert count == 1 or (everywhere and count), f"{module.__name__} says {count} times {old!r}"
    name = f"broken_{module.__name__.rpartition('.')[2]}_{next(numbers)}"
    file = folder / f"{name}.py"
    file.write_text(source.replace(old, new).replace('"dreamserve::', f'"{name}::'))
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    loaded = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded
