"""Finished pictures on their way out: never a wrong byte, whole or in ranges, and nobody fetches one twice in vain."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.problems import MEDIA_TYPE
from tests.service.conftest import Bench, picture
from workers.jobs import Progress, encode

DATA = picture()
SIZE = len(DATA)


@pytest.fixture
def url(bench: Bench) -> str:
    """Where a finished picture, DATA, lies."""
    job = bench.submit()["id"]
    bench.finish(job, DATA)
    return f"/v1/jobs/{job}/images/0"


def test_image_has_its_digest_as_etag(bench: Bench) -> None:
    """The bytes that were committed, under an ETag that saves fetching them twice."""
    job = bench.submit()["id"]
    digest = bench.finish(job, DATA).images[0].sha256
    url = f"/v1/jobs/{job}/images/0"
    answer = bench.client.get(url)
    assert answer.content == DATA
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["etag"] == f'"{digest}"'
    for known in (f'"{digest}"', f'W/"{digest}"', f'"x", "{digest}"', "*"):
        again = bench.client.get(url, headers={"If-None-Match": known, "Range": "bytes=0-1"})
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["etag"] == answer.headers["etag"]
    assert bench.client.get(url, headers={"If-None-Match": '"x"'}).status_code == 200


def test_headers(bench: Bench, url: str) -> None:
    """Kept by the caller's own cache only and for good; saved under a name; HEAD says the same without the bytes."""
    whole = bench.client.get(url)
    head = bench.client.head(url)
    assert (head.status_code, head.content) == (200, b"")
    same = ("etag", "cache-control", "accept-ranges", "content-disposition", "content-type", "content-length")
    assert {name: head.headers[name] for name in same} == {name: whole.headers[name] for name in same}
    assert whole.headers["content-length"] == str(SIZE)
    assert {"private", "immutable"} <= set(whole.headers["cache-control"].split(", "))
    assert whole.headers["accept-ranges"] == "bytes"
    job = url.split("/")[3]
    assert whole.headers["content-disposition"] == f'inline; filename="{job}-0.png"'
    assert bench.client.head(url, headers={"Range": "bytes=0-1"}).status_code == 200, "ranges are defined for GET alone"


@settings(max_examples=150)
@given(first=st.none() | st.integers(0, SIZE + 3), last=st.none() | st.integers(0, SIZE + 3))
def test_single_ranges(bench: Bench, url: str, first: int | None, last: int | None) -> None:
    """Against Python's own slices: any first, last and suffix gives those bytes, says which, or that none exist."""
    wanted = f"bytes={'' if first is None else first}-{'' if last is None else last}"
    answer = bench.client.get(url, headers={"Range": wanted})
    if (first is None and last is None) or (first is not None and last is not None and last < first):
        assert (answer.status_code, answer.content) == (200, DATA), "malformed: as if it was not asked"
        return
    if first is None:
        expected = DATA[-last:] if last else b""
    else:
        expected = DATA[first:] if last is None else DATA[first : last + 1]
    if expected:
        assert (answer.status_code, answer.content) == (206, expected)
        start, end, size = map(int, re.findall(r"\d+", answer.headers["content-range"]))
        assert (DATA[start : end + 1], size) == (expected, SIZE)
        assert answer.headers["content-length"] == str(len(expected))
    else:
        assert (answer.status_code, answer.json()["code"]) == (416, "range_not_satisfiable")
        assert answer.headers["content-range"] == f"bytes */{SIZE}"


@pytest.mark.parametrize(
    "asked",
    ["bytes=0-1,3-4", "lines=0-1", "bytes", "bytes=", "bytes=-", "bytes=a-b", "bytes=0x1-2", "bytes=" + "9" * 99],
)
def test_other_ranges_get_the_whole(bench: Bench, url: str, asked: str) -> None:
    """What is not one range of bytes is passed over, as RFC 9110 allows; it is never an error of ours."""
    answer = bench.client.get(url, headers={"Range": asked})
    assert (answer.status_code, answer.content) == (200, DATA)


def test_if_range(bench: Bench, url: str) -> None:
    """A range is only of use for the version that its asker has: by strong comparison, else the whole comes."""
    etag = bench.client.get(url).headers["etag"]
    for known, status in ((etag, 206), (f"W/{etag}", 200), ('"x"', 200), ("Wed, 01 Jan 2025 00:00:00 GMT", 200)):
        answer = bench.client.get(url, headers={"Range": "bytes=2-5", "If-Range": known})
        assert (answer.status_code, answer.content) == (status, DATA[2:6] if status == 206 else DATA)


@pytest.mark.parametrize("headers", [{}, {"Range": "bytes=0-3"}, {"Range": "bytes=-4"}])
def test_damaged_image_is_never_served(bench: Bench, headers: dict[str, str]) -> None:
    """One flipped bit on the disk is noticed, also by who asks for other bytes only, and again the next time; so is a
    file that is gone. The control: before, the same request is answered."""
    job = bench.submit()["id"]
    image = bench.finish(job, DATA).images[0]
    url = f"/v1/jobs/{job}/images/0"
    assert bench.client.get(url, headers=headers).status_code in (200, 206)
    file = bench.store.path(image.name)
    damaged = bytearray(file.read_bytes())
    damaged[-20] ^= 1
    file.write_bytes(damaged)
    for method in ("GET", "HEAD", "GET"):
        answer = bench.client.request(method, url, headers=headers)
        assert answer.status_code == 500
    assert answer.json()["code"] == "artifact_corrupt"
    file.unlink()
    answer = bench.client.get(url, headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (410, "artifact_missing")


def test_preview(bench: Bench) -> None:
    """The newest preview of a running job, never from a cache; before the first one there is none."""
    job = bench.submit()["id"]
    token = bench.ledger.claim(job, "test-worker")
    assert token is not None
    url = f"/v1/jobs/{job}/preview"
    missing = bench.client.get(url)
    assert (missing.status_code, missing.headers["content-type"]) == (404, MEDIA_TYPE)
    for step, (kind, media_type) in enumerate((("PNG", "image/png"), ("JPEG", "image/jpeg")), start=1):
        preview = picture(kind)
        bench.ledger.beat(job, token, Progress("denoise", step, 4), preview=preview)
        answer = bench.client.get(url)
        assert (answer.status_code, answer.content) == (200, preview)
        assert answer.headers["content-type"] == media_type
        assert answer.headers["cache-control"] == "no-store"


def test_foreign_pictures_are_not_found(bench: Bench, url: str) -> None:
    """Another tenant's picture is like none, also by range, by HEAD and for who knows its digest."""
    etag = bench.client.get(url).headers["etag"]
    record = bench.ledger.get(url.split("/")[3])
    assert record is not None
    unknown = bench.client.get("/v1/jobs/job_unknown/images/0").json()
    key = f"dreamserve:job:{record.job.id}"
    bench.redis.hset(key, "job", encode(replace(record.job, tenant="another")))
    for headers in ({}, {"If-None-Match": etag}, {"If-None-Match": "*"}, {"Range": "bytes=0-1"}):
        answer = bench.client.get(url, headers=headers)
        assert answer.status_code == bench.client.head(url, headers=headers).status_code == 404
        assert answer.json() | {"instance": "", "request_id": ""} == unknown | {"instance": "", "request_id": ""}
