"""Triton where it can be had: not on every platform, and nothing but the Triton backend needs it.

The interpreter (TRITON_INTERPRET=1) is chosen by Triton when a kernel is decorated, so by the environment at import.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, Final

HAS_TRITON: Final = importlib.util.find_spec("triton") is not None

tl: Any = importlib.import_module("triton.language") if HAS_TRITON else None


def triton_jit(function: Callable[..., Any]) -> Any:
    """`triton.jit`; without Triton the function as it is, which nobody launches then."""
    return importlib.import_module("triton").jit(function) if HAS_TRITON else function
