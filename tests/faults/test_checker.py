"""The judge of the campaign is no yes-man: a good history passes, each forged one is refused for what was forged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.faults.checker import check, reclaims
from tests.faults.history import Event, ordered

IMAGES = [["job_1.2.0.png", "ab"]]
DRAINED = {"leases": 0, "deliveries": 0, "temporary files": 0}


STORY = [["queued", 1], ["running", 1], ["queued", 2], ["running", 2], ["succeeded", 2]]
TOLD = {"story": STORY, "messages": STORY[-1:], "asked": "terminal"}


def view(event: str, at: float, **changes: Any) -> Event:
    """A record as somebody saw it."""
    shown: Event = {
        "job": "job_1",
        "status": "running",
        "attempt": 1,
        "finished_at": None,
        "images": None,
        "code": None,
    }
    return {"at": at, "event": event, **shown, **changes}


def ended(event: str, at: float, **changes: Any) -> Event:
    return view(event, at, **({"status": "succeeded", "attempt": 2, "finished_at": 5.5, "images": IMAGES} | changes))


def good() -> list[Event]:
    """A job whose first worker is killed and whose second one commits."""
    return [
        {"at": 1.0, "event": "submit", "job": "job_1"},
        {"at": 1.1, "event": "accepted", "job": "job_1"},
        {"at": 2.0, "event": "claim", "job": "job_1", "token": 1, "pid": 10},
        view("observed", 2.5),
        {"at": 3.0, "event": "kill", "pid": 10, "plan": "step=kill"},
        {"at": 5.0, "event": "claim", "job": "job_1", "token": 2, "pid": 11},
        {"at": 5.4, "event": "commit", "job": "job_1", "token": 2, "pid": 11},
        {"at": 5.6, "event": "commit", "job": "job_1", "token": 2, "pid": 11, "taken": True},
        ended("observed", 6.0),
        ended("final", 7.0, token=2, missing=[], wrong=[], **TOLD),
        {"at": 8.0, "event": "drained", **DRAINED},
    ]


def final(**changes: Any) -> Callable[[list[Event]], list[Event]]:
    """Another end of the same story."""
    return lambda events: [event | changes if event["event"] == "final" else event for event in events]


def also(event: Event) -> Callable[[list[Event]], list[Event]]:
    """The same story, and something more in it."""
    return lambda events: ordered([*events, event])


def without(kind: str) -> Callable[[list[Event]], list[Event]]:
    return lambda events: [event for event in events if event["event"] != kind]


def test_a_good_history_passes() -> None:
    """Otherwise no refusal would say anything."""
    verdict = check(good())
    assert verdict.violations == ()
    assert (verdict.accepted, verdict.lost, verdict.twice) == (1, 0, 0)
    assert verdict.ends == {"succeeded": 1}
    assert verdict.faults == {"kill step": 1}


ZOMBIE: Event = {"at": 6.5, "event": "commit", "job": "job_1", "token": 1, "pid": 10, "taken": True}


@pytest.mark.parametrize(
    ("forge", "promise"),
    [
        (final(status="running", images=None), "I1"),
        (without("final"), "I1"),
        (final(status="failed", code="internal", images=None), "I1"),
        (also(ZOMBIE), "I2"),
        (final(token=3), "I2"),
        (final(token=None), "I2"),
        (final(missing=["job_1.2.0.png"]), "I2"),
        (final(wrong=["job_1.2.0.png"]), "I2"),
        (final(images=None), "I2"),
        (final(status="failed", code="internal"), "I2"),
        (also(ended("observed", 6.2, finished_at=6.1)), "I3"),
        (also(ended("observed", 6.2, status="canceled", images=None)), "I3"),
        (also(view("observed", 6.2)), "I3"),
        (also({"at": 4.0, "event": "claim", "job": "ghost", "token": 9, "pid": 10}), "I4"),
        (also({"at": 6.0, "event": "claim", "job": "job_1", "token": 2, "pid": 10}), "I4"),
        (also(ended("final", 7.0, job="ghost", token=None, missing=[], wrong=[], **TOLD)), "I4"),
        (also(ended("cancel", 4.0, status="canceled", images=None)), "I5"),
        (also(ended("observed", 6.2, job="job_2")), "I5"),
        (also(view("cancel", 4.0, attempt=3)), "I5"),
        (final(story=None), "I5"),
        (final(story=STORY[1:]), "I5"),
        (final(story=STORY[:-1]), "I5"),
        (final(story=[*STORY[:2], *STORY[3:]]), "I5"),
        (final(story=[*STORY, *STORY[-1:]]), "I5"),
        (final(messages=[]), "I5"),
        (final(messages=STORY[-1:] * 2), "I5"),
        (final(asked="status"), "I5"),
        (final(asked=None), "I5"),
        (lambda events: [event | {"leases": 1} if event["event"] == "drained" else event for event in events], "I6"),
        (without("drained"), "I6"),
    ],
)
def test_a_forged_history_is_refused(forge: Callable[[list[Event]], list[Event]], promise: str) -> None:
    """Each promise has histories that break it, and the checker names it."""
    assert promise in {violation.promise for violation in check(forge(good())).violations}


def test_lost_and_twice_are_counted() -> None:
    """The two figures of the table are those of the story."""
    assert check(final(status="queued", images=None)(good())).lost == 1
    assert check(also(ZOMBIE)(good())).twice == 1


def test_time_to_claim_again() -> None:
    """It runs from the kill to the next claim, and only for what was in hand."""
    assert reclaims(good()) == [2.0]
    late_kill: Event = {"at": 6.0, "event": "kill", "pid": 11, "plan": "anywhere=kill"}
    again: Event = {"at": 9.0, "event": "claim", "job": "job_1", "token": 3, "pid": 12}
    assert reclaims([*good(), late_kill, again]) == [2.0]
