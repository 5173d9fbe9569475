"""One job from claim to commit, in this process: what is written, what stops it, how failures are named."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import redis
import structlog
from PIL import Image

from model.roles import Role
from tests.waiting import wait_for
from tests.workers.conftest import MakeJob
from tests.workers.inference.conftest import Make
from tests.workers.standin import Run, StandinPipeline, picture
from workers import queues
from workers.artifacts import ArtifactStore
from workers.inference.runner import JobRunner
from workers.jobs import CUSTOMIZE, CustomizeJob, CustomizeRecord, JobStatus, ReferenceInput
from workers.ledger import Ledger
from workers.pictures import PictureLimits, decode
from workers.redis_process import start_redis
from workers.settings import WorkerSettings


@pytest.fixture
def runner(make_runner: Make) -> JobRunner:
    return make_runner()


def run(runner: JobRunner, job: CustomizeJob) -> CustomizeRecord:
    """Accept, run to the end, and look."""
    runner.ledger.accept(job)
    runner.run(job.id)
    assert runner.wait(60)
    record = runner.ledger.get(job.id)
    assert record is not None
    assert runner.claims == []
    return record


def stored(store: ArtifactStore) -> set[str]:
    return {path.name for path in store.root.rglob("*") if path.is_file() and path.parent.name == "pictures"}


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("format_", ["png", "jpeg", "webp"])
def test_pictures_are_those_of_the_pipeline(runner: JobRunner, make_job: MakeJob, format_: str) -> None:
    """Every image of a job: its own seed (wrapping at 2**64), its digest, its size, its bytes in the store."""
    record = run(runner, make_job("job_1", num_images=3, steps=4, seed=2**64 - 2, output_format=format_))
    assert record.status is JobStatus.SUCCEEDED and record.result is not None
    assert [image.seed for image in record.result.images] == [2**64 - 2, 2**64 - 1, 0]
    for number, image in enumerate(record.result.images):
        assert image.name == f"job_1.1.{number}.{format_}"
        data = runner.store.read_picture(image.name, image.sha256)
        assert (image.size, image.media_type) == (len(data), f"image/{format_}")
        pixels = decode(data, PictureLimits())
        assert pixels.shape == (image.height, image.width, 3) == (32, 16, 3)
        if format_ == "png":
            np.testing.assert_array_equal(pixels, picture("a toy", image.seed, 4, 32, 16))
    assert set(record.result.timings) == {"preprocess_s", "encode_s", "denoise_s", "decode_s"}
    assert all(seconds >= 0 and seconds == round(seconds, 4) for seconds in record.result.timings.values())
    assert record.progress is not None
    assert (record.progress.phase, record.progress.step, record.progress.total) == ("decode", 12, 12)


def test_progress_is_published_at_each_step(make_runner: Make, make_job: MakeJob) -> None:
    """A watcher sees the count of finished steps grow by that of each forward, over all images, during the run."""
    seen: list[tuple[str, int, int]] = []

    def look(_: Run) -> None:
        record = runner.ledger.get("job_1")
        assert record is not None and record.progress is not None
        seen.append((record.progress.phase, record.progress.step, record.progress.total))

    runner = make_runner(StandinPipeline(look), forward_runs=1)
    run(runner, make_job("job_1", num_images=2, steps=3))
    assert [step for _, step, _ in seen] == [0, 1, 2, 3, 4, 5]
    assert [(phase, total) for phase, _, total in seen] == [("denoise", 6)] * 6


def test_references_reach_the_pipeline_decoded(make_runner: Make, make_job: MakeJob) -> None:
    """Slots stay; alpha becomes a mask only if it says something; a given mask goes first; sizes have defaults."""
    rgb = np.random.default_rng(1).integers(0, 256, (8, 6, 3), dtype=np.uint8)
    alpha = np.arange(48, dtype=np.uint8).reshape(8, 6)
    mask = 255 - alpha
    pipeline = StandinPipeline()
    runner = make_runner(pipeline)
    put = partial(runner.store.put, "default")
    clear, solid = put(png(np.dstack([rgb, alpha]))), put(png(np.dstack([rgb, np.full_like(alpha, 255)])))
    references = (
        ReferenceInput(1, Role.SUBJECT, put(png(rgb))),
        ReferenceInput(2, Role.SUBJECT, clear, resolution=768),
        ReferenceInput(4, Role.GARMENT, solid),
        ReferenceInput(5, Role.SUBJECT, clear, mask=put(png(mask))),
        ReferenceInput(9, Role.IDENTITY, solid, resolution=768, on_no_face="subject"),
    )
    record = run(runner, make_job("job_1", references=references, negative_prompt="blurry"))
    assert record.status is JobStatus.SUCCEEDED, record.error
    (request,) = pipeline.requests
    assert (request.height, request.width, request.negative_prompt) == (32, 16, "blurry")
    got = request.references
    assert [reference.slot for reference in got] == [1, 2, 4, 5, 9]
    assert [reference.resolution for reference in got] == [512, 768, 512, 512, 768]
    assert [reference.on_no_face for reference in got] == ["fail"] * 4 + ["subject"]
    for reference, expected in zip(got, (None, alpha, None, mask, None), strict=True):
        np.testing.assert_array_equal(reference.pixels, rgb)
        if expected is None:
            assert reference.mask is None
        else:
            np.testing.assert_array_equal(reference.mask, expected)


def test_images_of_a_job_are_begun_beside_each_other(make_runner: Make, make_job: MakeJob) -> None:
    """So that they hold once what no seed changes; those of another job hold their own."""
    pipeline = StandinPipeline()
    runner = make_runner(pipeline)
    for name in ("job_1", "job_2"):
        assert run(runner, make_job(name, num_images=3)).status is JobStatus.SUCCEEDED
    assert (pipeline.starts, pipeline.shared) == (6, 4)


@pytest.mark.parametrize(
    ("prompt", "code", "retryable"),
    [
        ("oom", "out_of_memory", True),
        ("memory", "out_of_memory", True),
        ("face", "no_face", False),
        ("nan", "not_finite", False),
        ("boom", "internal", False),
    ],
)
def test_failures_have_codes_and_hold_no_content(
    runner: JobRunner, make_job: MakeJob, prompt: str, code: str, retryable: bool
) -> None:
    """Each failure has its code; of an unforeseen one only the type's name gets out, in record and log alike."""
    with structlog.testing.capture_logs() as logs:
        record = run(runner, make_job("job_1", prompt=f"{prompt} canary-prompt"))
    assert record.status is JobStatus.FAILED and record.error is not None
    assert (record.error.code, record.error.retryable) == (code, retryable)
    assert "canary" not in record.error.message + repr(logs)
    if code == "internal":
        assert "KeyError" in record.error.message
    assert run(runner, make_job("job_2")).status is JobStatus.SUCCEEDED, "the runner is fit for the next job"


def test_storage_failures(runner: JobRunner, make_job: MakeJob, tmp_path: Path) -> None:
    """Missing, corrupt and undecodable references, and a store that cannot be written, each have their code."""
    put = partial(runner.store.put, "default")
    corrupt = put(b"will be corrupt")
    next(runner.store.root.rglob(corrupt)).write_bytes(b"other")
    for number, (key, code) in enumerate(
        [("0" * 64, "artifact_missing"), (corrupt, "artifact_corrupt"), (put(b"text"), "image_unsupported")]
    ):
        reference = ReferenceInput(1, Role.STYLE, key)
        record = run(runner, make_job(f"job_{number}", references=(reference,)))
        assert record.error is not None and (record.error.code, record.error.retryable) == (code, False)
    blocked = tmp_path / "file"
    blocked.write_bytes(b"")
    runner.store = ArtifactStore(blocked / "artifacts")
    record = run(runner, make_job("job_9"))
    assert record.error is not None
    assert (record.error.code, record.error.retryable) == ("storage_unavailable", True)


def test_damaged_record_fails_alone(runner: JobRunner, client: redis.Redis, make_job: MakeJob) -> None:
    """A record that was tampered with ends its job and nothing else."""
    runner.ledger.accept(make_job("job_1"))
    client.hset(f"{CUSTOMIZE.root}job:job_1", "job", "{}")
    runner.run("job_1")
    assert runner.wait(60)
    assert client.hget(f"{CUSTOMIZE.root}job:job_1", "status") == b"failed"
    assert run(runner, make_job("job_2")).status is JobStatus.SUCCEEDED


def at_step(step: int, act: Callable[[], object]) -> StandinPipeline:
    """A pipeline that acts once, before the given step of an image."""
    acted: list[bool] = []

    def on_step(run: Run) -> None:
        if run.step == step and not acted:
            acted.append(True)
            act()

    return StandinPipeline(on_step)


def test_cancel_stops_at_the_next_step(make_runner: Make, client: redis.Redis, make_job: MakeJob) -> None:
    """The step in which the wish arrives is the last; pictures made before it are removed."""
    steps: list[int] = []
    ledger = Ledger(client, CUSTOMIZE)
    pipeline = StandinPipeline(lambda run: (steps.append(run.step), len(steps) == 5 and ledger.cancel("job_1"))[0])
    runner = make_runner(pipeline, forward_runs=1)
    record = run(runner, make_job("job_1", num_images=3, steps=3))
    assert record.status is JobStatus.CANCELED
    assert steps == [0, 1, 2, 0, 1], "the first picture, and two steps of the second"
    assert stored(runner.store) == set()


def test_a_lost_job_is_left_alone(
    make_runner: Make, client: redis.Redis, store: ArtifactStore, make_job: MakeJob
) -> None:
    """Once another worker has the job, this one stops, writes nothing and takes its own pictures away."""

    def lose() -> None:
        Ledger(client, CUSTOMIZE, lease_s=0.0).beat("job_1", 1)
        assert runner.ledger.reap() == ["job_1"]
        assert runner.ledger.claim("job_1", "other") == 2

    runner = make_runner(at_step(1, lose))
    runner.ledger.accept(make_job("job_1", num_images=2))
    store.publish("job_1.2.0.png", b"the other worker's")
    runner.run("job_1")
    assert runner.wait(60)
    record = runner.ledger.get("job_1")
    assert record is not None and (record.status, record.attempt) == (JobStatus.RUNNING, 2)
    assert stored(store) == {"job_1.2.0.png"}


def test_refused_claim_is_a_no_op(make_runner: Make, make_job: MakeJob) -> None:
    """A delivery that comes twice, late or for nothing runs nothing."""
    pipeline = StandinPipeline()
    runner = make_runner(pipeline)
    runner.run("job_unknown")
    first = run(runner, make_job("job_1"))
    runner.run("job_1")
    assert runner.ledger.get("job_1") == first
    assert len(pipeline.requests) == 1


def test_redis_away_in_the_middle_loses_no_picture(tmp_path: Path, make_job: MakeJob) -> None:
    """Redis dies after the first step and is back a while after the last: the commit has waited, once is enough."""
    process = start_redis(tmp_path / "state")
    away, stepped = threading.Event(), threading.Event()

    def outage(run: Run) -> None:
        if run.step == 1:
            process.stop()
            away.set()
        if run.step == 2:
            stepped.set()

    settings = WorkerSettings(commit_patience_s=60.0, grace_s=0.0)
    store = ArtifactStore(tmp_path / "artifacts")
    ledger = Ledger(queues.connect(process.url), CUSTOMIZE, lease_s=60.0)
    runner = JobRunner(StandinPipeline(outage), ledger, store, settings, "w")
    ledger.accept(make_job("job_1", steps=3))
    runner.run("job_1")
    assert away.wait(60) and stepped.wait(60), "it goes on without Redis"
    process = start_redis(tmp_path / "state")  # by this thread, with which it would end
    try:
        assert runner.wait(60)
        record = ledger.get("job_1")
        assert record is not None and record.result is not None
        assert (record.status, record.attempt) == (JobStatus.SUCCEEDED, 1)
        assert stored(store) == {record.result.images[0].name}
    finally:
        runner.close()
        process.stop()


def test_redis_away_for_too_long(tmp_path: Path, make_job: MakeJob) -> None:
    """Patience ends: the job is let go of, for its lease to lapse, and the worker goes on when Redis is back."""
    process = start_redis(tmp_path / "state")
    client = queues.connect(process.url)
    store = ArtifactStore(tmp_path / "artifacts")
    settings = WorkerSettings(commit_patience_s=0.0, grace_s=0.0)
    runner = JobRunner(at_step(1, process.stop), Ledger(client, CUSTOMIZE), store, settings, "w")
    runner.ledger.accept(make_job("job_1"))
    with structlog.testing.capture_logs() as logs:
        runner.run("job_1")
        assert runner.wait(60)
    assert "redis was away for too long" in {log["event"] for log in logs}
    process = start_redis(tmp_path / "state")
    assert run(runner, make_job("job_2")).status is JobStatus.SUCCEEDED
    record = runner.ledger.get("job_1")
    assert record is not None and record.status is JobStatus.RUNNING, "until its lease lapses"
    runner.close()
    process.stop()


def test_what_was_kept_is_said(runner: JobRunner, make_job: MakeJob) -> None:
    """The first job of a kind misses, the next one hits, and a tenant never hits what another's job has left."""
    data = png(np.zeros((8, 8, 3), np.uint8))
    picture = runner.store.put("default", data)
    assert runner.store.put("other", data) == picture
    references = (ReferenceInput(2, Role.SUBJECT, picture),)
    outcomes = [
        record.result and record.result.cache
        for record in (
            run(runner, make_job("job_1", references=references)),
            run(runner, make_job("job_2", references=references, seed=9)),
            run(runner, make_job("job_3", references=references, tenant="other")),
        )
    ]
    missed, hit = {"prompt": "miss", "reference_2": "miss"}, {"prompt": "hit", "reference_2": "hit"}
    assert outcomes == [missed, hit, missed]


def test_batch_work_leaves_room_for_interactive_work(make_runner: Make, make_job: MakeJob) -> None:
    """A job that somebody waits for ends before a batch job with less to do that came earlier."""
    both = threading.Event()
    pipeline = StandinPipeline(lambda _: both.wait(60))
    runner = make_runner(pipeline, forward_runs=1)
    for name, priority, steps in (("job_1", "batch", 8), ("job_2", "batch", 9), ("job_3", "interactive", 12)):
        runner.ledger.accept(make_job(name, priority=priority, steps=steps))
        runner.run(name)
    wait_for(lambda: pipeline.starts == 3, "all three")
    both.set()
    assert runner.wait(60)
    records = [runner.ledger.get(name) for name in ("job_1", "job_2", "job_3")]
    ends = [record.finished_at or 0.0 for record in records if record is not None]
    assert ends[2] < ends[0] and ends[2] < ends[1]
