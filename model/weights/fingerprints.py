"""What tells one base model from another: a digest of its transformer's tensors by a sample of each.

Reading all of FLUX.1-dev takes half a minute of a start. Whoever trains a base changes every large tensor, so its
names, its shapes and the first values of each are enough; as bfloat16, so that the same base in other shards or in
float32 has the same fingerprint.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import safe_open

_VALUES: Final = 256


def fingerprint_of(transformer: Path) -> str | None:
    """Of a transformer's directory in diffusers layout: 32 hex digits; None if there are no weights in it.

    Raises:
        SafetensorError, OSError: they cannot be read.
    """
    found: list[bytes] = []
    for file in transformer.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            found += [_sample(name, opened.get_slice(name)) for name in opened.keys()]  # noqa: SIM118 - no mapping
    return hashlib.sha256(b"".join(sorted(found))).hexdigest()[:32] if found else None


def _sample(name: str, tensor: Any) -> bytes:
    shape = tensor.get_shape()
    first: torch.Tensor = tensor[:1] if len(shape) > 1 else tensor[:_VALUES]
    values = first.flatten()[:_VALUES].to(torch.bfloat16).view(torch.int16).numpy()
    return f"{name} {shape}\n".encode() + hashlib.sha256(values.tobytes()).digest()
