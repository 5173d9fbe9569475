"""The planner's promises: budgets hold, nobody starves, shares are kept, short runs are not held up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers import planner
from workers.planner import Account, Budget, Seat, next_forward

SECONDS = 0.1
"""That a forward takes here."""

SEATS = st.lists(
    st.builds(
        Seat,
        key=st.uuids().map(str),
        tokens=st.integers(1, 9000),
        steps=st.integers(1, 30),
        waiting_since=st.floats(0, 100),
        tenant=st.sampled_from("abc"),
        interactive=st.booleans(),
        group=st.sampled_from(["", "toys"]),
    ),
    max_size=12,
    unique_by=lambda seat: seat.key,
)
BUDGETS = st.builds(Budget, tokens=st.integers(1, 20_000), runs=st.integers(1, 6))


def simulate(
    seats: Sequence[Seat],
    budget: Budget,
    forwards: int,
    *,
    choose: Callable[..., tuple[Seat, ...]] = next_forward,
    refill: bool = False,
) -> list[tuple[str, ...]]:
    """Who stepped in each forward; `refill` has every run that ends come back as it was."""
    left = {seat.key: seat for seat in seats}
    first, account, history, now = dict(left), Account(), list[tuple[str, ...]](), 0.0
    for _ in range(forwards):
        chosen = choose(list(left.values()), budget, account, now)
        if not chosen:
            break
        account = account.charged(chosen, list(left.values()), budget)
        now += SECONDS
        history.append(tuple(seat.key for seat in chosen))
        for seat in chosen:
            moved = replace(seat, steps=seat.steps - 1, waiting_since=now)
            if moved.steps:
                left[seat.key] = moved
            elif refill:
                left[seat.key] = replace(first[seat.key], waiting_since=now)
            else:
                del left[seat.key]
    return history


@given(SEATS, BUDGETS, st.floats(0, 200), st.integers(0, 3))
def test_a_forward_keeps_its_budget(seats: list[Seat], budget: Budget, now: float, turn: int) -> None:
    """One group, distinct runs that were offered, within both budgets unless one alone exceeds them; never nothing."""
    chosen = next_forward(seats, budget, Account(turn=turn), now)
    assert bool(chosen) == bool(seats)
    assert len({seat.key for seat in chosen}) == len(chosen) <= budget.runs
    assert set(chosen) <= set(seats)
    assert len({seat.group for seat in chosen}) <= 1
    assert len(chosen) <= 1 or sum(seat.tokens for seat in chosen) <= budget.tokens


@given(SEATS, BUDGETS)
def test_every_run_ends(seats: list[Seat], budget: Budget) -> None:
    """Each run steps as often as it has steps, and not once more."""
    history = simulate(seats, budget, 10_000)
    assert Counter(key for forward in history for key in forward) == {seat.key: seat.steps for seat in seats}


def flood(count: int) -> list[Seat]:
    """Short interactive runs without end of one tenant, and one long batch run of another."""
    short = [Seat(f"short{number}", 100, 2, 0.0, tenant="loud") for number in range(count)]
    return [*short, Seat("long", 900, 30, 0.0, tenant="quiet", interactive=False)]


def longest_wait(history: Sequence[tuple[str, ...]], key: str) -> int:
    """Most forwards between two steps of a run."""
    steps = [-1, *(number for number, forward in enumerate(history) if key in forward), len(history)]
    return max(after - before for before, after in pairwise(steps))


def test_nobody_starves() -> None:
    """Under a flood that never ends, whatever the shares, a run waits for its patience and the others that have waited
    too, each of them twice at most; without patience a share of nothing waits for ever."""
    budget = Budget(tokens=1000, runs=1, interactive_share=1.0, patience_s=2.0)
    seats = flood(5)
    history = simulate(seats, budget, 600, refill=True)
    assert longest_wait(history, "long") <= 2.0 / SECONDS + 2 * len(seats) + 2
    endless = replace(budget, patience_s=float("inf"))
    assert longest_wait(simulate(seats, endless, 600, refill=True), "long") > 500


@pytest.mark.parametrize("share", [0.5, 0.8])
def test_classes_get_their_shares(share: float) -> None:
    """Of the tokens that are computed while both wait, interactive work gets its share, within one forward's size."""
    seats = [Seat("now", 100, 4, 0.0), Seat("later", 300, 9, 0.0, interactive=False)]
    budget = Budget(tokens=300, runs=1, interactive_share=share, patience_s=float("inf"))
    history = simulate(seats, budget, 3000, refill=True)
    tokens = Counter[str]()
    for (key,) in history:
        tokens[key] += {"now": 100, "later": 300}[key]
    assert tokens["now"] / sum(tokens.values()) == pytest.approx(share, abs=0.01)


def test_tenants_of_a_class_get_equal_parts() -> None:
    """Twenty runs of one tenant take no more of the device than the one run of another."""
    seats = [Seat(f"many{number}", 100, 5, 0.0, tenant="many") for number in range(20)]
    seats.append(Seat("one", 100, 5, 0.0, tenant="one"))
    history = simulate(seats, Budget(tokens=100, runs=1, patience_s=float("inf")), 1000, refill=True)
    assert sum("one" in forward for forward in history) == pytest.approx(500, abs=5)


def test_who_was_away_has_no_claim() -> None:
    """A tenant that comes after an hour does not get the hour: it and the one who worked take turns."""
    worker = Seat("worker", 100, 10_000, 0.0, tenant="worker")
    account, budget = Account(), Budget(100, 1, patience_s=float("inf"))
    for _ in range(500):
        account = account.charged([worker], [worker], budget)
    both = [worker, Seat("late", 100, 10_000, 0.0, tenant="late")]
    taken = Counter[str]()
    for _ in range(100):
        chosen = next_forward(both, budget, account, 0.0)
        account = account.charged(chosen, both, budget)
        taken[chosen[0].key] += 1
    assert abs(taken["late"] - taken["worker"]) <= 1


def first_ends(order: Callable[..., tuple[Seat, ...]]) -> int:
    """Forwards until a run of 4 steps has ended that comes while 50 runs of 30 steps wait for longer than patience."""
    seats = [Seat(f"long{number}", 500, 30, -100.0) for number in range(50)]
    history = simulate([*seats, Seat("short", 500, 4, 0.0)], Budget(500, 1, patience_s=1.0), 4000, choose=order)
    return max(number for number, forward in enumerate(history) if "short" in forward) + 1


def test_a_short_run_is_not_held_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """With 50 long runs waiting, all of them impatient, a short one takes at most twice the forwards it has steps; with
    the order of arrival instead, which this check must see, it waits for them all."""
    assert first_ends(next_forward) <= 2 * 4
    monkeypatch.setattr(planner, "_rank", lambda seat, *_: (seat.waiting_since, seat.key))
    assert first_ends(next_forward) > 50


def company_of_the_short(budget: Budget, longs: int = 7) -> set[int]:
    """How many share the forwards of a short run among long ones that are in no hurry."""
    seats = [Seat(f"long{number}", 500, 30, 0.0) for number in range(longs)] + [Seat("short", 500, 4, 0.0)]
    return {len(forward) for forward in simulate(seats, budget, 20) if "short" in forward}


def test_large_runs_do_not_hold_up_a_small_one() -> None:
    """A run's forwards are its own while only larger ones wait, unless a larger forward costs little."""
    assert company_of_the_short(Budget(8000, 16)) == {1}
    assert company_of_the_short(Budget(8000, 16, light_tokens=1999)) == {3}
    assert company_of_the_short(Budget(8000, 16, light_tokens=10**6)) == {8}


def test_a_brief_forward_takes_company_that_costs_little() -> None:
    """Up to the light size and never more than the budget; at least one run goes, however large."""
    runs = [Seat(str(number), 100, 4, 0.0) for number in range(6)]
    for light, budget, chosen in ((0, 600, 1), (99, 600, 1), (300, 600, 3), (10**6, 400, 4), (10**6, 50, 1)):
        assert len(next_forward(runs, Budget(budget, 8, light_tokens=light).brief(), Account(), 0.0)) == chosen


def test_runs_of_a_kind_share_forwards() -> None:
    """Equal runs that arrived one after the other are all in each forward, though the first has least left."""
    seats = [Seat(str(steps), 500, steps, 0.0, size=500 * 12) for steps in range(5, 13)]
    assert [len(forward) for forward in simulate(seats, Budget(8000, 16), 5)] == [8] * 5
