"""A worker without a model, for tests of what lies around one: every job becomes a picture of one colour."""

from __future__ import annotations

import io
import os
import time

from PIL import Image

from workers import queues
from workers.artifacts import ArtifactStore
from workers.jobs import CUSTOMIZE, ImageArtifact, JobError, JobResult, Progress
from workers.ledger import CustomizeLedger, Ledger
from workers.settings import QueueSettings


def main() -> None:
    """Serve until terminated; a prompt with the word `fail` fails."""
    settings = QueueSettings()
    assert settings.redis_url is not None
    client = queues.connect(settings.redis_url)
    ledger, store = Ledger(client, CUSTOMIZE), ArtifactStore(settings.artifact_root)
    while True:
        queues.announce(client, CUSTOMIZE, f"fake-{os.getpid()}", {"state": "ready", "pid": os.getpid()}, 10.0)
        work(ledger, store)
        time.sleep(0.02)


def work(ledger: CustomizeLedger, store: ArtifactStore) -> None:
    """Do all that waits now."""
    for job_id in ledger.waiting(0.0):
        _run(ledger, store, job_id)


def _run(ledger: CustomizeLedger, store: ArtifactStore, job_id: str) -> None:
    token = ledger.claim(job_id, "fake")
    record = ledger.get(job_id)
    if token is None or record is None:
        return
    job = record.job
    ledger.beat(job_id, token, Progress("denoise", 1, job.sampling.num_inference_steps))
    if "fail" in job.prompt:
        ledger.fail(job_id, token, JobError("no_face", "No face was found: use another picture."))
        return
    images: list[ImageArtifact] = []
    for index in range(job.num_images):
        buffer = io.BytesIO()
        size = (job.sampling.width, job.sampling.height)
        Image.new("RGB", size, (index, 90, 40)).save(buffer, job.output_format)
        name = f"{job_id}.{token}.{index}.{job.output_format}"
        digest = store.publish(name, buffer.getvalue())
        seed = (job.sampling.seed + index) % 2**64
        images.append(ImageArtifact(name, digest, f"image/{job.output_format}", *size, len(buffer.getvalue()), seed))
    ledger.commit(job_id, token, JobResult(tuple(images), {"denoise_s": 0.1}))


if __name__ == "__main__":
    main()
