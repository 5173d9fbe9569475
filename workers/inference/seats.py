"""The engine's names for the pictures of jobs, and what the planner is to know of each."""

from __future__ import annotations

import time
from typing import Any, Protocol

from workers.inference.works import Work
from workers.planner import Seat


class Sizes(Protocol):
    """As much of `model.pipeline.Pipeline` as a seat needs."""

    def group(self, run: Any) -> str: ...
    def num_tokens(self, run: Any) -> int: ...


def seat_of(work: Work, number: int, run: Any, pipeline: Sizes) -> Seat:
    """Image `number` of a job, now that its run is there."""
    tokens = pipeline.num_tokens(run)
    return Seat(
        key=f"{work.key}/{number}",
        tokens=tokens,
        steps=run.num_steps - run.step,
        waiting_since=time.monotonic(),
        tenant=work.job.tenant,
        interactive=work.job.priority == "interactive",
        group=pipeline.group(run),
        size=tokens * run.num_steps,
    )


def image_of(key: str) -> int:
    """The image's number of a seat's key."""
    return int(key.rpartition("/")[2])


def work_of(key: str) -> str:
    """The work's key of a seat's key."""
    return key.rpartition("/")[0]
