"""Noise levels against diffusers' scheduler."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from model.errors import WeightsError
from model.schedule import ShiftRule, euler_step, read_shift_rule, sigmas

FLUX = ShiftRule(dynamic=True, shift=3.0, base_tokens=256, max_tokens=4096, base_mu=0.5, max_mu=1.15)


def oracle(rule: ShiftRule, num_steps: int, tokens: int) -> FlowMatchEulerDiscreteScheduler:
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=rule.dynamic, shift=rule.shift)
    scheduler.set_timesteps(
        sigmas=np.linspace(1.0, 1 / num_steps, num_steps),
        mu=rule.mu(tokens) if rule.dynamic else None,
    )
    return scheduler


@given(st.integers(1, 50), st.integers(4, 16384), st.booleans())
@settings(max_examples=80)
def test_equals_diffusers(num_steps: int, tokens: int, dynamic: bool) -> None:
    """The same float32 levels as the scheduler the released pipeline uses, for any size and number of steps."""
    rule = ShiftRule(dynamic, 3.0, 256, 4096, 0.5, 1.15)
    assert torch.equal(sigmas(num_steps, tokens, rule), oracle(rule, num_steps, tokens).sigmas)


def test_published_levels() -> None:
    """DreamO's twelve levels at 1024²."""
    wanted = [1, 0.9720, 0.9404, 0.9045, 0.8633, 0.8155, 0.7595, 0.6929, 0.6123, 0.5128, 0.3871, 0.2231, 0]
    assert torch.allclose(sigmas(12, 4096, FLUX), torch.tensor(wanted), atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_step_equals_diffusers(dtype: torch.dtype) -> None:
    """A whole Euler descent, bit for bit, with the same rounding between steps."""
    scheduler = oracle(FLUX, 5, 1024)
    levels = sigmas(5, 1024, FLUX)
    ours = theirs = torch.randn(7, 64).to(dtype)
    for step, timestep in enumerate(scheduler.timesteps):
        velocity = torch.randn(7, 64).to(dtype)
        theirs = scheduler.step(velocity, timestep, theirs, return_dict=False)[0]
        ours = euler_step(ours, velocity, levels[step], levels[step + 1])
        assert ours.dtype == dtype
        assert torch.equal(ours, theirs)


def test_the_true_velocity_recovers_the_data() -> None:
    """One step along noise − data from pure noise lands on the data (rectified flow)."""
    data, noise = torch.randn(4, 64), torch.randn(4, 64)
    assert torch.allclose(euler_step(noise, noise - data, torch.tensor(1.0), torch.tensor(0.0)), data, atol=1e-6)


def test_other_schedules_are_refused(tmp_path: Path) -> None:
    """A scheduler configuration FLUX does not use must not be half obeyed."""
    file = tmp_path / "scheduler_config.json"
    file.write_text(json.dumps({"use_karras_sigmas": True}))
    with pytest.raises(WeightsError, match="only FLUX's"):
        read_shift_rule(file)
