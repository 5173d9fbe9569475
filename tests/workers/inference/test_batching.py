"""Continuous batching on the shipped model: whoever shares a forward, a picture is the one it would be alone."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kernels.packs import Pack, make_pack
from model.pipeline import Pipeline, load_pipeline
from model.requests import ImageRequest, Reference
from model.roles import Role
from model.sampling import Denoising
from model.weights.adapted import Adaptation
from model.weights.adapters import MAIN
from model.weights.checkpoints import SHIPPED, ModelSource
from tests.model.weights.adapters import another_dreamo, plain_lora
from workers.engine import Engine
from workers.pictures import encode
from workers.planner import Budget, Seat

SIDES = (48, 64, 72, 96)
"""Of targets, in pixels."""


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    """All runs of a forward in one pack."""
    loaded = load_pipeline(ModelSource())
    return Pipeline(loaded.model, loaded.tools, lanes=1)


@dataclass(frozen=True, slots=True)
class Begun:
    """A run before its first step, and in which forward it arrives."""

    name: str
    run: Denoising
    arrives: int


def begun(
    pipeline: Pipeline,
    count: int,
    seed: int,
    adaptations: Sequence[Adaptation | None] = (None,),
    steps: tuple[int, int] = (3, 6),
) -> list[Begun]:
    """Random requests: sizes, 0 to 3 references, some with true CFG, by one adaptation each, arriving one after the
    other."""
    draw, noise = random.Random(seed), np.random.default_rng(seed)
    made: list[Begun] = []
    for number in range(count):
        references = tuple(
            Reference(slot, Role.STYLE, noise.integers(0, 256, (24, 24, 3), dtype=np.uint8), None, 24, "fail")
            for slot in draw.sample(range(1, 5), draw.randint(0, 3))
        )
        splits = draw.random() < 0.3
        request = ImageRequest(
            prompt=f"a red star {number} " + " ".join(f"[ref#{reference.slot}]" for reference in references),
            negative_prompt="blue" if splits else "",
            references=references,
            height=draw.choice(SIDES),
            width=draw.choice(SIDES),
            num_inference_steps=draw.randint(*steps),
            guidance=draw.uniform(1.5, 4.5),
            first_step_guidance=2.0,
            true_cfg_scale=2.0 if splits else 1.0,
            true_cfg_start=1,
            true_cfg_end=3,
        )
        encoded = pipeline.encode(request, pipeline.preprocess(request), draw.choice(adaptations))
        made.append(Begun(str(number), pipeline.start(encoded, seed=number), number // 2))
    return made


def alone(pipeline: Pipeline, one: Begun) -> Denoising:
    """The run's end without company."""
    run = one.run
    while not run.done:
        (run,) = pipeline.step([run])
    return run


def together(pipeline: Pipeline, runs: Sequence[Begun], budget: Budget) -> tuple[dict[str, Denoising], list[int]]:
    """Each run's end in continuous batches, and how many shared each forward."""
    engine = Engine(pipeline, budget)
    ended: dict[str, Denoising] = {}
    sizes: list[int] = []
    waiting = list(runs)
    while waiting or len(engine):
        for one in [one for one in waiting if one.arrives <= len(sizes)]:
            seat = Seat(one.name, pipeline.num_tokens(one.run), one.run.num_steps, float(len(sizes)))
            engine.add(replace(seat, group=pipeline.group(one.run)), one.run)
            waiting.remove(one)
        forward = engine.forward()
        assert forward.failed == {}
        sizes.append(len(forward.moved))
        ended |= {key: run for key, run in forward.moved.items() if run.done}
    return ended, sizes


def png(pipeline: Pipeline, run: Denoising) -> bytes:
    pixels: NDArray[np.uint8] = pipeline.decode(run)
    return encode(pixels, "png")


@pytest.mark.parametrize("lanes", [1, 2])
def test_company_changes_no_picture(pipeline: Pipeline, lanes: int) -> None:
    """Random jobs in continuous batches end with the latents of their solo runs (1e-5) and their PNG, byte for byte."""
    runs = begun(pipeline, 12, seed=lanes)
    batching = Pipeline(pipeline.model, pipeline.tools, lanes=lanes)
    ended, sizes = together(batching, runs, Budget(tokens=1200, runs=5))
    assert max(sizes) >= 4 and min(sizes) >= 1, "they did share forwards"
    for one in runs:
        solo = alone(pipeline, one)
        assert (ended[one.name].latents - solo.latents).abs().max() <= 1e-5
        assert png(pipeline, ended[one.name]) == png(pipeline, solo)


@pytest.fixture(scope="module")
def adaptations(pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> list[Adaptation | None]:
    """None, a whole DreamO adapter at two scales, a plain LoRA at two."""
    folder = tmp_path_factory.mktemp("adapters")
    whole = pipeline.load_adapter(another_dreamo(folder / MAIN, SHIPPED / "dreamo" / MAIN, seed=1, amount=0.2))
    plain = pipeline.load_adapter(plain_lora(folder / "plain.safetensors", pipeline.model.transformer, seed=2))
    return [None, whole.at(1.0), whole.at(0.5), plain.at(0.8), plain.at(-0.4)]


def test_adapters_share_a_worker(pipeline: Pipeline, adaptations: list[Adaptation | None]) -> None:
    """64 random jobs of two adapters at two scales and of none, batched as they come: each ends with the latents of its
    solo run (1e-5) and its PNG, byte for byte. Batches hold jobs of the same adapter and scale, and do hold several."""
    runs = begun(pipeline, 64, seed=7, adaptations=adaptations, steps=(4, 12))
    batching = Pipeline(pipeline.model, pipeline.tools, lanes=1)
    assert len({pipeline.group(one.run) for one in runs}) == 5
    ended, sizes = together(batching, runs, Budget(tokens=1200, runs=8))
    assert max(sizes) >= 4
    for one in runs:
        solo = alone(pipeline, one)
        assert (ended[one.name].latents - solo.latents).abs().max() <= 1e-5
        assert png(pipeline, ended[one.name]) == png(pipeline, solo)


def test_a_wrong_adapter_would_be_seen(pipeline: Pipeline, adaptations: list[Adaptation | None]) -> None:
    """The control: the same job by another adapter, at another scale or without ends elsewhere, in other pixels."""
    ends = [alone(pipeline, *begun(pipeline, 1, seed=3, adaptations=[adaptation])) for adaptation in adaptations]
    for number, one in enumerate(ends):
        for other in ends[:number]:
            assert (one.latents - other.latents).abs().max() > 1e-2 and png(pipeline, one) != png(pipeline, other)


def test_a_mix_up_would_be_seen(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: two requests whose boundary in the pack is lost see each other, and the comparison says so."""
    runs = begun(pipeline, 2, seed=2)
    solo = [alone(pipeline, one) for one in runs]
    monkeypatch.setattr("model.transformer.make_pack", merged_pack)
    fresh = Pipeline(pipeline.model, pipeline.tools, lanes=1)
    ended, sizes = together(fresh, [replace(one, arrives=0) for one in runs], Budget(tokens=10**6, runs=5))
    assert max(sizes) == 2
    assert all((ended[one.name].latents - end.latents).abs().max() > 1e-3 for one, end in zip(runs, solo, strict=True))


def merged_pack(boundaries: Sequence[int], device: torch.device) -> Pack:
    """A pack of one sequence."""
    return make_pack((boundaries[0], boundaries[-1]), device)
