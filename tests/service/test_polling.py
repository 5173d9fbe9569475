"""The plain status read, which passes FastAPI's dependencies by, answers as the one that does not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import redis
from starlette.testclient import TestClient

from service.app import create_app
from service.callers.auth import Door
from tests.service.conftest import Bench, picture, settings
from workers.redis_process import RedisProcess
from workers.tenants import TenantBook

Headers = dict[str, str]


@pytest.fixture
def keyed(redis_server: RedisProcess, model_dir: Path, tmp_path: Path, bench: Bench) -> Iterator[TestClient]:
    with TestClient(create_app(settings(redis_server.url, tmp_path, model_dir, auth="keys"))) as caller:
        yield caller


def answer(caller: TestClient, path: str, headers: Headers) -> tuple[int, bytes, Any]:
    """Status, body and header of a read; ids of requests, drawn anew each time, are given."""
    told = caller.get(path, headers={**headers, "X-Request-ID": "same"})
    return told.status_code, told.content, dict(told.headers)


def test_both_ways_say_the_same(keyed: TestClient, bench: Bench, redis_server: RedisProcess) -> None:
    """Byte for byte, for every state of a job, every reason to refuse it, and every header that matters.

    `?wait=0` asks for nothing more, but has a query, so it goes the long way.
    """
    book = TenantBook(redis.Redis.from_url(redis_server.url))
    mine, theirs = ({"Authorization": f"Bearer {book.create_key(name)}"} for name in ("mine", "theirs"))
    queued, running, ended, deleted = (
        keyed.post("/v1/customize", json={"prompt": "a toy"}, headers=mine).json()["id"] for _ in range(4)
    )
    bench.ledger.claim(running, "test-worker")
    for job in (ended, deleted):
        bench.finish(job, picture())
    bench.ledger.delete(deleted)
    tag = {"If-None-Match": keyed.get(f"/v1/jobs/{ended}", headers=mine).headers["etag"]}
    statuses: set[int] = set()
    ids = [queued, running, ended, deleted, "job_none", "a" * 64, "a" * 65, "a.b", "é", "a%00b", "a%0a", "%2e%2e"]
    for job in ids:
        for headers in (
            mine,
            theirs,
            {},
            {"Authorization": "Bearer x"},
            {**mine, **tag},
            {**mine, "If-None-Match": "*"},
        ):
            plain = answer(keyed, f"/v1/jobs/{job}", headers)
            assert plain == answer(keyed, f"/v1/jobs/{job}?wait=0", headers), (job, headers.keys())
            statuses.add(plain[0])
    assert statuses == {200, 304, 401, 404, 410}


def test_a_query_is_never_passed_over(keyed: TestClient, bench: Bench, redis_server: RedisProcess) -> None:
    """The control: what stands in the query is read, and refused where it has to be."""
    key = TenantBook(redis.Redis.from_url(redis_server.url)).create_key("mine")
    told = keyed.get("/v1/jobs/job_none?wait=61", headers={"Authorization": f"Bearer {key}"})
    assert told.status_code == 422


def test_a_key_is_remembered_only_as_long_as_it_may_be(bench: Bench) -> None:
    """The event loop asks nobody but its memory, and only for what is in it: then revoking works in time."""
    book = TenantBook(bench.redis)
    key = f"Bearer {book.create_key('acme')}"
    door = Door(book, "keys", "127.0.0.1", remember_s=60)
    assert not door.remembers(key)
    assert door.tenant(key, None) == "acme"
    assert door.remembers(key)
    assert not door.remembers(f"Bearer dreamserve_{'0' * 12}_{'a' * 43}"), "a key that may have been made since"
    forgetful = Door(book, "keys", "127.0.0.1", remember_s=0)
    assert forgetful.tenant(key, None) == "acme"
    assert not forgetful.remembers(key)


@pytest.mark.parametrize(
    "path", ["/v1/jobs/{job}?wait=1&wait=0", "/v1/jobs?limit=1&limit=2", "/v1/trainings?limit=1&limit=1"]
)
def test_a_parameter_given_twice_is_refused(keyed: TestClient, redis_server: RedisProcess, path: str) -> None:
    """Something in front may have read the other one. Once, the control, is answered."""
    key = TenantBook(redis.Redis.from_url(redis_server.url)).create_key("mine")
    headers = {"Authorization": f"Bearer {key}"}
    job = keyed.post("/v1/customize", json={"prompt": "a"}, headers=headers).json()["id"]
    twice = keyed.get(path.format(job=job), headers=headers)
    assert (twice.status_code, twice.json()["code"]) == (422, "invalid_value")
    assert keyed.get(path.format(job=job).rpartition("&")[0], headers=headers).status_code == 200


@pytest.mark.parametrize("number", ["0.0", "0_0", "+0", " 0", "0 ", "٠"])
def test_a_number_is_written_in_digits(bench: Bench, number: str) -> None:
    """What a proxy or another library may read as another number, or as none, is refused; the control is answered."""
    job = bench.submit()["id"]
    bench.finish(job, picture())
    for path in (f"/v1/jobs/{job}?wait=", "/v1/jobs?status=queued&limit=1"):
        told = bench.client.get(path + quote(number))
        (fault,) = told.json()["errors"]
        assert (told.status_code, fault["code"]) == (422, "invalid_value")
        assert fault["pointer"] == "?" + path.rpartition("=")[0].rpartition("?")[2].rpartition("&")[2]
        assert bench.client.get(path + "0").status_code == 200
    assert bench.client.get(f"/v1/jobs/{job}/images/{quote(number)}").status_code == 404
    assert bench.client.get(f"/v1/jobs/{job}/images/0").status_code == 200
