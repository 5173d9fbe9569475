"""The same request gives the same draws."""

import torch

from model.noise import ReleasedDraws, SeededDraws


def test_draws_follow_from_seed_and_slot() -> None:
    """A reference's draw depends on seed and slot alone, not on which slots were drawn before."""
    shape = (16, 8, 8)
    alone = SeededDraws(7).reference(3, shape)
    draws = SeededDraws(7)
    draws.target(shape)
    draws.reference(1, shape)
    assert torch.equal(draws.reference(3, shape), alone)
    assert not torch.equal(SeededDraws(7).reference(2, shape), alone)
    assert not torch.equal(SeededDraws(8).reference(3, shape), alone)


def test_the_target_is_drawn_as_released() -> None:
    """randn from a CPU generator with the request's seed, uint64 seeds included."""
    for seed in (0, 7, 2**64 - 1):
        wanted = torch.randn(4, 4, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(SeededDraws(seed).target((4, 4)), wanted)


def test_the_released_order_is_one_stream() -> None:
    """References continue one generator in call order, as torch's global one does."""
    draws = ReleasedDraws(7, 4242)
    torch.manual_seed(4242)
    for slot in (2, 5):
        assert torch.equal(draws.reference(slot, (3, 5)), torch.randn(3, 5))
