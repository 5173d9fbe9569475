"""Lanes: runs shared out over several forwards come back moved, in order, or not at all."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.lanes import Lanes, lanes_of, shared_out
from model.sampling import Guidance
from model.weights.checkpoints import LoadedModel
from tests.model.test_sampling import run, sampler


@given(st.lists(st.integers(1, 5000), max_size=12), st.integers(1, 4))
def test_every_run_has_one_lane(tokens: list[int], lanes: int) -> None:
    """Nobody is lost or moved twice, no lane is empty, and none is fuller than the rest by more than its last run."""
    shares = shared_out(tokens, lanes)
    assert sorted(position for share in shares for position in share) == list(range(len(tokens)))
    assert len(shares) == min(lanes, len(tokens)) and all(shares)
    filled = [sum(tokens[position] for position in share) for share in shares]
    for share, total in zip(shares, filled, strict=True):
        assert total - min(tokens[position] for position in share) <= min(filled)


def test_runs_come_back_in_order(tiny: LoadedModel) -> None:
    """Three lanes move five runs of different sizes as one forward does."""
    runs = [run(tiny, seed, 4, Guidance(3.5, 3.5), references=seed % 3) for seed in range(5)]
    lanes = Lanes(lambda: sampler(tiny), 3)
    moved = lanes.advance(runs, [100, 900, 300, 200, 150])
    for one, by_one in zip(moved, sampler(tiny).advance(runs), strict=True):
        assert one.step == 1
        assert (one.latents - by_one.latents).abs().max() <= 1e-5


def test_an_error_in_one_lane_fails_the_forward(tiny: LoadedModel) -> None:
    """A finished run among the others: the forward raises what its lane raised, and later forwards work."""
    runs = [run(tiny, seed, 1, Guidance(3.5, 3.5), references=0) for seed in range(2)]
    (finished,) = sampler(tiny).advance(runs[:1])
    lanes = Lanes(lambda: sampler(tiny), 2)
    with pytest.raises(ValueError, match="finished run"):
        lanes.advance([runs[1], finished], [1, 1])
    assert [moved.done for moved in lanes.advance(runs, [1, 1])] == [True, True]


def test_a_gpu_and_compiled_graphs_have_one_lane() -> None:
    """Side by side they would only wait for each other."""
    assert lanes_of(torch.device("cuda"), compiles=False) == 1
    assert lanes_of(torch.device("cpu"), compiles=True) == 1
    assert lanes_of(torch.device("cpu"), compiles=False) == torch.get_num_threads()
