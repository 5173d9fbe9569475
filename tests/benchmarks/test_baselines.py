"""What `step` compares with does the work it should: the same velocities, and the FLOP its floor is made of."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model.fabricate import open_gates
from model.sampling import Denoising, Sampler
from tests.benchmarks.baselines import inputs_at, pad, padded, released, stock
from tests.benchmarks.step_cases import FLOOR, SIZES, Bench, Size, begin, make_codec, make_request, prepare
from tests.benchmarks.trips import trips

SMALL = Size(2, (4, 6, 6), 1, 2, 8, (6, 6), 3, (16, 32))


@pytest.fixture(scope="module")
def bench() -> Bench:
    """A small model whose gates are open, so that every part of a step shows in its velocity."""
    bench = prepare(SMALL, "cpu", rounds=1)
    open_gates(bench.model)
    return bench


def begun(bench: Bench, references: int) -> Denoising:
    request = make_request(bench.size, references, "cpu", torch.float32)
    return begin(Sampler(bench.network, bench.tables), *request, step=2 * references)


@pytest.mark.parametrize("references", range(4))
def test_the_released_step_has_our_velocity(bench: Bench, references: int) -> None:
    """What we are compared with computes the same thing; stock diffusers, which adds no vectors, something else."""
    run = begun(bench, references)
    inputs = inputs_at(bench.tables, [run])
    ours = Sampler(bench.network, bench.tables).velocities([run])[0][0]
    assert (released(bench.model, inputs)[0] - ours).abs().max() <= 1e-5
    plain = replace(inputs, added=torch.zeros_like(inputs.added))
    wanted = stock(bench.model, inputs)[0, : len(ours)]
    assert (released(bench.model, plain)[0] - wanted).abs().max() <= 1e-5
    assert (ours - wanted).abs().max() > 1e-2


def test_padding_changes_nothing_but_the_work(bench: Bench) -> None:
    """Padded, by our blocks and by diffusers', a mixed batch has the packed velocities; without the mask it has not."""
    runs = [begun(bench, references) for references in range(4)]
    packed = [parts[0] for parts in Sampler(bench.network, bench.tables).velocities(runs)]
    even, mask = pad(Sampler(bench.network, bench.tables), runs)
    assert mask.flatten(1).sum(1).tolist() == [bench.size.tokens(references) for references in range(4)]
    for seen, same in ((mask, True), (torch.ones_like(mask), False)):
        ours = [parts[0] for parts in Sampler(padded(bench.network, seen), bench.tables).velocities(even)]
        theirs = released(bench.model, inputs_at(bench.tables, even, seen))
        for velocities in (ours, theirs):
            errors = [float((a - b).abs().max()) for a, b in zip(velocities, packed, strict=True)]
            assert max(errors) <= 1e-5 if same else min(errors[:3]) > 1e-3


def test_both_ways_make_one_picture(bench: Bench) -> None:
    """All steps and the VAE on both ends: the released way and ours from the same pixels to the same."""
    request = make_request(bench.size, 2, "cpu", torch.float32)
    ways = trips(bench, make_codec(bench.size, "cpu", torch.float32), request)
    theirs, ours = ways["released"](), ways["ours"]()
    assert theirs.shape == (3, 24, 24)
    assert theirs.std() > 1e-3
    assert (theirs - ours).abs().max() <= 1e-4


def test_the_floor_counts_the_work(bench: Bench) -> None:
    """`Size.flop` is what torch counts in our step, but for both outer layers and what the last block leaves out;
    at FLUX's sizes it gives the known floor."""
    size, run, sampler = bench.size, begun(bench, 3), Sampler(bench.network, bench.tables)
    # Torch counts no FLOP of a CPU's own attention.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        sampler.velocities([run])
    target, others = len(run.latents), size.tokens(3) - len(run.latents)
    outer, left_out = 2 * 2 * 64 * size.width * target, 18 * size.width**2 * others
    assert counter.get_total_flops() == size.flop(3) + outer - left_out
    milliseconds = [1e3 * SIZES["cuda"].flop(references) / FLOOR for references in range(4)]
    assert milliseconds == pytest.approx([94.2, 120.2, 148.1, 177.8], rel=1e-3)
