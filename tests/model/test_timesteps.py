"""How training draws noise levels."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from model.losses import LAYOUT_LAW, TimestepLaw


def quantiles(law: TimestepLaw, *at: float) -> list[float]:
    draws = law.draw(40_000, torch.Generator().manual_seed(0))
    assert draws.dtype is torch.float32
    assert 0 <= draws.min() <= draws.max() <= 1
    return torch.quantile(draws, torch.tensor(at)).tolist()


@pytest.mark.parametrize(
    ("law", "logit"),
    [
        (TimestepLaw(), lambda z: z),
        (TimestepLaw(mean=1.2, std=1.2), lambda z: 1.2 + 1.2 * z),
        (TimestepLaw(mean=0.5, shift=0.65), lambda z: 1.15 + z),
    ],
)
def test_logit_normal_quantiles(law: TimestepLaw, logit: Callable[[float], float]) -> None:
    """Quantiles of sigmoid(mean + std·n), shifted on the logit; the default puts 0.5 % above 0.93."""
    normal = torch.distributions.Normal(0.0, 1.0)
    at = (0.05, 0.25, 0.5, 0.75, 0.95)
    wanted = [1 / (1 + math.exp(-logit(normal.icdf(torch.tensor(q)).item()))) for q in at]
    assert quantiles(law, *at) == pytest.approx(wanted, abs=0.01)


def test_uniform_and_its_shift() -> None:
    """Uniform in t; shifted, t → e^μ·t / (1 + (e^μ − 1)·t), FLUX's own curve."""
    at = (0.1, 0.5, 0.9)
    assert quantiles(TimestepLaw(kind="uniform"), *at) == pytest.approx(at, abs=0.01)
    odds = math.exp(1.15)
    shifted = [odds * q / (1 + (odds - 1) * q) for q in at]
    assert quantiles(TimestepLaw(kind="uniform", shift=1.15), *at) == pytest.approx(shifted, abs=0.01)


def test_the_high_share() -> None:
    """A quarter is uniform in [0.9, 1] on top of what the law itself puts there; draws follow from the generator."""
    draws = LAYOUT_LAW.draw(40_000, torch.Generator().manual_seed(1))
    normal = torch.distributions.Normal(0.0, 1.0)
    own = 1 - normal.cdf(torch.tensor((math.log(9) - 1.2) / 1.2)).item()
    assert (draws >= 0.9).float().mean().item() == pytest.approx(0.25 + 0.75 * own, abs=0.01)
    only = TimestepLaw(high_share=1.0).draw(40_000, torch.Generator().manual_seed(2))
    assert torch.quantile(only, torch.tensor([0.0, 0.5, 1.0])).tolist() == pytest.approx([0.9, 0.95, 1.0], abs=0.002)
    assert torch.equal(draws, LAYOUT_LAW.draw(40_000, torch.Generator().manual_seed(1)))
    assert not torch.equal(draws, LAYOUT_LAW.draw(40_000, torch.Generator().manual_seed(3)))
