"""The recorded reference preparation of the released application, and how well two masks agree."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

RECORDING = Path(__file__).parents[1] / "golden" / "assets" / "preprocess.safetensors"


@cache
def recorded_tensor(name: str) -> NDArray[Any]:
    """One recorded tensor."""
    with safe_open(RECORDING, "np") as file:
        return file.get_tensor(name)


@cache
def recorded_meta() -> dict[str, Any]:
    """Tables and parameters of the recording."""
    with safe_open(RECORDING, "np") as file:
        return json.loads(file.metadata()["meta"])


def overlap(mask: NDArray[np.uint8], truth: NDArray[np.uint8]) -> float:
    """Intersection over union of two masks, cut at half."""
    ours, theirs = mask > 127, truth > 127
    return float((ours & theirs).sum() / (ours | theirs).sum())
