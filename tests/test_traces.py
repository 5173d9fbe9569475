"""One request is one trace: from the gateway through Redis and a worker to the webhook, every span under its parent."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import redis
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from starlette.testclient import TestClient

from service.app import create_app
from service.settings import GatewaySettings
from tests.deployed_logging import deployed_logging
from tests.workers.courier.hosts import AUTHORITY, NEAR, Host, World, always, said
from tests.workers.courier.test_fetching import PNG
from tests.workers.standin import StandinPipeline
from workers.courier.egress import Egress, trust
from workers.courier.fetching import ReferenceFetcher
from workers.courier.webhooks import WebhookSender
from workers.courier.worker import Fetches, Webhooks
from workers.inference.runner import JobRunner
from workers.jobs import CUSTOMIZE, TRAINING, JobStatus
from workers.ledger import CustomizeLedger, Ledger, TrainingLedger
from workers.redis_process import RedisProcess, start_redis
from workers.registry import Registry
from workers.settings import TrainingSettings, WorkerSettings
from workers.telemetry.tracing import Tracing, open_tracing, traceparent_of
from workers.training.worker import TrainingRunner

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
CANARY = "c4nary"


@dataclass(frozen=True)
class Exported:
    """What processes have exported, each as its provider collects it."""

    exporter: InMemorySpanExporter

    @property
    def spans(self) -> list[ReadableSpan]:
        return list(self.exporter.get_finished_spans())

    def parents(self) -> dict[str, str | None]:
        """By name of each span, its parent's: `outside` for one that is not here."""
        names = {span.context.span_id: span.name for span in self.spans if span.context}
        return {span.name: names.get(span.parent.span_id, "outside") if span.parent else None for span in self.spans}

    def traces(self) -> set[str]:
        return {f"{span.context.trace_id:032x}" for span in self.spans if span.context}


@pytest.fixture
def exported() -> Exported:
    return Exported(InMemorySpanExporter())


def tracing(exported: Exported) -> Tracing:
    """A process' own provider; all of them export to one place."""
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exported.exporter))
    return Tracing.over(provider)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisProcess]:
    process = start_redis(tmp_path_factory.mktemp("redis"))
    yield process
    process.stop()


@dataclass(frozen=True)
class Line:
    """Gateway, courier and worker over one Redis, each with a tracing of its own."""

    gateway: TestClient
    ledger: CustomizeLedger
    fetches: Fetches
    webhooks: Webhooks
    runner: JobRunner
    port: int

    def send(self, headers: dict[str, str]) -> str:
        """A job with a reference at a URL and a webhook, run to its end and told of; its id."""
        body = {
            "prompt": CANARY,
            "references": [{"image": f"https://{CANARY}.guard.example:{self.port}/{CANARY}.png", "role": "subject"}],
            "num_images": 2,
            "num_inference_steps": 3,
            "width": 64,
            "height": 64,
            "metadata": {CANARY: CANARY},
            "webhook": {"url": f"https://{CANARY}.guard.example:{self.port}/{CANARY}"},
        }
        answer = self.gateway.post("/v1/customize", json=body, headers=headers)
        assert answer.status_code == 202, answer.text
        job_id = answer.json()["id"]
        for entry in self.ledger.due_fetches():
            asyncio.run(self.fetches.handle(entry))
        self.runner.run(job_id)
        assert self.runner.wait(60)
        for delivery in self.ledger.due_webhooks():
            asyncio.run(self.webhooks.handle(delivery))
        record = self.ledger.get(job_id)
        assert record
        assert record.status is JobStatus.SUCCEEDED, record.error
        return job_id


@pytest.fixture
def line(server: RedisProcess, exported: Exported, tmp_path: Path) -> Iterator[Line]:
    with Host(always(said(200, PNG))) as host:
        with redis.Redis.from_url(server.url) as client:
            client.flushall()
        settings = GatewaySettings(
            redis_url=server.url,
            state_dir=tmp_path,
            auth="off",
            egress_ports=(443, host.port),
            webhook_secrets=(SECRET,),  # pyright: ignore[reportArgumentType]  # pydantic's own conversion
        )
        application = create_app(settings, tracing(exported))
        world = World(host.port, host.port)
        world.name(f"{CANARY}.guard.example", ["93.184.216.34"])
        courier, store = tracing(exported), application.state.gateway.store
        egress = Egress(NEAR, trust(AUTHORITY), resolve=world.resolve, dial=world.dial)
        ledger: CustomizeLedger = Ledger(redis.Redis.from_url(server.url), CUSTOMIZE)
        fetches = Fetches(ledger, ReferenceFetcher(egress, store), tracing=courier)
        webhooks = Webhooks(ledger, WebhookSender(egress, lambda _: [SECRET]), tracing=courier)
        runner = JobRunner(
            StandinPipeline(), ledger, store, WorkerSettings(grace_s=0.0), "w", tracing=tracing(exported)
        )
        with TestClient(application) as caller:
            yield Line(caller, ledger, fetches, webhooks, runner, host.port)
        runner.close()


TREE = {
    "accept": "POST /v1/customize",
    "fetch": "accept",
    "queue": "accept",
    "job": "accept",
    "prepare": "job",
    "denoise": "job",
    "decode": "job",
    "commit": "job",
    "webhook": "accept",
}


def test_one_trace_all_the_way(line: Line, exported: Exported) -> None:
    """The caller's trace, every span once under its parent; each phase after the one before; nothing of the content."""
    job_id = line.send({"traceparent": CALLER, "Authorization": f"Bearer {CANARY}"})
    assert exported.traces() == {CALLER.split("-")[1]}
    assert exported.parents() == {"POST /v1/customize": "outside", **TREE}
    spans = {span.name: span for span in exported.spans}
    assert len(spans) == len(exported.spans) == len(TREE) + 1
    assert spans["POST /v1/customize"].parent is not None
    assert f"{spans['POST /v1/customize'].parent.span_id:016x}" == CALLER.split("-")[2]
    for earlier, later in zip(
        ("queue", "prepare", "denoise", "decode"), ("job", "denoise", "decode", "commit"), strict=True
    ):
        assert span_end(spans[earlier]) <= (spans[later].start_time or 0)
    assert dict(spans["denoise"].attributes or {})["dreamserve.steps"] == 6
    assert dict(spans["job"].attributes or {})["dreamserve.job_id"] == job_id
    assert dict(spans["job"].attributes or {})["dreamserve.state"] == "succeeded"
    told = json.dumps([json.loads(span.to_json()) for span in exported.spans])
    assert CANARY not in told
    assert "default" not in told, "no tenant's name either"


def span_end(span: ReadableSpan) -> int:
    assert span.end_time is not None
    return span.end_time


def test_without_a_caller_it_begins_here(line: Line, exported: Exported) -> None:
    """One new trace, the same tree; a traceparent that is none begins one too."""
    line.send({"traceparent": "00-c4nary"})
    assert len(exported.traces()) == 1
    assert exported.parents() == {"POST /v1/customize": None, **TREE}


TRAINING_TREE = {
    "POST /v1/trainings": "outside",
    "accept": "POST /v1/trainings",
    "queue": "accept",
    "job": "accept",
    "prepare": "job",
    "train": "job",
    "publish": "job",
    "commit": "job",
    "webhook": "accept",
}
SHORT = {
    "lora": {"rank": 2},
    "stages": {name: {"steps": 1, "batch": 1} for name in ("warm-up", "all-tasks", "quality")},
}


@pytest.mark.parametrize("fails", [False, True], ids=["succeeds", "fails"])
def test_a_training_is_one_trace_too(line: Line, exported: Exported, tmp_path: Path, *, fails: bool) -> None:
    """From its request to its webhook, over gateway, training worker and courier; a failed one up to its end."""
    hook = {"url": f"https://{CANARY}.guard.example:{line.port}/{CANARY}"}
    body = {"recipe": "sticker-adapter", "overrides": SHORT, "webhook": hook, "metadata": {CANARY: CANARY}}
    job_id = line.gateway.post("/v1/trainings", json=body, headers={"traceparent": CALLER}).json()["id"]
    client, settings = line.ledger.redis, TrainingSettings(state_dir=tmp_path)
    ledger: TrainingLedger = Ledger(client, TRAINING)
    if fails:
        (tmp_path / "trainings").write_text("no directory can be made here")
    runner = TrainingRunner(client, ledger, Registry(tmp_path / "adapters"), settings, "w", tracing=tracing(exported))
    runner.run(job_id)
    sender = WebhookSender(line.webhooks.sender.egress, lambda _: [SECRET])
    for delivery in ledger.due_webhooks():
        asyncio.run(Webhooks(ledger, sender, tracing=tracing(exported)).handle(delivery))
    record = ledger.get(job_id)
    assert record and record.status is (JobStatus.FAILED if fails else JobStatus.SUCCEEDED), record
    assert exported.traces() == {CALLER.split("-")[1]}
    missing = {"publish"} if fails else set[str]()
    assert exported.parents() == {name: up for name, up in TRAINING_TREE.items() if name not in missing}
    spans = {span.name: dict(span.attributes or {}) for span in exported.spans}
    assert spans["job"]["dreamserve.job_id"] == job_id
    assert spans["job"]["dreamserve.state"] == record.status
    if not fails:
        assert spans["train"]["dreamserve.steps"] == 3
    assert CANARY not in json.dumps([json.loads(span.to_json()) for span in exported.spans])


def test_the_record_stays_small(line: Line) -> None:
    """The context is 55 characters of a job's record, which stays under 4 KiB."""
    job_id = line.send({})
    raw: Any = line.ledger.redis.hget(f"{CUSTOMIZE.root}job:{job_id}", "job")
    assert len(json.loads(raw)["traceparent"]) == 55
    assert len(raw) < 4096


def test_a_failure_has_its_end(line: Line, exported: Exported) -> None:
    """A job that fails in its preparation: its spans end, with its state; none is left open."""
    answer = line.gateway.post("/v1/customize", json={"prompt": "boom", "width": 64, "height": 64})
    line.runner.run(answer.json()["id"])
    assert line.runner.wait(60)
    spans = {span.name: span for span in exported.spans}
    assert spans.keys() == {"POST /v1/customize", "accept", "queue", "job", "prepare", "commit"}
    assert dict(spans["job"].attributes or {})["dreamserve.state"] == "failed"
    exported.exporter.clear()
    line.gateway.post("/v1/customize", json={"prompt": ""})
    assert dict(exported.spans[0].attributes or {})["error.type"] == "Problem"


def test_a_workers_lines_name_the_request(line: Line, capfd: pytest.CaptureFixture[str]) -> None:
    """Who looks for the id that a caller quotes finds what the worker says of the job too."""
    with deployed_logging():
        headers = {"X-Request-ID": "quoted-1"}
        job_id = line.gateway.post("/v1/customize", json={"prompt": "boom"}, headers=headers).json()["id"]
        line.runner.run(job_id)
        assert line.runner.wait(60)
    lines = [json.loads(one) for one in capfd.readouterr().err.splitlines()]
    told = {one["event"]: (one.get("request_id"), one.get("job_id")) for one in lines}
    assert told["request"] == ("quoted-1", None)
    assert told["job failed"] == ("quoted-1", job_id)


def test_watching_is_no_trace(line: Line, exported: Exported) -> None:
    """Health checks, several a second, are none."""
    for path in ("/livez", "/readyz"):
        assert line.gateway.get(path).status_code == 200
    assert exported.spans == []


def test_without_an_exporter_there_is_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """No endpoint: no spans, and a caller's context is handed on as it came."""
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    quiet = open_tracing("gateway")
    assert not quiet.on
    with quiet.span("accept", CALLER) as span:
        assert not span.is_recording()
        assert traceparent_of(span) == CALLER
    with quiet.span("accept", None) as span:
        assert traceparent_of(span) is None
