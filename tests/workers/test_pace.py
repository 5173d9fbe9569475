"""What is learnt of a device: when company costs little, and that nothing is learnt of nothing."""

from __future__ import annotations

import random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from workers.pace import Pace


def pace_of(base: float, token: float, sizes: list[int], noise: float = 0.0) -> Pace:
    draw, pace = random.Random(0), Pace()
    for tokens in sizes:
        pace = pace.after(tokens, (base + token * tokens) * (1 + noise * draw.uniform(-1, 1)))
    return pace


@given(st.floats(0.001, 1.0), st.floats(1e-6, 1e-3), st.lists(st.integers(1, 5000), min_size=2, max_size=40))
@example(0.001, 0.0009999999999999998, [1, 7])
def test_the_light_size_is_where_both_parts_are_equal(base: float, token: float, sizes: list[int]) -> None:
    """Base over token, whatever forwards there were, if they were of more than one size."""
    light = pace_of(base, token, sizes).light_tokens
    if max(sizes) > 1.1 * min(sizes):
        # It is rounded down, and what it is rounded from is a fit's: just below 1 it is 0.
        assert light == pytest.approx(base / token, rel=0.02, abs=1.01)


@pytest.mark.parametrize("sizes", [[], [500], [500] * 50])
def test_one_size_says_nothing(sizes: list[int]) -> None:
    """Then company is judged by its own size alone."""
    assert pace_of(0.01, 1e-5, sizes).light_tokens == 0


def test_noise_and_slow_machines_are_forgotten() -> None:
    """Times that scatter by a tenth still tell; a device that becomes another one is learnt anew."""
    draw = random.Random(1)
    sizes = [draw.randint(100, 4000) for _ in range(200)]
    assert pace_of(0.05, 5e-5, sizes, noise=0.1).light_tokens == pytest.approx(1000, rel=0.3)
    pace = pace_of(1.0, 1e-5, sizes)
    for tokens in sizes * 3:
        pace = pace.after(tokens, 0.05 + 5e-5 * tokens)
    assert pace.light_tokens == pytest.approx(1000, rel=0.1)


def test_forwards_that_cost_by_tokens_alone_have_no_light_size() -> None:
    """Also where larger forwards happened to be faster: no guess is better than a wild one."""
    assert pace_of(0.0, 1e-4, [100, 900, 300]).light_tokens == 0
    assert Pace().after(100, 2.0).after(1000, 1.0).light_tokens == 0
