"""Kernels compiled for GPUs that are not here: what they take of the machine, as the assembler says.

`python -m tests.kernels.ahead_of_time` measures all of `tests/kernels/specs` and writes budget.json anew.
"""

from __future__ import annotations

import importlib
import io
import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SPECS = Path(__file__).with_name("specs")
BUDGET = Path(__file__).with_name("budget.json")
SHARED = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
"""Bytes of shared memory a program may have, by compute capability."""
TENSOR_MEMORY = 512
"""Columns of tensor memory a program may have (compute capability 10.0)."""


@dataclass(frozen=True, slots=True)
class Spec:
    """One kernel as it is launched.

    Attributes:
        name: unique among all specs.
        kernel: a `triton.JITFunction`.
        signature: type of each argument that is no constant: "*bf16", "i32", "fp32".
        constexprs: the constants; also `None` for a tensor that is left out.
        aligned: arguments divisible by 16.
        mma: whether it must use tensor cores. A kernel too large for them may "compile" without.
        archs: compute capabilities it is launched like this on.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    aligned: tuple[str, ...]
    num_warps: int
    num_stages: int
    mma: bool
    archs: tuple[int, ...] = (80, 90, 100)


@dataclass(frozen=True, slots=True)
class Usage:
    """What a compiled kernel takes: registers of a thread; bytes spilled, stores and loads; bytes of shared memory of a
    program; whether it uses tensor cores; columns of tensor memory."""

    registers: int
    spills: int
    shared: int
    mma: bool
    tensor_memory: int


def compile_for(spec: Spec, arch: int) -> Usage:
    """Compile a kernel down to machine code for compute capability `arch` (90 is 9.0). Needs no GPU."""
    names = spec.kernel.arg_names
    source = ASTSource(
        spec.kernel,
        {name: "constexpr" if name in spec.constexprs else spec.signature[name] for name in names},
        dict(spec.constexprs),
        {(names.index(name),): [["tt.divisibility", 16]] for name in spec.aligned},
    )
    log = io.StringIO()
    with ExitStack() as stack:
        knobs = triton.knobs
        for group in (knobs.nvidia, knobs.compilation, knobs.cache):
            stack.enter_context(group.scope())
        knobs.nvidia.dump_ptxas_log = True
        knobs.compilation.always_compile = True
        knobs.cache.dir = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(redirect_stdout(log))
        options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages}
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
        ptx = compiled.asm["ptx"]
    return Usage(
        registers=_number(r"Used (\d+) registers", log.getvalue()),
        spills=_number(r"(\d+) bytes spill stores", log.getvalue())
        + _number(r"(\d+) bytes spill loads", log.getvalue()),
        shared=compiled.metadata.shared,
        mma=re.search(r"\b(wgmma\.mma_async|tcgen05\.mma|mma\.sync)", ptx) is not None,
        tensor_memory=compiled.metadata.tmem_size or 0,
    )


def _number(pattern: str, log: str) -> int:
    found = re.findall(pattern, log)
    if not found:
        raise ValueError(f"the assembler's log has no {pattern!r}:\n{log}")
    return max(map(int, found))


def faults(spec: Spec, arch: int, usage: Usage, budget: Mapping[str, int] | None, *, spills: int = 0) -> list[str]:
    """What is wrong with a kernel: it must not spill, be impossible to launch, or take more than `budget`.

    Args:
        budget: registers and shared; None where nothing is held against it.
        spills: bytes it may spill all the same.
    """
    found = [
        (usage.spills > spills, f"spills {usage.spills} bytes"),
        (usage.shared > SHARED[arch], f"{usage.shared} bytes of shared memory; there are {SHARED[arch]}"),
        (usage.tensor_memory > TENSOR_MEMORY, f"{usage.tensor_memory} columns of tensor memory"),
        (spec.mma and not usage.mma, "no tensor cores"),
    ]
    for what, allowed in (budget or {}).items():
        used = getattr(usage, what)
        found.append((used > allowed, f"{used} {what}, budget {allowed}"))
    return [text for wrong, text in found if wrong]


def all_specs() -> list[Spec]:
    """The specs of all operations: every module of `specs` has a tuple SPECS."""
    modules = sorted(file.stem for file in SPECS.glob("[!_]*.py"))
    return [spec for name in modules for spec in importlib.import_module(f"tests.kernels.specs.{name}").SPECS]


def write_budget(specs: Sequence[Spec]) -> list[str]:
    """Measure `specs`, make what they take the budget, and return what is wrong all the same."""
    kernels: dict[str, dict[str, dict[str, int]]] = {}
    wrong: list[str] = []
    for spec in specs:
        rows = kernels[spec.name] = {}
        for arch in spec.archs:
            usage = compile_for(spec, arch)
            print(f"{spec.name:40} sm_{arch}  {usage}", flush=True)
            rows[str(arch)] = {"registers": usage.registers, "shared": usage.shared}
            wrong += [f"{spec.name} sm_{arch}: {fault}" for fault in faults(spec, arch, usage, None)]
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(rows)}" for name, rows in kernels.items())
    BUDGET.write_text(f'{{"triton": {json.dumps(triton.__version__)}, "kernels": {{\n{lines}\n}}}}\n')
    return wrong


if __name__ == "__main__":
    raise SystemExit("\n".join(write_budget(all_specs())) or None)
