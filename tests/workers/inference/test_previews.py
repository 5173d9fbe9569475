"""Previews on request: every so many steps, of the first image, newest last, and never in the way of the job."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from PIL import Image

from model.pipeline import load_pipeline
from model.requests import ImageRequest
from model.weights.checkpoints import ModelSource
from tests.workers.conftest import MakeJob
from tests.workers.inference.conftest import Make
from tests.workers.inference.test_runner import run
from tests.workers.standin import Run, StandinPipeline
from workers.jobs import JobStatus
from workers.ledger import MAX_PREVIEW_BYTES
from workers.pictures import encode


def grey(data: bytes) -> float:
    return float(np.asarray(Image.open(io.BytesIO(data)).convert("L")).mean())


@pytest.mark.parametrize(("every", "steps"), [(0, []), (2, [2, 4]), (3, [3]), (5, []), (9, [])])
def test_previews_come_every_so_many_steps(make_runner: Make, make_job: MakeJob, every: int, steps: list[int]) -> None:
    """Each is told of as an event with its progress, also with two images; the last can be read after the end."""
    runner = make_runner()
    record = run(runner, make_job("job_1", steps=5, previews=every, num_images=2))
    assert record.status is JobStatus.SUCCEEDED
    events, _ = runner.ledger.events("job_1", None)
    told = [json.loads(event.data) for event in events if event.kind == "preview"]
    assert bool(told) == bool(steps) and len(told) <= len(steps), "one that is not told yet makes way for the next"
    assert {data["phase"] for data in told} <= {"denoise", "decode"}, "one that is told late, with what is new by then"
    assert [data["step"] for data in told] == sorted(data["step"] for data in told)
    shown = runner.ledger.preview("job_1")
    if steps:
        assert shown is not None and grey(shown) == pytest.approx(255 * steps[-1] // 5, abs=2)
    else:
        assert shown is None


class Blind(StandinPipeline):
    """Cannot show anything."""

    def preview(self, run: Run) -> np.ndarray:
        raise LookupError(run)


def test_a_preview_that_fails_fails_its_job_alone(make_runner: Make, make_job: MakeJob) -> None:
    """Like any other part of a job: recorded, and the worker goes on."""
    runner = make_runner(Blind())
    record = run(runner, make_job("job_1", steps=3, previews=1))
    assert record.error is not None and record.error.code == "internal"
    assert run(runner, make_job("job_2", steps=3)).status is JobStatus.SUCCEEDED


class Noisy(StandinPipeline):
    """Shows what no JPEG of that size can say in 64 KiB."""

    def preview(self, run: Run) -> np.ndarray:
        return np.random.default_rng(run.step).integers(0, 2, (160, 160, 3), dtype=np.uint8) * 255


def test_a_preview_that_is_too_large_is_made_smaller(make_runner: Make, make_job: MakeJob) -> None:
    """It is shown with fewer pixels, its job ends as without it, and progress is told of the next job as of any."""
    runner = make_runner(Noisy())
    assert len(encode(Noisy().preview(Run(None, 0, 1)), "jpeg")) > MAX_PREVIEW_BYTES
    assert run(runner, make_job("job_1", steps=4, previews=1)).status is JobStatus.SUCCEEDED
    shown = runner.ledger.preview("job_1")
    assert shown is not None and len(shown) <= MAX_PREVIEW_BYTES
    assert Image.open(io.BytesIO(shown)).size == (80, 80)
    record = run(runner, make_job("job_2", steps=4))
    assert record.status is JobStatus.SUCCEEDED
    assert record.progress is not None and (record.progress.phase, record.progress.step) == ("decode", 4)


def test_the_shipped_models_previews_are_small() -> None:
    """One pixel a latent, as JPEG far below what the ledger takes; noise at first, the picture in the end."""
    pipeline = load_pipeline(ModelSource())
    spec = pipeline.spec
    request = ImageRequest("a red star", "", (), int(spec.height.default), int(spec.width.default), 4, 3.5, 3.5)
    (moved,) = pipeline.step([pipeline.start(pipeline.encode(request, ()), seed=1)])
    pixels = pipeline.preview(moved)
    assert pixels.dtype == np.uint8 and pixels.shape[0] * pipeline.model.codec.factor == request.height
    noise = np.random.default_rng(0).integers(0, 256, (160, 160, 3), np.uint8)
    assert len(encode(noise, "jpeg")) < MAX_PREVIEW_BYTES, "even the worst picture of the largest size"
