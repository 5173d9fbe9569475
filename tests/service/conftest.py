"""A gateway over a real Redis, and the hands that tests play callers and workers with."""

from __future__ import annotations

import base64
import io
import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import redis
from PIL import Image
from starlette.testclient import TestClient

from service.app import create_app
from service.settings import GatewaySettings
from tests.service.awaited import Connect, connecting
from tests.service.fake_worker import work
from tests.service.gates import Gate, serve
from tests.service.houses import House, OpenHouse
from workers.artifacts import ArtifactStore
from workers.jobs import CUSTOMIZE, TRAINING, ImageArtifact, JobResult, Progress
from workers.ledger import CustomizeLedger, Ledger, TrainingLedger
from workers.redis_process import RedisProcess, start_redis
from workers.tenants import TenantBook

Open = Callable[..., Gate]
"""Opens a gateway on a socket, with the bench's Redis and store and with changed settings."""

TRIGGER = "generate a same style image."
SPEC = {
    "name": "unit",
    "width": {"minimum": 16, "maximum": 128, "step": 8, "default": 72},
    "height": {"minimum": 16, "maximum": 96, "step": 8, "default": 64},
    "num_inference_steps": {"minimum": 1, "maximum": 20, "step": 1, "default": 4},
    "reference_resolution": {"minimum": 16, "maximum": 64, "step": 8, "default": 24},
    "identity_resolution": 24,
    "max_prompt_characters": 400,
    "max_references": 4,
    "roles": ["subject", "identity", "style", "content"],
}
"""Limits unlike any shipped model's, so that a test cannot pass by a constant in the code."""


def picture(kind: str = "PNG", size: tuple[int, int] = (12, 10), colour: tuple[int, int, int] = (200, 30, 40)) -> bytes:
    """A picture of one colour, (width, height) pixels."""
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, kind)
    return buffer.getvalue()


def data_url(data: bytes, media_type: str = "image/png") -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def reference(role: str = "subject", **changes: Any) -> dict[str, Any]:
    return {"image": data_url(picture()), "role": role, **changes}


@dataclass(frozen=True)
class Bench:
    """One gateway, its caller, and the worker's side of its ledger and store."""

    client: TestClient
    redis: redis.Redis
    ledger: CustomizeLedger
    trainings: TrainingLedger
    store: ArtifactStore
    home: Path

    def submit(self, **changes: Any) -> dict[str, Any]:
        """An accepted job's body."""
        answer = self.client.post("/v1/customize", json={"prompt": "a toy", **changes})
        assert answer.status_code == 202, answer.text
        return answer.json()

    def finish(self, job_id: str, data: bytes, seed: int = 7) -> JobResult:
        """Do what a worker does: claim, show a preview, publish, commit."""
        token = self.ledger.claim(job_id, "test-worker")
        assert token is not None
        self.ledger.beat(job_id, token, Progress("denoise", 1, 4), preview=data)
        name = f"{job_id}.{token}.0.png"
        digest = self.store.publish(name, data)
        image = ImageArtifact(name, digest, "image/png", 12, 10, len(data), seed)
        result = JobResult((image,), {"denoise_s": 0.25}, {"prompt": "hit"})
        assert self.ledger.commit(job_id, token, result)
        return result


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory with just what the gateway reads of one: a VAE of 8 pixels per token, and limits."""
    folder = tmp_path_factory.mktemp("unit")
    (folder / "vae").mkdir()
    (folder / "vae" / "config.json").write_text(json.dumps({"block_out_channels": [8, 8, 8]}))
    (folder / "dreamserve.json").write_text(json.dumps({"spec": SPEC}))
    return folder


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisProcess]:
    server = start_redis(tmp_path_factory.mktemp("redis"))
    yield server
    server.stop()


def settings(url: str, state: Path, model: Path, **changes: Any) -> GatewaySettings:
    return GatewaySettings(redis_url=url, state_dir=state, base_model=str(model), redis_timeout_s=60.0, **changes)


def environment_of(model: Path | str) -> dict[str, str]:
    """For a process: none of our variables but the model."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("DREAMSERVE_")}
    return kept | {"DREAMSERVE_BASE_MODEL": str(model)}


@pytest.fixture
def bench(redis_server: RedisProcess, model_dir: Path, tmp_path: Path) -> Iterator[Bench]:
    client = redis.Redis.from_url(redis_server.url)
    client.flushdb()
    app = create_app(
        settings(redis_server.url, tmp_path, model_dir, max_body_bytes=2**20, recipes_dir=tmp_path / "recipes")
    )
    with TestClient(app) as caller:
        yield Bench(
            caller,
            client,
            Ledger(client, CUSTOMIZE),
            Ledger(client, TRAINING),
            app.state.gateway.store,
            tmp_path,
        )
    client.flushdb()  # a key left behind would close the next gateway
    client.close()


@pytest.fixture
def open_gate(bench: Bench, redis_server: RedisProcess, model_dir: Path, tmp_path: Path) -> Iterator[Open]:
    with ExitStack() as stack:

        def make(**changes: Any) -> Gate:
            app = create_app(settings(redis_server.url, tmp_path, model_dir, **changes))
            return stack.enter_context(contextmanager(serve)(app))

        yield make


@pytest.fixture
def open_house(redis_server: RedisProcess, model_dir: Path, tmp_path: Path, bench: Bench) -> Iterator[OpenHouse]:
    with ExitStack() as stack:

        def make(**changes: Any) -> House:
            book = TenantBook(bench.redis)
            keys = {tenant: {"Authorization": f"Bearer {book.create_key(tenant)}"} for tenant in "abc"}
            app = create_app(settings(redis_server.url, tmp_path, model_dir, auth="keys", **changes))
            house = House(stack.enter_context(contextmanager(serve)(app)), app, keys)
            stack.enter_context(house.closing)
            return house

        yield make


@pytest.fixture(params=["blocking", "asynchronous"])
def connect(request: pytest.FixtureRequest) -> Iterator[Connect]:
    """The same test for both clients."""
    with connecting(request.param) as made:
        yield made


@pytest.fixture
def worker(bench: Bench) -> Iterator[None]:
    """Does what waits until the test is over; a prompt with the word `fail` fails."""
    over = threading.Event()

    def run() -> None:
        while not over.wait(0.01):
            work(bench.ledger, bench.store)

    thread = threading.Thread(target=run)
    thread.start()
    yield
    over.set()
    thread.join()
