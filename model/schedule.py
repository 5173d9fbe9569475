"""Noise levels of a rectified flow: FLUX's Euler schedule with a shift that grows with the number of target tokens.

t in [0, 1], 1 = noise; sigma = t. Same numbers as diffusers' `FlowMatchEulerDiscreteScheduler`, as plain functions.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from model.errors import WeightsError


@dataclass(frozen=True, slots=True)
class ShiftRule:
    """How the schedule is shifted: by `shift`, or dynamically with the number of target tokens.

    FLUX.1-dev: dynamic, mu from 0.5 at 256 tokens to 1.15 at 4096.
    """

    dynamic: bool
    shift: float
    base_tokens: int
    max_tokens: int
    base_mu: float
    max_mu: float

    def mu(self, num_target_tokens: int) -> float:
        """Shift exponent; references do not count (DreamO)."""
        slope = (self.max_mu - self.base_mu) / (self.max_tokens - self.base_tokens)
        return num_target_tokens * slope + self.base_mu - slope * self.base_tokens


def read_shift_rule(file: Path) -> ShiftRule:
    """The rule in a diffusers `scheduler_config.json`.

    Raises:
        WeightsError: the file asks for a schedule FLUX does not use.
    """
    config = json.loads(file.read_bytes())
    if config.get("time_shift_type", "exponential") != "exponential" or any(
        config.get(f"use_{kind}_sigmas") for kind in ("karras", "exponential", "beta")
    ):
        raise WeightsError("weights_format", f"{file}: only FLUX's exponential time shift is supported")
    return ShiftRule(
        dynamic=bool(config.get("use_dynamic_shifting", False)),
        shift=config.get("shift", 1.0),
        base_tokens=config.get("base_image_seq_len", 256),
        max_tokens=config.get("max_image_seq_len", 4096),
        base_mu=config.get("base_shift", 0.5),
        max_mu=config.get("max_shift", 1.15),
    )


def sigmas(num_steps: int, num_target_tokens: int, rule: ShiftRule) -> torch.Tensor:
    """Noise levels before each step and after the last: [num_steps + 1] float32, from 1 down to 0."""
    level = np.linspace(1.0, 1.0 / num_steps, num_steps).astype(np.float32)
    if rule.dynamic:
        odds = math.exp(rule.mu(num_target_tokens))
        level = odds / (odds + (1.0 / level - 1.0))
    else:
        level = rule.shift * level / (1 + (rule.shift - 1) * level)
    return torch.cat([torch.from_numpy(level.astype(np.float32)), torch.zeros(1)])


def euler_step(
    latents: torch.Tensor, velocity: torch.Tensor, sigma: torch.Tensor, sigma_next: torch.Tensor
) -> torch.Tensor:
    """x + (sigma_next − sigma)·v, summed in float32, returned in the velocity's dtype; the sigmas are scalars."""
    return (latents.float() + (sigma_next - sigma) * velocity).to(velocity.dtype)
