"""Step-level continuous batching: before each forward, the planner chooses among all runs that are there.

A run is a frozen value, so a forward that fails has changed nothing. Out of memory: the newer half of the forward's
runs is left out and comes again later, with a smaller budget for a while; only a run that does not fit alone fails. Any
other error: its runs step one by one, and those that fail alone were the culprits.

One thread drives it. No Redis, no torch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from workers.failpoints import reach
from workers.pace import Pace
from workers.planner import Account, Budget, Seat, next_forward

_CALM_FORWARDS = 64
"""Forwards without a want of memory after which a smaller budget grows again by half."""

_WANTS_OF_MEMORY = ("out of memory", "can't allocate memory", "_status_alloc_failed", "allocation_failed")
"""In lower case: of torch and the driver, of the host, of cuBLAS and cuDNN, of cuDNN 9."""
_LOST_DEVICES = (
    "CUDA error",
    "CUDA driver error",
    "Triton Error [CUDA]",
    "CUDNN_STATUS_EXECUTION_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR",
)


class Steps(Protocol):
    """What moves runs: `model.pipeline.Pipeline`."""

    def step(self, runs: Sequence[Any]) -> Sequence[Any]: ...
    def release_memory(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Forward:
    """What one forward did.

    Attributes:
        moved: runs one step further, by key. failed: those that cannot go on, with the reason; the engine forgets them.
        seconds: it took. tokens: of the runs moved.
    """

    moved: dict[str, Any]
    failed: dict[str, Exception]
    seconds: float
    tokens: int = 0


class BrokenDeviceError(Exception):
    """The device will not work again in this process: it has to end."""


class Engine:
    """Runs on one device.

    Args:
        clock: seconds, for waiting times.
    """

    def __init__(self, pipeline: Steps, budget: Budget, clock: Callable[[], float] = time.monotonic) -> None:
        self.pipeline = pipeline
        self.budget = budget
        self._clock = clock
        self._account = Account()
        self._seats: dict[str, Seat] = {}
        self._runs: dict[str, Any] = {}
        self._tokens = budget.tokens
        self._calm = 0
        self.sheds = 0
        """Runs left out of a forward, or failed, for want of memory."""
        self._pace = Pace()

    def __len__(self) -> int:
        return len(self._seats)

    def running(self) -> list[str]:
        """The runs there are."""
        return list(self._seats)

    @property
    def tokens(self) -> int:
        """That a forward holds at present; less than the budget's after a want of memory."""
        return self._tokens

    def add(self, seat: Seat, run: Any) -> None:
        """Let a run take part from the next forward on."""
        self._seats[seat.key] = seat
        self._runs[seat.key] = run

    def drop(self, key: str) -> Any:
        """Take a run out; None if it is not there."""
        self._seats.pop(key, None)
        return self._runs.pop(key, None)

    @property
    def usual_s(self) -> float:
        """Seconds of a forward, on average over the last ones."""
        return self._pace.usual_s

    def forward(self, *, brief: bool = False) -> Forward:
        """Choose, and step once. Runs that have made their last step are taken out.

        Args:
            brief: somebody who goes before all that are here is about to come; see `planner.Budget.brief`.

        Raises:
            BrokenDeviceError: see there.
        """
        began = self._clock()
        budget = replace(self.budget, tokens=self._tokens, light_tokens=self._pace.light_tokens)
        wanted = budget.brief() if brief else budget
        chosen = next_forward(list(self._seats.values()), wanted, self._account, began)
        moved, failed = self._step(sorted(chosen, key=lambda seat: seat.waiting_since))
        stepped = [seat for seat in chosen if seat.key in moved]
        self._account = self._account.charged(stepped, list(self._seats.values()), budget)
        ended = self._clock()
        if len(moved) == len(chosen):
            self._pace = self._pace.after(sum(seat.tokens for seat in chosen), ended - began)
        for key in failed:
            self.drop(key)
        for key, run in moved.items():
            if run.done:
                self.drop(key)
            else:
                seat = self._seats[key]
                self._seats[key] = replace(seat, steps=seat.steps - 1, waiting_since=ended)
                self._runs[key] = run
        return Forward(moved, failed, ended - began, sum(seat.tokens for seat in stepped))

    def _step(self, seats: Sequence[Seat]) -> tuple[dict[str, Any], dict[str, Exception]]:
        """Runs moved and runs failed; who is in neither steps another time."""
        if not seats:
            return {}, {}
        runs, error = self._tried(seats)
        if error is None:
            self._grow()
            return {seat.key: run for seat, run in zip(seats, runs, strict=True)}, {}
        if is_out_of_memory(error):
            return self._with_less(seats, error)
        if len(seats) == 1:
            return {}, {seats[0].key: error}
        parts = [self._step([seat]) for seat in seats]
        return merged([part for part, _ in parts]), merged([part for _, part in parts])

    def _tried(self, seats: Sequence[Seat]) -> tuple[Sequence[Any], Exception | None]:
        """One forward: the runs moved, or why not. Once this returns, nothing holds what a failed one has computed."""
        try:
            reach("step")
            return self.pipeline.step([self._runs[seat.key] for seat in seats]), None
        except Exception as error:  # whatever a forward raises belongs to its runs, not to the worker
            if is_broken_device(error):
                raise BrokenDeviceError(type(error).__name__) from error
            return (), without_frames(error)

    def _with_less(self, seats: Sequence[Seat], error: Exception) -> tuple[dict[str, Any], dict[str, Exception]]:
        """After a want of memory: the older half alone."""
        self.pipeline.release_memory()
        self._calm = 0
        if len(seats) == 1:
            self.sheds += 1
            return {}, {seats[0].key: error}
        older = seats[: (len(seats) + 1) // 2]
        self.sheds += len(seats) - len(older)
        self._tokens = sum(seat.tokens for seat in older)
        return self._step(older)

    def _grow(self) -> None:
        """Let a budget that was made smaller grow again, after a while."""
        self._calm += 1
        if self._calm >= _CALM_FORWARDS:
            self._calm = 0
            self._tokens = min(self.budget.tokens, self._tokens + self._tokens // 2)


def merged(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """All entries of all parts."""
    return {key: value for part in parts for key, value in part.items()}


def without_frames(error: Exception) -> Exception:
    """An error that is to be kept for a while. The frames it was raised through hold all that was computed there."""
    chain: list[BaseException | None] = [error]
    while chain:
        one = chain.pop()
        if one is not None and one.__traceback__ is not None:
            one.__traceback__ = None
            chain += [one.__cause__, one.__context__]
    return error


def is_out_of_memory(error: Exception) -> bool:
    """torch.OutOfMemoryError and its relatives are RuntimeErrors that say so."""
    if isinstance(error, MemoryError):
        return True
    text = str(error).lower() if isinstance(error, RuntimeError) else ""
    return any(sign in text for sign in _WANTS_OF_MEMORY)


def is_broken_device(error: Exception) -> bool:
    """CUDA errors other than a want of memory stay: each later call fails too."""
    if not isinstance(error, RuntimeError) or is_out_of_memory(error):
        return False
    named = any(kind.__name__ == "AcceleratorError" for kind in type(error).__mro__)  # torch's, unknown here
    return named or any(sign in str(error) for sign in _LOST_DEVICES)
