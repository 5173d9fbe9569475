"""The engine: many runs in a forward end as they would alone; want of memory and bad runs cost nobody else anything."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.workers.faulty import Held
from workers.engine import BrokenDeviceError, Engine, is_broken_device, is_out_of_memory
from workers.planner import Budget, Seat


@dataclass(frozen=True, slots=True)
class Count:
    """A run whose state is the list of its own steps."""

    name: str
    num_steps: int
    tokens: int = 10
    step: int = 0

    @property
    def done(self) -> bool:
        return self.step == self.num_steps


class Device:
    """Steps counts. More tokens in a forward than `room` is a want of memory; a name in `bad` is an error."""

    def __init__(self, room: int = 10**9, bad: Sequence[str] = (), error: Exception | None = None) -> None:
        self.room = room
        self.bad = bad
        self.error = error or ValueError("bad")
        self.forwards: list[tuple[str, ...]] = []
        self.released = 0

    def step(self, runs: Sequence[Any]) -> Sequence[Any]:
        if sum(run.tokens for run in runs) > self.room:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        if any(run.name in self.bad and run.step == 1 for run in runs):
            raise self.error
        self.forwards.append(tuple(run.name for run in runs))
        return [replace(run, step=run.step + 1) for run in runs]

    def release_memory(self) -> None:
        self.released += 1


class Clock:
    """A second later each time."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def engine_of(device: Device, runs: Sequence[Count], budget: Budget) -> Engine:
    engine = Engine(device, budget, Clock())
    for number, run in enumerate(runs):
        engine.add(Seat(run.name, run.tokens, run.num_steps, float(number)), run)
    return engine


def run_out(engine: Engine) -> tuple[dict[str, Any], dict[str, Exception]]:
    """Forwards until nothing is left: what has ended, and what has failed."""
    ended: dict[str, Any] = {}
    failed: dict[str, Exception] = {}
    for _ in range(10_000):
        if not len(engine):
            return ended, failed
        forward = engine.forward()
        ended |= {key: run for key, run in forward.moved.items() if run.done}
        failed |= forward.failed
    raise AssertionError("the engine goes on for ever")


RUNS = st.lists(
    st.builds(Count, st.uuids().map(str), st.integers(1, 6), st.integers(1, 40)),
    min_size=1,
    max_size=8,
    unique_by=lambda run: run.name,
)


@given(RUNS, st.integers(1, 120), st.integers(1, 8), st.integers(40, 120))
def test_every_run_ends_whole(runs: list[Count], tokens: int, most: int, room: int) -> None:
    """Whatever the budget and the memory, as long as each fits alone: all runs make all steps, none fails."""
    ended, failed = run_out(engine_of(Device(room), runs, Budget(tokens, most)))
    assert failed == {}
    assert ended == {run.name: replace(run, step=run.num_steps) for run in runs}


def test_a_want_of_memory_halves_the_forward_and_not_the_work() -> None:
    """The newer half waits, memory is given back, the budget grows again later; who does not fit alone fails."""
    device = Device(room=40)
    runs = [Count(f"run{number}", 200) for number in range(8)]
    engine = engine_of(device, [*runs, Count("giant", 300, tokens=50)], Budget(100, 8, patience_s=0.0))
    forward = engine.forward()
    assert list(forward.moved) == [f"run{number}" for number in range(4)], "the oldest half"
    assert (engine.tokens, device.released, forward.failed) == (40, 1, {})
    ended, failed = run_out(engine)
    assert set(ended) == {run.name for run in runs}
    assert list(failed) == ["giant"] and is_out_of_memory(failed["giant"])
    assert device.released > 2, "it has tried a larger forward again"


def test_a_bad_run_falls_alone() -> None:
    """An error in a forward is laid at the door of the run that fails alone; its mates end as without it."""
    runs = [Count(f"run{number}", 4) for number in range(5)]
    device = Device(bad=["run3"])
    ended, failed = run_out(engine_of(device, runs, Budget(1000, 8)))
    assert list(failed) == ["run3"]
    assert ended == {run.name: replace(run, step=4) for run in runs if run.name != "run3"}
    steps = [name for forward in device.forwards for name in forward]
    assert all(steps.count(run.name) == 4 for run in runs if run.name != "run3"), "no step is made twice"


def test_a_dropped_run_steps_no_more() -> None:
    """Whoever leaves is out of the next forward, and the others' runs are not touched."""
    device = Device()
    engine = engine_of(device, [Count("stays", 3), Count("goes", 3)], Budget(1000, 8))
    engine.forward()
    assert engine.drop("goes").step == 1
    assert engine.drop("goes") is None
    ended, _ = run_out(engine)
    assert list(ended) == ["stays"]
    assert device.forwards == [("stays", "goes"), ("stays",), ("stays",)]


def test_a_brief_forward_is_the_first_run_alone_until_company_is_known_to_cost_little() -> None:
    """While somebody is awaited one run steps, the one that would be first; without one awaited all step."""
    device = Device()
    engine = engine_of(device, [Count("a", 3), Count("b", 3), Count("c", 4)], Budget(1000, 8))
    engine.forward(brief=True)
    engine.forward()
    assert [sorted(forward) for forward in device.forwards] == [["a"], ["a", "b", "c"]]


def test_a_lost_device_ends_the_engine() -> None:
    """CUDA errors stay in a process: no run is blamed for them. Want of memory is not one of them."""
    lost = RuntimeError("CUDA error: an illegal memory access was encountered")
    engine = engine_of(Device(bad=["a"], error=lost), [Count("a", 3), Count("b", 3)], Budget(1000, 8))
    engine.forward()
    with pytest.raises(BrokenDeviceError):
        engine.forward()


class AcceleratorError(RuntimeError):
    """Named like torch's own, of which a CUDA error is one since 2.8."""


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(...)`"),
        RuntimeError("CUDA driver error: unspecified launch failure"),
        RuntimeError("Triton Error [CUDA]: device-side assert triggered"),
        RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"),
        AcceleratorError("unspecified launch failure"),
    ],
)
def test_errors_of_a_lost_device(error: Exception) -> None:
    """torch, cuBLAS, cuDNN, the driver and Triton say it in words of their own."""
    assert is_broken_device(error) and not is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA driver error: out of memory"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        AcceleratorError("CUDA error: out of memory"),
        MemoryError(),
    ],
)
def test_a_want_of_memory_is_no_lost_device(error: Exception) -> None:
    """In the same words, but the process goes on."""
    assert is_out_of_memory(error) and not is_broken_device(error)


@pytest.mark.parametrize("error", [ValueError("CUDA error"), RuntimeError("shapes do not fit"), KeyError("CUDA error")])
def test_other_errors_are_neither(error: Exception) -> None:
    """What a job brings about itself says nothing of the device, whatever its words are."""
    assert not is_broken_device(error) and not is_out_of_memory(error)


class HoldingDevice(Device):
    """Its forwards compute something before they fail. `seen`: how much was held at each begin and each release."""

    def __init__(self, room: int = 10**9, bad: Sequence[str] = ()) -> None:
        super().__init__(room, bad)
        self.seen: list[int] = []

    def step(self, runs: Sequence[Any]) -> Sequence[Any]:
        self.seen.append(Held.alive)
        computed = Held()
        try:
            return super().step(runs)
        except ValueError as error:
            raise RuntimeError("the computation has failed") from error
        finally:
            assert computed is not None

    def release_memory(self) -> None:
        self.seen.append(Held.alive)


def test_a_failed_forward_holds_nothing() -> None:
    """What it has computed is free before memory is given back, before the next try, and in what is told of a failure;
    without waiting for a collection. Errors hold their frames, and frames all that a forward has computed."""
    runs = [Count(f"run{number}", 3) for number in range(8)]
    short, bad = HoldingDevice(room=15), HoldingDevice(bad=["run3"])
    engine = engine_of(bad, runs, Budget(1000, 8))
    gc.disable()
    try:
        assert engine_of(short, runs, Budget(1000, 8)).forward().failed == {}
        engine.forward()
        failed = engine.forward().failed
        assert list(failed) == ["run3"] and Held.alive == 0
    finally:
        gc.enable()
    assert len(short.seen) == 7 and set(short.seen) == {0}
    assert set(bad.seen) == {0}
