"""Submissions whose answers are lost: the gateway accepts, and its caller never hears of it and submits again.

    python -m tests.fuzz lost-replies --number 10000

Of each submission one to three answers are lost, before their first byte or anywhere within, by an end or a reset of
the connection. The idempotency key must leave one job of each; without keys (`--keyless`, the control) it does not.
The gateway is a process of its own; each caller comes through a proxy of its own.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import httpx2

from service.callers.connections import allow_open_files
from service.client import Client
from tests.fuzz.slow_sockets import gateway
from tests.service.gates import Address
from tests.service.lossy import Fault, Plan, proxied

WITHIN = 600
"""Bytes of an answer that arrive at most before it is lost; none is shorter."""


@dataclass(frozen=True)
class Outcome:
    """What became of `number` submissions.

    Attributes:
        lost: answers that never arrived whole.
        jobs: that the service has.
        doubled: submissions with more than one. missing: those with none.
        mistaken: whose caller was told of another's job.
    """

    number: int
    lost: int
    jobs: int
    doubled: int
    missing: int
    mistaken: int

    @property
    def good(self) -> bool:
        return self.jobs == self.number and not self.doubled + self.missing + self.mistaken


def losing(seed: int) -> Plan:
    """Lose one to three answers of each submission, then let one pass."""
    draw = random.Random(seed)
    left = draw.randint(1, 3)

    def plan(_: int) -> Fault | None:
        nonlocal left
        left -= 1
        if left >= 0:
            return Fault(draw.randrange(WITHIN), abrupt=draw.random() < 0.5)
        left = draw.randint(1, 3)
        return None

    return plan


Submit = Callable[[str, range], dict[str, str]]
"""Submit these numbers at a URL; the ids of the jobs, as their caller was told, by number."""


def with_keys(url: str, numbers: range) -> dict[str, str]:
    """By the client."""
    with Client(url) as client:
        return {str(number): client.customize("a", metadata={"number": str(number)}).id for number in numbers}


def keyless(url: str, numbers: range) -> dict[str, str]:
    """The control: a caller who simply tries again."""
    told: dict[str, str] = {}
    with httpx2.Client(base_url=url, trust_env=False) as client:
        for number in numbers:
            while str(number) not in told:
                try:
                    body = {"prompt": "a", "metadata": {"number": str(number)}}
                    told[str(number)] = client.post("/v1/customize", json=body).json()["id"]
                except httpx2.TransportError:
                    continue
    return told


def run(number: int, *, callers: int, seed: int = 1, submit: Submit = with_keys) -> Outcome:
    """Submit so many jobs, and compare what their callers were told with what the service has."""

    def one(caller: int) -> tuple[dict[str, str], int]:
        with proxied(address, losing(seed * callers + caller)) as proxy:
            told = submit(proxy.url, range(caller, number, callers))
            return told, len(proxy.lost)

    with gateway(DREAMSERVE_BOUND_S="1e12", DREAMSERVE_LOG_LEVEL="error") as (host, port, _):
        address: Address = (host, port)
        with ThreadPoolExecutor(callers) as pool:
            parts = list(pool.map(one, range(callers)))
        with Client(f"http://{host}:{port}") as client:
            jobs = {job.id: job.metadata["number"] for job in client.jobs()}
    told = {number: job_id for part, _ in parts for number, job_id in part.items()}
    return Outcome(
        number,
        lost=sum(lost for _, lost in parts),
        jobs=len(jobs),
        doubled=len(jobs) - len(set(jobs.values())),
        missing=len({str(each) for each in range(number)} - set(jobs.values())),
        mistaken=sum(jobs.get(job_id) != number for number, job_id in told.items()),
    )


def main(arguments: list[str]) -> int:
    """Print what became of them; 1 unless each has its one job."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz lost-replies")
    parser.add_argument("--number", type=int, default=10_000)
    parser.add_argument("--callers", type=int, default=16)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keyless", action="store_true", help="the control: without keys there must be doubles")
    options = parser.parse_args(arguments)
    allow_open_files()
    began = time.monotonic()
    submit = keyless if options.keyless else with_keys
    outcome = run(options.number, callers=options.callers, seed=options.seed, submit=submit)
    print(f"{outcome} in {time.monotonic() - began:.0f} s")
    return 0 if outcome.good else 1
