"""The gateway's own speed: seconds of its process for each submission and each status read, beside a stock route's.

Over real sockets, Redis and store, each process as it is served, with API keys on. What counts is the time that the
serving process computes, with all of its threads, so neighbours on the machine do not matter; Redis' and the callers'
time is theirs. See `traffic`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from itertools import count
from typing import Any, cast

import psutil

from tests.benchmarks.measure import Figure, figure, interleaved, ratios
from tests.benchmarks.traffic.load import Burst, asked, paced, repeated, request
from tests.benchmarks.traffic.pictures import data_url, distinct
from tests.benchmarks.traffic.servers import STATES, Bench, attacks, bench

SUBMISSIONS, SUBMITTING = 60, 4
"""Requests a round, and connections."""
READS, READING = 3000, 16
FORMATS = ("jpeg", "png")
RATE, SECONDS = 200.0, 10.0
"""Of the valid traffic."""
SUBMITTED = 20
"""Among it, every so manieth request is a submission with one picture of 300 kB."""
SLOW_SOCKETS, ATTACKS_PER_S = 200, 5.0
"""The latter of each kind."""


def run(device: str, rounds: int) -> list[Figure]:
    """Submissions, status reads, and what ordinary callers wait while others attack."""
    with bench() as both:
        return [*reads(both, rounds, device), *submissions(both, rounds, device), *under_attack(both, rounds)]


def submissions(both: Bench, rounds: int, device: str) -> list[Figure]:
    """With three references of about 300 kB each, no two alike; and the same ones again and again."""
    found: list[Figure] = []
    for format in FORMATS:
        pictures = distinct(format)
        same = [next(pictures) for _ in range(3)]
        rows = {
            "stock": Burst(both.stock, posts(pictures, format, {}), 202, SUBMISSIONS, SUBMITTING),
            "gateway": Burst(both.ours, posts(pictures, format, both.headers), 202, SUBMISSIONS, SUBMITTING),
            "gateway, stored before": Burst(
                both.ours, posts(repeated(same), format, both.headers), 202, SUBMISSIONS, SUBMITTING
            ),
        }
        found += compared(f"submission with 3 references of 300 kB, {format}", rows, rounds, device)
    return found


def reads(both: Bench, rounds: int, device: str) -> list[Figure]:
    """Of queued, running and ended jobs in turn, over connections that stay open."""
    by_state = {
        state: [request("GET", f"/v1/jobs/{job}", both.headers) for job in both.jobs[state]] for state in STATES
    }
    mixed = [message for triple in zip(*by_state.values(), strict=True) for message in triple]
    stock = [request("GET", f"/v1/jobs/{job}", {}) for jobs in zip(*both.jobs.values(), strict=True) for job in jobs]
    tagged: list[bytes] = []
    for job in (job for jobs in both.jobs.values() for job in jobs):
        etag = asked(both.ours, request("GET", f"/v1/jobs/{job}", both.headers)).header("etag")
        tagged.append(request("GET", f"/v1/jobs/{job}", {**both.headers, "If-None-Match": etag}))
    rows = {
        "stock": Burst(both.stock, repeated(stock), 200, READS, READING),
        "gateway": Burst(both.ours, repeated(mixed), 200, READS, READING),
        "gateway, unchanged since": Burst(both.ours, repeated(tagged), 304, READS, READING),
        "gateway, one at a time": Burst(both.ours, repeated(mixed), 200, READS // 3, 1),
    }
    rows |= {
        f"gateway, {state} jobs": Burst(both.ours, repeated(messages), 200, READS // 3, READING)
        for state, messages in by_state.items()
    }
    return compared("status read", rows, rounds, device)


def under_attack(both: Bench, rounds: int) -> list[Figure]:
    """Valid requests at a fixed rate, without and with everything that the fuzzers know."""
    waits: dict[str, list[float]] = {}
    details: dict[str, dict[str, Any]] = {"alone": {"seconds stolen": []}, "under attack": {"seconds stolen": []}}

    def window(name: str) -> None:
        before = _stolen()
        for what, seconds in _waits(paced(both.ours, traffic(both), RATE, SECONDS)):
            waits.setdefault(f"{name}: {what}", []).append(seconds)
        details[name]["seconds stolen"].append(round(_stolen() - before, 2))

    for _ in range(max(1, rounds // 2)):
        window("alone")
        with attacks(both, SLOW_SOCKETS, ATTACKS_PER_S) as answers:
            window("under attack")
        details["under attack"] |= answers
    what = f"{RATE:.0f} valid requests a second"
    return [
        figure(f"{what}, {name}", "ms", values, **details[name.partition(":")[0]]) for name, values in waits.items()
    ]


def _stolen() -> float:
    """Seconds that both cores were ready to work and the machine's host let others: the callers wait for those too."""
    return getattr(psutil.cpu_times(), "steal", 0.0)


def compared(what: str, bursts: Mapping[str, Burst], rounds: int, device: str) -> list[Figure]:
    """Requests by core, and how many times the stock application's."""

    def own_seconds(run: Callable[[], object]) -> float:
        return cast(Burst, run).seconds_each()

    seconds = interleaved(bursts, rounds=rounds, device=device, warmup=1, timer=own_seconds)
    rows = [figure(f"{what}: {name}", "1/s", [1 / s for s in each]) for name, each in seconds.items()]
    return rows + ratios(what, seconds, "stock")


def posts(pictures: Iterator[bytes], format: str, headers: dict[str, str], number: int = 3) -> Iterator[bytes]:
    """Submissions with so many pictures each."""
    while True:
        references = [{"image": data_url(next(pictures), format), "role": "subject"} for _ in range(number)]
        body = {"prompt": "[ref#1] on a wooden table", "references": references}
        yield request("POST", "/v1/customize", headers, json.dumps(body).encode())


def traffic(both: Bench) -> Iterator[tuple[str, bytes]]:
    """What an ordinary caller does: mostly ask how it goes."""
    messages = repeated(
        [request("GET", f"/v1/jobs/{job}", both.headers) for jobs in both.jobs.values() for job in jobs]
    )
    pictures = posts(distinct("jpeg"), "jpeg", both.headers, number=1)
    return (
        ("submission", next(pictures)) if number % SUBMITTED == 0 else ("status read", next(messages))
        for number in count(1)
    )


def _waits(seen: list[tuple[str, float]]) -> Iterator[tuple[str, float]]:
    """Median and 99th percentile of each kind and of all, in ms."""
    for kind in ("status read", "submission", "all"):
        seconds = sorted(wait for what, wait in seen if kind in (what, "all"))
        for part in (0.5, 0.99):
            yield f"{kind}, p{100 * part:.0f}", 1e3 * seconds[int(part * (len(seconds) - 1))]
