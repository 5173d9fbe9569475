"""The denoise step against the released pipeline and stock diffusers, and a mixed batch packed against padded.

All with the same weights and random data, in turn within one run. Foreseen from the FLOP of `Size.flop`: a padded batch
of 0–3 references does 1.32 times the work of the packed one at FLUX's sizes, 1.43 times on the narrow model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch._dynamo.exc import TorchDynamoException

from model.sampling import Sampler
from tests.benchmarks.baselines import inputs_at, pad, padded, released, stock
from tests.benchmarks.measure import Figure, compared, figure, ratios
from tests.benchmarks.step_cases import FLOOR, SIZES, STEPS, Bench, begin, make_codec, make_request, prepare
from tests.benchmarks.trips import trips

MIXED = (0, 1, 2, 3)
"""References of the requests that share a forward."""

Candidates = dict[str, Callable[[], object]]


def run(device: str, rounds: int) -> list[Figure]:
    """Rows for 0–3 references alone and for the mixed batch of all four; on CUDA also for a whole picture."""
    bench = prepare(SIZES[device], device, rounds)
    figures = [row for references in MIXED for row in _solo(bench, references)] + _mixed(bench)
    return figures + (_whole(bench) if device == "cuda" else [])


def _solo(bench: Bench, references: int) -> list[Figure]:
    """One request: milliseconds and ratios, and on CUDA what share of the floor."""
    what = f"step, {references} references"
    seconds = bench.measured(_solo_candidates(bench, references))
    details = {"tokens": bench.size.tokens(references), "timer": _timer(bench)}
    figures = compared(what, seconds, "released", **details)
    if "stock compiled" in seconds:
        ours = {name: values for name, values in seconds.items() if name.startswith(("ours", "stock compiled"))}
        figures += ratios(what, ours, "stock compiled", **details)
    return figures + _work(bench, what, seconds, bench.size.flop(references), **details)


def _solo_candidates(bench: Bench, references: int) -> Candidates:
    condition, noise = make_request(bench.size, references, bench.device, bench.dtype)
    sampler = Sampler(bench.network, bench.tables)
    denoising = begin(sampler, condition, noise, step=1)
    inputs = inputs_at(bench.tables, [denoising])
    compiling = Sampler(bench.compiled, bench.tables)
    candidates: Candidates = {
        "released": lambda: released(bench.model, inputs),
        "stock": lambda: stock(bench.model, inputs),
        "stock compiled": lambda: stock(bench.whole, inputs),
        "ours": lambda: sampler.velocities([denoising]),
        "ours compiled": lambda: compiling.velocities([denoising]),
    }
    return {name: run for name, run in candidates.items() if not name.endswith("compiled") or _compiles(name, run)}


def _compiles(name: str, run: Callable[[], object]) -> bool:
    """Whether what is compiled runs here; without a compiler it does not."""
    try:
        run()
    except TorchDynamoException as error:
        print(f"no {name}: {type(error).__name__}: {str(error)[:300]}")
        return False
    return True


def _mixed(bench: Bench) -> list[Figure]:
    """One packed forward; padded, by our blocks and by diffusers' as a library would; one by one. Steps differ."""
    what = "mixed batch of 0–3 references"
    flop = [bench.size.flop(references) for references in MIXED]
    details = {
        "tokens": sum(bench.size.tokens(references) for references in MIXED),
        "padded_tokens": len(MIXED) * bench.size.tokens(max(MIXED)),
        "foreseen_over_padded": len(MIXED) * max(flop) / sum(flop),
        "timer": _timer(bench),
    }
    seconds = bench.measured(_mixed_candidates(bench))
    figures = compared(what, seconds, "one by one", **details)
    for baseline in (name for name in seconds if name.startswith("padded")):
        figures += ratios(what, {name: seconds[name] for name in (baseline, "packed")}, baseline, **details)
    return figures + _work(bench, what, seconds, sum(flop), **details)


def _mixed_candidates(bench: Bench) -> Candidates:
    sampler = Sampler(bench.network, bench.tables)
    runs = [
        begin(sampler, *make_request(bench.size, references, bench.device, bench.dtype), step=3 * number)
        for number, references in enumerate(MIXED)
    ]
    even, mask = pad(sampler, runs)
    inputs = inputs_at(bench.tables, even, mask)
    orders = {"padded": False} | ({"padded, cuDNN first": True} if bench.device == "cuda" else {})
    samplers = {name: Sampler(padded(bench.network, mask, cudnn=cudnn), bench.tables) for name, cudnn in orders.items()}
    return {
        "one by one": lambda: [sampler.velocities([one]) for one in runs],
        **{name: lambda padding=padding: padding.velocities(even) for name, padding in samplers.items()},
        "padded, diffusers' blocks": lambda: released(bench.model, inputs),
        "packed": lambda: sampler.velocities(runs),
    }


def _whole(bench: Bench) -> list[Figure]:
    """A picture of two references from pixels to pixels, prompts embedded beforehand; and what it adds to its steps."""
    codec = make_codec(bench.size, bench.device, bench.dtype)
    request = make_request(bench.size, 2, bench.device, bench.dtype)
    seconds = bench.measured(trips(bench, codec, request))
    return compared(f"picture, 2 references, {STEPS} steps", seconds, "released", timer=_timer(bench))


def _work(bench: Bench, what: str, seconds: Mapping[str, Sequence[float]], flop: float, **details: Any) -> list[Figure]:
    """TFLOP/s of what has to be computed, and the share of the time in which the floor could do it; on CUDA only."""
    if bench.device != "cuda":
        return []
    rows: list[Figure] = []
    for name, values in seconds.items():
        rows.append(figure(f"{what}: {name}", "TFLOP/s", [1e-12 * flop / s for s in values], **details))
        rows.append(figure(f"{what}: {name}, of the floor", "%", [100 * flop / FLOOR / s for s in values], **details))
    return rows


def _timer(bench: Bench) -> str:
    return "process" if bench.timer else "wall"
