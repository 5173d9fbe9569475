"""Following a job: its body in every state, lists, cancellation, pictures."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from service.app import create_app
from service.problems import MEDIA_TYPE
from tests.service.conftest import Bench, picture, settings
from tests.waiting import wait_for
from workers import queues
from workers.jobs import CUSTOMIZE, JobError, Progress
from workers.redis_process import RedisProcess


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
    assert bench.client.get(f"/v1/jobs/{third}").json()["queue"]["position"] == 2
    bench.client.post(f"/v1/jobs/{first}/cancel")
    assert bench.client.get(f"/v1/jobs/{third}").json()["queue"]["position"] == 1
    assert bench.client.get(f"/v1/jobs/{second}").json()["queue"]["position"] == 0


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


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/v1/jobs/job_x", "DELETE, GET"),
        ("/v1/references/ref_x", "DELETE, GET"),
        ("/v1/trainings", "GET, POST"),
        ("/v1/jobs/job_x/images/0", "GET, HEAD"),
        ("/livez", "GET, HEAD"),
        ("/v1/jobs/job_x/cancel", "POST"),
    ],
)
def test_allow_names_the_methods_of_every_route_of_a_path(bench: Bench, path: str, allowed: str) -> None:
    """The framework would name those of the first route that has the path."""
    answer = bench.client.patch(path)
    assert (answer.status_code, answer.headers["allow"]) == (405, allowed)


def test_probes_may_ask_for_the_head_only(bench: Bench) -> None:
    """Load balancers do; they get the status and no body."""
    for path in ("/livez", "/readyz"):
        answer = bench.client.head(path)
        assert (answer.status_code, answer.content) == (200, b"")


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


def test_a_deleted_job_is_gone(bench: Bench) -> None:
    """Its pictures leave the disk, its record answers 410 on every route, and it is in no list."""
    job = bench.submit()["id"]
    image = bench.finish(job, picture()).images[0]
    deleted = bench.client.delete(f"/v1/jobs/{job}")
    assert (deleted.status_code, deleted.content, "content-type" in deleted.headers) == (204, b"", False)
    assert not bench.store.path(image.name).exists()
    routes = (("GET", ""), ("GET", "/images/0"), ("GET", "/events"), ("POST", "/cancel"), ("DELETE", ""))
    for method, path in routes:
        answer = bench.client.request(method, f"/v1/jobs/{job}{path}")
        assert (answer.status_code, answer.json()["code"]) == (410, "job_gone"), (method, path)
    assert bench.client.get("/v1/jobs").json()["jobs"] == []


def test_only_what_has_ended_can_be_deleted(bench: Bench) -> None:
    """A worker would write for nobody: 409 with the remedy, and nothing is lost."""
    job = bench.submit()["id"]
    for _ in ("queued", "running"):
        answer = bench.client.delete(f"/v1/jobs/{job}")
        assert (answer.status_code, answer.json()["code"]) == (409, "job_not_finished")
        assert "cancel" in answer.json()["detail"]
        bench.ledger.claim(job, "w")
    assert bench.client.get(f"/v1/jobs/{job}").json()["status"] == "running"


def test_an_expired_record_is_gone_not_unknown(redis_server: RedisProcess, model_dir: Path, tmp_path: Path) -> None:
    """For a week its tenant learns that the job was there: 410 says submit again, 404 would say wrong id."""
    with TestClient(create_app(settings(redis_server.url, tmp_path, model_dir, job_ttl_s=1))) as client:
        job = client.post("/v1/customize", json={"prompt": "a"}).json()["id"]
        client.post(f"/v1/jobs/{job}/cancel")
        wait_for(lambda: client.get(f"/v1/jobs/{job}").status_code == 410, "the end of the record")
        assert client.get(f"/v1/jobs/{job}").json()["code"] == "job_gone"
