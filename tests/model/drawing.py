"""A request that reads everything an adapter can change, and what is drawn of it."""

from __future__ import annotations

import numpy as np
import torch

from model.pipeline import EncodedRequest, Pipeline
from model.requests import ImageRequest, Reference
from model.roles import Role
from model.sampling import Denoising
from model.weights.adapted import Adaptation


def whole_request(pipeline: Pipeline, adaptation: Adaptation | None = None) -> EncodedRequest:
    """A request that reads everything an adapter can change: references in slots, placeholders, true CFG."""
    noise = np.random.default_rng(0)
    references = tuple(
        Reference(slot, Role.STYLE, noise.integers(0, 256, (32, 32, 3), dtype=np.uint8), None, 32, "fail")
        for slot in (1, 3)
    )
    request = ImageRequest(
        prompt="the toy [ref#1] and the mug [ref#3]",
        negative_prompt="blue",
        references=references,
        height=64,
        width=96,
        num_inference_steps=6,
        guidance=3.5,
        first_step_guidance=2.0,
        true_cfg_scale=2.0,
        true_cfg_start=1,
        true_cfg_end=3,
    )
    return pipeline.encode(request, pipeline.preprocess(request), adaptation)


def begun(pipeline: Pipeline, adaptation: Adaptation | None = None) -> Denoising:
    """An image of it before its first step."""
    return pipeline.start(whole_request(pipeline, adaptation), seed=3)


def drawn(pipeline: Pipeline, adaptation: Adaptation | None = None) -> torch.Tensor:
    """The request's latents after all its steps."""
    run = begun(pipeline, adaptation)
    while not run.done:
        (run,) = pipeline.step([run])
    return run.latents


def off(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative distance."""
    return float((got - wanted).norm() / wanted.norm())
