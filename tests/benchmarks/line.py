"""The whole line over HTTP: one job after the other on one hot worker, and what it costs beside the model."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import psutil

from service.client import Client, Job, Reference
from service.commands.samples import ring, star
from tests.benchmarks.measure import Figure, figure

JOBS = 50
PROMPT = "the star from [ref#1] and the ring from [ref#2]"
MODEL = ("preprocess_s", "encode_s", "denoise_s", "decode_s")


def run(device: str, rounds: int) -> list[Figure]:
    """Rows for `JOBS` jobs in a row; the first ten are left out as warm-up."""
    with _service(device) as url, httpx2.Client(base_url=url, trust_env=False) as http, Client(url) as client:
        jobs: list[Job] = []
        memory: list[float] = []
        references = [Reference.bytes(data, role="subject") for data in (star(), ring())]
        for number in range(JOBS):
            jobs.append(client.customize(PROMPT, references, seed=number, wait=60).wait())
            (worker,) = http.get("/v1/models").json()["workers"]
            memory.append(psutil.Process(worker["pid"]).memory_info().rss / 2**20)
        loads = http.get("/v1/models").json()["workers"]
    settled = jobs[10:]
    beside = [1e3 * (_seconds(job) - sum(job.timings[phase] for phase in MODEL)) for job in settled]
    inside = [1e3 * sum(job.timings[phase] for phase in MODEL) for job in settled]
    return [
        figure("outside the model, accepted to finished", "ms", beside, jobs=JOBS),
        figure("inside the model", "ms", inside, jobs=JOBS),
        figure("worker memory after job 11 to 50", "MiB", memory[10:], first=memory[10], last=memory[-1]),
        figure("workers that loaded the model", "", [float(len({card["pid"] for card in loads}))], jobs=JOBS),
    ]


def _seconds(job: Job) -> float:
    assert job.finished_at is not None
    return (job.finished_at - job.created_at).total_seconds()


@contextmanager
def _service(device: str) -> Generator[str]:
    with tempfile.TemporaryDirectory() as state:
        command = [sys.executable, "-m", "service.cli", "serve", "--port", "0", "--state-dir", state]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("DREAMSERVE_")}
        environment |= {"DREAMSERVE_DEVICE": device, "DREAMSERVE_LOG_LEVEL": "warning"}
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
        )
        try:
            assert process.stdout is not None
            yield process.stdout.readline().split()[-1]
        finally:
            process.terminate()
            process.wait(30)
