"""What `Hands` promises its callers: the first in line goes first, and nothing is begun after the end."""

from __future__ import annotations

import threading

import pytest
import structlog
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.waiting import wait_for
from workers.inference.hands import Hands, Place

places = st.tuples(st.booleans(), st.integers(0, 3), st.integers(0, 3))


@settings(max_examples=30)
@given(st.lists(places, max_size=12))
def test_the_first_in_line_goes_first(line: list[Place]) -> None:
    """Whatever the order of arrival, places are taken up in their order, and equal ones as they came."""
    free, done = threading.Event(), list[tuple[Place, int]]()
    hands = Hands(1, "hands", lambda: None)
    busy = threading.Event()
    hands.put((False, 0, 0), lambda: (busy.set(), free.wait(30)))
    assert busy.wait(30)
    for number, place in enumerate(line):
        hands.put(place, lambda place=place, number=number: done.append((place, number)))
    free.set()
    wait_for(lambda: len(done) == len(line), "all of them")
    assert done == sorted(done)
    hands.close(wait=True)


def test_one_that_takes_long_holds_up_no_other_hand() -> None:
    """Two hands: while the one waits, the other does all that comes."""
    free, done = threading.Event(), list[int]()
    hands = Hands(2, "hands", lambda: None)
    hands.put((False, 0, 0), lambda: free.wait(30))
    for number in range(5):
        hands.put((False, 1, number), lambda number=number: done.append(number))
    wait_for(lambda: len(done) == 5, "the others")
    assert done == list(range(5))
    free.set()
    hands.close(wait=True)


def test_each_thread_is_begun_in_itself() -> None:
    """What a thread has to be told of itself, its count of cores, is told to each and only to them."""
    begun = list[str]()
    Hands(3, "hands", lambda: begun.append(threading.current_thread().name)).close(wait=True)
    assert begun == ["hands"] * 3


@pytest.mark.parametrize(("forget", "after"), [(True, []), (False, ["in line"])])
def test_closing_forgets_what_is_in_line_if_it_is_told_to(forget: bool, after: list[str]) -> None:
    """What is being done is waited for; nothing is taken any more; without `wait` nobody waits."""
    busy, free, done = threading.Event(), threading.Event(), list[str]()
    hands = Hands(1, "hands", lambda: None)
    hands.put((False, 0, 0), lambda: (busy.set(), free.wait(30), done.append("at work")))
    assert busy.wait(30)
    hands.put((False, 1, 0), lambda: done.append("in line"))
    hands.close(wait=False, forget=forget)
    hands.put((False, 0, 0), lambda: done.append("too late"))
    assert not done
    free.set()
    hands.close(wait=True, forget=forget)
    assert done == ["at work", *after]


def test_what_fails_ends_no_hand() -> None:
    """A task that raises, against its promise, is written down without its words; its thread goes on with the next."""
    done = threading.Event()
    hands = Hands(1, "hands", lambda: None)

    def fail() -> None:
        raise LookupError("canary")

    with structlog.testing.capture_logs() as logs:
        hands.put((False, 0, 0), fail)
        hands.put((False, 1, 0), done.set)
        assert done.wait(30)
    hands.close(wait=True)
    assert [(log["log_level"], log["exception"]) for log in logs] == [("error", "LookupError")]
    assert "canary" not in repr(logs)
