"""API keys: who gets in, what is kept of a key, and that nobody serves strangers unawares."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest
import redis
from fastapi import FastAPI
from starlette.testclient import TestClient
from structlog.testing import capture_logs

from service.app import create_app
from service.callers.auth import REMEMBER_S, Door
from service.client.blocking import Client
from service.client.errors import UnauthenticatedError
from service.problems import Problem
from tests.conftest import ROOT
from tests.service.conftest import Bench, picture, settings
from tests.service.gates import serve
from tests.waiting import wait_for
from workers.redis_process import RedisProcess, start_redis
from workers.tenants import TenantBook


@pytest.fixture
def book(bench: Bench) -> TenantBook:
    return TenantBook(bench.redis)


@pytest.fixture
def keyed(redis_server: RedisProcess, model_dir: Path, tmp_path: Path, book: TenantBook) -> Iterator[TestClient]:
    """A gateway that asks for keys, on the same Redis as `book`."""
    with TestClient(create_app(settings(redis_server.url, tmp_path, model_dir, auth="keys"))) as caller:
        yield caller


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_a_key_opens_and_names_its_tenant(keyed: TestClient, book: TenantBook, bench: Bench) -> None:
    """The key's tenant owns what is submitted with it."""
    key = book.create_key("acme")
    answer = keyed.post("/v1/customize", json={"prompt": "a toy"}, headers=bearer(key))
    record = bench.ledger.get(answer.json()["id"])
    assert record is not None
    assert record.job.tenant == "acme"


def _wrong_keys(key: str, other: str) -> list[dict[str, Any]]:
    head, key_id, secret = key.split("_", 2)
    flipped = secret[:-1] + ("A" if secret[-1] != "A" else "E")
    return [
        {},
        bearer(""),
        bearer("x"),
        bearer(f"{head}_{key_id}_{flipped}"),
        bearer(f"{head}_{other.split('_')[1]}_{secret}"),
        bearer(f"{head}_{key_id}_{secret.swapcase()}"),
        bearer(key[:-1]),
        bearer(key + "A"),
        bearer(f"{head}_{'0' * 12}_{secret}"),
        {"Authorization": key},
        {"Authorization": f"Basic {key}"},
        {"Authorization": b"Bearer \x00\xff"},
        {"X-API-Key": key},
    ]


def test_wrong_keys_are_refused_alike(keyed: TestClient, book: TenantBook) -> None:
    """No key, a key changed in one letter, another's id or another scheme: one answer, and it says how to ask."""
    key, other = book.create_key("acme"), book.create_key("acme")
    bodies: set[str] = set()
    for headers in _wrong_keys(key, other):
        answer = keyed.get("/v1/jobs", headers={**headers, "X-Request-ID": "same"})
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"].startswith('Bearer realm="dreamserve"')
        bodies.add(answer.text)
    assert len(bodies) == 1
    assert keyed.get("/v1/jobs", headers=bearer(key)).status_code == 200
    assert keyed.get("/v1/jobs", headers={"Authorization": f"bearer   {key} "}).status_code == 200


def test_a_body_is_not_read_without_a_key(keyed: TestClient) -> None:
    """Strangers cannot make the gateway unfold pictures: the key comes before the body's faults."""
    assert keyed.post("/v1/customize", content=b"{").status_code == 401


def test_only_a_hash_is_kept(keyed: TestClient, book: TenantBook, bench: Bench) -> None:
    """Neither Redis nor the log ever holds a key's secret; the search would find it."""
    with capture_logs() as lines:
        key = book.create_key("acme")
        keyed.post("/v1/customize", json={"prompt": "a toy"}, headers=bearer(key))
        keyed.get("/v1/jobs", headers=bearer(key[:-1] + "!"))
    stored = b"".join(bench.redis.dump(name) or b"" for name in bench.redis.scan_iter())
    secret = key.split("_", 2)[2]
    everything = stored.decode("latin-1") + str(lines)
    assert secret not in everything
    assert secret[:20] not in everything
    bench.redis.set("control", f"x{secret}x")
    control: Any = bench.redis.dump("control")
    assert secret in control.decode("latin-1")


def test_a_revoked_key_is_refused_soon(book: TenantBook) -> None:
    """A remembered key opens until the memory lapses, which is well below the promised 5 seconds."""
    assert REMEMBER_S <= 4
    door = Door(book, "keys", "127.0.0.1", remember_s=0.2)
    key = book.create_key("acme")
    authorization = f"Bearer {key}"
    assert door.tenant(authorization, None) == "acme"
    (entry,) = book.entries()
    assert book.revoke(entry.id)

    def refused() -> bool:
        try:
            door.tenant(authorization, None)
        except Problem as problem:
            return problem.details.code == "unauthenticated"
        return False

    wait_for(refused, "the refusal of a revoked key")
    assert not book.revoke("0" * 12)
    assert book.entries()[0].revoked_at is not None


def test_a_damaged_entry_opens_nothing(keyed: TestClient, book: TenantBook, bench: Bench) -> None:
    """What somebody wrote into Redis by hand is no key, and the other keys still are."""
    bench.redis.hset("dreamserve:keys", "0" * 12, '{"id": "000000000000", "tenant": "acme", "sha256": 5}')
    key = book.create_key("acme")
    assert keyed.get("/v1/jobs", headers=bearer(f"dreamserve_{'0' * 12}_{'A' * 43}")).status_code == 401
    assert keyed.get("/v1/jobs", headers=bearer(key)).status_code == 200
    assert len(book.entries()) == 1


@pytest.mark.parametrize("tenant", ["", "A", "a b", "../x", ".a", "a/b", "a" * 65, "ä", "a\n"])
def test_a_tenant_has_a_plain_name(book: TenantBook, tenant: str) -> None:
    """Tenants become directories and parts of keys in Redis."""
    with pytest.raises(ValueError, match="lowercase"):
        book.create_key(tenant)


def test_without_keys_only_this_machine_is_served(book: TenantBook) -> None:
    """Single-tenant mode is for callers on this machine, whatever address the server was really bound to."""
    door = Door(book, "auto", "127.0.0.1")
    assert {door.tenant(None, peer) for peer in (None, "127.0.0.1", "::1", "::ffff:127.0.0.1")} == {"default"}
    for peer in ("10.0.0.7", "fe80::1", "::ffff:10.0.0.7", "8.8.8.8"):
        with pytest.raises(Problem):
            door.tenant(None, peer)
    assert Door(book, "off", "0.0.0.0").tenant(None, "10.0.0.7") == "default"


def test_the_first_key_closes_the_door_for_good(book: TenantBook) -> None:
    """Revoking the last key must not open the service to everybody."""
    door = Door(book, "auto", "127.0.0.1", remember_s=0.0)
    assert door.tenant(None, "127.0.0.1") == "default"
    key = book.create_key("acme")
    assert door.tenant(f"Bearer {key}", "127.0.0.1") == "acme"
    book.revoke(book.entries()[0].id)
    for authorization in (None, f"Bearer {key}"):
        with pytest.raises(Problem):
            door.tenant(authorization, "127.0.0.1")


def test_an_open_address_asks_for_keys_though_there_are_none(book: TenantBook) -> None:
    """A Redis that was emptied while others can connect lets nobody in."""
    with pytest.raises(Problem):
        Door(book, "auto", "0.0.0.0").tenant(None, "127.0.0.1")


def test_a_client_with_a_key(keyed: TestClient, book: TenantBook, bench: Bench) -> None:
    """It sends the key; without one it says what is missing."""
    with contextmanager(serve)(cast("FastAPI", keyed.app)) as gate:
        with Client(gate.url) as stranger, pytest.raises(UnauthenticatedError) as refused:
            stranger.customize("a")
        assert refused.value.code == "unauthenticated"
        with Client(gate.url, book.create_key("acme")) as client:
            job = client.customize("a")
            bench.finish(job.id, picture())
            assert job.wait().images[0].read() == picture()


def _run(home: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("DREAMSERVE_")}
    command = [sys.executable, "-m", "service.cli", *arguments]
    environment = kept | {"DREAMSERVE_STATE_DIR": str(home), **variables}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)


def test_the_command_line_keeps_keys_in_the_state_directory(tmp_path: Path) -> None:
    """Keys are made before the service ever ran, listed without their secrets, and revoked."""
    made = _run(tmp_path, "keys", "create", "acme", "--share", "90")
    assert made.returncode == 0, made.stderr
    key = made.stdout.strip()
    listed = _run(tmp_path, "keys", "list").stdout
    assert re.search(rf"{key.split('_')[1]}\s+acme\s+90\s", listed)
    assert key.split("_", 2)[2] not in listed
    assert _run(tmp_path, "keys", "revoke", key.split("_")[1]).returncode == 0
    assert _run(tmp_path, "keys", "revoke", "nothing").returncode == 2
    assert _run(tmp_path, "keys", "share", "acme", "45").returncode == 0
    assert "lowercase" in _run(tmp_path, "keys", "share", "Acme!", "45").stderr
    server = start_redis(tmp_path)
    try:
        book = TenantBook(redis.Redis.from_url(server.url))
        assert [(entry.tenant, entry.fits(key)) for entry in book.entries()] == [("acme", False)]
        assert book.shares() == {"acme": 45.0}
    finally:
        server.stop()


@pytest.mark.parametrize("command", ["serve", "gateway"])
def test_serving_strangers_without_keys_is_refused(
    command: str, tmp_path: Path, redis_server: RedisProcess, model_dir: Path
) -> None:
    """An address that others reach needs keys, or the word of the operator; the message says both."""
    redis.Redis.from_url(redis_server.url).flushdb()
    variables = {"DREAMSERVE_REDIS_URL": redis_server.url, "DREAMSERVE_BASE_MODEL": str(model_dir)}
    done = _run(tmp_path, command, "--host", "0.0.0.0", "--port", "0", **variables)
    assert done.returncode == 2
    assert "dreamserve keys create" in done.stderr
    assert "DREAMSERVE_AUTH=off" in done.stderr
