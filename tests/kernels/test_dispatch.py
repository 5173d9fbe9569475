"""Which backend is chosen: by the operator, by measurement, else torch's own; never one that cannot run."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from kernels import dispatch
from kernels.dispatch import (
    OPERATIONS,
    SIZE_CLASSES,
    VARIABLE,
    choose,
    describe,
    parse_overrides,
    read_table,
    size_class,
)
from tests.benchmarks import ops
from tests.benchmarks.measure import Figure, figure
from tests.conftest import ROOT

ROW = {
    "capability": "9.0",
    "dtype": "float32",
    "op": "attention",
    "gradient": False,
    "size": 1024,
    "backend": "reference",
    "milliseconds": {"reference": 1.0, "sdpa": 2.0},
    "device": "some device",
    "versions": {"torch": "2.13.0"},
}


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Generator[None]:
    """No choice of another test, no setting of the machine."""
    monkeypatch.delenv(VARIABLE, raising=False)
    dispatch.reset()
    yield
    dispatch.reset()


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A function that installs a table in which the CPU counts as a device of capability 9.0."""

    def install(*rows: dict[str, Any]) -> None:
        file = tmp_path / "table.json"
        file.write_text(json.dumps([ROW | row for row in rows]))
        monkeypatch.setattr(dispatch, "read_table", lambda: read_table(file))
        monkeypatch.setattr(dispatch, "_capability", lambda _: "9.0")
        dispatch.reset()

    return install


def test_without_a_measurement_torch_runs() -> None:
    """On a CPU nothing was measured: attention is SDPA, everything else the reference, at all sizes."""
    tensor = torch.zeros(1)
    for op, backends in OPERATIONS.items():
        assert {choose(op, tensor, size=size) for size in (1, 4608, 10**6)} == {backends[0]}
    assert choose("attention", tensor, size=1) == "sdpa"
    assert describe() == {op: backends[0] for op, backends in OPERATIONS.items()}


def test_the_table_decides_its_class_dtype_and_capability_alone(table: Any) -> None:
    """A measurement counts where it was taken, and nowhere else."""
    table({"size": 1024}, {"size": 4096}, {"size": 8192, "capability": "8.0"}, {"size": 512, "gradient": True})
    tensor = torch.zeros(1)
    chosen = {size: choose("attention", tensor, size=size) for size in (512, 513, 1024, 1025, 2048, 2049, 4096, 4097)}
    assert chosen == {512: "sdpa", 513: "reference", 1024: "reference", 1025: "sdpa", 2048: "sdpa"} | {
        2049: "reference",
        4096: "reference",
        4097: "sdpa",
    }
    assert choose("attention", tensor.double(), size=1024) == "sdpa"
    assert choose("attention", tensor, size=512, gradient=True) == "reference"
    assert "reference to 1024 tokens" in describe()["attention"]


def test_the_operator_overrides_the_table(table: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable beats the measurement, and holds for all sizes."""
    table({})
    monkeypatch.setenv(VARIABLE, "attention=sdpa")
    assert choose("attention", torch.zeros(1), size=1024) == "sdpa"
    monkeypatch.setenv(VARIABLE, "reference")
    dispatch.reset()
    assert {choose("attention", torch.zeros(1), size=size) for size in SIZE_CLASSES} == {"reference"}


@pytest.mark.parametrize("backend", ["triton", "cudnn", "xformers"])
def test_what_cannot_run_is_never_chosen(
    table: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, backend: str
) -> None:
    """Neither the table nor the operator can bring in a backend whose probe fails; the log says why, once."""
    table({"backend": backend})
    for forced in ("", backend):
        monkeypatch.setenv(VARIABLE, forced)
        dispatch.reset()
        with caplog.at_level(logging.INFO, logger="kernels.dispatch"):
            assert {choose("attention", torch.zeros(1), size=size) for size in (1, 1000, 1000, 5000)} == {"sdpa"}
        warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert len(warnings) == 1
        assert backend in warnings[0]
        assert "CUDA" in warnings[0]
        caplog.clear()


def test_without_triton_everything_runs() -> None:
    """Triton does not exist for every platform: all operations import and run, also where the operator wants it."""
    script = """
import importlib, logging, pathlib, sys
sys.modules["triton"] = None
import torch
from kernels import dispatch
logging.basicConfig(format="%(message)s", stream=sys.stdout)
for file in pathlib.Path("kernels").glob("[!_]*.py"):
    importlib.import_module(f"kernels.{file.stem}")
for op in dispatch.OPERATIONS:
    assert dispatch.choose(op, torch.zeros(1), size=1) == dispatch.OPERATIONS[op][0]
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {VARIABLE: "triton"}
    command = [sys.executable, "-c", script]
    run = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True, timeout=240)
    assert run.stdout.count("Triton is not installed") == len(OPERATIONS)


def test_a_probe_that_raises_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """A binary built for another torch raises whatever it likes while it loads: the service goes on without it."""

    def load(_: torch.device) -> str:
        raise OSError("undefined symbol\nand much more")

    monkeypatch.setattr(dispatch, "_PROBES", {"xformers": load})
    reason = dispatch.usable("attention", "xformers", torch.device("cpu"), torch.float32)
    assert reason == "OSError: undefined symbol"
    assert not dispatch.usable("attention", "sdpa", torch.device("cpu"), torch.float64)


def test_a_choice_is_made_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """One line per operation, device and dtype, however often it is asked for."""
    with caplog.at_level(logging.INFO, logger="kernels.dispatch"):
        for size in (10, 10, 5000):
            choose("modulate", torch.zeros(1), size=size)
        choose("modulate", torch.zeros(1, dtype=torch.bfloat16), size=10)
    assert len(caplog.records) == 2
    assert "modulate: reference" in caplog.records[0].getMessage()


@pytest.mark.parametrize(
    "text", ["cutlass", "attention=cutlass", "conv=triton", "modulate=sdpa", "attention=", "triton;sdpa"]
)
def test_unknown_names_are_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """A typing error does not pass for a choice; the message lists what there is."""
    monkeypatch.setenv(VARIABLE, f"modulate=triton, {text}")
    with pytest.raises(ValueError, match=VARIABLE) as error:
        choose("attention", torch.zeros(1), size=1)
    assert all(name in str(error.value) for name in ("attention=", "xformers", "qk_norm_rope=", "reference"))


named = st.sampled_from([(op, backend) for op, backends in OPERATIONS.items() for backend in backends])
alone = st.sampled_from(sorted({backend for backends in OPERATIONS.values() for backend in backends}))


@given(st.lists(named, max_size=4), st.none() | alone, st.randoms())
def test_an_operations_own_entry_wins(entries: list[tuple[str, str]], everywhere: str | None, random: Any) -> None:
    """Whatever the order: named entries, then the backend for all that have it."""
    entries = list(dict(entries).items())
    texts = [f" {op} = {backend} " for op, backend in entries] + ([everywhere] if everywhere else [])
    random.shuffle(texts)
    got = parse_overrides(",".join(texts))
    for op, backends in OPERATIONS.items():
        assert got.get(op) == dict(entries).get(op, everywhere if everywhere in backends else None)


def test_the_shipped_table_is_sound() -> None:
    """What the benchmark wrote names existing operations, backends, dtypes and classes, each once."""
    rows = read_table()
    assert len({(r.capability, r.dtype, r.op, r.gradient, r.size) for r in rows}) == len(rows)
    for row in rows:
        assert row.backend in OPERATIONS[row.op]
        assert row.size in SIZE_CLASSES
        assert isinstance(getattr(torch, row.dtype), torch.dtype)


@given(st.integers(1, 10**6))
def test_classes_cover_every_size(size: int) -> None:
    """The smallest bound that holds the size; the last class is open."""
    bound = size_class(size)
    assert bound == SIZE_CLASSES[-1] or bound >= size
    assert bound == SIZE_CLASSES[0] or bound < 2 * size or size > SIZE_CLASSES[-1]


def _doubled(x: Tensor) -> Tensor:
    return x * 2 if choose("attention", x, size=x.shape[0]) == "sdpa" else x * 3


def test_dynamo_takes_the_choice_as_a_constant() -> None:
    """No graph break, and with one backend for all sizes one graph for all sizes; the first choice is made inside."""
    torch.compiler.reset()
    counter = CompileCounter()
    compiled = torch.compile(_doubled, fullgraph=True, dynamic=True, backend=counter)
    for size in (3, 500, 5000):
        assert torch.equal(compiled(torch.ones(size)), torch.full((size,), 2.0))
    assert counter.frame_count == 1
    assert describe() == {"attention": "sdpa"}


def test_dynamo_compiles_again_only_where_the_backend_changes(table: Any) -> None:
    """One graph per backend, not per size: a symbolic size is guarded by a range."""
    table({"size": 128})
    torch.compiler.reset()
    counter = CompileCounter()
    compiled = torch.compile(_doubled, fullgraph=True, dynamic=True, backend=counter)
    for size, factor in ((3, 3.0), (100, 3.0), (128, 3.0), (129, 2.0), (5000, 2.0), (7, 3.0)):
        assert torch.equal(compiled(torch.ones(size)), torch.full((size,), factor))
    assert counter.frame_count == 2


def _timed(op: str, size: int, name: str, milliseconds: float, *, gradient: bool = False) -> Figure:
    details = {"op": op, "dtype": "float32", "gradient": gradient, "size": size, "errors": {}}
    return figure(f"{op}, some pack: {name}", "ms", [milliseconds], **details)


def test_what_the_benchmark_writes_is_what_is_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Figures → table file → choice: the fastest over all packs of a class, if it ran on all of them."""
    figures = [
        *(_timed("attention", size, "sdpa", 1.0) for size in (3000, 4000, 5000)),
        *(_timed("attention", size, "reference", 0.5) for size in (3000, 4000)),
        _timed("attention", 3000, "cudnn", 0.1),  # Fastest where it ran, but not everywhere.
        _timed("attention", 5000, "reference", 0.99),  # Faster, but within what repeats differ by.
        figure("attention, some pack: cudnn over sdpa", "x", [9.0]),
    ]
    file = tmp_path / "table.json"
    old = ops.table([_timed("attention", 100, "sdpa", 1.0), _timed("attention", 4000, "sdpa", 1.0)], "9.0", "old")
    ops.save_table(ops.merged(old, ops.table(figures, "9.0", "new")), file)
    rows = read_table(file)
    assert [(row.size, row.backend, row.device) for row in rows] == [
        (128, "sdpa", "old"),
        (4096, "reference", "new"),
        (8192, "sdpa", "new"),
    ]
    monkeypatch.setattr(dispatch, "read_table", lambda: rows)
    monkeypatch.setattr(dispatch, "_capability", lambda _: "9.0")
    assert choose("attention", torch.zeros(1), size=4096) == "reference"
    assert choose("attention", torch.zeros(1), size=4097) == "sdpa"


@pytest.mark.parametrize(
    ("eager", "compiled", "triton", "wanted"),
    [
        (3.0, 2.0, 1.0, "triton"),
        (3.0, 1.0, 2.0, "reference"),
        (1.0, 3.0, 2.0, "reference"),
        (2.0, 2.0, 1.99, "reference"),
    ],
)
def test_ours_must_beat_the_compiler(eager: float, compiled: float, triton: float, wanted: str) -> None:
    """A kernel that only beats eager torch is not the default."""
    assert ops.fastest("modulate", {"eager": eager, "compiled": compiled, "triton": triton}) == wanted
    assert ops.fastest("modulate", {"eager": eager, "compiled": compiled}) == "reference"
