"""Adapters over the whole line: registered by the command, named in a request, drawn by the worker that runs."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from model.pipeline import load_pipeline
from model.requests import ImageRequest, Reference
from model.roles import Role
from model.weights.adapters import MAIN
from model.weights.checkpoints import SHIPPED, ModelSource
from service.client import AdapterUse, Client, Job
from service.client import Reference as Sent
from service.commands.samples import star
from tests.conftest import ROOT
from tests.model.weights.adapters import another_dreamo
from workers import pictures
from workers.pictures import PictureLimits

PROMPT = "the star [ref#1] on the left on water"


def command(state: Path, *arguments: str) -> str:
    """`dreamserve adapters` beside a service with this state; what it says."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("DREAMSERVE_")}
    line = [sys.executable, "-m", "service.cli", "adapters", *arguments]
    environment["DREAMSERVE_STATE_DIR"] = str(state)
    return subprocess.run(
        line, cwd=ROOT, env=environment, check=True, capture_output=True, text=True, timeout=240
    ).stdout


def drawn(address: str, adapter: AdapterUse | None) -> tuple[bytes, Job]:
    """The picture and its job."""
    reference = Sent.bytes(star(), role="subject")
    with Client(address) as client:
        job = client.customize(PROMPT, [reference], seed=7, num_inference_steps=4, adapter=adapter, wait=60).wait()
        return job.images[0].read(), job


def fused_with(directory: Path, request: dict[str, Any]) -> np.ndarray:
    """The oracle: a pipeline that was started with DreamO files of this directory draws what a job's `request` says."""
    pipeline = load_pipeline(ModelSource(dreamo=directory, device="cpu"))
    pixels = pictures.decode(star(), PictureLimits())
    wanted = ImageRequest(
        prompt=request["prompt"],
        negative_prompt="",
        references=(Reference(1, Role.SUBJECT, pixels[..., :3], None, request["references"][0]["resolution"], "fail"),),
        height=request["height"],
        width=request["width"],
        num_inference_steps=request["num_inference_steps"],
        guidance=request["guidance"],
        first_step_guidance=request["first_step_guidance"],
    )
    run = pipeline.start(pipeline.encode(wanted, pipeline.preprocess(wanted)), request["seed"])
    while not run.done:
        (run,) = pipeline.step([run])
    assert torch.isfinite(run.latents).all()
    return pipeline.decode(run)


def test_a_registered_adapter_draws_at_once(address: str, state: Path, tmp_path: Path) -> None:
    """A file registered while the service runs: at scale 1 the picture of a service that was started with it, at 0 the
    served model's, byte for byte, and another in between; jobs without one are left alone."""
    file = another_dreamo(tmp_path / MAIN, SHIPPED / "dreamo" / MAIN, seed=4, amount=0.3)
    before, _ = drawn(address, None)
    said = command(state, "add", "line-style", str(file))
    full, job = drawn(address, AdapterUse("line-style"))
    version = job.request["adapter"]["version"]
    assert version in said and "line-style dreamo" in command(state, "list")
    assert job.cache["adapter"] == "miss" and "adapt_s" in job.timings
    half, again = drawn(address, AdapterUse("line-style", 0.5, version))
    assert again.cache["adapter"] == "hit"
    assert drawn(address, AdapterUse("line-style", 0))[0] == before == drawn(address, None)[0]
    assert len({before, half, full}) == 3
    wanted = fused_with(tmp_path, job.request).astype(int)
    with Image.open(io.BytesIO(full)) as image:
        assert np.abs(np.asarray(image).astype(int) - wanted).max() <= 1, "rounding, at most"
    with Image.open(io.BytesIO(before)) as image:
        assert np.abs(np.asarray(image).astype(int) - wanted).max() > 8, "the control"
    with Client(address) as client:
        (listed,) = client.adapters("line-style")
    assert (listed.version, listed.kind, listed.files) == (version, "dreamo", (MAIN,))
