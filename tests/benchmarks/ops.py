"""Each operation of `kernels` by every backend: eager torch, what torch.compile makes of it, ours, the vendors'.

On CUDA a candidate runs behind a sleeping device, so that launches are not what is measured, and every run finds an L2
cache full of something else. The measured dispatch table comes from here: `--write-table`.
"""

from __future__ import annotations

import functools
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels import dispatch
from kernels.dispatch import OPERATIONS, Measurement, size_class, usable
from tests.benchmarks.measure import Figure, Timer, compared, figure, interleaved, versions
from tests.benchmarks.op_cases import Case, cases

Candidates = dict[str, Callable[[], object]]
RUNS = 10
"""Runs of a candidate on CUDA within a round; their median counts."""
SLEEP = 20_000_000
"""Cycles, some 10 ms: the time in which the host gets ahead of the device by `RUNS` runs."""
SCRATCH = 2**28
"""Bytes written between runs, several times any L2 cache."""
ERROR = {torch.bfloat16: 2e-2, torch.float16: 5e-3, torch.float32: 1e-4}
"""What a candidate's results may differ from the reference's, relative to their largest."""
MARGIN = 0.98
"""A backend takes the default's place if its time is below this share of the best of torch's."""


def run(device: str, rounds: int) -> list[Figure]:
    """Rows for every case: milliseconds, ratios, and GB/s with their share of a copy, or TFLOP/s."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    timer = cuda_timer() if device == "cuda" else None
    copy = _copy_speed(device, rounds, timer)
    figures = [figure("copy, read and written", "GB/s", copy, bytes=SCRATCH)]
    for case in cases(device, dtype):
        for gradient in (False, True) if case.learning else (False,):
            figures += _measured(case, gradient, device, dtype, rounds, timer, statistics.median(copy))
    return figures


def cuda_timer() -> Timer:
    """Seconds of device time from events around each run."""
    scratch = torch.empty(SCRATCH, dtype=torch.int8, device="cuda")

    def timed(run: Callable[[], object]) -> float:
        begin, end = ([torch.cuda.Event(enable_timing=True) for _ in range(RUNS)] for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(SLEEP)  # as torch's own benchmarks do
        for start, stop in zip(begin, end, strict=True):
            scratch.zero_()
            start.record()
            run()
            stop.record()
        torch.cuda.synchronize()
        return 1e-3 * statistics.median(start.elapsed_time(stop) for start, stop in zip(begin, end, strict=True))

    return timed


def _copy_speed(device: str, rounds: int, timer: Timer | None) -> list[float]:
    """GB/s, read and written, of torch's own copy of random bytes."""
    source = torch.randint(0, 255, (SCRATCH,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copying = {"copy": lambda: target.copy_(source)}
    return [2e-9 * SCRATCH / s for s in interleaved(copying, rounds=rounds, device=device, timer=timer)["copy"]]


def _measured(
    case: Case, gradient: bool, device: str, dtype: torch.dtype, rounds: int, timer: Timer | None, copy: float
) -> list[Figure]:
    """Rows of one case, with or without the backward pass."""
    torch.compiler.reset()
    candidates, errors = _checked(case, _candidates(case, torch.device(device), dtype), gradient, dtype)
    seconds = interleaved(candidates, rounds=rounds, device=device, timer=timer)
    baseline = next(iter(candidates))
    what = f"{case.op}, {case.setting}{', with backward' if gradient else ''}"
    details = {
        "op": case.op,
        "dtype": str(dtype).removeprefix("torch."),
        "gradient": gradient,
        "size": case.size,
        "errors": errors,
    }
    figures = compared(what, seconds, baseline, **details)
    moved = case.moved_learning if gradient else case.moved
    flop = case.flop * (3.5 if gradient else 1)  # Attention alone has both: five products on the way back, two forth.
    for name, values in seconds.items():
        if moved:
            figures.append(figure(f"{what}: {name}", "GB/s", [1e-9 * moved / s for s in values], **details))
            figures.append(
                figure(f"{what}: {name}, of a copy", "%", [1e-7 * moved / s / copy for s in values], **details)
            )
        if flop:
            figures.append(figure(f"{what}: {name}", "TFLOP/s", [1e-12 * flop / s for s in values], **details))
    return figures


def _candidates(case: Case, device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """By name; the first is what the others are compared with."""
    found: dict[str, Callable[[], Any]] = {}
    if case.op == "attention":
        found["sdpa"] = lambda: case.run("sdpa")
        if device.type == "cuda":
            found["flash"] = lambda: _with_flash(case)
        else:
            found["reference"] = lambda: case.run("reference")
    else:
        found["eager"] = lambda: case.run("reference")
        found["compiled"] = torch.compile(lambda: case.run("reference"), fullgraph=True, dynamic=False)
    for backend in OPERATIONS[case.op]:
        if backend in ("sdpa", "reference"):
            continue
        if reason := usable(case.op, backend, device, dtype):
            _note(f"{case.op}: no {backend}: {reason}")
        else:
            found[backend] = lambda backend=backend: case.run(backend)
    return found


@functools.cache
def _note(text: str) -> None:
    """Say it once."""
    print(text)


def _with_flash(case: Case) -> Any:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return case.run("sdpa")


def _checked(
    case: Case, found: Mapping[str, Callable[[], Any]], gradient: bool, dtype: torch.dtype
) -> tuple[Candidates, dict[str, float]]:
    """Those that run and agree with the first one, ready to be timed; and how far each is from it."""
    candidates: Candidates = {}
    errors: dict[str, float] = {}
    wanted: list[Tensor] = []
    for name, forward in found.items():
        ready = _learning(case, forward) if gradient else _forward(forward)
        try:
            got = ready()
        except Exception as error:  # One backend's failure, of whatever kind, is not the others'
            if not candidates:
                raise
            print(f"{case.op}, {case.setting}: {name} does not run: {type(error).__name__}: {str(error)[:300]}")
            continue
        wanted = wanted or got
        errors[name] = max(_distance(a, b) for a, b in zip(got, wanted, strict=True))
        if errors[name] < ERROR[dtype]:
            candidates[name] = ready
        else:
            print(f"{case.op}, {case.setting}: {name} is off by {errors[name]:.2g} and not measured")
    return candidates, errors


def _distance(got: Tensor, wanted: Tensor) -> float:
    """The largest difference over the largest value; infinite where something is not a number."""
    distance = float((got.float() - wanted.float()).abs().max() / wanted.float().abs().max().clamp_min(1e-20))
    return distance if distance == distance else float("inf")  # noqa: PLR0124  # only NaN differs from itself


def _tensors(outputs: Any) -> list[Tensor]:
    outputs = [outputs] if isinstance(outputs, Tensor) else outputs
    return [output for output in outputs if output is not None]


def _forward(forward: Callable[[], Any]) -> Callable[[], list[Tensor]]:
    return torch.no_grad()(lambda: _tensors(forward()))


def _learning(case: Case, forward: Callable[[], Any]) -> Callable[[], list[Tensor]]:
    """Forward and backward: the gradients of a random sum of the outputs, the same for all candidates."""
    seeds: list[Tensor] = []

    def both() -> list[Tensor]:
        for tensor in case.inputs:
            tensor.requires_grad_()
        try:
            outputs = _tensors(forward())
            if not seeds:
                generator = torch.Generator(outputs[0].device).manual_seed(0)
                for o in outputs:
                    seeds.append(torch.randn(o.shape, dtype=o.dtype, device=o.device, generator=generator))
            return list(torch.autograd.grad(outputs, case.inputs, seeds))
        finally:
            for tensor in case.inputs:
                tensor.requires_grad_(False)

    return both


def write_table(figures: Sequence[Figure], file: Path = dispatch.TABLE) -> None:
    """Bring the dispatch table up to date with these figures of the CUDA device at hand; other rows stay."""
    major, minor = torch.cuda.get_device_capability()
    rows = table(figures, f"{major}.{minor}", torch.cuda.get_device_name())
    save_table(merged(dispatch.read_table(file), rows), file)
    dispatch.reset()


def save_table(rows: Sequence[Measurement], file: Path) -> None:
    """One row a line."""
    lines = ",\n".join(json.dumps(asdict(row)) for row in rows)
    file.write_text(f"[\n{lines}\n]\n" if rows else "[]\n")


def merged(old: Sequence[Measurement], new: Sequence[Measurement]) -> list[Measurement]:
    """New rows in the place of old ones of the same key, in order of the keys."""

    def key(row: Measurement) -> tuple[str, str, str, bool, int]:
        return row.capability, row.dtype, row.op, row.gradient, row.size

    return [row for _, row in sorted(({key(row): row for row in old} | {key(row): row for row in new}).items())]


def table(figures: Sequence[Figure], capability: str, device: str) -> list[Measurement]:
    """The fastest backend of each operation and size class, by the sum over the settings measured in the class."""
    groups: dict[tuple[str, str, bool, int], list[Figure]] = {}
    for row in figures:
        if row.unit == "ms" and "op" in row.details:
            d = row.details
            groups.setdefault((d["op"], d["dtype"], d["gradient"], size_class(d["size"])), []).append(row)
    rows: list[Measurement] = []
    for (op, dtype, gradient, size), members in groups.items():
        times: dict[str, list[float]] = {}
        for row in members:
            times.setdefault(row.what.rpartition(": ")[2], []).append(row.median)
        most = max(len(values) for values in times.values())
        sums = {name: round(sum(values), 4) for name, values in times.items() if len(values) == most}
        rows.append(Measurement(capability, dtype, op, gradient, size, fastest(op, sums), sums, device, versions()))
    return rows


def fastest(op: str, milliseconds: Mapping[str, float]) -> str:
    """The backend to choose: torch's own, unless another is clearly faster than the best torch makes of it."""
    default = OPERATIONS[op][0]
    own = min(milliseconds[name] for name in (default, "eager", "compiled") if name in milliseconds)
    others = {name: milliseconds[name] for name in OPERATIONS[op][1:] if name in milliseconds}
    best = min(others, key=lambda name: others[name], default=default)
    return best if others and others[best] < MARGIN * own else default
