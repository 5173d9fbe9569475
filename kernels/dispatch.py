"""Which backend runs an operation: the fastest one measured on this device, or torch's own where nothing was measured.

A choice is made once per (operation, device, dtype, with or without gradient) for all size classes together:

1. `DREAMSERVE_KERNELS`, if it names a backend for the operation: `triton`, or `attention=sdpa,modulate=triton`.
2. Else the row of `dispatch_table.json` for the device's compute capability, the dtype and the size class. The table is
   written by `python -m tests.benchmarks ops --device cuda --write-table`, which lets a kernel of ours in only if it is
   faster than what `torch.compile` makes of the reference.
3. Else the first backend in `OPERATIONS`: torch's own.

A backend is probed by a real call before it is first chosen; one that fails (Triton missing or without a C compiler,
xFormers built for another torch) is never chosen, and the log says why.

Under `torch.compile`: a choice depends on plain values only. `_plan` is marked `assume_constant_result`, so dynamo
calls it while tracing (environment, file, probes and log lines stay outside the graph) and treats what it returns as a
constant. `choose` itself is traced: it compares `size` with the few sizes at which the backend changes. A symbolic size
therefore gets a range as its guard, not a value, and a graph is compiled again only when the backend changes.
"""

from __future__ import annotations

import functools
import importlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels.jit import HAS_TRITON, tl, triton_jit

OPERATIONS: Final[Mapping[str, tuple[str, ...]]] = {
    "attention": ("sdpa", "cudnn", "triton", "xformers", "reference"),
    "modulate": ("reference", "triton"),
    "gate_residual": ("reference", "triton"),
    "gate_residual_modulate": ("reference", "triton"),
    "qk_norm_rope": ("reference", "triton"),
    "pooled_response": ("reference", "triton"),
    "column_mass": ("reference", "triton"),
}
"""Each operation's backends. The first is torch's own: the default."""

VARIABLE: Final = "DREAMSERVE_KERNELS"
TABLE: Final = Path(__file__).with_name("dispatch_table.json")
SIZE_CLASSES: Final = tuple(2**n for n in range(7, 18))
"""Upper bounds, in tokens: those of the longest sequence for attention, of the whole call for the others."""

Plan = tuple[tuple[str, int], ...]
"""(backend, the largest size it is chosen for), growing; the last entry also takes everything beyond."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Measurement:
    """A row of the table: the fastest backend of one operation in one size class.

    Attributes:
        capability: compute capability, "9.0". dtype: torch's name of it, "bfloat16".
        gradient: forward and backward together, else forward alone.
        size: the class's upper bound. milliseconds: of each candidate, summed over the shapes measured in the class.
        device, versions: what it was measured on.
    """

    capability: str
    dtype: str
    op: str
    gradient: bool
    size: int
    backend: str
    milliseconds: Mapping[str, float]
    device: str
    versions: Mapping[str, str]


def choose(op: str, tensor: torch.Tensor, *, size: int, gradient: bool = False) -> str:
    """The backend for `op` on tensors like `tensor`.

    Args:
        op: a key of `OPERATIONS`.
        tensor: its device and dtype count.
        size: tokens, as in `SIZE_CLASSES`.
        gradient: whether a backward pass will follow.

    Raises:
        ValueError: `DREAMSERVE_KERNELS` names what there is not.
    """
    plan = _plan(op, tensor.device.type, tensor.device.index, tensor.dtype, gradient)
    for backend, largest in plan[:-1]:
        if size <= largest:
            return backend
    return plan[-1][0]


def size_class(size: int) -> int:
    """The upper bound of the class that `size` tokens belong to."""
    return next((bound for bound in SIZE_CLASSES if size <= bound), SIZE_CLASSES[-1])


def describe() -> dict[str, str]:
    """The choices made so far, for `/v1/models`: `{"attention": "sdpa to 4096 tokens, triton beyond", …}`."""
    made: dict[str, list[str]] = {}
    for (op, *_), plan in sorted(_made.items(), key=lambda item: str(item[0])):
        texts = made.setdefault(op, [])
        if (text := _text(plan)) not in texts:
            texts.append(text)
    return {op: " | ".join(texts) for op, texts in made.items()}


def reset() -> None:
    """Forget choices, probes and the table, as in a new process. Graphs that were compiled keep what they chose."""
    _made.clear()
    for cached in (_resolve, _probe, _table, _overrides):
        cached.cache_clear()


def parse_overrides(text: str) -> dict[str, str]:
    """`DREAMSERVE_KERNELS` → operation → backend.

    Entries are separated by commas: `operation=backend`, or a backend alone for all operations that have it. An
    operation's own entry wins, wherever it stands.

    Raises:
        ValueError: an unknown operation or backend; it lists what there is.
    """
    everywhere: dict[str, str] = {}
    named: dict[str, str] = {}
    for entry in filter(None, (part.strip() for part in text.split(","))):
        op, equals, backend = (part.strip() for part in entry.partition("="))
        if equals and backend in OPERATIONS.get(op, ()):
            named[op] = backend
        elif not equals and any(op in backends for backends in OPERATIONS.values()):
            everywhere |= {name: op for name, backends in OPERATIONS.items() if op in backends}
        else:
            known = "; ".join(f"{name}={'|'.join(backends)}" for name, backends in OPERATIONS.items())
            raise ValueError(f"{VARIABLE}: there is no {entry!r}. Known, or a backend alone for all: {known}")
    return everywhere | named


def read_table(path: Path = TABLE) -> tuple[Measurement, ...]:
    """All measurements of a table file."""
    return tuple(Measurement(**row) for row in json.loads(path.read_text()))


def usable(op: str, backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """Why `backend` cannot run `op` here; empty if it can."""
    if backend not in OPERATIONS[op]:
        return f"{op} has no such backend"
    if backend in ("reference", "sdpa"):
        return ""
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it does not compute in {str(dtype).removeprefix('torch.')}"
    return _probe(backend, device.type, device.index)


@torch.compiler.assume_constant_result
def _plan(op: str, kind: str, index: int | None, dtype: torch.dtype, gradient: bool) -> Plan:
    """`_resolve`, which caches, as a plain function: dynamo looks for the mark on what is called."""
    return _resolve(op, kind, index, dtype, gradient)


_made: dict[tuple[str, str, int | None, torch.dtype, bool], Plan] = {}


@functools.cache
def _resolve(op: str, kind: str, index: int | None, dtype: torch.dtype, gradient: bool) -> Plan:
    device = torch.device(kind) if index is None else torch.device(kind, index)
    default = OPERATIONS[op][0]
    forced = _overrides(os.environ.get(VARIABLE, "")).get(op)
    measured = {row.size: row.backend for row in _rows(op, device, dtype, gradient)}
    wanted = [(forced or measured.get(bound, default), bound) for bound in SIZE_CLASSES]
    refused = {backend: usable(op, backend, device, dtype) for backend in dict.fromkeys(name for name, _ in wanted)}
    for backend, reason in refused.items():
        if reason:
            _log.warning("%s: %s is not used, %s instead: %s", op, backend, default, reason)
    plan = _merged([(default if refused[backend] else backend, bound) for backend, bound in wanted])
    why = VARIABLE if forced else "measured" if measured else "default, not measured here"
    _log.info("%s: %s (%s; %s, %s%s)", op, _text(plan), why, device, dtype, ", with gradient" if gradient else "")
    _made[op, kind, index, dtype, gradient] = plan
    return plan


def _rows(op: str, device: torch.device, dtype: torch.dtype, gradient: bool) -> list[Measurement]:
    """The table's rows for this operation here."""
    capability, name = _capability(device), str(dtype).removeprefix("torch.")
    return [
        row for row in _table() if (row.capability, row.dtype, row.op, row.gradient) == (capability, name, op, gradient)
    ]


def _capability(device: torch.device) -> str | None:
    """Compute capability of an NVIDIA device; None elsewhere, where the table has nothing."""
    if device.type != "cuda" or torch.version.hip is not None or not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return f"{major}.{minor}"


def _merged(steps: Sequence[tuple[str, int]]) -> Plan:
    """Neighbours of the same backend as one step."""
    return tuple(step for step, after in zip(steps, [*steps[1:], ("", 0)], strict=True) if step[0] != after[0])


def _text(plan: Plan) -> str:
    *steps, (last, _) = plan
    return ", ".join(
        [*(f"{backend} to {largest} tokens" for backend, largest in steps), f"{last} beyond" if steps else last]
    )


@functools.cache
def _table() -> tuple[Measurement, ...]:
    return read_table()


@functools.cache
def _overrides(text: str) -> dict[str, str]:
    return parse_overrides(text)


@functools.cache
def _probe(backend: str, kind: str, index: int | None) -> str:
    """Call a backend once and compare; why it cannot be used, or an empty text."""
    device = torch.device(kind) if index is None else torch.device(kind, index)
    try:
        return _PROBES[backend](device)
    except Exception as error:  # noqa: BLE001  # a foreign binary or compiler may fail with anything: then it is not used
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"


def _probe_triton(device: torch.device) -> str:
    if not HAS_TRITON:
        return "Triton is not installed"
    interpreted = type(_increment).__name__ == "InterpretedFunction"
    if device.type != "cuda" and not interpreted:
        return "it needs a CUDA device, or Triton's interpreter (TRITON_INTERPRET=1)"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs compute capability 8.0 or higher"
    numbers = torch.arange(16, dtype=torch.float32, device=device)
    _increment[(1,)](numbers, WIDTH=16)
    return "" if numbers.tolist() == list(range(1, 17)) else "a trial kernel computed something else"


@triton_jit
def _increment(x: Any, WIDTH: tl.constexpr) -> None:  # noqa: N803  # pyright: ignore[reportInvalidTypeForm]  # Triton's way
    places = x + tl.arange(0, WIDTH)
    tl.store(places, tl.load(places) + 1)


def _probe_cudnn(device: torch.device) -> str:
    if device.type != "cuda":
        return "it needs a CUDA device"
    query = torch.randn(1, 2, 48, 64, dtype=torch.float16, device=device)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        got = F.scaled_dot_product_attention(query, query, query)
    wanted = F.scaled_dot_product_attention(query, query, query)
    return "" if torch.allclose(got, wanted, atol=2e-2) else "a trial call computed something else"


def _probe_xformers(device: torch.device) -> str:
    if device.type != "cuda":
        return "it needs a CUDA device"
    ops: Any = importlib.import_module("xformers.ops")
    masks: Any = importlib.import_module("xformers.ops.fmha.attn_bias")
    lengths = [32, 16]
    query = torch.randn(1, sum(lengths), 2, 64, dtype=torch.float16, device=device)
    got = ops.memory_efficient_attention(query, query, query, attn_bias=masks.BlockDiagonalMask.from_seqlens(lengths))
    parts = [part.transpose(1, 2) for part in query.split(lengths, dim=1)]
    wanted = torch.cat([F.scaled_dot_product_attention(x, x, x).transpose(1, 2) for x in parts], dim=1)
    return "" if torch.allclose(got, wanted, atol=2e-2) else "a trial call computed something else"


_PROBES: Final[Mapping[str, Callable[[torch.device], str]]] = {
    "triton": _probe_triton,
    "cudnn": _probe_cudnn,
    "xformers": _probe_xformers,
}
