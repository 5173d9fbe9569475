"""From a run to a picture: in the store if it has all its steps, on its way to the caller if not."""

from __future__ import annotations

import time
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from workers import pictures
from workers.artifacts import ArtifactStore
from workers.inference.works import Work
from workers.jobs import ImageArtifact
from workers.ledger import MAX_PREVIEW_BYTES

SEEDS = 2**64


class Decoder(Protocol):
    """As much of `model.pipeline.Pipeline` as a picture needs."""

    def decode(self, run: Any) -> NDArray[np.uint8]: ...
    def preview(self, run: Any) -> NDArray[np.uint8]: ...


def publish_image(work: Work, number: int, run: Any, pipeline: Decoder, store: ArtifactStore) -> None:
    """Decode image `number` of a job, encode it, store it under the claim's token, and note it with the job.

    Raises:
        ArtifactError: `storage_unavailable`.
    """
    job = work.job
    began = time.perf_counter()
    pixels = pipeline.decode(run)
    data = pictures.encode(pixels, job.output_format)
    name = f"{job.id}.{work.claimed.claim.token}.{number}.{job.output_format}"
    height, width, _ = pixels.shape
    image = ImageArtifact(
        name=name,
        sha256=store.publish(name, data),
        media_type=pictures.media_type(job.output_format),
        width=width,
        height=height,
        size=len(data),
        seed=seed_of(work, number),
    )
    work.spend("decode_s", time.perf_counter() - began)
    if not work.keep(number, image):
        store.discard(name)


def show_image(work: Work, run: Any, pipeline: Decoder) -> None:
    """Send a small picture of what a run is heading for on its way, smaller still if the ledger would not take it."""
    pixels = pipeline.preview(run)
    data = pictures.encode(pixels, "jpeg")
    while len(data) > MAX_PREVIEW_BYTES:
        pixels = np.ascontiguousarray(pixels[::2, ::2])
        data = pictures.encode(pixels, "jpeg")
    work.show(data)


def wants_preview(work: Work, number: int, run: Any) -> bool:
    """Whether the first image of a job that is to be shown has come so far."""
    every = work.job.previews
    return every > 0 and number == 0 and run.step % every == 0


def seed_of(work: Work, number: int) -> int:
    """That image `number` of a job is drawn with."""
    return (work.job.sampling.seed + number) % SEEDS
