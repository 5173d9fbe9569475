"""Following a job: its body in every state, lists, cancellation, pictures."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import pytest

from service.problems import MEDIA_TYPE
from tests.service.conftest import Bench, picture
from workers import queues
from workers.jobs import CUSTOMIZE, JobError, Progress


def test_queued_running_succeeded(bench: Bench) -> None:
    """The states a caller sees are those that the ledger passes through, with times in order."""
    job = bench.submit(seed=7, metadata={"order": "42"})["id"]
    token = bench.ledger.claim(job, "test-worker")
    assert token is not None
    bench.ledger.beat(job, token, Progress("denoise", 2, 4))
    running = bench.client.get(f"/v1/jobs/{job}").json()
    assert (running["status"], running["queue"]) == ("running", None)
    assert running["progress"] == {"phase": "denoise", "step": 2, "total": 4}
    assert running["finished_at"] is running["expires_at"] is None
    other = bench.submit()["id"]
    bench.finish(other, picture())
    done = bench.client.get(f"/v1/jobs/{other}").json()
    assert done["status"] == "succeeded"
    times = [datetime.fromisoformat(done[name]) for name in ("created_at", "started_at", "finished_at", "expires_at")]
    assert times == sorted(times)
    assert (times[3] - times[2]).total_seconds() == pytest.approx(bench.ledger.job_ttl_s, abs=0.01)
    assert done["timings"]["denoise_s"] == 0.25
    assert (running["cache"], done["cache"]) == ({}, {"prompt": "hit"})
    assert done["timings"]["queued_s"] >= 0
    assert done["images"][0]["url"] == f"/v1/jobs/{other}/images/0"


def test_failed_job_is_a_200_with_its_error(bench: Bench) -> None:
    """A failed job is not a failed request."""
    job = bench.submit()["id"]
    token = bench.ledger.claim(job, "test-worker")
    assert token is not None
    bench.ledger.fail(job, token, JobError("no_face", "No face was found: use another picture."))
    answer = bench.client.get(f"/v1/jobs/{job}")
    assert answer.status_code == 200
    assert answer.json()["error"] == {
        "code": "no_face",
        "message": "No face was found: use another picture.",
        "retryable": False,
    }


def test_queue_position_counts_those_ahead(bench: Bench) -> None:
    """Position 0 is next; a cancellation ahead moves the others up."""
    first, second, third = (bench.submit()["id"] for _ in range(3))
    assert bench.client.get(f"/v1/jobs/{third}").json()["queue"] == {"position": 2}
    bench.client.post(f"/v1/jobs/{first}/cancel")
    assert bench.client.get(f"/v1/jobs/{third}").json()["queue"] == {"position": 1}
    assert bench.client.get(f"/v1/jobs/{second}").json()["queue"] == {"position": 0}


def test_list_pages_newest_first(bench: Bench) -> None:
    """Walking the cursors gives every job once, newest first, and the filter keeps only its state."""
    ids = [bench.submit()["id"] for _ in range(5)]
    bench.client.post(f"/v1/jobs/{ids[2]}/cancel")
    seen: list[str] = []
    cursor: str | None = None
    while True:
        page = bench.client.get("/v1/jobs", params={"limit": 2, **({"cursor": cursor} if cursor else {})}).json()
        seen += [job["id"] for job in page["jobs"]]
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert seen == ids[::-1]
    canceled = bench.client.get("/v1/jobs", params={"status": "canceled"}).json()["jobs"]
    assert [job["id"] for job in canceled] == [ids[2]]


def test_list_refuses_wrong_parameters(bench: Bench) -> None:
    """A made-up cursor and an impossible limit are the caller's slips."""
    answer = bench.client.get("/v1/jobs", params={"cursor": "../x"})
    assert (answer.status_code, answer.json()["code"]) == (422, "cursor_invalid")
    for name, value in (("limit", "0"), ("limit", "x"), ("status", "done")):
        problem = bench.client.get("/v1/jobs", params={name: value}).json()
        assert (problem["code"], problem["errors"][0]["pointer"]) == ("invalid_value", f"?{name}")


def test_cancel_queued(bench: Bench) -> None:
    """A queued job ends at once and no worker can claim it any more."""
    job = bench.submit()["id"]
    answer = bench.client.post(f"/v1/jobs/{job}/cancel")
    assert (answer.status_code, answer.json()["status"]) == (200, "canceled")
    assert bench.ledger.claim(job, "test-worker") is None


def test_cancel_running(bench: Bench) -> None:
    """A running job is asked to stop: 202, and its worker learns of it at the next beat."""
    job = bench.submit()["id"]
    token = bench.ledger.claim(job, "test-worker")
    assert token is not None
    answer = bench.client.post(f"/v1/jobs/{job}/cancel")
    assert (answer.status_code, answer.json()["status"]) == (202, "running")
    assert answer.json()["cancel_requested"] is True
    assert bench.ledger.beat(job, token, Progress("denoise", 1, 4)) == "canceled"


def test_cancel_finished_changes_nothing(bench: Bench) -> None:
    """A terminal state is final."""
    job = bench.submit()["id"]
    bench.finish(job, picture())
    before = bench.client.get(f"/v1/jobs/{job}").json()
    answer = bench.client.post(f"/v1/jobs/{job}/cancel")
    assert (answer.status_code, answer.json()) == (200, before)


def test_image_has_its_digest_as_etag(bench: Bench) -> None:
    """The bytes that were committed, under an ETag that saves fetching them twice."""
    job = bench.submit()["id"]
    data = picture()
    digest = bench.finish(job, data).images[0].sha256
    url = f"/v1/jobs/{job}/images/0"
    answer = bench.client.get(url)
    assert answer.content == data
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["etag"] == f'"{digest}"'
    for known in (f'"{digest}"', f'W/"{digest}"', f'"x", "{digest}"', "*"):
        again = bench.client.get(url, headers={"If-None-Match": known})
        assert (again.status_code, again.content) == (304, b"")
    assert bench.client.get(url, headers={"If-None-Match": '"x"'}).status_code == 200


def test_damaged_image_is_never_served(bench: Bench) -> None:
    """One flipped bit on the disk is noticed; so is a file that is gone."""
    job = bench.submit()["id"]
    image = bench.finish(job, picture()).images[0]
    file = bench.store.path(image.name)
    damaged = bytearray(file.read_bytes())
    damaged[-20] ^= 1
    file.write_bytes(damaged)
    answer = bench.client.get(f"/v1/jobs/{job}/images/0")
    assert (answer.status_code, answer.json()["code"]) == (500, "artifact_corrupt")
    file.unlink()
    answer = bench.client.get(f"/v1/jobs/{job}/images/0")
    assert (answer.status_code, answer.json()["code"]) == (410, "artifact_missing")


@pytest.mark.parametrize(
    "path",
    [
        "/nothing",
        "/docs",
        "/v1/jobs/job_unknown",
        "/v1/jobs/" + "a" * 65,
        "/v1/jobs/..%2F..%2Fetc",
        "/v1/jobs/a%00b",
        "/v1/jobs/job_unknown/images/0",
        "/v1/jobs/{job}/images/0",
        "/v1/jobs/{job}/images/1",
        "/v1/jobs/{job}/images/-1",
        "/v1/jobs/{job}/images/x",
        "/v1/jobs/{job}/images/" + "9" * 5000,
        "/v1/jobs/",
    ],
)
def test_not_found(bench: Bench, path: str) -> None:
    """Unknown, malformed and unfinished all look alike."""
    job = bench.submit()["id"]
    answer = bench.client.get(path.format(job=job))
    assert (answer.status_code, answer.json()["code"]) == (404, "not_found")
    assert answer.headers["content-type"] == MEDIA_TYPE
    assert answer.json()["instance"].startswith("urn:dreamserve:request:")


def test_cancel_unknown(bench: Bench) -> None:
    """Nor can one probe for jobs by cancelling."""
    assert bench.client.post("/v1/jobs/job_unknown/cancel").json()["code"] == "not_found"


def test_wrong_method(bench: Bench) -> None:
    """The framework's own refusals are problems too, with the header that says what works."""
    answer = bench.client.get("/v1/customize")
    assert (answer.status_code, answer.json()["code"]) == (405, "method_not_allowed")
    assert answer.headers["allow"] == "POST"
    assert answer.headers["content-type"] == MEDIA_TYPE


def test_readiness_and_models_show_live_workers(bench: Bench) -> None:
    """A worker counts as ready when its card says so, and its card is shown as it is."""
    assert bench.client.get("/livez").json() == {"status": "live"}
    assert bench.client.get("/readyz").json() == {"status": "ready", "workers_ready": 0}
    card = {"device": "cpu", "dtype": "float32", "model": "unit", "pid": 1, "state": "ready"}
    queues.announce(bench.redis, CUSTOMIZE, "worker-a", card, 30.0)
    queues.announce(bench.redis, CUSTOMIZE, "worker-b", {**card, "state": "loading"}, 30.0)
    assert bench.client.get("/readyz").json()["workers_ready"] == 1
    answer = bench.client.get("/v1/models").json()
    assert [worker["state"] for worker in answer["workers"]] == ["ready", "loading"]
    (model,) = answer["models"]
    assert (model["name"], model["cell"], model["width"]["default"]) == ("unit", 8, 72)
    assert model["roles"] == ["subject", "identity", "style", "content"]


def test_gateway_serves_only_what_the_ledger_names(bench: Bench, tmp_path: Path) -> None:
    """A file in the store that no commit named has no address."""
    job = bench.submit()["id"]
    bench.store.publish(f"{job}.1.0.png", picture())
    assert bench.client.get(f"/v1/jobs/{job}/images/0").status_code == 404
