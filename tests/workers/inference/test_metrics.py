"""What a worker counts agrees with what was done, by numbers that follow from the jobs."""

from __future__ import annotations

import threading
from typing import Any

from tests.waiting import wait_for
from tests.workers.conftest import MakeJob
from tests.workers.inference.conftest import Make
from tests.workers.standin import Run, StandinPipeline
from workers.inference.runner import JobRunner
from workers.jobs import CUSTOMIZE


def counted(runner: JobRunner, name: str, **labels: str) -> float:
    """A sample's value; 0 if there is none."""
    return runner.metrics.registry.get_sample_value(f"dreamserve:{name}", labels) or 0.0


def run(runner: JobRunner, *jobs: Any) -> None:
    for job in jobs:
        runner.ledger.accept(job)
        runner.run(job.id)
    assert runner.wait(60)


def test_forwards_steps_and_stages(make_runner: Make, make_job: MakeJob) -> None:
    """Two pictures of three steps are six steps, whatever forwards they shared; each stage is timed once a job."""
    runner = make_runner()
    run(runner, make_job("job_1", num_images=2, steps=3), make_job("job_2", prompt="boom"))
    assert counted(runner, "denoise_steps_total") == 6
    assert counted(runner, "forward_runs_sum") == 6
    assert counted(runner, "forward_tokens_sum") == 6 * (64 + 32 * 16 // 64)
    assert counted(runner, "denoise_step_s_count") == counted(runner, "forward_runs_count") <= 6
    assert counted(runner, "image_count_total") == 2
    assert counted(runner, "requests_ended_total", state="succeeded") == 1
    assert counted(runner, "requests_ended_total", state="failed") == 1
    assert counted(runner, "e2e_request_latency_s_count") == 1
    for stage in ("preprocess", "encode", "denoise", "decode"):
        assert counted(runner, "stage_gen_time_s_count", stage=stage) == 1
    assert counted(runner, "cache_requests_total", cache="prompts", outcome="miss") == 2
    run(runner, make_job("job_3"))
    assert counted(runner, "cache_requests_total", cache="prompts", outcome="hit") == 1
    assert counted(runner, "cache_bytes", cache="prompts") == len("a toy")


def test_sheds_are_counted(make_runner: Make, make_job: MakeJob) -> None:
    """A device that takes one picture at a time: of four in a forward two are shed, then one."""
    sizes: list[int] = []

    class Narrow(StandinPipeline):
        def step(self, runs: Any) -> Any:
            sizes.append(len(runs))
            if len(runs) > 1:
                raise RuntimeError("CUDA out of memory")
            return super().step(runs)

    runner = make_runner(Narrow())
    run(runner, make_job("job_1", num_images=4, steps=1))
    sheds = sum(number // 2 for number in sizes if number > 1)
    assert sheds > 0
    assert counted(runner, "out_of_memory_sheds_total") == sheds
    assert counted(runner, "denoise_steps_total") == 4


def test_what_is_in_hand_and_what_is_lost(make_runner: Make, make_job: MakeJob) -> None:
    """While a job is held: one runs. Its lease taken away meanwhile: it ends here as lost, and is counted so."""
    held, release = threading.Event(), threading.Event()

    def hold(_: Run) -> None:
        held.set()
        assert release.wait(60)

    runner = make_runner(StandinPipeline(hold), forward_runs=1)
    runner.ledger.accept(make_job("job_1"))
    runner.run("job_1")
    try:
        assert held.wait(60)
        assert (counted(runner, "requests_in_hand", state="running"), counted(runner, "runs")) == (1, 1)
        runner.ledger.redis.hset(f"{CUSTOMIZE.root}job:job_1", "token", "999")
    finally:
        release.set()
    assert runner.wait(60)
    wait_for(lambda: counted(runner, "requests_ended_total", state="lost") == 1, "the loss")
    assert counted(runner, "requests_in_hand", state="running") == 0


def test_jobs_handed_over_are_counted(make_runner: Make, make_job: MakeJob) -> None:
    """As many as went back to the line."""
    release = threading.Event()
    runner = make_runner(StandinPipeline(lambda _: assert_true(release.wait(60))), forward_runs=1)
    for number in range(4):
        runner.ledger.accept(make_job(f"job_{number}"))
        runner.run(f"job_{number}")
    try:
        runner.hand_over()
        handed = counted(runner, "handed_over_total")
        wait_for(lambda: len(runner.claims) == 4 - handed, "them to go back")
        assert handed == counted(runner, "requests_ended_total", state="leaving") > 0
    finally:
        release.set()
    assert runner.wait(60)


def assert_true(held: bool) -> None:
    assert held
