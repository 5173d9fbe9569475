"""What low precision costs and gives: drift from bfloat16 on fixed scenes, time of a step, bytes of weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from model.compilation import compiled
from model.network import fused
from model.pipeline import ModelSource, Pipeline, PreparedReference, load_pipeline
from model.precision import Precision, held_bytes, quantized
from model.requests import ImageRequest
from model.sampling import Denoising, Sampler
from model.transformer import EmbeddingTables, Network
from tests.benchmarks.measure import Figure, compared, figure, interleaved, own_seconds
from tests.benchmarks.step_cases import SIZES, Size, begin, make_model, make_request
from workers.training.stickerworld.scenes import Scene
from workers.training.stickerworld.settings import Settings
from workers.training.stickerworld.world import scene

PRECISIONS: tuple[Precision, ...] = ("int8", "fp8")
SCENES = 16
BATCH = 8
REFERENCES = 2


def run(device: str, rounds: int) -> list[Figure]:
    """Rows of drift on the shipped model, then of time and bytes at the device's size with random weights."""
    return drift(device) + cost(device, rounds)


def drift(device: str) -> list[Figure]:
    """Cosine of the final latents and PSNR of the pictures against bfloat16, over scenes that training never shows.

    float32 stands beside them as the measure: so far bfloat16 itself is from the exact computation.
    """
    settings = Settings(mixture=(("multi_subject", 1.0),), max_subjects=2, split="held_out")
    scenes = [scene(0, index, settings) for index in range(SCENES)]
    source = ModelSource(dtype="bfloat16", device=device, compile="off")
    baseline = _made(load_pipeline(source), scenes)
    others = {"float32": _made(load_pipeline(replace(source, dtype="float32")), scenes)}
    others |= {name: _made(load_pipeline(replace(source, precision=name)), scenes) for name in PRECISIONS}
    figures: list[Figure] = []
    for name, made in others.items():
        pairs = list(zip(made, baseline, strict=True))
        cosines = [float(F.cosine_similarity(a, b, dim=0)) for (a, _), (b, _) in pairs]
        figures.append(figure(f"latents of the shipped model: {name} against bfloat16", "cosine", cosines))
        decibels = [psnr(a, b) for (_, a), (_, b) in pairs]
        figures.append(figure(f"pictures of the shipped model: {name} against bfloat16", "dB", decibels))
    return figures


def psnr(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    """Of two pictures, in dB; of equal ones what a single level in a single value would make."""
    error = float(((one.astype(np.float64) - other) ** 2).sum())
    return 10 * math.log10(255**2 * one.size / max(error, 1.0))


def cost(device: str, rounds: int) -> list[Figure]:
    """Milliseconds of a step in each precision, on a GPU also compiled; and the weights' bytes."""
    size = SIZES[device]
    networks = {name: _network(size, device, name) for name in ("full", *PRECISIONS)}
    held = {name: held_bytes(network) for name, network in networks.items()}
    if device == "cuda":
        networks |= {f"{name}, compiled": compiled(network) for name, network in networks.items()}
    condition, noise = make_request(size, REFERENCES, device, torch.bfloat16)
    tables = EmbeddingTables(*(torch.randn(rows, size.width).to(noise) for rows in (2, 10)))

    def step(network: Network) -> Callable[[], object]:
        sampler = Sampler(network, tables)
        started = begin(sampler, condition, noise, step=1)
        return lambda: sampler.velocities([started])

    steps = {name: step(network) for name, network in networks.items()}
    timer = own_seconds if device == "cpu" and torch.get_num_threads() == 1 else None
    seconds = interleaved(steps, rounds=rounds, device=device, timer=timer)
    figures = compared(f"step, {REFERENCES} references", seconds, "full", tokens=size.tokens(REFERENCES))
    for name, count in held.items():
        figures.append(figure(f"weights held: {name}", "MB", [count / 1e6]))
        figures.append(figure(f"weights held: {name} to full", "x", [count / held["full"]]))
    return figures


def _network(size: Size, device: str, precision: str) -> Network:
    """Random weights, the same at each call."""
    torch.manual_seed(0)
    network = fused(make_model(size, device, torch.bfloat16)[0])
    return network if precision == "full" else quantized(network, cast("Precision", precision))


def _made(pipeline: Pipeline, scenes: Sequence[Scene]) -> list[tuple[torch.Tensor, NDArray[np.uint8]]]:
    """Final latents, flat, and picture of each scene; scene i is drawn with seed i."""
    runs: list[Denoising] = []
    for first in range(0, len(scenes), BATCH):
        group = [_start(pipeline, one, seed) for seed, one in enumerate(scenes[first : first + BATCH], first)]
        while not group[0].done:
            group = list(pipeline.step(group))
        runs += group
    return [(one.latents.flatten().double().cpu(), pipeline.decode(one)) for one in runs]


def _start(pipeline: Pipeline, one: Scene, seed: int) -> Denoising:
    spec, (height, width) = pipeline.spec, one.picture.shape[:2]
    request = ImageRequest(
        prompt=one.prompt,
        negative_prompt="",
        references=(),
        height=height,
        width=width,
        num_inference_steps=int(spec.num_inference_steps.default),
        guidance=spec.guidance.default,
        first_step_guidance=spec.guidance.default,
    )
    # StickerWorld's references are cut out and sized already.
    prepared = [PreparedReference(r.slot, r.role, r.pixels) for r in one.record().references]
    return pipeline.start(pipeline.encode(request, prepared), seed)
