"""Who is at work beside whom, whatever came in whatever order."""

from __future__ import annotations

from typing import Any, cast

from hypothesis import given
from hypothesis import strategies as st

from workers.inference.turns import Turns
from workers.inference.works import Work
from workers.jobs import CustomizeJob, JobRecord, JobStatus, Sampling

MOST = 3
KINDS = st.tuples(st.integers(1, MOST), st.booleans(), st.integers(1, 4))
"""Attempt, whether somebody waits for it, steps."""


def work_of(number: int, attempt: int, interactive: bool, steps: int) -> Work:
    job = CustomizeJob(
        f"job_{number}",
        "standin",
        "",
        "",
        (),
        Sampling(16, 16, steps, 1.0, 1.0, 0),
        priority="interactive" if interactive else "batch",
    )
    work = Work(cast("Any", None), cast("Any", None))
    work.accept(JobRecord(job, JobStatus.RUNNING, attempt, 0.0), MOST)
    return work


@given(kinds=st.lists(KINDS, max_size=12), ahead=st.integers(1, 4), ends=st.lists(st.integers(0, 11), max_size=60))
def test_company(kinds: list[tuple[int, bool, int]], ahead: int, ends: list[int]) -> None:
    """At any time at most one suspect is at work, nobody beside one on its last attempt; and all get a turn."""
    turns = Turns(ahead)
    works = [work_of(number, *kind) for number, kind in enumerate(kinds)]
    for work in works:
        turns.add(work)
    at_work: list[Work] = []
    done: list[Work] = []
    choices = iter(ends)
    while len(done) < len(works):
        while (work := turns.next(at_work)) is not None:
            turns.take(work)
            at_work.append(work)
            assert sum(one.suspect for one in at_work) <= 1
            assert len(at_work) == 1 or not any(one.alone for one in at_work)
        assert at_work, "somebody can always go on"
        done.append(at_work.pop(next(choices, 0) % len(at_work)))


def test_what_is_not_to_go_on_waits_for_nobody() -> None:
    """A canceled suspect is let through to its end, though another suspect is at work."""
    turns = Turns(4)
    first, second = work_of(0, 2, True, 1), work_of(1, 2, True, 1)
    turns.add(first)
    turns.take(first)
    turns.add(second)
    assert turns.next([first]) is None
    second.stopped = "canceled"
    assert turns.next([first]) is second
