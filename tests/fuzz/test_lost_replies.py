"""A short run of lost answers, and the control. The whole one is `python -m tests.fuzz lost-replies --number 10000`."""

from __future__ import annotations

from tests.fuzz.lost_replies import keyless, run


def test_a_lost_answer_is_no_second_job() -> None:
    """Every submission has one job, and its caller knows it, though one to three answers of each were lost."""
    outcome = run(40, callers=4)
    assert outcome.good, outcome
    assert outcome.lost >= 40


def test_without_keys_there_are_doubles() -> None:
    """The control: the answers that are lost are those of jobs that were accepted."""
    outcome = run(10, callers=2, submit=keyless)
    assert outcome.doubled >= 10
    assert outcome.missing == 0
