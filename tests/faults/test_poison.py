"""A job that kills every worker it comes to, among others."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from tests.faults.clients import some_job
from tests.faults.crew import Crew
from tests.faults.history import History
from tests.waiting import wait_for
from workers import queues
from workers.jobs import CustomizeJob, CustomizeRecord, JobStatus

MATES = 7


def at_once(crew: Crew) -> list[CustomizeJob]:
    """A poison and its mates, all in the queue before any worker is there to take them."""
    draw = random.Random(0)
    jobs = [some_job(number, draw) for number in range(MATES + 1)]
    sampling = replace(jobs[0].sampling, num_inference_steps=120)
    jobs = [replace(job, sampling=sampling, num_images=1) for job in jobs]
    # The last and largest is prepared when its mates are at work.
    jobs[0] = replace(jobs[0], prompt="poison", sampling=replace(sampling, num_inference_steps=130))
    for job in [*jobs[1:], jobs[0]]:
        queues.ring_accepted(crew.ledger, crew.ledger.accept(job))
    return jobs


def ends(home: Path, variant: str, workers: int) -> list[CustomizeRecord]:
    """The records of the poison and of its mates once all have ended."""
    with Crew(home, History(home / "history.jsonl"), size=workers, lease_s=1.0, variant=variant) as crew:
        jobs = at_once(crew)

        def look() -> list[CustomizeRecord] | None:
            crew.tend()
            records = [crew.ledger.get(job.id) for job in jobs]
            return records if all(record is not None and record.status.terminal for record in records) else None  # pyright: ignore[reportReturnType]  # none is None

        return wait_for(look, "all ends")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_poison_fails_and_its_neighbours_do_not(tmp_path: Path, workers: int) -> None:
    """It fails at its third attempt, with nobody beside it by then; who was beside it has lost one attempt at most."""
    poison, *mates = ends(tmp_path, "product", workers)
    assert (poison.status, poison.attempt) == (JobStatus.FAILED, 3)
    assert poison.error is not None and poison.error.code == "worker_lost"
    assert {mate.status for mate in mates} == {JobStatus.SUCCEEDED}
    attempts = {mate.attempt for mate in mates}
    assert attempts <= {1, 2}
    assert workers > 1 or 2 in attempts, "they were beside it when it died first"


def test_in_a_crowd_neighbours_pay(tmp_path: Path) -> None:
    """The control: without turns, those beside it lose as many attempts as it does."""
    _, *mates = ends(tmp_path, "crowded", 1)
    assert 3 in {mate.attempt for mate in mates}
