"""What callers send stays where it belongs: unique words in every part of a request, on every route and error path,
then looked for in all that the processes leave behind: logs, metrics, traces, Redis, the disk.
"""

from __future__ import annotations

import base64
import json
import logging
import re
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
import structlog
from fastapi import APIRouter, FastAPI, Request
from prometheus_client import generate_latest
from starlette.testclient import TestClient

from service.app import create_app
from service.gateway import GatewayDependency
from tests.deployed_logging import deployed_logging
from tests.service.canaries import BODIES, SECRET, WORDS, Collector, House, disk_of, found, picture, redis_of
from tests.service.conftest import settings
from tests.service.test_isolation import OPEN
from tests.service.test_readiness import free_port, status
from tests.waiting import wait_for
from tests.workers.courier.hosts import Host, always, said
from tests.workers.courier.test_fetching import PNG
from workers.jobs import CUSTOMIZE
from workers.redis_process import RedisProcess, start_redis
from workers.telemetry.metrics import counter
from workers.tenants import TenantBook


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    server, collector = start_redis(tmp_path / "state"), Collector()
    with redis.Redis.from_url(server.url) as client:
        key = TenantBook(client).create_key(WORDS["tenant"])
    with Host(always(said(200, PNG))) as host:
        one = House(tmp_path, server, host, collector, free_port(), key)
        one.start("gateway", "service.cli", "gateway", "--port", str(one.port))
        one.start("worker", "tests.workers.standin")
        one.start("courier", "workers.courier")
        try:
            wait_for(lambda: status(f"{one.url}/readyz") == 200, "the gateway")
            wait_for(lambda: all(b'"event": "metrics"' in log for log in one.logs.values()), "the ports")
            yield one
        finally:
            one.client.close()
            for process in one.processes.values():
                process.kill()
                process.wait()
            server.stop()
            collector.shutdown()


def body(house: House, **changes: Any) -> dict[str, Any]:
    """A request that has a word wherever there is room for one."""
    host = f"https://localhost:{house.host.port}"
    image = base64.b64encode(picture(WORDS["image"])).decode()
    return {
        "prompt": f"a toy {WORDS['prompt']}",
        "negative_prompt": WORDS["negative"],
        "references": [
            {"image": f"data:image/png;base64,{image}", "role": "subject"},
            {"image": f"{host}/mug.png?Signature={WORDS['refurl']}", "role": "subject"},
        ],
        "width": 64,
        "height": 64,
        "num_inference_steps": 2,
        "metadata": {"order": WORDS["metadata"]},
        "webhook": {"url": f"{host}/hook?token={WORDS['hookurl']}", "events": ["status", "terminal"]},
        **changes,
    }


def go_well(house: House) -> str:
    """Jobs that succeed, are replayed, fail in the worker, in the courier; their ids are the first one's."""
    headers = {
        "Idempotency-Key": WORDS["idem"],
        "X-Request-ID": f"a {WORDS['header']}",
        "traceparent": WORDS["header"],
    }
    first = house.ask("POST", "/v1/customize", json=body(house), headers=headers)
    assert first.status_code == 202, first.text
    assert (
        house.ask("POST", "/v1/customize", json=body(house), headers=headers).headers["Idempotent-Replayed"] == "true"
    )
    conflict = house.ask("POST", "/v1/customize", json=body(house, seed=1), headers=headers)
    assert conflict.json()["code"] == "idempotency_conflict"
    job_id = first.json()["id"]
    assert house.ended(job_id)["status"] == "succeeded"
    for word, code in (("boom", "internal"), ("oom", "out_of_memory"), ("face", "no_face")):
        failing = house.ask("POST", "/v1/customize", json=body(house, prompt=f"{word} {WORDS['prompt']}"))
        assert house.ended(failing.json()["id"])["error"]["code"] == code
    inside = {"image": f"https://localhost:1/{WORDS['refurl']}", "role": "subject"}
    assert house.ask("POST", "/v1/customize", json=body(house, references=[inside])).json()["code"] == "url_forbidden"
    away = {"image": f"https://{WORDS['refurl']}.invalid/x.png", "role": "subject"}
    gone = house.ask("POST", "/v1/customize", json=body(house, references=[away])).json()["id"]
    assert house.ended(gone)["error"]["code"] == "reference_unreachable"
    upload = {"Content-Type": "image/png"}
    assert house.ask("POST", "/v1/references", content=picture(WORDS["image"]), headers=upload).status_code == 201
    wait_for(lambda: len([seen for seen in house.host.seen if seen.method == "POST"]) >= 4, "webhooks")
    return job_id


def bodies(house: House) -> Iterable[bytes]:
    """Bodies that are refused, each for another reason, and all of them with a word in them."""
    word = WORDS["prompt"]
    yield f'{{"prompt": "{word}'.encode()
    yield f'{{"prompt": "{word}", "{word}": 1}}'.encode()
    yield json.dumps(body(house, prompt=f"{word} [ref#9]\u202e")).encode()
    yield json.dumps(body(house, seed=WORDS["metadata"], output={"format": word})).encode()
    yield json.dumps(body(house, metadata={"k": WORDS["metadata"] * 400})).encode()
    yield json.dumps(body(house, webhook={"url": f"http://{WORDS['hookurl']}"})).encode()
    yield json.dumps(body(house, adapter={"name": word, "scale": 1.0})).encode()
    yield json.dumps(body(house, references=[{"image": f"data:image/png;base64,{word}", "role": word}])).encode()
    bomb = base64.b64encode(b"\x89PNG\r\n\x1a\n" + WORDS["image"].encode() * 9).decode()
    yield json.dumps(body(house, references=[{"image": f"data:image/png;base64,{bomb}", "role": "subject"}])).encode()
    yield json.dumps({"recipe": word, "adapter": word, "dataset": word, "overrides": {word: word}}).encode()
    yield WORDS["image"].encode()


def go_wrong(house: House, job_id: str) -> set[int]:
    """Every route with ids that are there, that are not and that cannot be, with and without a key; the statuses."""
    document = house.ask("GET", "/openapi.json").json()
    statuses: set[int] = set()
    for template, methods in document["paths"].items():
        for method in (*methods, "patch"):
            for id in (job_id, WORDS["path"], f"{WORDS['path']}%0d%0a{WORDS['path']}", f"..%2f{WORDS['path']}"):
                path = re.sub(r"{id}", id, re.sub(r"{(index|ref)}", "0", template))
                if method == "delete" and id == job_id:
                    continue
                for key in (None, f"ds_{WORDS['wrongkey']}", "x"):
                    if template in OPEN and key is not None:
                        continue
                    with house.client.stream(
                        method.upper(),
                        f"{house.url}{path}?wait=0&cursor={WORDS['query']}&status={WORDS['query']}",
                        headers={
                            "Authorization": f"Bearer {house.key if key is None else key}",
                            "Last-Event-ID": WORDS["header"],
                            "Cancel-After": WORDS["header"],
                            "Range": f"bytes={WORDS['header']}",
                            "If-None-Match": WORDS["header"],
                            "User-Agent": WORDS["header"],
                            "Referer": f"https://{WORDS['header']}/",
                        },
                    ) as answer:
                        statuses.add(answer.status_code)
    for route in ("/v1/customize", "/v1/trainings", "/v1/references"):
        for content in bodies(house):
            for media in ("application/json", "image/png", f"text/{WORDS['header']}"):
                answer = house.ask("POST", route, content=content, headers={"Content-Type": media})
                statuses.add(answer.status_code)
    for raw in (
        f"GET /{WORDS['path']}\r\n\r\n",
        f"GET / HTTP/1.1\nHost: {WORDS['header']}\n\n",
        f"GET / HTTP/1.1\r\nX: {WORDS['header'] * 2000}\r\n\r\n",
        f"{WORDS['path']}\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", house.port), timeout=240) as caller:
            caller.sendall(raw.encode())
            answer = caller.recv(4096)
            if answer:
                statuses.add(int(answer.split()[1]))
    return statuses


def go_down(house: House) -> None:
    """Faults of our own: a damaged record, a store that is a file, a Redis that is killed while things go on."""
    with redis.Redis.from_url(house.server.url) as client:
        client.hset(f"{CUSTOMIZE.root}job:job_damaged", mapping={"status": "queued", "job": WORDS["prompt"]})
        assert house.ask("GET", "/v1/jobs/job_damaged").status_code == 500
        client.delete(f"{CUSTOMIZE.root}job:job_damaged")
    references = house.home / "state" / "artifacts" / "references"
    references.rename(references.with_name("aside"))
    references.write_text("")
    assert house.ask("POST", "/v1/customize", json=body(house)).status_code == 503
    references.unlink()
    references.with_name("aside").rename(references)
    house.server.process.kill()
    house.server.process.wait()
    assert house.ask("POST", "/v1/customize", json=body(house)).status_code == 503
    assert house.ask("GET", f"/v1/jobs/{WORDS['path']}").status_code == 503
    house.server.stop()
    house.server = start_redis(house.home / "state")
    wait_for(lambda: status(f"{house.url}/readyz") == 200, "the gateway")


def test_nothing_is_where_it_does_not_belong(house: House) -> None:
    """No word in any log, metric or trace; in Redis a job's words in its record alone; on the disk the picture alone;
    keys, in any of them, nowhere.
    """
    job_id = go_well(house)
    statuses = go_wrong(house, job_id)
    assert statuses >= {200, 400, 401, 404, 405, 415, 422, 431}, "the error paths were taken"
    go_down(house)
    metrics = house.metrics()
    house.end()
    everything = {**WORDS, "key": house.key, "secret": SECRET[6:]}
    traces = {"traces": b"\0".join(house.collector.bodies)}
    with redis.Redis.from_url(house.server.url) as client:
        store = redis_of(client)
    disk = disk_of(house.home / "state")

    assert all(len(page) > 1000 for page in metrics.values())
    assert b"denoise" in traces["traces"] and b"webhook" in traces["traces"] and b"accept" in traces["traces"]
    for log in house.logs.values():
        assert b'"event": "ready"' in log or b'"event": "request"' in log
    assert found(everything, {**house.logs, **metrics, **traces}) == []

    kept = [place for place in found(everything, store) if not belongs(place)]
    assert kept == []
    assert any("dreamserve:job:" in place for place in found({"prompt": WORDS["prompt"]}, store)), "the control"
    aof = {"redis' files": b"".join(path.read_bytes() for path in (house.home / "state" / "redis").glob("*.aof"))}
    assert found({name: everything[name] for name in ("image", "idem", "wrongkey", "key", "secret")}, aof) == []
    assert [
        place for place in found(everything, disk) if not place.startswith("image in disk artifacts/references/")
    ] == []
    assert found({"image": WORDS["image"]}, disk), "the control"


def belongs(place: str) -> bool:
    """Whether a word may be there: the request in its record, the webhook's URL beside it, a tenant's name."""
    word, _, where = place.partition(" in redis ")
    name, _, field_ = where.partition(" ")
    record = re.fullmatch(r"dreamserve:job:\w+", name) is not None
    if word == "tenant":
        return not name.startswith("rq:")
    return record and ((field_ == "job" and word in BODIES) or (field_ == "hook" and word == "hookurl"))


def test_the_search_finds_what_leaks(
    redis_server: RedisProcess, model_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The control: a careless route that lets a word out into each of the places is found in each, base64 included."""
    word, application = WORDS["prompt"], create_app(settings(redis_server.url, tmp_path, model_dir, auth="off"))
    careless(application)
    with deployed_logging(), TestClient(application) as caller:
        assert caller.post("/v1/leak", content=word.encode()).status_code == 200
    metrics = generate_latest(application.state.gateway.metrics.registry)
    sinks = {"log": capfd.readouterr().err.encode(), "metrics": metrics}
    with redis.Redis.from_url(redis_server.url) as client:
        sinks |= redis_of(client)
        client.flushdb()
    names = {place.split(" in ")[1] for place in found({"prompt": word}, {**sinks, **disk_of(tmp_path)})}
    assert names == {"log", "metrics", "redis leaked", "disk artifacts/leaked"}
    assert not belongs("prompt in redis leaked")
    assert not belongs("key in redis dreamserve:job:job_1 job")


def careless(application: FastAPI) -> None:
    """A route that says in every way what it was sent."""
    router = APIRouter()

    @router.post("/v1/leak")
    async def leak(request: Request, gateway: GatewayDependency) -> str:
        said_ = (await request.body()).decode()
        structlog.stdlib.get_logger("careless").info("leak", prompt=said_)
        counter(gateway.metrics.registry, "leaks", "A leak.", "prompt").labels(said_).inc()
        gateway.redis.set("leaked", base64.b64encode(f"?{said_}???".encode()))
        gateway.store.root.mkdir(parents=True)
        (gateway.store.root / "leaked").write_text(said_)
        return "done"

    application.include_router(router)


def test_lines_cannot_be_forged(capfd: pytest.CaptureFixture[str]) -> None:
    """A line end in a value stays within its line, whatever logged it: ours, or a library by its own means."""
    with deployed_logging():
        forged = 'x\r\n{"event": "forged"}\u2028\n'
        structlog.stdlib.get_logger("ours").info("said", value=forged, request_id=forged)
        logging.getLogger("library").warning("said %s", forged)
        try:
            raise ValueError(forged)
        except ValueError:
            logging.getLogger("library").exception("failed")
    lines = capfd.readouterr().err.splitlines()
    assert [json.loads(line)["logger"] for line in lines] == ["ours", "library", "library"]
    assert "forged" not in lines[2], "of an exception only the type"
