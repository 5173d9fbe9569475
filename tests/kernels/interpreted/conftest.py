"""These tests run in Triton's interpreter (see `test_interpreted`) or on a GPU, and are not collected elsewhere."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the kernels run."""
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture(scope="session", autouse=True)
def true_bfloat16() -> Iterator[None]:
    """Teach the interpreter bfloat16: it keeps it as uint16, multiplies those numbers, and rounds towards zero."""
    if not INTERPRETED:
        yield
        return
    from triton.runtime import interpreter

    builder: Any = interpreter.InterpreterBuilder
    cast, dot = builder.cast_impl, builder.create_dot
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "cast_impl", lambda self, source, kind: _cast(cast, self, source, kind))
        patch.setattr(builder, "create_dot", lambda self, a, b, *rest: dot(self, _widened(a), _widened(b), *rest))
        yield


def _widened(handle: Any) -> Any:
    """A bfloat16 tensor as float32, others as they are."""
    from triton import language as tl
    from triton.runtime.interpreter import TensorHandle

    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _cast(cast: Any, builder: Any, source: Any, kind: Any) -> Any:
    """To and from bfloat16 by way of float32, rounded to nearest even."""
    from triton import language as tl
    from triton.runtime.interpreter import TensorHandle

    if kind.scalar != tl.bfloat16:
        return cast(builder, _widened(source), kind)
    if source.dtype.scalar == tl.bfloat16:
        return source
    wide = np.ascontiguousarray(source.data.astype(np.float32))
    bits = wide.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return TensorHandle(np.where(np.isnan(wide), np.uint16(0x7FC0), rounded), tl.bfloat16)
