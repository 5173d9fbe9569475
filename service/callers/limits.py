"""What a job will cost the devices and how long what waits will take: estimates for admission, not promises. Pure.

A denoise step over n tokens (text, target, references) takes about `token · n + square · n²` seconds. The defaults
go through 128 ms without and 244 ms with three references of 512² at 1024² (docs/scaling.md, FLUX.1-dev on an H200).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from model.spec import ModelSpec
from workers.jobs import CustomizeJob
from workers.training.recipes import Recipe

WINDOWS_S = (15.0, 60.0, 300.0)
"""Over which ended jobs are counted; the shortest that holds enough of them says how fast it goes now."""
ENOUGH_JOBS = 5
LONGEST_TRAINING_S = 1e8
"""What a training is taken for at most, however many steps somebody writes down: three years."""
LONGEST_WAIT_S = 600
UNKNOWN_WAIT_S = 10
"""Told while nothing has ended lately, so that nobody knows."""


@dataclass(frozen=True)
class StepCost:
    """Seconds of a step per token and per token²."""

    token: float = 2.18e-5
    square: float = 1.30e-9

    def seconds(self, tokens: int) -> float:
        return self.token * tokens + self.square * tokens**2


def cost_s(job: CustomizeJob, spec: ModelSpec, step: StepCost) -> float:
    """Estimated GPU-seconds of a job: every step of every picture, those with true CFG twice."""
    sampling = job.sampling
    cells = (sampling.width // spec.cell) * (sampling.height // spec.cell)
    cells += sum(((reference.resolution or 0) // spec.cell) ** 2 for reference in job.references)
    guided = sampling.true_cfg_end - sampling.true_cfg_start if sampling.true_cfg_scale > 1 else 0
    steps = sampling.num_inference_steps + guided
    return job.num_images * steps * step.seconds(spec.text_tokens + cells)


def training_cost_s(recipe: Recipe, sample_s: float) -> float:
    """Estimated GPU-seconds of a training: every sample of every stage."""
    samples = sum(stage.steps * stage.batch for stage in recipe.stages)
    return min(LONGEST_TRAINING_S, samples * sample_s)


def drain_rate(ended: Mapping[float, int]) -> float | None:
    """Jobs that end per second, from how many ended within each window (seconds); None if nothing did."""
    for window, jobs in sorted(ended.items()):
        if jobs >= ENOUGH_JOBS:
            return jobs / window
    longest = max(ended)
    return ended[longest] / longest if ended[longest] else None


def retry_after_s(jobs: float, rate: float | None) -> int:
    """Whole seconds until `jobs` have ended at `rate` jobs per second, within reason."""
    if rate is None:
        return UNKNOWN_WAIT_S
    return max(1, min(LONGEST_WAIT_S, math.ceil(jobs / rate)))
