"""Every kernel compiled for the GPUs it is meant for, and held to the committed budget. Needs Triton, but no GPU."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)

from tests.kernels.ahead_of_time import BUDGET, Spec, Usage, all_specs, compile_for, faults  # noqa: E402

SPECS = all_specs()
HELD = json.loads(BUDGET.read_text())
RENEW = "python -m tests.kernels.ahead_of_time"


@pytest.mark.parametrize(("spec", "arch"), [pytest.param(s, a, id=f"{s.name}-sm_{a}") for s in SPECS for a in s.archs])
def test_kernel_keeps_to_its_budget(spec: Spec, arch: int) -> None:
    """No spill, tensor cores in use, launchable, and no more registers or shared memory than was agreed on.

    Registers are the assembler's doing: another Triton release is not held to this one's, and may spill a little.
    """
    assert spec.name in HELD["kernels"], f"not in the budget; {RENEW}"
    usage = compile_for(spec, arch)
    if triton.__version__ == HELD["triton"]:
        assert not faults(spec, arch, usage, HELD["kernels"][spec.name][str(arch)])
    else:
        assert not faults(spec, arch, usage, None, spills=128)


def test_every_row_of_the_budget_has_a_kernel() -> None:
    """A kernel that was renamed or dropped leaves no row behind, and no two share a name."""
    assert sorted(HELD["kernels"]) == sorted(spec.name for spec in SPECS), RENEW


def named(name: str) -> Spec:
    """One of the specs."""
    return next(spec for spec in SPECS if spec.name == name)


def test_control_too_few_warps_spill() -> None:
    """The same kernel with half the threads does not fit its registers, and is refused for it."""
    spec = replace(named("attention-forward-128"), num_warps=4)
    usage = compile_for(spec, 90)
    assert usage.spills > 0
    assert any("spills" in fault for fault in faults(spec, 90, usage, None))


def test_control_no_tensor_cores() -> None:
    """A kernel without a product has no tensor core instruction, and is refused where one is wanted."""
    spec = replace(named("attention-delta-128"), mma=True)
    assert faults(spec, 90, compile_for(spec, 90), None) == ["no tensor cores"]


def test_control_one_register_more() -> None:
    """The budget is a bound, not a note."""
    spec = named("attention-forward-128")
    usage = Usage(registers=101, spills=0, shared=200_000, mma=True, tensor_memory=600)
    assert faults(spec, 90, usage, {"registers": 101, "shared": 200_000}) == ["600 columns of tensor memory"]
    assert len(faults(spec, 80, usage, {"registers": 100, "shared": 199_999})) == 4
