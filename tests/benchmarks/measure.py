"""How everything is measured here: interleaved rounds, medians with their spread, one JSON row a figure."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured quantity: median, minimum and maximum over `rounds` interleaved rounds."""

    what: str
    unit: str
    median: float
    minimum: float
    maximum: float
    rounds: int
    details: Mapping[str, Any]


def figure(what: str, unit: str, values: Sequence[float], **details: Any) -> Figure:
    """A figure from the values of all rounds."""
    return Figure(what, unit, statistics.median(values), min(values), max(values), len(values), details)


Timer = Callable[[Callable[[], object]], float]
"""Runs something and says how many seconds it took."""


def interleaved(
    candidates: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    device: str,
    warmup: int = 2,
    timer: Timer | None = None,
) -> dict[str, list[float]]:
    """Seconds of each candidate per round, run in turn (A B A B …) so that a drift of the machine hits all alike.

    Args:
        timer: instead of the wall clock around one synchronised run.
    """

    def wall_clock(run: Callable[[], object]) -> float:
        _synchronize(device)
        start = time.perf_counter()
        run()
        _synchronize(device)
        return time.perf_counter() - start

    timed = timer or wall_clock
    for run in candidates.values():
        for _ in range(warmup):
            timed(run)
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            seconds[name].append(timed(run))
    return seconds


def own_seconds(run: Callable[[], object]) -> float:
    """A timer for one thread on a CPU: what this process ran, whoever else had the core in between."""
    start = time.process_time()
    run()
    return time.process_time() - start


def compared(what: str, seconds: Mapping[str, Sequence[float]], baseline: str, **details: Any) -> list[Figure]:
    """Milliseconds of each candidate, and the baseline's time over each other's, round by round."""
    rows = [figure(f"{what}: {name}", "ms", [1e3 * s for s in values], **details) for name, values in seconds.items()]
    return rows + ratios(what, seconds, baseline, **details)


def ratios(what: str, seconds: Mapping[str, Sequence[float]], baseline: str, **details: Any) -> list[Figure]:
    """The baseline's time over each other's, round by round: how many times as fast they are."""
    rows: list[Figure] = []
    for name, values in seconds.items():
        if name != baseline:
            faster = [b / v for b, v in zip(seconds[baseline], values, strict=True)]
            rows.append(figure(f"{what}: {name} over {baseline}", "x", faster, **details))
    return rows


def publish(name: str, figures: Sequence[Figure], device: str) -> Path:
    """Print the figures and write them with what they were measured on to `results/<name>-<device>.json`."""
    machine = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU, {_cores()} cores"
    context = {
        "device": machine,
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": versions(),
    }
    for row in figures:
        spread = f"{row.minimum:.4g}–{row.maximum:.4g}"
        print(f"{row.median:10.4g} {row.unit:6} ({spread}, n={row.rounds})  {row.what}")
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{name}-{device}.json"
    rows = [asdict(row) | context for row in figures]
    file.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    return file


def versions() -> dict[str, str]:
    """Installed versions of the libraries that matter; what is missing is left out."""
    found: dict[str, str] = {}
    for package in ("torch", "triton", "diffusers", "transformers", "xformers", "fastapi", "uvloop", "hiredis"):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _cores() -> int:
    return torch.get_num_threads()


def _commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    with suppress(FileNotFoundError):
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    return "unknown"
