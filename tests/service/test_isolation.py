"""Two tenants on every route of the service: what is another's is not there, byte for byte.

The routes are taken from the OpenAPI document, so a new one is looked at without being named here. One with a path
parameter that `Theirs` does not know fails the test until it is told how to make such a thing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import redis
from fastapi import APIRouter, FastAPI
from starlette.testclient import TestClient

from service.app import create_app
from service.gateway import GatewayDependency
from tests.service.conftest import Bench, picture, settings
from workers.jobs import CUSTOMIZE, TRAINING
from workers.ledger import Ledger
from workers.redis_process import RedisProcess
from workers.registry import MAIN
from workers.tenants import TenantBook

OPEN = {"/livez", "/readyz"}
"""All that a stranger may ask."""
CANARY = "c4nary"
JSON = {"Content-Type": "application/json"}


@dataclass(frozen=True)
class House:
    """A gateway with two tenants; `mine` has made things, `theirs` looks for them."""

    app: FastAPI
    bench: Bench
    mine: dict[str, str]
    theirs: dict[str, str]

    def ids(self, path: str) -> dict[str, str] | None:
        """Path parameters of something of mine that the route at `path` can serve; None if there is no such kind."""
        names = set(re.findall(r"{(\w+)}", path))
        if path.startswith("/v1/jobs/{id}"):
            known = {"id": self._job(), "index": "0", "ref": "1"}
        elif path.startswith("/v1/trainings/{id}"):
            known = {"id": self._training()}
        elif path.startswith("/v1/references/{id}"):
            known = {"id": self._reference()}
        else:
            known = {}
        return {name: known[name] for name in names} if names <= known.keys() else None

    def call(self, method: str, path: str, key: dict[str, str]) -> Any:
        headers = {**JSON, **key, "X-Request-ID": "same"}
        return self.bench.client.request(method, path, headers=headers, content=b"{}" if method == "POST" else None)

    def furnish(self) -> None:
        """Make something of mine to find."""
        self._job()
        self._training()
        self._reference()

    def _job(self) -> str:
        body = {"prompt": CANARY, "metadata": {"order": CANARY}}
        made = self.bench.client.post("/v1/customize", json=body, headers=self.mine).json()
        self.bench.finish(made["id"], picture())
        return made["id"]

    def _reference(self) -> str:
        headers = {**self.mine, "Content-Type": "image/png"}
        return self.bench.client.post("/v1/references", content=picture(), headers=headers).json()["id"]

    def _training(self) -> str:
        body = {"recipe": "sticker-adapter", "adapter": CANARY}
        made = self.bench.client.post("/v1/trainings", json=body, headers=self.mine).json()["id"]
        self.bench.trainings.cancel(made)  # one whose events come to an end
        return made


@pytest.fixture
def house(redis_server: RedisProcess, model_dir: Path, tmp_path: Path) -> Iterator[House]:
    client = redis.Redis.from_url(redis_server.url)
    client.flushdb()
    app = create_app(settings(redis_server.url, tmp_path, model_dir, auth="keys"))
    book = TenantBook(client)
    mine, theirs = ({"Authorization": f"Bearer {book.create_key(name)}"} for name in ("mine", "theirs"))
    with TestClient(app) as caller:
        ledgers = Ledger(client, CUSTOMIZE), Ledger(client, TRAINING)
        yield House(app, Bench(caller, client, *ledgers, app.state.gateway.store, tmp_path), mine, theirs)
    client.flushdb()  # a key left behind would close the next gateway
    client.close()


def leaks(house: House) -> list[str]:
    """Everything that a tenant can learn of another's things, and every route that a stranger can use."""
    found: list[str] = []
    document = house.app.openapi()
    operations = [(method.upper(), path) for path, methods in document["paths"].items() for method in methods]
    for method, path in operations:
        place = f"{method} {path}"
        if path in OPEN:
            continue
        ids = house.ids(path)
        if ids is None:
            found.append(f"{place}: House.ids does not know how to make what it names")
            continue
        if house.call(method, path.format(**ids), {}).status_code != 401:
            found.append(f"{place}: answers without a key")
        if ids:
            found += [f"{place}: {what}" for what in _differs(house, method, path, ids)]
        else:
            house.furnish()
            if CANARY in house.call(method, path, house.theirs).text:
                found.append(f"{place}: shows another's")
    return found


def _differs(house: House, method: str, path: str, ids: dict[str, str]) -> list[str]:
    """How an answer about another's thing differs from one about nothing, and whether its owner gets anything."""
    unknown = {**ids, "id": re.sub(r"[0-9a-f]{8}$", "00000000", ids["id"])}
    foreign, nothing = (house.call(method, path.format(**one), house.theirs) for one in (ids, unknown))
    faults: list[str] = []
    if foreign.status_code != 404 or (foreign.content, foreign.headers) != (nothing.content, nothing.headers):
        faults.append("another's thing is not answered like one that does not exist")
    if house.call(method, path.format(**ids), house.mine).status_code == 404:
        faults.append("its owner does not get it either: the test asks wrongly")
    return faults


def test_no_route_shows_another_tenants_things(house: House) -> None:
    """Foreign is unknown: status, body and headers, on every route that there is."""
    adapters = house.bench.home / "exported"
    adapters.mkdir()
    (adapters / MAIN).write_bytes(b"weights")
    house.app.state.gateway.registry.of("mine").publish(CANARY, adapters)
    assert CANARY in house.call("GET", "/v1/adapters", house.mine).text
    assert leaks(house) == []


def test_the_search_finds_leaks(house: House) -> None:
    """The control: routes without a key, without a look at the tenant, or of a kind nobody told of are all named."""
    careless = APIRouter()

    @careless.get("/v1/jobs/{id}/leak")
    def leak(gateway: GatewayDependency, id: str) -> Any:
        record = gateway.ledger.get(id)
        return {"prompt": record.job.prompt if record else None}

    @careless.get("/v1/all")
    def everything(gateway: GatewayDependency) -> Any:
        return [record.job.prompt for record in gateway.ledger.list(None, None, 100)[0]]

    @careless.get("/v1/things/{thing}")
    def unknown(thing: str) -> str:
        return thing

    house.app.include_router(careless)
    house.app.openapi_schema = None
    assert leaks(house) == [
        "GET /v1/jobs/{id}/leak: answers without a key",
        "GET /v1/jobs/{id}/leak: another's thing is not answered like one that does not exist",
        "GET /v1/all: answers without a key",
        "GET /v1/all: shows another's",
        "GET /v1/things/{thing}: House.ids does not know how to make what it names",
    ]


def test_idempotency_keys_of_two_tenants_do_not_meet(house: House) -> None:
    """The same key and body from another tenant is another job; nobody can probe for keys in use."""
    headers = {"Idempotency-Key": "order-42"}
    answers = [
        house.bench.client.post("/v1/customize", json={"prompt": prompt}, headers={**headers, **who})
        for who, prompt in ((house.mine, "a"), (house.theirs, "a"), (house.mine, "a"))
    ]
    assert [answer.status_code for answer in answers] == [202] * 3
    mine, theirs, again = (answer.json()["id"] for answer in answers)
    assert mine == again != theirs
    conflict = {"json": {"prompt": "b"}}
    assert house.bench.client.post("/v1/customize", **conflict, headers={**headers, **house.theirs}).status_code == 422


def test_a_tenants_references_are_its_own(house: House) -> None:
    """Another's upload cannot be named in a request either: it is as unknown as one that never was."""
    mine = house.ids("/v1/references/{id}")
    assert mine is not None
    answers: list[Any] = []
    for ref_id in (mine["id"], "ref_" + "0" * 32):
        body = {"prompt": "a", "references": [{"image": ref_id, "role": "subject"}]}
        headers = {**house.theirs, "X-Request-ID": "same"}
        answers.append(house.bench.client.post("/v1/customize", json=body, headers=headers))
    assert answers[0].status_code == 422
    assert answers[0].content == answers[1].content


def test_a_tenants_adapters_are_its_own(house: House, tmp_path: Path) -> None:
    """What one trained the other can neither see nor draw with; what lies on top is for both."""
    registry = house.app.state.gateway.registry
    for tenant, content in (("mine", b"one"), ("default", b"two")):
        folder = tmp_path / f"exported-{tenant}"
        folder.mkdir()
        (folder / MAIN).write_bytes(content)
        registry.of(tenant).publish("style" if tenant == "mine" else "common", folder)
    listed = [
        {adapter["name"] for adapter in house.call("GET", "/v1/adapters", who).json()["adapters"]}
        for who in (house.mine, house.theirs)
    ]
    assert listed == [{"style", "common"}, {"common"}]
    body = {"prompt": "a", "adapter": {"name": "style"}}
    answer = house.bench.client.post("/v1/customize", json=body, headers=house.theirs)
    assert (answer.status_code, answer.json()["code"]) == (422, "adapter_unknown")
