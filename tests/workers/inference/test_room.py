"""Want of memory beside the forwards: what was made so far is not thrown away for it."""

from __future__ import annotations

import gc
import threading
from collections.abc import Sequence

import pytest

from tests.workers.conftest import MakeJob
from tests.workers.faulty import FaultyPipeline, Held
from tests.workers.inference.conftest import Make
from tests.workers.inference.test_runner import run
from workers.inference.room import Room
from workers.jobs import JobStatus


class ShortOnce(FaultyPipeline):
    """Runs out of memory the first time it does something; not before its `after`th try."""

    def __init__(self, phase: str, after: int = 0) -> None:
        super().__init__()
        self.phase = phase
        self.left = after
        self.released = 0

    def meet(self, phase: str) -> None:
        if phase == self.phase:
            self.left -= 1
            if self.left == -1:
                raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def release_memory(self) -> None:
        self.released += 1


@pytest.mark.parametrize("phase", ["encode", "start", "preview", "decode"])
@pytest.mark.parametrize("after", [0, 1])
def test_a_want_of_memory_beside_the_forwards_costs_no_job(
    make_runner: Make, make_job: MakeJob, phase: str, after: int
) -> None:
    """Memory is given back and the phase is tried once more; every picture is made once, with its own seed."""
    pipeline = ShortOnce(phase, after)
    runner = make_runner(pipeline)
    for name in ("job_1", "job_2"):
        record = run(runner, make_job(name, num_images=2, steps=3, previews=1, prompt=f"a {name}"))
        assert record.status is JobStatus.SUCCEEDED and record.result is not None
        assert [image.seed for image in record.result.images] == [7, 8]
        assert record.progress is not None and record.progress.step == 6
    assert pipeline.left < -1 and pipeline.released == 1


def test_the_second_try_finds_nothing_of_the_first() -> None:
    """What the first try has computed is free before memory is given back; without waiting for a collection."""
    seen: list[int] = []
    room = Room(lambda: seen.append(Held.alive))

    def act() -> str:
        computed = Held()
        if not seen:
            raise RuntimeError("CUDA out of memory")
        del computed
        return "done"

    gc.disable()
    try:
        assert room.try_twice(act) == "done"
    finally:
        gc.enable()
    assert seen == [0]


def test_the_second_try_has_the_device_to_itself() -> None:
    """It waits until the forward at hand is over, and the next forward waits until it is."""
    room = Room(lambda: order.append("released"))
    order: list[str] = []
    failed, stepping = threading.Event(), threading.Event()

    def act() -> None:
        if not failed.is_set():
            failed.set()
            raise MemoryError
        order.append("second try")

    with room.forward():
        second = threading.Thread(target=room.try_twice, args=(act,))
        second.start()
        assert failed.wait(30)
        second.join(0.2)
        order.append("end of forward")
    forward = threading.Thread(target=lambda: forward_in(room, stepping, order))
    forward.start()
    second.join(30)
    assert stepping.wait(30)
    forward.join(30)
    assert order == ["end of forward", "released", "second try", "next forward"]


def forward_in(room: Room, stepping: threading.Event, order: list[str]) -> None:
    with room.forward():
        order.append("next forward")
        stepping.set()


@pytest.mark.parametrize(("error", "tries"), [(MemoryError(), 2), (KeyError("canary"), 1)])
def test_what_fails_again_or_otherwise_fails(error: Exception, tries: int) -> None:
    """Two tries at most, and one for any other error; the next forward does not wait."""
    room, made = Room(lambda: None), list[int]()

    def act() -> None:
        made.append(1)
        raise error

    with pytest.raises(type(error)):
        room.try_twice(act)
    assert len(made) == tries
    with room.forward():
        pass


def test_a_forward_that_fails_is_over() -> None:
    """Who is short of memory waits for no forward that has ended with an error."""
    room, made = Room(lambda: None), list[int]()

    def act(steps: Sequence[int] = (0, 1)) -> int:
        made.append(1)
        if len(made) < len(steps):
            raise MemoryError
        return len(made)

    with pytest.raises(LookupError), room.forward():
        raise LookupError
    assert room.try_twice(act) == 2
