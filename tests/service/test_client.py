"""Both clients against a gateway on a socket: everything that can be asked, and what comes back."""

from __future__ import annotations

import hashlib
import io
import re
import subprocess
import sys
from dataclasses import FrozenInstanceError
from importlib.metadata import distribution, files, requires
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image

from service.client import AdapterUse, GoneError, JobFailedError, JobTimeoutError, NotFoundError, Reference, Webhook
from service.client.calls import PAGE
from tests.conftest import ROOT
from tests.service.awaited import Connect
from tests.service.conftest import SPEC, Bench, Open, picture
from tests.service.gates import Gate
from workers.jobs import JobError, Progress, TrainingProgress
from workers.registry import MAIN

WEBHOOK_SECRET = "whsec_" + "A" * 32


@pytest.fixture
def gate(open_gate: Open) -> Gate:
    return open_gate()


@pytest.fixture
def client(connect: Connect, gate: Gate) -> Any:
    return connect(gate.url)


def test_from_a_file_to_a_file(client: Any, worker: None, tmp_path: Path) -> None:
    """References of every kind on their way in, a picture with its digest and seed on its way out."""
    toy = tmp_path / "toy.png"
    toy.write_bytes(picture())
    uploaded = client.upload(picture(colour=(1, 2, 3)))
    references = [
        Reference.file(toy, role="subject", resolution=32),
        None,
        Reference.bytes(picture("JPEG"), role="subject").masked(picture()),
        Reference.uploaded(uploaded, role="identity", on_no_face="subject"),
    ]
    job = client.customize("[ref#1] and [ref#3]", references, seed=2**64 - 1, num_images=2, width=80, format="webp")
    job = job.wait(60)
    assert (job.succeeded, job.progress.phase, job.timings["denoise_s"]) == (True, "denoise", 0.1)
    assert job.created_at <= job.started_at <= job.finished_at < job.expires_at
    slots = {entry["slot"]: entry for entry in job.request["references"]}
    assert slots.keys() == {1, 3, 4}
    assert (slots[1]["resolution"], slots[4]["on_no_face"]) == (32, "subject")
    assert (slots[1]["sha256"], slots[4]["sha256"]) == (hashlib.sha256(picture()).hexdigest(), uploaded.sha256)
    assert slots[3]["mask_sha256"] == slots[1]["sha256"]
    assert [image.seed for image in job.images] == [2**64 - 1, 0]
    saved = job.images[1].save(tmp_path / "out.webp")
    assert hashlib.sha256(saved.read_bytes()).hexdigest() == job.images[1].sha256
    with Image.open(io.BytesIO(job.images[0].read())) as image:
        assert (image.format, image.size) == ("WEBP", (80, 64))


def test_all_that_a_request_may_say_arrives(connect: Connect, open_gate: Open, bench: Bench) -> None:
    """Every option comes out in the job's own account of itself."""
    adapters = bench.home / "exported"
    adapters.mkdir()
    (adapters / MAIN).write_bytes(b"weights")
    app: Any = bench.client.app
    version = app.state.gateway.registry.of("default").publish("toys", adapters).version
    client = connect(open_gate(webhook_secrets=(WEBHOOK_SECRET,)).url)
    options: dict[str, Any] = {
        "height": 48,
        "width": 64,
        "num_inference_steps": 9,
        "guidance": 2.5,
        "first_step_guidance": 3.5,
        "true_cfg_scale": 2.0,
        "true_cfg_start": 1,
        "true_cfg_end": 7,
        "negative_prompt": "mud",
        "negative_guidance": 1.5,
        "seed": 3,
        "num_images": 2,
        "priority": "batch",
        "previews": 4,
    }
    adapter, webhook = AdapterUse("toys", 0.5), Webhook("https://example.com/", ("status",))
    job = client.customize(
        "a toy", format="jpeg", adapter=adapter, webhook=webhook, metadata={"order": "42"}, start_within=89.5, **options
    )
    assert {name: job.request[name] for name in options} == options
    assert job.request["output"] == {"format": "jpeg"}
    assert job.request["adapter"] == {"name": "toys", "version": version, "scale": 0.5}
    assert job.request["webhook"] == {"url": "https://example.com/", "events": ["status"]}
    assert job.metadata == {"order": "42"}
    assert (job.start_by - job.created_at).total_seconds() == pytest.approx(90)
    plain = client.customize("a", adapter="toys", webhook="https://example.com/").request
    assert (plain["adapter"]["scale"], plain["webhook"]["events"]) == (1.0, ["terminal"])
    (listed,) = client.adapters("toys")
    assert (listed.version, listed.kind, listed.files) == (version, "dreamo", (MAIN,))
    assert client.adapters("others") == ()


def test_waiting_in_the_call_itself(client: Any, worker: None) -> None:
    """`wait` brings the finished job in the first answer, a failed one too: only `Job.wait` judges."""
    assert client.customize("a", wait=60).succeeded
    failed = client.customize("fail", wait=60)
    assert (failed.status, failed.error.code) == ("failed", "no_face")


def test_a_job_that_fails(client: Any, worker: None) -> None:
    """An error with the job's own code, and the job."""
    with pytest.raises(JobFailedError, match="No face was found") as caught:
        client.customize("fail").wait(60)
    assert (caught.value.code, caught.value.retryable, caught.value.job.status) == ("no_face", False, "failed")


def test_waiting_in_vain(client: Any) -> None:
    """After the time that was asked for; it is an ordinary TimeoutError too, and the job goes on."""
    with pytest.raises(JobTimeoutError) as caught:
        client.customize("a").wait(0.3)
    assert isinstance(caught.value, TimeoutError)
    assert client.job(caught.value.job.id).status == "queued"


def test_canceling_and_deleting(client: Any) -> None:
    """What was canceled has ended; what was deleted is gone, not unknown."""
    job = client.customize("a").cancel()
    with pytest.raises(JobFailedError) as caught:
        job.wait()
    assert caught.value.code == "canceled"
    job.delete()
    with pytest.raises(GoneError):
        job.refresh()


def test_all_jobs_page_by_page(client: Any, bench: Bench) -> None:
    """Newest first over the edge of a page, none twice and none left out; or those in one state."""
    made = [bench.submit()["id"] for _ in range(PAGE + 3)]
    client.job(made[5]).cancel()
    assert [job.id for job in client.jobs()] == made[::-1]
    assert [job.id for job in client.jobs("canceled")] == [made[5]]


def test_the_same_picture_is_uploaded_once(client: Any, tmp_path: Path) -> None:
    """By bytes or by file it has one id, and is unknown after it was deleted."""
    file = tmp_path / "a.webp"
    file.write_bytes(picture("WEBP"))
    first, again = client.upload(file), client.upload(picture("WEBP"))
    assert (again.id, again.media_type, again.width) == (first.id, "image/webp", 12)
    assert client.reference(first.id).sha256 == hashlib.sha256(picture("WEBP")).hexdigest()
    client.delete_reference(first.id)
    with pytest.raises(NotFoundError):
        client.reference(first.id)


def test_the_models_limits(client: Any) -> None:
    """What is served says what it takes."""
    (model,) = client.models()
    assert (model.name, model.cell, model.max_references) == (SPEC["name"], 8, SPEC["max_references"])
    assert (model.width.maximum, model.width.default) == (128, 72)
    assert "subject" in model.roles


def test_trainings(client: Any) -> None:
    """They are submitted once, followed, listed and canceled like jobs."""
    options: dict[str, Any] = {"adapter": "toys", "metadata": {"a": "b"}, "overrides": {"seed": 9}}
    made = [client.train("sticker-adapter", idempotency_key="k", **options) for _ in range(2)]
    training = made[0]
    assert made[1].id == training.id
    assert (training.status, training.request["adapter"], training.request["recipe"]["seed"]) == ("queued", "toys", 9)
    with pytest.raises(JobTimeoutError):
        training.wait(0.1)
    assert training.cancel().status == "canceled"
    assert [entry.id for entry in client.trainings("canceled")] == [training.id]
    with pytest.raises(JobFailedError):
        training.refresh().wait()


def test_following_a_training(client: Any, bench: Bench) -> None:
    """Its states and steps in order, up to the end; from any of them on."""
    training = client.train("sticker-adapter", adapter="toys")
    token = bench.trainings.claim(training.id, "w")
    assert token is not None
    bench.trainings.beat(training.id, token, TrainingProgress("warm-up", 40, 420, {"flow": 0.5}, 16.0, 0.5))
    bench.trainings.fail(training.id, token, JobError("training_failed", "It broke."))
    told = list(training.events())
    assert [event.kind for event in told] == ["status", "status", "progress", "status"]
    assert (told[2].data["step"], told[-1].data["status"], told[-1].ends) == (40, "failed", True)
    assert list(training.events(after=told[1].id)) == list(client.training_events(training.id, told[1].id)) == told[2:]
    assert list(training.events(after=told[-1].id)) == []


def test_following_a_job(client: Any, bench: Bench) -> None:
    """Each thing that happens, in order, up to the end; from any of them on; and the preview that is told of."""
    job = client.customize("a", previews=1)
    assert job.preview() is None
    result = bench.finish(job.id, picture())
    told = list(job.events())
    assert [(event.kind, event.data.get("status")) for event in told if event.kind == "status"] == [
        ("status", "queued"),
        ("status", "running"),
        ("status", "succeeded"),
    ]
    assert {"progress", "preview"} <= {event.kind for event in told}
    assert told[-1].ends and not any(event.ends for event in told[:-1])
    assert list(job.events(after=told[1].id)) == told[2:]
    assert list(job.events(after=told[-1].id)) == []
    assert job.preview() == picture()
    assert job.refresh().images[0].sha256 == result.images[0].sha256


def test_a_gap_in_what_is_kept_is_told(client: Any, bench: Bench) -> None:
    """Of a job with more events than are kept, the whole job comes first, then those that there are, to the end."""
    job = client.customize("a")
    token = bench.ledger.claim(job.id, "w")
    assert token is not None
    for step in range(1, 211):
        bench.ledger.beat(job.id, token, Progress("denoise", step, 210))
    bench.ledger.cancel(job.id)
    bench.ledger.release_canceled(job.id, token)
    first, *rest = job.events()
    assert (first.kind, first.data["id"], first.data["status"]) == ("reset", job.id, "canceled")
    assert [int(event.id) for event in rest] == list(range(int(first.id) + 1, int(first.id) + 1 + len(rest)))
    assert rest[-1].ends and len(rest) > 100


def test_one_key_is_one_job(client: Any, connect: Connect, gate: Gate) -> None:
    """Of the caller's own key, in another process too; without one two calls are two jobs."""
    first = client.customize("a", idempotency_key="order-42")
    assert connect(gate.url).customize("a", idempotency_key="order-42").id == first.id
    assert len({client.customize("a").id for _ in range(2)} | {first.id}) == 3


def test_what_comes_back_stays_as_it_is(client: Any) -> None:
    """A job is what was known at one moment: nobody changes it, and its text shows no client and no key."""
    job = client.customize("a")
    target = getattr(job, "_target", job)
    with pytest.raises(FrozenInstanceError):
        target.status = "succeeded"
    assert "client" not in repr(target)


def test_the_client_is_light() -> None:
    """A backend that only calls the service loads neither torch nor the gateway."""
    program = (
        "import sys, service.client\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'numpy', 'PIL'}\n"
        "heavy |= {'fastapi', 'starlette', 'uvicorn', 'rq', 'redis'}\n"
        "print(sorted(heavy & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


ALONE = """
import sys
sys.path += sys.argv[1:]
import asyncio
from service.client import AsyncClient, Client, NoAnswerError, WebhookError, verify_webhook

async def ask():
    async with AsyncClient("https://localhost:1", retry_for=0) as client:
        await client.models()

for call in (Client("https://localhost:1", retry_for=0).models, lambda: asyncio.run(ask())):
    try:
        call()
    except NoAnswerError as error:
        print(type(error.__cause__).__name__)
try:
    verify_webhook({}, b"", "whsec_" + "A" * 32)
except WebhookError as error:
    print(error.code)
"""


def needed(distribution: str, found: set[str]) -> set[str]:
    """Names of what a distribution needs here, itself among them."""
    if distribution not in found:
        found.add(distribution)
        for line in requires(distribution) or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                needed(canonicalize_name(requirement.name), found)
    return found


def test_what_is_installed_for_the_client_is_enough(tmp_path: Path) -> None:
    """README's line names all that the client needs: it runs where nothing else of the service's is, webhooks too."""
    (line,) = re.findall(r"^python -m pip install (.+) && .*--no-deps", (ROOT / "README.md").read_text(), re.MULTILINE)
    found: set[str] = set()
    for name in re.findall(r"'([a-z0-9-]+)[<>=]", line):
        needed(name, found)
    for name in found:
        for top in {file.parts[0] for file in files(name) or () if file.parts[0] != ".."}:
            (tmp_path / top).symlink_to(distribution(name).locate_file(top))
    command = [sys.executable, "-I", "-S", "-c", ALONE, str(tmp_path), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.stdout.split() == ["ConnectError", "ConnectError", "webhook_headers"], done.stderr
