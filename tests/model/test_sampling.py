"""Denoising runs: several in one forward, true CFG's window, and what a run refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from model.sampling import Denoising, Guidance, Sampler
from model.schedule import sigmas
from model.transformer import Network
from model.weights.checkpoints import LoadedModel
from tests.model.requests import sample

CFG = Guidance(scale=3.5, first_step=2.0, true_scale=2.5, start=1, end=3, negative=3.0)


def sampler(model: LoadedModel) -> Sampler:
    return Sampler(Network(model.transformer), model.tables)


def run(model: LoadedModel, seed: int, steps: int, guidance: Guidance, references: int) -> Denoising:
    one = sample(model, seed, (6, 6), dict.fromkeys(range(1, references + 1), (3, 4)), timestep=1.0)
    negative = sample(model, seed + 100, (6, 6), {}, timestep=1.0, embedded=False).condition
    return sampler(model).begin(one.condition, negative, guidance, sigmas(steps, 36, model.shift), one.latents)


def finish(model: LoadedModel, start: Denoising) -> Denoising:
    while not start.done:
        (start,) = sampler(model).advance([start])
    return start


def test_runs_of_all_kinds_share_a_forward(tiny: LoadedModel) -> None:
    """Different schedules, steps and CFG windows advanced together end where they end alone."""
    starts = [run(tiny, 1, 4, CFG, 2), run(tiny, 2, 6, Guidance(4.5, 4.5), 0), run(tiny, 3, 5, CFG, 1)]
    alone = [finish(tiny, start) for start in starts]
    runs = starts
    while any(not r.done for r in runs):
        moved = iter(sampler(tiny).advance([r for r in runs if not r.done]))
        runs = [r if r.done else next(moved) for r in runs]
    for together, solo in zip(runs, alone, strict=True):
        assert (together.latents - solo.latents).abs().max() <= 1e-5


def test_true_cfg_runs_in_its_window_only(tiny: LoadedModel) -> None:
    """start ≤ step < end; scale 1 or a missing negative prompt never splits."""
    start = run(tiny, 1, 4, CFG, 1)
    sizes = [len(sampler(tiny).velocities([replace(start, step=s)])[0]) for s in range(4)]
    assert sizes == [1, 2, 2, 1]
    for other in (replace(start, negative=None), replace(start, guidance=replace(CFG, true_scale=1.0))):
        assert len(sampler(tiny).velocities([replace(other, step=1)])[0]) == 1


def test_the_first_step_has_its_own_guidance() -> None:
    """`first_step` at step 0, `scale` after it."""
    assert [CFG.at(step) for step in range(3)] == [2.0, 3.5, 3.5]


def test_times_are_rounded_as_released(tiny: LoadedModel) -> None:
    """In bfloat16 the network sees t·1000 rounded, e.g. 904 for 904.5."""
    start = run(tiny, 1, 12, CFG, 0)
    start = replace(start, sigmas=sigmas(12, 4096, tiny.shift), latents=start.latents.bfloat16())
    seen = [float(replace(start, step=s).timestep * 1000) for s in range(12)]
    assert seen == [1000, 972, 940, 904, 864, 816, 760, 692, 612, 512, 388, 223]


def test_a_finished_run_takes_no_step(tiny: LoadedModel) -> None:
    """Stepping past the end is a mistake of the caller, not silence."""
    done = finish(tiny, run(tiny, 1, 1, Guidance(3.5, 3.5), 0))
    with pytest.raises(ValueError, match="finished"):
        sampler(tiny).advance([done])
    assert torch.isfinite(done.latents).all()
