"""What the gateway counts is what callers were answered; what it says of the ledger is what lies there."""

from __future__ import annotations

import re
import socket
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml
from prometheus_client import CollectorRegistry
from starlette.testclient import TestClient

from service.app import create_app
from service.metrics import GatewayMetrics
from service.problems import TABLE
from tests.conftest import ROOT
from tests.service.conftest import Bench, picture, settings
from tests.service.gates import serve
from tests.waiting import wait_for
from tests.workers.ledgers import lapse
from workers.courier.metrics import CourierMetrics
from workers.inference.caches import Counts
from workers.inference.metrics import InHand, WorkerMetrics
from workers.jobs import CUSTOMIZE, TRAINING, JobError, Progress
from workers.ledger import Ledger
from workers.redis_process import RedisProcess
from workers.training.metrics import TrainingMetrics


def registry(bench: Bench) -> CollectorRegistry:
    app: Any = bench.client.app
    return app.state.gateway.metrics.registry


def value(source: Bench | CollectorRegistry, name: str, **labels: str) -> float:
    one = source if isinstance(source, CollectorRegistry) else registry(source)
    return one.get_sample_value(f"dreamserve:{name}", labels) or 0.0


def labels_of(source: CollectorRegistry) -> set[tuple[str, str]]:
    """Every label and value."""
    samples = [sample for family in source.collect() for sample in family.samples]
    return {pair for sample in samples for pair in sample.labels.items()}


def test_requests_are_counted_by_template(bench: Bench) -> None:
    """As many as there were, by method, route template and status; no path, unknown route or method is a label."""
    job = bench.submit()["id"]
    asked = [
        ("GET", f"/v1/jobs/{job}", "/v1/jobs/{id}"),
        ("GET", f"/v1/jobs/{job}", "/v1/jobs/{id}"),
        ("GET", "/v1/jobs/job_c4nary", "/v1/jobs/{id}"),
        ("GET", "/v1/jobs?cursor=c4nary", "/v1/jobs"),
        ("GET", "/c4nary", "unknown"),
        ("C4NARY", "/v1/jobs", "/v1/jobs"),
        ("DELETE", f"/v1/jobs/{job}", "/v1/jobs/{id}"),
    ]
    expected: Counter[tuple[str, str, str]] = Counter()
    codes: Counter[str] = Counter()
    for method, path, route in asked:
        answer = bench.client.request(method, path)
        expected[method if method != "C4NARY" else "other", route, str(answer.status_code)] += 1
        if answer.status_code >= 400:
            codes[answer.json()["code"]] += 1
    for (method, route, status), number in expected.items():
        assert value(bench, "http_requests_total", method=method, route=route, status=status) == number
    for code, number in codes.items():
        assert value(bench, "rejects_total", code=code) == number
    assert codes.keys() == {"not_found", "cursor_invalid", "method_not_allowed", "job_not_finished"}
    assert value(bench, "http_request_s_count", method="GET", route="/v1/jobs/{id}") == 3
    assert "c4nary" not in str(labels_of(registry(bench))).lower()


def test_submissions_are_accepted_or_replayed(bench: Bench) -> None:
    """A refused one is neither."""
    for key, body in (("a", {"prompt": "a"}), ("a", {"prompt": "a"}), ("b", {"prompt": ""})):
        bench.client.post("/v1/customize", json=body, headers={"Idempotency-Key": key})
    bench.client.post("/v1/trainings", json={"recipe": "sticker-adapter", "adapter": "toys"})
    counted = {
        (kind, outcome): value(bench, "submissions_total", kind=kind, outcome=outcome)
        for kind in ("customize", "training")
        for outcome in ("accepted", "replayed")
    }
    assert counted == {
        ("customize", "accepted"): 1,
        ("customize", "replayed"): 1,
        ("training", "accepted"): 1,
        ("training", "replayed"): 0,
    }


def test_the_census(bench: Bench) -> None:
    """Every way to wait, run and end, once each: by the places that a job passes, and Redis' own clock."""
    narrow = Ledger(bench.redis, CUSTOMIZE, tenant_window=2, max_attempts=1)
    bench.finish(bench.submit()["id"], picture())
    queued = bench.submit()["id"]
    bench.client.post(f"/v1/jobs/{queued}/cancel")
    failing, canceled, lost = (bench.submit()["id"] for _ in range(3))
    token = bench.ledger.claim(failing, "w")
    assert token and bench.ledger.fail(failing, token, JobError("no_face", "Send a face."))
    token = bench.ledger.claim(canceled, "w", waits=True)
    assert token and bench.ledger.begin(canceled, token)
    for _ in range(2):  # the first request counts
        bench.client.post(f"/v1/jobs/{canceled}/cancel")
    assert bench.ledger.release_canceled(canceled, token)
    token = bench.ledger.claim(lost, "w")
    assert token
    lapse(bench.ledger, lost, token)
    assert narrow.reap() == []
    bench.client.post("/v1/customize", json={"prompt": "a"}, headers={"Cancel-After": "1s"})
    wait_for(narrow.expire, "the deadline")

    running = bench.submit()["id"]
    token = bench.ledger.claim(running, "w")
    assert token and bench.ledger.beat(running, token, Progress("denoise", 1, 4)) == "ok"
    bench.submit()
    for job_id in ("job_l", "job_m"):
        record = bench.ledger.get(running)
        assert record
        accept(Ledger(bench.redis, CUSTOMIZE, tenant_window=1), record.job, id=job_id, tenant="one")
    fetched = {"image": "https://a.example/x.png", "role": "subject"}
    assert bench.client.post("/v1/customize", json={"prompt": "a", "references": [fetched]}).status_code == 202

    def seen(name: str, **labels: str) -> float:
        return value(bench, name, kind="customize", **labels)

    ended = {state: seen("jobs_ended_total", state=state) for state in ("succeeded", "failed", "canceled", "expired")}
    assert ended == {"succeeded": 1, "failed": 2, "canceled": 2, "expired": 1}
    places = {place: seen("num_requests_waiting", place=place) for place in ("fetching", "lined_up", "called")}
    assert places == {"fetching": 1, "lined_up": 1, "called": 2}
    assert seen("num_requests_running") == 1
    assert seen("request_queue_wait_s_count") == 5, "who was canceled or expired in the queue has not been taken up"
    assert seen("request_queue_wait_s_bucket", le="+Inf") == 5
    assert seen("cancel_latency_s_count") == 1, "one queued when it was canceled has none"
    assert 0 < seen("cancel_latency_s_sum") < 60
    assert value(bench, "num_requests_waiting", kind="training", place="called") == 0
    assert value(bench, "redis_up") == 1


def accept(ledger: Any, job: Any, **changes: Any) -> None:
    """The job once more, changed."""
    assert ledger.accept(replace(job, **changes)).outcome == "new"


def test_the_tally_counts_once(bench: Bench) -> None:
    """A lost reply repeated, a lost worker's job taken up again: one end, one wait."""
    job = bench.submit()["id"]
    token = bench.ledger.claim(job, "w")
    assert token
    lapse(bench.ledger, job, token)
    assert bench.ledger.reap() == [job]
    token = bench.ledger.claim(job, "w")
    assert token
    for _ in range(2):
        assert bench.ledger.fail(job, token, JobError("x", "y"))
    assert value(bench, "jobs_ended_total", kind="customize", state="failed") == 1
    assert value(bench, "request_queue_wait_s_count", kind="customize") == 1


@pytest.mark.parametrize("named", [False, True])
def test_tenants_are_named_only_if_wanted(
    redis_server: RedisProcess, model_dir: Path, tmp_path: Path, named: bool
) -> None:
    """By default nobody who reads metrics learns who uses the service."""
    application = create_app(settings(redis_server.url, tmp_path, model_dir, metrics_tenants=named))
    with TestClient(application) as caller:
        gateway = application.state.gateway
        gateway.redis.flushdb()
        job = caller.post("/v1/customize", json={"prompt": "a"}).json()["id"]
        record = gateway.ledger.get(job)
        assert record
        accept(gateway.ledger, record.job, id="job_2", tenant="c4nary", prompt="b")
        assert (value(gateway.metrics.registry, "load_s", kind="customize") > 0) is True
        assert (("tenant", "default") in labels_of(gateway.metrics.registry)) is named
        gateway.redis.flushdb()


def test_without_redis_the_rest_is_told(model_dir: Path, tmp_path: Path) -> None:
    """Metrics of a gateway whose Redis is away say so, and what it answered itself."""
    application = create_app(settings("redis://127.0.0.1:1", tmp_path, model_dir))
    with TestClient(application) as caller:
        assert caller.get("/v1/jobs").status_code == 503
        one = application.state.gateway.metrics.registry
        assert value(one, "redis_up") == 0
        assert value(one, "rejects_total", code="queue_unavailable") == 1


def test_streams_and_refused_connections(bench: Bench) -> None:
    """An event stream is counted while it is open, on real sockets; what the connection itself refuses is a reject."""
    app: Any = bench.client.app
    job = bench.submit()["id"]
    gates = serve(app)
    gate = next(gates)
    try:
        with httpx2.stream("GET", f"{gate.url}/v1/jobs/{job}/events", timeout=240) as answer:
            lines = answer.iter_lines()
            next(lines)
            assert value(bench, "event_streams") == 1
            bench.client.post(f"/v1/jobs/{job}/cancel")
            assert "event: status" in list(lines)
        wait_for(lambda: value(bench, "event_streams") == 0, "the end of the stream")
        with socket.create_connection(gate.address) as caller:
            caller.sendall(b"GET /livez HTTP/1.1\nHost: x\n\n")
            assert b"400" in caller.recv(1000)
        assert value(bench, "rejects_total", code="malformed_request") == 1
    finally:
        stopping = threading.Thread(target=lambda: next(gates, None))
        stopping.start()
        stopping.join()


def families(source: CollectorRegistry) -> dict[str, tuple[str, str]]:
    """Type and meaning by the name that is asked for, of our own metrics."""
    return {
        family.name + ("_total" if family.type == "counter" else ""): (family.type, family.documentation)
        for family in source.collect()
        if family.name.startswith("dreamserve:")
    }


def shown() -> dict[str, dict[str, tuple[str, str]]]:
    """Everything that each process can show."""
    gateway, worker = GatewayMetrics.fresh(), WorkerMetrics.fresh()
    courier, training = CourierMetrics.fresh(), TrainingMetrics.fresh()
    gateway.watch({}, tenants=True)
    worker.watch(lambda: InHand(0, 0, 0, 0, {"prompts": Counts(0, 0, 0, 0, 0)}))
    courier.watch(lambda: {"fetches": 0})
    sources = {"gateway": gateway, "worker": worker, "training worker": training, "courier": courier}
    return {process: families(source.registry) for process, source in sources.items()}


def test_the_documents_table_is_this_one() -> None:
    """docs/operations.md lists every metric with its type and meaning, by process, and no other."""
    text = (ROOT / "docs" / "operations.md").read_text()
    rows = re.findall(r"^\| ([a-z ]+) \| `(dreamserve:\w+)`[^|]* \| (\w+) \| (.+) \|$", text, re.MULTILINE)
    listed: dict[str, dict[str, tuple[str, str]]] = {}
    for process, name, kind, meaning in rows:
        listed.setdefault(process, {})[name] = (kind, meaning)
    assert listed == shown()


@pytest.mark.parametrize("file", ["grafana.json", "alerts.yml"])
def test_what_is_deployed_asks_for_what_there_is(file: str) -> None:
    """Every metric that the dashboard or an alert names exists; the control: a name that does not is seen."""
    text = (ROOT / "deploy" / file).read_text()
    assert isinstance(yaml.safe_load(text), dict)
    known = {name for process in shown().values() for name in process}

    def unknown(text: str) -> set[str]:
        named = {re.sub(r"_(bucket|sum|count)$", "", name) for name in re.findall(r"dreamserve:\w+", text)}
        return {name for name in named if name not in known and f"{name}_count" not in known}

    assert unknown(text) == set()
    assert unknown(f"{text} dreamserve:nothing_total") == {"dreamserve:nothing_total"}


def test_what_is_alerted_at_its_first_increase_begins_at_zero() -> None:
    """Prometheus sees no increase in a series that appears as 1: what an alert asks for is there before the first."""
    fresh = [kind.fresh().registry for kind in (GatewayMetrics, WorkerMetrics, CourierMetrics)]
    alerts = (ROOT / "deploy" / "alerts.yml").read_text()
    asked = re.findall(r'increase\((dreamserve:\w+)\{(\w+)="(\w+)"\}', alerts)
    assert {name for name, _, _ in asked} >= {"dreamserve:rejects_total", "dreamserve:webhooks_total"}
    for name, label, value in [*asked, *(("dreamserve:rejects_total", "code", code) for code in TABLE)]:
        assert [found for each in fresh if (found := each.get_sample_value(name, {label: value})) is not None] == [0]


def test_a_process_that_is_gone_is_missed(bench: Bench) -> None:
    """By a metric that it alone shows, and always; a service without trainings lacks no training worker."""
    worker, courier = WorkerMetrics.fresh(), CourierMetrics.fresh()
    worker.watch(lambda: InHand(0, 0, 0, 0, {}))
    courier.watch(lambda: {"fetches": 0})
    sources = {"gateway": registry(bench), "worker": worker.registry, "courier": courier.registry}
    samples = {
        process: {sample.name for family in source.collect() for sample in family.samples}
        for process, source in sources.items()
    }
    missed = re.findall(r"absent\((dreamserve:\w+)\)", (ROOT / "deploy" / "alerts.yml").read_text())
    assert sorted(process for name in missed for process in samples if name in samples[process]) == sorted(sources)
    assert not set(missed) & shown()["training worker"].keys()


def test_units_are_in_the_names() -> None:
    """vLLM-Omni's rule: seconds end in _s, bytes in _bytes, what only grows in _total; the one prefix is before all."""
    for process in shown().values():
        for name, (kind, _) in process.items():
            assert re.fullmatch(r"dreamserve:[a-z0-9_]+", name)
            assert name.endswith("_total") == (kind == "counter")
            assert "seconds" not in name


def test_kinds_have_the_names_of_their_queues() -> None:
    """What the labels say, and what the documents say of them."""
    assert (CUSTOMIZE.queue, TRAINING.queue) == ("customize", "training")
