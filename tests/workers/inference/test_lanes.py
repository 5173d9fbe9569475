"""A worker whose pipeline has several lanes prepares and finishes as many jobs at once, small ones first."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.waiting import wait_for
from tests.workers.conftest import MakeJob
from tests.workers.inference.conftest import Make
from tests.workers.standin import StandinPipeline
from workers.inference.runner import JobRunner
from workers.jobs import JobStatus
from workers.settings import WorkerSettings


class Held(StandinPipeline):
    """Prompts that hold `slow` stay in their preparation, and pictures in their decoding, until let go."""

    def __init__(self, num_lanes: int) -> None:
        super().__init__(num_lanes=num_lanes)
        self.prepare, self.decoding = threading.Event(), threading.Event()
        self.settled: list[str] = []
        self.begun: list[int] = []
        self.slow: list[str] = []

    def settle_thread(self) -> None:
        self.settled.append(threading.current_thread().name)

    def encode_prompt(self, prompt: str, adaptation: Any = None) -> Any:
        if "slow" in prompt:
            self.slow.append(prompt)
            assert self.prepare.wait(60)
        return super().encode_prompt(prompt, adaptation)

    def decode(self, run: Any) -> NDArray[np.uint8]:
        self.begun.append(run.num_steps)
        assert self.decoding.wait(60)
        return super().decode(run)


@pytest.mark.parametrize("lanes", [1, 2])
def test_a_long_preparation_holds_up_others_only_where_there_is_one_lane(
    make_runner: Make, make_job: MakeJob, lanes: int
) -> None:
    """With two, whoever comes beside it goes on; with one (the control) nobody does."""
    pipeline = Held(lanes)
    pipeline.decoding.set()
    runner = make_runner(pipeline)
    for name, prompt in (("job_1", "slow"), ("job_2", "quick")):
        runner.ledger.accept(make_job(name, prompt=prompt))
        runner.run(name)
    if lanes == 2:
        wait_for(lambda: len(runner.claims) == 1, "the quick one's end")
    pipeline.prepare.set()
    assert runner.wait(60)
    prompts = [request.prompt for request in pipeline.requests]
    assert prompts == (["slow", "quick"] if lanes == 1 else ["quick", "slow"])


def test_pictures_are_finished_side_by_side_and_small_ones_first(make_runner: Make, make_job: MakeJob) -> None:
    """Two pictures are decoded at once; of those that wait meanwhile, the smaller job's goes before the larger's."""
    pipeline = Held(num_lanes=2)
    runner = make_runner(pipeline)
    for number, steps in enumerate((1, 1, 4, 2, 3)):
        runner.ledger.accept(make_job(f"job_{number}", steps=steps))
        runner.run(f"job_{number}")
        if number == 1:
            wait_for(lambda: len(pipeline.begun) == 2, "both decodings")
    for number, steps in ((2, 4), (3, 2), (4, 3)):
        wait_for(lambda name=f"job_{number}", steps=steps: steps_of(runner, name) == steps, "its steps")
    assert pipeline.begun == [1, 1]
    pipeline.decoding.set()
    assert runner.wait(60)
    assert pipeline.begun[2:] in ([2, 3, 4], [2, 4, 3], [3, 2, 4])
    for number in range(5):
        record = runner.ledger.get(f"job_{number}")
        assert record is not None and record.status is JobStatus.SUCCEEDED


def steps_of(runner: JobRunner, job: str) -> int:
    """That the ledger knows of."""
    record = runner.ledger.get(job)
    return record.progress.step if record and record.progress else 0


def test_images_of_one_job_finished_at_once_end_it_once(make_runner: Make, make_job: MakeJob) -> None:
    """The last two pictures of a job come from two threads: all are there, and it is committed once."""
    pipeline = Held(num_lanes=2)
    pipeline.decoding.set()
    runner = make_runner(pipeline)
    for number in range(20):
        runner.ledger.accept(make_job(f"job_{number}", num_images=4, steps=1))
        runner.run(f"job_{number}")
    assert runner.wait(60)
    for number in range(20):
        record = runner.ledger.get(f"job_{number}")
        assert record is not None and record.result is not None
        assert len(record.result.images) == 4 and record.attempt == 1


def test_forwards_are_brief_while_a_smaller_job_is_prepared(make_runner: Make, make_job: MakeJob) -> None:
    """Two large jobs step together while a larger one is being prepared, and one at a time while a smaller one is."""
    company: list[int] = []
    hold, coming = threading.Event(), threading.Event()

    class Watched(Held):
        def step(self, runs: Sequence[Any]) -> Sequence[Any]:
            company.append(len(runs))
            if len(company) == 1:
                assert hold.wait(60)  # a long one: what follows is brief for twice its time
            if len(company) == 2:
                assert coming.wait(60)
            return super().step(runs)

    pipeline = Watched(num_lanes=2)
    pipeline.decoding.set()
    runner = make_runner(pipeline)
    for name, prompt, steps in (("job_1", "quick", 12), ("job_2", "quick", 12), ("job_3", "slow", 24)):
        runner.ledger.accept(make_job(name, prompt=prompt, steps=steps))
        runner.run(name)
    wait_for(lambda: pipeline.starts == 2 and len(pipeline.slow) == 1, "two runs and the larger one's preparation")
    time.sleep(0.5)
    hold.set()
    wait_for(lambda: len(company) == 2, "the next forward")
    runner.ledger.accept(make_job("job_4", prompt="slow too", steps=2))
    runner.run("job_4")
    wait_for(lambda: len(pipeline.slow) == 2, "its preparation")
    coming.set()
    wait_for(lambda: len(runner.claims) == 2, "the large ones' ends")
    pipeline.prepare.set()
    assert runner.wait(60)
    assert company[1:3] == [2, 1]


def test_each_thread_beside_the_forwards_is_told_of_its_core(make_runner: Make) -> None:
    """Two prepare and two finish: none of them may take the cores of the lanes."""
    pipeline = Held(num_lanes=2)
    make_runner(pipeline)
    wait_for(lambda: len(pipeline.settled) == 4, "all four")
    assert sorted(pipeline.settled) == ["finish", "finish", "prepare", "prepare"]


def test_a_forward_holds_two_pictures_a_lane_unless_told_otherwise() -> None:
    """On one lane, a GPU, eight; what the operator says goes before both."""
    assert [WorkerSettings().budget(lanes).runs for lanes in (1, 2, 16)] == [8, 4, 32]
    assert WorkerSettings(forward_runs=3).budget(16).runs == 3
