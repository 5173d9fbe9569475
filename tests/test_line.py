"""The whole line with the shipped model: a caller over HTTP, every process real, pictures computed by the model."""

from __future__ import annotations

import io
from typing import Any, Unpack

import httpx2
import numpy as np
import pytest
from PIL import Image

from service.client import Client, Job, JobFailedError, Reference
from service.client.calls import CustomizeOptions
from service.commands.samples import ring, star
from service.commands.submit import follow

TWO = "the star from [ref#1] and the ring from [ref#2]"


def entry(data: bytes, role: str = "subject", **more: Any) -> Reference:
    return Reference.bytes(data, role, **more)


def picture(
    address: str, references: list[Reference | None], prompt: str = "a table", **more: Unpack[CustomizeOptions]
) -> bytes:
    """The first picture of a job that succeeds."""
    options: CustomizeOptions = {"seed": 7, "num_inference_steps": 2, **more}
    with Client(address) as client:
        return client.customize(prompt, references, wait=60, **options).wait(60).images[0].read()


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def test_the_same_request_gives_the_same_bytes(address: str) -> None:
    """Everything random follows from the seed, also with other jobs in between."""
    references = [entry(star()), entry(ring())]
    first = picture(address, references, TWO)
    assert picture(address, references, TWO, seed=8) != first
    assert picture(address, references, TWO) == first


def test_references_and_their_slots_matter(address: str) -> None:
    """Swapping references, leaving a slot empty and leaving a reference out each change the picture."""
    a, b = entry(star()), entry(ring())
    made = [
        picture(address, references)
        for references in ([a, b], [b, a], [a, None, b], [None, a, b], [a], [a, b, entry(star(64))], [])
    ]
    assert len(set(made)) == len(made)


def test_the_role_matters_by_its_preparation(address: str) -> None:
    """A subject is cut out, a style is not; a mask goes before the cut-out."""
    pixels = np.asarray(Image.open(io.BytesIO(star())).convert("RGB"))
    mask = np.zeros(pixels.shape[:2], np.uint8)
    mask[: len(mask) // 2] = 255
    subject = picture(address, [entry(star())])
    trigger = "generate a same style image."
    assert picture(address, [entry(star(), "style")]) != picture(address, [entry(star())], trigger + " a table")
    masked = picture(address, [entry(star()).masked(png(mask))])
    assert masked != subject
    transparent = png(np.dstack([pixels, mask]))
    assert picture(address, [entry(transparent)]) == masked


def test_image_n_is_the_picture_of_seed_plus_n(address: str) -> None:
    """Each picture of a job can be made again alone."""
    references: list[Reference | None] = [entry(star())]
    with Client(address) as client:
        job = client.customize("a table", references, seed=2**64 - 1, num_inference_steps=2, num_images=2).wait()
        assert [image.seed for image in job.images] == [2**64 - 1, 0]
        assert picture(address, references, seed=0) == job.images[1].read()


def test_progress_and_timings_are_told(address: str) -> None:
    """A follower sees steps go by, and where the time went."""
    seen: list[tuple[str, int]] = []

    def note(job: Job) -> None:
        if job.progress:
            seen.append((job.progress.phase, job.progress.step))

    with Client(address) as client:
        submitted = client.customize("a table", num_inference_steps=50, num_images=2, width=128, height=96)
        job = follow(submitted, note)
        second = job.images[1].read()
    assert any(phase == "denoise" and 0 < step < 100 for phase, step in seen)
    assert [step for _, step in seen] == sorted(step for _, step in seen)
    assert {"queued_s", "preprocess_s", "encode_s", "denoise_s", "decode_s"} <= job.timings.keys()
    with Image.open(io.BytesIO(second)) as image:
        assert image.size == (128, 96)


def test_true_cfg_changes_the_picture(address: str) -> None:
    """The negative branch runs, and its prompt counts."""
    plain = picture(address, [entry(star())])
    one = picture(address, [entry(star())], true_cfg_scale=3.0, negative_prompt="a red star")
    two = picture(address, [entry(star())], true_cfg_scale=3.0, negative_prompt="a blue mug")
    assert len({plain, one, two}) == 3


def test_no_face_names_the_reference(address: str) -> None:
    """The job fails with a code and the remedy, unless the caller allows a subject instead."""
    with pytest.raises(JobFailedError, match=r"No face was found in references\[1\]") as caught:
        picture(address, [entry(ring()), entry(star(), "identity")])
    assert (caught.value.code, caught.value.retryable) == ("no_face", False)
    allowed = picture(address, [entry(star(), "identity", on_no_face="subject")])
    assert allowed == picture(address, [entry(star())])


def test_one_worker_loads_the_model_once(address: str) -> None:
    """All of the above ran on one process with one model; its card says what it is."""
    with httpx2.Client(base_url=address, trust_env=False) as client:
        answer = client.get("/v1/models").json()
    (card,) = answer["workers"]
    assert card["model"] == answer["models"][0]["name"] == "dreamo-tiny"
    assert "attention: sdpa" in card["kernels"]
