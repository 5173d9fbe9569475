"""What the pipeline is asked for: every default resolved, every picture decoded. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from model.roles import Role


@dataclass(frozen=True, slots=True)
class Reference:
    """One occupied slot as the caller sent it, decoded.

    Attributes:
        slot: 1-based, never compacted.
        pixels: uint8 [h, w, 3] RGB.
        mask: uint8 [h, w], what to keep; goes before cut-out and face parsing.
        resolution: side of the square whose area the prepared picture has; an identity reference ignores it.
        on_no_face: whether an identity reference without a face is refused or treated as a subject.
    """

    slot: int
    role: Role
    pixels: NDArray[np.uint8]
    mask: NDArray[np.uint8] | None
    resolution: int
    on_no_face: Literal["fail", "subject"] = "fail"


@dataclass(frozen=True, slots=True)
class ImageRequest:
    """What to make. Sizes in pixels."""

    prompt: str
    negative_prompt: str
    references: tuple[Reference, ...]
    height: int
    width: int
    num_inference_steps: int
    guidance: float
    first_step_guidance: float
    true_cfg_scale: float = 1.0
    true_cfg_start: int = 0
    true_cfg_end: int = 0
    negative_guidance: float = 3.5
