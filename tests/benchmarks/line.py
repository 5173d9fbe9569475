"""The whole line over HTTP: one job after the other on one hot worker, and what it costs beside the model."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx2
import psutil

from service.samples import ring, star
from service.submit import customize, data_url
from tests.benchmarks.measure import Figure, figure

JOBS = 50
MODEL = ("preprocess_s", "encode_s", "denoise_s", "decode_s")


def run(device: str, rounds: int) -> list[Figure]:
    """Rows for `JOBS` jobs in a row; the first ten are left out as warm-up."""
    with _service(device) as url, httpx2.Client(base_url=url, trust_env=False) as client:
        jobs: list[dict[str, Any]] = []
        memory: list[float] = []
        for number in range(JOBS):
            jobs.append(customize(url, _body(number), lambda _: None).job)
            (worker,) = client.get("/v1/models").json()["workers"]
            memory.append(psutil.Process(worker["pid"]).memory_info().rss / 2**20)
        loads = client.get("/v1/models").json()["workers"]
    settled = jobs[10:]
    beside = [1e3 * (_seconds(job) - sum(job["timings"][phase] for phase in MODEL)) for job in settled]
    inside = [1e3 * sum(job["timings"][phase] for phase in MODEL) for job in settled]
    return [
        figure("outside the model, accepted to finished", "ms", beside, jobs=JOBS),
        figure("inside the model", "ms", inside, jobs=JOBS),
        figure("worker memory after job 11 to 50", "MiB", memory[10:], first=memory[10], last=memory[-1]),
        figure("workers that loaded the model", "", [float(len({card["pid"] for card in loads}))], jobs=JOBS),
    ]


def _body(number: int) -> dict[str, Any]:
    references = [{"role": "subject", "image": data_url(data, "sample")} for data in (star(), ring())]
    return {"prompt": "the star from [ref#1] and the ring from [ref#2]", "references": references, "seed": number}


def _seconds(job: dict[str, Any]) -> float:
    return (datetime.fromisoformat(job["finished_at"]) - datetime.fromisoformat(job["created_at"])).total_seconds()


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
