"""A job that kills every worker it comes to, among others."""

from __future__ import annotations

import random
from collections.abc import Callable
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


def play(
    home: Path, variant: str, workers: int, step_s: float, enough: Callable[[list[CustomizeRecord]], bool]
) -> list[CustomizeRecord]:
    """The records of the poison and of its mates once they are enough. `step_s`: how long one step of one of them
    takes: together they must still be at work when the poison comes, however slow the machine.
    """
    history = History(home / "history.jsonl")
    with Crew(home, history, size=workers, lease_s=1.0, variant=variant, step_s=step_s) as crew:
        jobs = at_once(crew)

        def look() -> list[CustomizeRecord] | None:
            crew.tend()
            records = [record for job in jobs if (record := crew.ledger.get(job.id)) is not None]
            assert len(records) == len(jobs)
            return records if enough(records) else None

        return wait_for(look, "what is to be seen")


def all_ended(records: list[CustomizeRecord]) -> bool:
    return all(record.status.terminal for record in records)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_poison_fails_and_its_neighbours_do_not(tmp_path: Path, workers: int) -> None:
    """It fails at its third attempt, with nobody beside it by then; who was beside it has lost one attempt at most."""
    poison, *mates = play(tmp_path, "product", workers, 0.005, all_ended)
    assert (poison.status, poison.attempt) == (JobStatus.FAILED, 3)
    assert poison.error is not None and poison.error.code == "worker_lost"
    assert {mate.status for mate in mates} == {JobStatus.SUCCEEDED}
    attempts = {mate.attempt for mate in mates}
    assert attempts <= {1, 2}
    assert workers > 1 or 2 in attempts, "they were beside it when it died first"


def test_in_a_crowd_neighbours_pay(tmp_path: Path) -> None:
    """The control: without turns, those beside it lose as many attempts as it does."""

    def enough(records: list[CustomizeRecord]) -> bool:
        return all_ended(records) or any(mate.attempt == 3 for mate in records[1:])

    _, *mates = play(tmp_path, "crowded", 1, 0.02, enough)
    assert 3 in {mate.attempt for mate in mates}
