"""How much may wait: costs, shares and the bound, and what a caller over them is told."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient

from model.roles import Role
from model.spec import ModelSpec, flux_spec
from service.app import create_app
from service.callers.limits import (
    LONGEST_TRAINING_S,
    LONGEST_WAIT_S,
    UNKNOWN_WAIT_S,
    WINDOWS_S,
    StepCost,
    cost_s,
    drain_rate,
    retry_after_s,
)
from tests.service.conftest import Bench, picture, settings
from tests.waiting import wait_for
from tests.workers.ledgers import settled_hour
from workers.jobs import TRAINING, CustomizeJob, JobError, ReferenceInput, Sampling, TrainingResult
from workers.ledger import Ledger, TrainingLedger
from workers.redis_process import RedisProcess
from workers.tenants import TenantBook
from workers.training.recipes import MAX_BATCH, MAX_STEPS

FLUX: ModelSpec = flux_spec("flux", 16, version="v1.1", turbo=True)
SAMPLING = Sampling(1024, 1024, 1, 4.5, 4.5, 7)
Make = Callable[..., TestClient]


def job(references: int = 0, images: int = 1, **sampling: Any) -> CustomizeJob:
    inputs = tuple(ReferenceInput(slot, Role.SUBJECT, "0" * 64, resolution=512) for slot in range(1, references + 1))
    return CustomizeJob("job_1", "flux", "a", "", inputs, replace(SAMPLING, **sampling), num_images=images)


def test_the_defaults_are_what_scaling_predicts() -> None:
    """docs/scaling.md: a step of 1024² takes 128 ms without and 244 ms with three references of 512²."""
    assert cost_s(job(), FLUX, StepCost()) == pytest.approx(0.128, rel=0.01)
    assert cost_s(job(3), FLUX, StepCost()) == pytest.approx(0.244, rel=0.01)


@given(st.integers(1, 50), st.integers(1, 4), st.integers(0, 8))
def test_costs_grow_with_all_that_is_asked_for(steps: int, images: int, references: int) -> None:
    """Steps and pictures multiply, true CFG doubles its window, a reference adds more the more there are."""
    base = cost_s(job(references, 1, num_inference_steps=1), FLUX, StepCost())
    assert cost_s(job(references, images, num_inference_steps=steps), FLUX, StepCost()) == pytest.approx(
        base * images * steps
    )
    window = {"true_cfg_scale": 2.0, "true_cfg_start": 0, "true_cfg_end": steps, "num_inference_steps": steps}
    assert cost_s(job(references, 1, **window), FLUX, StepCost()) == pytest.approx(2 * steps * base)
    more, most = (cost_s(job(references + n), FLUX, StepCost()) for n in (1, 2))
    assert most - more > more - base > 0


@given(st.lists(st.integers(0, 1000), min_size=3, max_size=3).map(sorted))
def test_the_drain_rate_is_one_of_the_windows(counts: list[int]) -> None:
    """Never faster than what was counted, never nothing when something ended."""
    rate = drain_rate(dict(zip(WINDOWS_S, counts, strict=True)))
    rates = [count / window for window, count in zip(WINDOWS_S, counts, strict=True)]
    assert rate is None if counts[-1] == 0 else rate in rates and rate > 0


@given(st.floats(0.001, 1e6), st.one_of(st.none(), st.floats(1e-6, 1e4)))
def test_retry_after_is_a_sensible_number(jobs: float, rate: float | None) -> None:
    """A whole number of seconds, at least one, long enough unless that would be absurd."""
    seconds = retry_after_s(jobs, rate)
    assert 1 <= seconds <= LONGEST_WAIT_S
    if rate is None:
        assert seconds == UNKNOWN_WAIT_S
    else:
        assert seconds == LONGEST_WAIT_S or seconds * rate >= jobs


COST = 4 * StepCost().seconds(512 + 72)
"""Of the test model's default job: 9 × 8 cells and the text, four steps."""


@pytest.fixture
def make(redis_server: RedisProcess, model_dir: Path, tmp_path: Path, bench: Bench) -> Iterator[Make]:
    """Gateways with other limits, over the Redis of `bench`."""
    with ExitStack() as stack:

        def made(**changes: Any) -> TestClient:
            chosen = settings(redis_server.url, tmp_path, model_dir, **changes)
            return stack.enter_context(TestClient(create_app(chosen)))

        yield made


def submit(client: TestClient, key: str | None = None, **headers: str) -> Any:
    if key:
        headers["Authorization"] = f"Bearer {key}"
    return client.post("/v1/customize", json={"prompt": "a toy"}, headers=headers)


def test_a_tenant_over_its_share_is_told_when_to_come_back(make: Make, bench: Bench) -> None:
    """429 for that tenant alone; the end of one of its jobs makes room; a replay is always answered."""
    client = make(auth="keys", share_s=2.5 * COST)
    book = TenantBook(bench.redis)
    flood, calm = book.create_key("flood"), book.create_key("calm")
    first = submit(client, flood, **{"Idempotency-Key": "k"})
    assert (first.status_code, submit(client, flood).status_code) == (202, 202)
    refused = submit(client, flood)
    assert (refused.status_code, refused.json()["code"]) == (429, "tenant_over_share")
    assert refused.json()["retryable"] is True
    assert int(refused.headers["retry-after"]) == UNKNOWN_WAIT_S
    assert submit(client, calm).status_code == 202
    assert submit(client, flood, **{"Idempotency-Key": "k"}).json()["id"] == first.json()["id"]
    bench.finish(first.json()["id"], picture())
    again = submit(client, flood)
    assert again.status_code == 202
    assert 1 <= int(submit(client, flood).headers["retry-after"]) <= LONGEST_WAIT_S


def test_a_share_of_its_own_goes_before_the_default(make: Make, bench: Bench) -> None:
    """`keys create --share` raises or lowers a tenant's share; one job is always let in."""
    book = TenantBook(bench.redis)
    small, large = book.create_key("small"), book.create_key("large")
    book.set_share("small", 0.0)
    book.set_share("large", 10 * COST)
    client = make(auth="keys", share_s=2.5 * COST)
    assert [submit(client, small).status_code for _ in range(2)] == [202, 429]
    assert [submit(client, large).status_code for _ in range(4)] == [202] * 4


SAMPLES = 100 * 8 + 300 * 8 + 20 * 8
"""Of the recipe sticker-adapter: steps and batch of its stages."""


def train(client: TestClient, key: str, **changes: Any) -> Any:
    body = {"recipe": "sticker-adapter", **changes}
    return client.post("/v1/trainings", json=body, headers={"Authorization": f"Bearer {key}"})


def lose(ledger: TrainingLedger, job_id: str, token: int) -> None:
    """Its last worker is lost."""
    ledger.redis.hset(f"{TRAINING.root}job:{job_id}", "attempt", 10)
    ledger.redis.zadd(f"{TRAINING.root}leases", {job_id: 0})
    assert Ledger(ledger.redis, TRAINING, max_attempts=10).reap() == []
    assert ledger.beat(job_id, token) == "lost"


def cancel_running(ledger: TrainingLedger, job_id: str, token: int) -> None:
    ledger.cancel(job_id)
    assert ledger.release_canceled(job_id, token)


ENDS: dict[str, Callable[[TrainingLedger, str, int], object]] = {
    "succeeded": lambda ledger, job, token: ledger.commit(job, token, TrainingResult("a", "0" * 64, 1, {})),
    "failed": lambda ledger, job, token: ledger.fail(job, token, JobError("internal", "It broke.")),
    "canceled": cancel_running,
    "lost": lose,
    "queued, then canceled": lambda ledger, job, token: (ledger.hand_back(job, token), ledger.cancel(job)),
}


@pytest.mark.parametrize("end", ENDS)
def test_trainings_have_a_share(make: Make, bench: Bench, end: str) -> None:
    """By samples to be trained on; over it a tenant's next one is refused until one ends, however it does. Control:
    while it runs nothing is free. Another tenant's trainings, and its own pictures, are not refused.
    """
    client = make(auth="keys", share_s=2.5 * SAMPLES, training_sample_s=1.0)
    book = TenantBook(bench.redis)
    flood, calm = book.create_key("flood"), book.create_key("calm")
    first = train(client, flood)
    assert (first.status_code, train(client, flood).status_code) == (202, 202)
    assert bench.trainings.load("flood") == 2 * SAMPLES
    refused = train(client, flood)
    assert (refused.status_code, refused.json()["code"]) == (429, "tenant_over_share")
    assert int(refused.headers["retry-after"]) >= 1
    assert train(client, calm).status_code == 202
    assert submit(client, flood).status_code == 202
    job = first.json()["id"]
    token = bench.trainings.claim(job, "w")
    assert token is not None
    assert train(client, flood).status_code == 429
    ENDS[end](bench.trainings, job, token)
    record = bench.trainings.get(job)
    assert record is not None and record.status.terminal
    assert bench.trainings.load("flood") == SAMPLES
    assert train(client, flood).status_code == 202


def test_a_training_without_end_is_still_a_number(make: Make, bench: Bench) -> None:
    """The longest that a recipe may ask for would take centuries: let in if it is alone, like any other, and freed."""
    client, key = make(auth="keys"), TenantBook(bench.redis).create_key("acme")
    endless = {"overrides": {"stages": {"warm-up": {"steps": MAX_STEPS, "batch": MAX_BATCH}}}}
    answer = train(client, key, **endless)
    assert answer.status_code == 202
    assert bench.trainings.load("acme") == LONGEST_TRAINING_S
    assert train(client, key).status_code == 429
    bench.trainings.cancel(answer.json()["id"])
    assert bench.trainings.load("acme") == 0


def test_the_whole_service_has_a_bound(make: Make, bench: Bench) -> None:
    """503 for everybody once too much waits, with a time to come back; without keys there is no share, but a bound."""
    client = make(share_s=0.5 * COST, bound_s=2.5 * COST)
    assert [submit(client).status_code for _ in range(2)] == [202, 202]
    refused = submit(client)
    assert (refused.status_code, refused.json()["code"]) == (503, "over_capacity")
    assert int(refused.headers["retry-after"]) == UNKNOWN_WAIT_S
    assert len(bench.ledger.list()[0]) == 2


def test_what_is_canceled_at_once_counts(make: Make, bench: Bench) -> None:
    """Its record stays for a day, so a tenant is accepted a number of times an hour and then told when to come back.

    A replay, what is refused and another tenant's count for nothing, trainings by themselves.
    """
    client, book = make(auth="keys", tenant_acceptances=3, share_s=1e6), TenantBook(bench.redis)
    flood, calm, hour = book.create_key("flood"), book.create_key("calm"), settled_hour(bench.redis)
    first = submit(client, flood, **{"Idempotency-Key": "k"})
    for _ in range(5):
        assert submit(client, flood, **{"Idempotency-Key": "k"}).json()["id"] == first.json()["id"]
        assert client.post("/v1/customize", json={}, headers={"Authorization": f"Bearer {flood}"}).status_code == 422
    for job in [first, *(submit(client, flood) for _ in range(2))]:
        assert job.status_code == 202
        bench.ledger.cancel(job.json()["id"])
    assert bench.ledger.load("flood") == 0.0, "no share says so"
    refused = submit(client, flood)
    assert (refused.status_code, refused.json()["code"]) == (429, "too_many_requests")
    assert 1 <= int(refused.headers["retry-after"]) <= 3600
    assert submit(client, flood, **{"Idempotency-Key": "k"}).json()["id"] == first.json()["id"]
    assert len(bench.ledger.list("flood")[0]) == 3
    assert submit(client, calm).status_code == 202
    trained = [train(client, flood) for _ in range(4)]
    assert [answer.status_code for answer in trained] == [202] * 3 + [429]
    assert trained[-1].json()["code"] == "too_many_requests"
    counter = f"{bench.ledger.root}accepted:flood:{hour}"
    bench.redis.rename(counter, f"{bench.ledger.root}accepted:flood:{hour - 1}")
    assert submit(client, flood).status_code == 202, "the next hour"


@pytest.mark.parametrize(("auth", "most"), [("off", 1), ("keys", 0)])
def test_a_pace_that_nobody_has(make: Make, bench: Bench, auth: str, most: int) -> None:
    """Neither the operator's own tenant, nor anybody where the number is 0: nothing is counted."""
    client = make(auth=auth, tenant_acceptances=most)
    key = TenantBook(bench.redis).create_key("acme") if auth == "keys" else None
    assert [submit(client, key).status_code for _ in range(3)] == [202] * 3
    assert bench.redis.keys(f"{bench.ledger.root}accepted:*") == []


def test_the_place_in_line_has_a_time(bench: Bench) -> None:
    """Once jobs have ended, a queued one says when it may start; before, nobody knows."""
    for _ in range(6):
        bench.finish(bench.submit()["id"], picture())
    bench.submit()
    job = bench.submit()["id"]

    def queue() -> Any:
        found = bench.client.get(f"/v1/jobs/{job}").json()["queue"]
        return None if found["eta_s"] is None else found

    known = wait_for(queue, "a rate, which is asked for once a second")
    assert known["position"] == 1
    assert 0 < known["eta_s"] <= WINDOWS_S[0]
