"""One training sample as every source yields it, synthetic or real: what was asked, with what, and what it should give.

Pictures are uint8 [h, w, 3] RGB, masks uint8 [h, w] with 255 = inside. No torch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model.roles import Role

Pixels = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class RecordReference:
    """One reference of a sample.

    Attributes:
        slot: 1-based; `[ref#slot]` in the prompt means this one.
        pixels: [h, w, 3], prepared already (cut out on white, resized) where the source is synthetic.
        target_mask: [H, W] where the subject lies in the target; None where nobody knows. The routing loss reads it.
    """

    slot: int
    role: Role
    pixels: Pixels
    target_mask: Pixels | None = None


@dataclass(frozen=True, slots=True)
class Record:
    """One training sample.

    Attributes:
        key: names the record within its source, for messages.
        task: which kind of sample it is, e.g. `multi_subject`; mixtures and reports go by it.
        prompt: may hold placeholders; what the references carry is left out of it.
        target: [H, W, 3].
    """

    key: str
    task: str
    prompt: str
    references: tuple[RecordReference, ...]
    target: Pixels
