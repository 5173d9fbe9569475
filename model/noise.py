"""Where randomness comes from: every draw of a request is a function of its seed, so its bytes repeat.

Draws are made on the CPU in float32 and then moved and rounded, so they are the same on every device.
"""

from __future__ import annotations

import hashlib
from typing import Protocol

import torch

Shape = tuple[int, ...]


class Draws(Protocol):
    """Standard normal draws of one image."""

    def target(self, shape: Shape) -> torch.Tensor:
        """Initial noise of the target latents."""
        ...

    def reference(self, slot: int, shape: Shape) -> torch.Tensor:
        """Noise of the VAE posterior of the reference in `slot`."""
        ...


class SeededDraws:
    """Production: the target from the seed itself (as released), each reference from (seed, slot).

    A reference's draw does not depend on which other slots are filled. The released pipeline takes reference draws
    from the process-global generator, so there the same seed gives different pictures.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def target(self, shape: Shape) -> torch.Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(self._seed))

    def reference(self, slot: int, shape: Shape) -> torch.Tensor:
        digest = hashlib.sha256(f"reference {self._seed} {slot}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
        return torch.randn(shape, generator=generator)


class ReleasedDraws:
    """The released order: the target from the request's generator, references one after another from one stream.

    That stream is torch's global CPU generator there; here it is a generator of its own with the same seed.
    """

    def __init__(self, seed: int, global_seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._stream = torch.Generator().manual_seed(global_seed)

    def target(self, shape: Shape) -> torch.Tensor:
        return torch.randn(shape, generator=self._generator)

    def reference(self, slot: int, shape: Shape) -> torch.Tensor:  # noqa: ARG002 (the order of calls decides)
        return torch.randn(shape, generator=self._stream)
