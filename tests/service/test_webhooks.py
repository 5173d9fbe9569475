"""What webhooks say, beside what the gateway says at the same moment."""

from __future__ import annotations

import json
from typing import Any

import pytest

from model.roles import Role
from service.trainings import training_body
from service.views import job_body
from tests.service.conftest import Bench
from tests.workers.ledgers import ERROR, RESULT
from workers.courier.webhooks import message
from workers.jobs import (
    CustomizeJob,
    JobError,
    ReferenceInput,
    Sampling,
    TrainingJob,
    TrainingResult,
    Webhook,
)
from workers.ledger import Ledger

DAY_S = 86_400
HOOK = Webhook("https://guard.example/hook?token=canary")


def ended(ledger: Ledger[Any, Any, Any], job_id: str, result: object) -> None:
    token = ledger.claim(job_id, "w")
    assert token
    assert ledger.fail(job_id, token, result) if isinstance(result, JobError) else ledger.commit(job_id, token, result)


def last_message(ledger: Ledger[Any, Any, Any]) -> dict[str, Any]:
    delivery = ledger.due_webhooks()[-1]
    record = ledger.get(delivery.job_id)
    assert record
    body = message(delivery, record)
    assert body == message(delivery, record)
    return json.loads(body)


@pytest.mark.parametrize("result", [RESULT, ERROR])
def test_a_message_says_what_the_job_says(bench: Bench, result: object) -> None:
    """Field by field the gateway's own answer, so polling and webhooks tell one story; no prompt, no reference."""
    reference = ReferenceInput(1, Role.SUBJECT, "0" * 64, url="https://guard.example/?Signature=canary")
    sampling = Sampling(16, 32, 2, 4.5, 4.5, seed=7)
    ledger = bench.ledger
    job = CustomizeJob("job_1", "m", "canary", "canary", (reference,), sampling, metadata={"o": "4ü2"}, webhook=HOOK)
    ledger.accept(job)
    ended(ledger, "job_1", result)
    said = last_message(ledger)
    record = ledger.get("job_1")
    assert record
    told = job_body(record, queue=None, ttl_s=DAY_S).model_dump(mode="json")
    assert said["type"] == f"job.{told['status']}"
    assert said["timestamp"] == told["finished_at"]
    assert said["data"].pop("urls")["self"] == told["urls"]["self"]
    assert said["data"].pop("timings", {}).items() <= told["timings"].items()
    assert {name: told[name] for name in said["data"]} == said["data"]
    assert {"id", "status", "attempt", "error", "metadata", "finished_at"} <= said["data"].keys()
    assert ("images" in said["data"]) == (result is RESULT)
    assert "canary" not in json.dumps(said)


def test_a_trainings_message_says_what_the_training_says(bench: Bench) -> None:
    """The same for the other kind of job; its recipe stays at home."""
    trainings = bench.trainings
    trainings.accept(TrainingJob("train_1", "toys", {"name": "canary"}, webhook=HOOK))
    ended(trainings, "train_1", TrainingResult("toys", "f" * 64, 3, {"flow": 0.5}))
    said = last_message(trainings)
    record = trainings.get("train_1")
    assert record
    told = training_body(record, queue=None, ttl_s=DAY_S).model_dump(mode="json")
    assert said["type"] == "training.succeeded"
    assert said["data"].pop("urls")["self"] == told["urls"]["self"]
    assert {name: told[name] for name in said["data"]} == said["data"]
    assert said["data"]["result"]["version"] == "f" * 64
    assert "canary" not in json.dumps(said)
