"""A short run of hostile pictures against a gateway process, and a control that the checker catches.

The whole one is `python -m tests.fuzz pictures`.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.fuzz.bombs import at_the_limit, promises
from tests.fuzz.picture_run import controls, gateway, judge
from tests.fuzz.pictures import Case, malformed, whole


@pytest.fixture
def made() -> list[Case]:
    """Malformed pictures, headers that promise too much, and the largest pictures that a decoder must bear."""
    promised = random.Random(7).sample(list(promises()), 40)
    return [*malformed(7, 1), *promised, *(case for case in at_the_limit() if "webp RGB" in case.name)]


def test_hostile_pictures(made: list[Case], tmp_path: Path) -> None:
    """No answer but 422 to what is no picture, none after more than a second or 256 MiB; good ones are still taken."""
    with gateway(tmp_path) as target:
        verdict = judge(target, made)
        assert verdict.wrong == []
        for media_type, pictures in whole().items():
            assert [target.upload(Case("whole", media_type, data)).status for data in pictures] == [200] * len(pictures)


def test_a_gateway_without_limits_is_caught(tmp_path: Path) -> None:
    """The control: the same checker finds the memory that a bomb takes where nothing stops it."""
    with gateway(tmp_path, unlimited=True) as target:
        wrong = judge(target, controls()).wrong
    assert any(line.endswith("MiB") for line in wrong), wrong


def test_the_seed_says_all() -> None:
    """A failure can be run again: the same seed makes the same files, another one others."""
    first, again, other = (list(malformed(seed, 1)) for seed in (3, 3, 4))
    assert first == again != other
    assert len({case.data for case in first}) > 0.9 * len(first)
