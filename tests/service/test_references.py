"""Uploaded references: sent once, named in many requests, gone when they are deleted; each tenant has its own."""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from starlette.testclient import TestClient

from service.app import create_app
from tests.service.conftest import Bench, data_url, picture, reference, settings
from tests.waiting import wait_for
from workers.artifacts import ArtifactError
from workers.redis_process import RedisProcess
from workers.tenants import TenantBook

PNG = {"Content-Type": "image/png"}
UNKNOWN = "ref_" + "0" * 32


def form(*files: bytes, name: str = 'filename="a.png"', kind: str = "image/png") -> bytes:
    """A multipart body with the boundary `x`."""
    parts = [
        f'--x\r\nContent-Disposition: form-data; name="file"; {name}\r\nContent-Type: {kind}\r\n\r\n'.encode() + data
        for data in files
    ]
    return b"\r\n".join([*parts, b"--x--\r\n"])


FORM = {"Content-Type": "multipart/form-data; boundary=x"}


def upload(bench: Bench, data: bytes, **headers: str) -> dict[str, Any]:
    answer = bench.client.post("/v1/references", content=data, headers=PNG | headers)
    assert answer.status_code in (200, 201), answer.text
    return answer.json()


def stored(bench: Bench) -> list[Path]:
    """Every file of the store, unfinished ones too."""
    return [path for path in (bench.home / "artifacts").rglob("*") if path.is_file()]


def tenants(bench: Bench, *names: str) -> list[dict[str, str]]:
    """Headers of tenants; from now on the gateway asks for keys."""
    keys = [TenantBook(bench.redis).create_key(name) for name in names]
    wait_for(lambda: bench.client.get("/v1/jobs").status_code == 401, "the gateway to ask for keys")
    return [{"Authorization": f"Bearer {key}"} for key in keys]


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (picture(), PNG),
        (picture(), {"Content-Type": "IMAGE/PNG; charset=binary"}),
        (form(picture()), FORM),
        (form(picture(), kind="application/octet-stream"), FORM),
    ],
)
def test_upload_and_use(bench: Bench, body: bytes, headers: dict[str, str]) -> None:
    """Raw or as a form, the picture is stored as it is, described, and a job that names it gets just those bytes."""
    answer = bench.client.post("/v1/references", content=body, headers=headers)
    said = answer.json()
    digest = hashlib.sha256(picture()).hexdigest()
    assert answer.status_code == 201
    assert answer.headers["location"] == f"/v1/references/{said['id']}"
    assert said["id"].startswith("ref_") and len(said["id"]) <= 64
    about = {"sha256": digest, "media_type": "image/png", "width": 12, "height": 10, "bytes": len(picture())}
    assert said.items() >= about.items()
    assert said["created_at"] < said["expires_at"]
    assert bench.client.get(f"/v1/references/{said['id']}").json() == said
    mask = upload(bench, picture(colour=(255, 255, 255)))["id"]
    job = bench.submit(references=[{"image": said["id"], "mask": mask, "role": "subject"}])
    (used,) = job["request"]["references"]
    assert used["sha256"] == digest
    assert bench.store.read("default", digest) == picture()
    assert bench.store.read("default", used["mask_sha256"]) == picture(colour=(255, 255, 255))


def test_same_bytes_have_the_same_id(bench: Bench) -> None:
    """Uploading again answers 200 with the same id, leaves one file, and makes it stay longer."""
    first = upload(bench, picture())
    again = bench.client.post("/v1/references", content=picture(), headers=PNG)
    assert (again.status_code, again.json()["id"]) == (200, first["id"])
    assert again.json()["created_at"] == first["created_at"]
    assert again.json()["expires_at"] >= first["expires_at"]
    assert len(stored(bench)) == 1
    assert upload(bench, picture(colour=(1, 2, 3)))["id"] != first["id"]


def test_size_is_that_of_the_upright_picture(bench: Bench) -> None:
    """A photo that lies on its side is described as it will be seen, so that a mask can be made to fit."""
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    Image.new("RGB", (12, 10)).save(buffer, "PNG", exif=exif)
    said = upload(bench, buffer.getvalue())
    assert (said["width"], said["height"]) == (10, 12)
    job = {"prompt": "a", "references": [{"image": said["id"], "mask": data_url(picture()), "role": "subject"}]}
    assert bench.client.post("/v1/customize", json=job).json()["code"] == "mask_size_mismatch"


def test_expiry_and_renewal(bench: Bench) -> None:
    """It goes when its time is over; each use, but not a mere look, gives it the whole time again."""
    ref = upload(bench, picture())["id"]
    (key,) = bench.redis.keys("dreamserve:reference:ref_*")
    path = bench.store._reference("default", hashlib.sha256(picture()).hexdigest())

    def age() -> None:
        bench.redis.pexpire(key, 60_000)
        os.utime(path, (1, 1))

    age()
    bench.client.get(f"/v1/references/{ref}")
    assert (bench.redis.pttl(key) <= 60_000, path.stat().st_mtime) == (True, 1)
    for use in (lambda: bench.submit(references=[{"image": ref, "role": "subject"}]), lambda: upload(bench, picture())):
        age()
        use()
        assert bench.redis.pttl(key) > 80_000_000
        assert path.stat().st_mtime > 1e9, "and no sweep takes its file"
    bench.redis.pexpire(key, 1)
    wait_for(lambda: bench.client.get(f"/v1/references/{ref}").status_code == 404, "the reference to expire")
    gone = {"prompt": "a", "references": [{"image": ref, "role": "subject"}]}
    assert bench.client.post("/v1/customize", json=gone).json()["code"] == "reference_unknown"


def test_deleting(bench: Bench) -> None:
    """204 means that the file is gone and that every worker will hear of it; then it is as if it had never been."""
    said = upload(bench, picture())
    url = f"/v1/references/{said['id']}"
    answer = bench.client.delete(url)
    assert (answer.status_code, answer.content) == (204, b"")
    assert stored(bench) == []
    purges: Any = bench.redis.xrange("dreamserve:references:purges")
    ((_, purge),) = purges
    assert purge == {b"tenant": b"default", b"sha256": said["sha256"].encode()}
    assert bench.client.get(url).status_code == bench.client.delete(url).status_code == 404
    slip = bench.client.post(
        "/v1/customize", json={"prompt": "a", "references": [{"image": said["id"], "role": "subject"}]}
    )
    assert (slip.status_code, slip.json()["code"]) == (422, "reference_unknown")
    assert upload(bench, picture())["id"] == said["id"], "and can be sent again"


def test_deleting_that_broke_off_can_be_done_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the disk does not let go of the file, the caller hears so, and the reference stays to be deleted again."""
    said = upload(bench, picture())
    folder = bench.store._reference("default", said["sha256"]).parent
    moved = folder.rename(folder.with_suffix(".away"))
    folder.write_text("a file where a folder is wanted")
    answer = bench.client.delete(f"/v1/references/{said['id']}")
    assert (answer.status_code, answer.json()["code"]) == (503, "storage_unavailable")
    folder.unlink()
    moved.rename(folder)
    assert bench.client.delete(f"/v1/references/{said['id']}").status_code == 204
    assert stored(bench) == []


def test_a_deletion_is_of_the_picture(bench: Bench) -> None:
    """The same bytes that a queued job of this tenant has sent itself are gone too, and can be sent again. Control:
    those of another tenant, and another picture, stay.
    """
    body = {"prompt": "a", "references": [{"image": data_url(picture()), "role": "subject"}]}
    other = {"prompt": "a", "references": [{"image": data_url(picture(size=(9, 9))), "role": "subject"}]}
    keys: list[str] = []
    for sent in (body, other):
        record = bench.ledger.get(bench.submit(**sent)["id"])
        assert record is not None
        keys.append(record.job.references[0].image)
    assert bench.store.put("neighbour", picture()) == keys[0]
    said = bench.client.post("/v1/references", content=picture(), headers={"Content-Type": "image/png"}).json()
    assert said["sha256"] == keys[0]
    assert bench.client.delete(f"/v1/references/{said['id']}").status_code == 204
    with pytest.raises(ArtifactError, match="send it again") as caught:
        bench.store.read("default", keys[0])
    assert caught.value.code == "artifact_missing"
    assert bench.store.read("neighbour", keys[0]) == picture()
    assert bench.store.read("default", keys[1]) == picture(size=(9, 9))
    bench.submit(**body)
    assert bench.store.read("default", keys[0]) == picture()


def test_file_that_has_gone_is_no_reference(bench: Bench) -> None:
    """What the store has lost is not promised to anybody; uploading it again mends it."""
    said = upload(bench, picture())
    bench.store.delete("default", said["sha256"])
    assert bench.client.get(f"/v1/references/{said['id']}").status_code == 404
    answer = bench.client.post(
        "/v1/customize", json={"prompt": "a", "references": [{"image": said["id"], "role": "subject"}]}
    )
    assert answer.json()["code"] == "reference_unknown"
    assert bench.ledger.list(None, None, 10, None)[0] == []
    upload(bench, picture())
    bench.submit(references=[{"image": said["id"], "role": "subject"}])


def test_tenants(bench: Bench) -> None:
    """The same picture has another id for each tenant, and a foreign id is like an unknown one, to the byte, wherever
    it is used; what the one deletes, the other keeps. The control: its owner finds it by each of these ways."""
    mine, other = tenants(bench, "acme", "globex")
    ids = [upload(bench, picture(), **who)["id"] for who in (mine, other)]
    assert ids[0] != ids[1]
    assert len(stored(bench)) == 2

    def answers(ref: str, who: dict[str, str]) -> list[tuple[int, Any]]:
        job = {"prompt": "a", "references": [{"image": ref, "role": "subject"}]}
        all_of_them = [
            bench.client.get(f"/v1/references/{ref}", headers=who),
            bench.client.post("/v1/customize", json=job, headers=who),
            bench.client.post("/v1/customize", json={**job, "references": [reference(mask=ref)]}, headers=who),
            bench.client.delete(f"/v1/references/{ref}", headers=who),
        ]
        blank = {"instance": "", "request_id": ""}
        return [(each.status_code, each.json() | blank if each.content else None) for each in all_of_them]

    assert answers(ids[0], other) == answers(UNKNOWN, other)
    assert [status for status, _ in answers(ids[1], other)] == [200, 202, 202, 204]
    assert bench.client.get(f"/v1/references/{ids[0]}", headers=mine).status_code == 200
    assert bench.store.read("acme", hashlib.sha256(picture()).hexdigest()) == picture()


def test_ids_cannot_be_computed(bench: Bench) -> None:
    """Who knows tenant and picture still cannot tell the id: it hangs on a secret that a fresh Redis draws anew."""
    first = upload(bench, picture())["id"]
    bench.redis.flushdb()
    assert upload(bench, picture())["id"] != first


@pytest.mark.parametrize(
    ("code", "body", "headers"),
    [
        ("image_type_mismatch", picture("JPEG"), PNG),
        ("image_type_mismatch", form(picture("WEBP")), FORM),
        ("image_undecodable", picture()[:-30], PNG),
        ("image_unsupported", b"", PNG),
        ("image_unsupported", picture("GIF"), PNG),
        ("malformed_form", form(picture(), picture()), FORM),
        ("malformed_form", form(), FORM),
        ("malformed_form", form(picture(), name="x=1"), FORM),
        ("malformed_form", form(picture())[:-8], FORM),
        ("malformed_form", picture(), FORM),
        ("malformed_form", form(picture()), {"Content-Type": "multipart/form-data"}),
        ("malformed_form", form(picture()), {"Content-Type": "multipart/form-data; boundary=" + "x" * 999}),
        ("malformed_form", b"--x\r\n" + b"A: b\r\n" * 999, FORM),
        ("unsupported_media_type", picture(), {"Content-Type": "application/json"}),
        ("unsupported_media_type", picture(), {"Content-Type": "image/gif"}),
        ("unsupported_media_type", picture(), {}),
        ("unsupported_media_type", picture(), PNG | {"Content-Encoding": "gzip"}),
        ("payload_too_large", bytes(20 * 2**20 + 1), PNG),
        ("payload_too_large", form(bytes(20 * 2**20 + 1)), FORM),
    ],
)
def test_refusals(bench: Bench, code: str, body: bytes, headers: dict[str, str]) -> None:
    """Each slip has its code, and nothing of a refused upload stays on the disk or in Redis."""
    answer = bench.client.post("/v1/references", content=body, headers=headers)
    assert 400 <= answer.status_code < 500
    assert answer.json()["code"] == code
    if code == "unsupported_media_type":
        assert "image/png" in answer.headers["accept-post"]
    assert stored(bench) == []
    assert bench.redis.keys("dreamserve:reference:*") == []


@pytest.mark.parametrize("path", ["ref_x", "REF_" + "0" * 32, UNKNOWN + "0", "..%2F..%2Fetc", "ref_" + "%00" * 32])
def test_ids_are_no_paths(bench: Bench, path: str) -> None:
    """Only what an upload was given is looked for."""
    for method in ("GET", "DELETE"):
        answer = bench.client.request(method, f"/v1/references/{path}")
        assert (answer.status_code, answer.json()["code"]) == (404, "not_found")


def test_disk_that_takes_nothing(redis_server: RedisProcess, model_dir: Path, tmp_path: Path) -> None:
    """An upload that cannot be written is a 503 without a path in it."""
    blocked = tmp_path / "file"
    blocked.write_text("a file where a folder is wanted")
    with TestClient(create_app(settings(redis_server.url, blocked / "state", model_dir))) as client:
        answer = client.post("/v1/references", content=picture(), headers=PNG)
    assert (answer.status_code, answer.json()["code"]) == (503, "storage_unavailable")
    assert str(tmp_path) not in answer.text
