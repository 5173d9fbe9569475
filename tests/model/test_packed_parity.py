"""A mixed batch in one forward against each of its requests alone, over random models and layouts.

Requests of a batch differ in size, number of references, text, guidance and step; some have true CFG's second branch.
The bound is 1e-5 of any value in float32, and in bfloat16 2e-2 of the velocity's norm (‖packed − solo‖ / ‖solo‖ over
all tokens of a branch). Forwards with one fault each show that these bounds would not let it pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.attention import make_pack
from model.blocks import Site
from model.fabricate import Shape, make_transformer, open_gates
from model.packing import Condition, ReferenceTokens
from model.positions import Grid
from model.roles import Role
from model.sampling import Denoising, Guidance, Sampler
from model.schedule import ShiftRule, sigmas
from model.transformer import EmbeddingTables, Network

SHAPES = (
    Shape(double_blocks=1, single_blocks=2, heads=2, axes=(4, 6, 6)),
    Shape(double_blocks=2, single_blocks=1, heads=3, axes=(2, 4, 4)),
    Shape(double_blocks=2, single_blocks=0, heads=2, axes=(4, 4, 8)),
)
SHIFT = ShiftRule(dynamic=True, shift=3.0, base_tokens=256, max_tokens=4096, base_mu=0.5, max_mu=1.15)
STEPS = 6
ABSOLUTE, RELATIVE = 1e-5, 2e-2

GRIDS = st.tuples(st.integers(1, 6), st.integers(1, 6))


@dataclass(frozen=True, slots=True)
class Ask:
    """One request of a batch at a step of its denoising; `split`: true CFG runs in it."""

    references: tuple[tuple[int, Grid], ...]
    target: Grid
    num_text: int
    step: int
    guidance: float
    split: bool


@st.composite
def asks(draw: st.DrawFn, references: int) -> Ask:
    """A request with so many references, in any of the nine slots."""
    slots = draw(st.lists(st.integers(1, 9), min_size=references, max_size=references, unique=True))
    return Ask(
        references=tuple((slot, draw(GRIDS)) for slot in sorted(slots)),
        target=draw(GRIDS),
        num_text=draw(st.integers(1, 9)),
        step=draw(st.integers(0, STEPS - 1)),
        guidance=draw(st.sampled_from([1.0, 3.5, 4.5])),
        split=draw(st.booleans()),
    )


MIXED = st.tuples(*(asks(references) for references in range(4))).flatmap(st.permutations)
"""0, 1, 2 and 3 references, in any order."""

FIXED = (
    # Four lengths and four steps: each fault below changes something.
    Ask((), (4, 5), 5, 0, 3.5, split=False),
    Ask(((1, (3, 3)),), (5, 4), 7, 2, 1.0, split=True),
    Ask(((1, (2, 4)), (3, (3, 3))), (4, 4), 5, 4, 4.5, split=False),
    Ask(((2, (2, 2)), (4, (1, 5)), (9, (3, 2))), (3, 6), 6, 5, 3.5, split=True),
)


@cache
def make_sampler(shape: Shape, dtype: torch.dtype) -> Sampler:
    """The sampler of a random model whose gates are open."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SHAPES.index(shape))
        model = open_gates(make_transformer(shape)).to(dtype).eval().requires_grad_(False)
        tables = EmbeddingTables(*(torch.randn(rows, shape.width).to(dtype) for rows in (2, 10)))
    return Sampler(Network(model), tables)


def begun(sampler: Sampler, seed: int, ask: Ask) -> Denoising:
    """The run asked for, of random tokens."""
    generator = torch.Generator().manual_seed(seed)
    model = sampler.network.model

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(model.dtype)

    def condition(references: tuple[tuple[int, Grid], ...], *, embedded: bool) -> Condition:
        text, pooled = draw(ask.num_text, SHAPES[0].text_width), draw(SHAPES[0].pooled_width)
        tokens = tuple(ReferenceTokens(slot, Role.SUBJECT, draw(g[0] * g[1], 64), g) for slot, g in references)
        return Condition(text, pooled, ask.target, tokens, embedded)

    guidance = Guidance(ask.guidance, 2.0, true_scale=2.5 if ask.split else 1.0, end=STEPS, negative=3.0)
    noise = draw(ask.target[0] * ask.target[1], 64)
    positive, negative = condition(ask.references, embedded=True), condition((), embedded=False)
    run = sampler.begin(positive, negative, guidance, sigmas(STEPS, len(noise), SHIFT), noise)
    return replace(run, step=ask.step)


def differences(together: Sampler, sampler: Sampler, runs: list[Denoising]) -> tuple[float, float]:
    """The largest |packed − solo| of any value, and the largest ‖packed − solo‖ / ‖solo‖ of any branch."""
    absolute = relative = 0.0
    for run, parts in zip(runs, together.velocities(runs), strict=True):
        alone = sampler.velocities([run])[0]
        assert len(parts) == len(alone) == 1 + run.guidance.splits(run.step)
        for packed, solo in zip(parts, alone, strict=True):
            assert packed.shape == solo.shape == run.latents.shape
            error = packed.double() - solo.double()
            absolute = max(absolute, float(error.abs().max()))
            relative = max(relative, float(error.norm() / solo.double().norm()))
    return absolute, relative


@given(MIXED, st.sampled_from(SHAPES), st.integers(0, 9))
@example([FIXED[2], FIXED[2], FIXED[0], FIXED[3]], SHAPES[0], 0).via("neighbours of equal length share a product")
@settings(max_examples=12)
def test_a_pack_equals_the_solo_runs_in_float32(batch: list[Ask], shape: Shape, seed: int) -> None:
    """Whoever shares a forward with a request, and in whatever order, its velocities stay as they are."""
    sampler = make_sampler(shape, torch.float32)
    runs = [begun(sampler, seed + number, ask) for number, ask in enumerate(batch)]
    assert differences(sampler, sampler, runs)[0] <= ABSOLUTE


@given(MIXED, st.sampled_from(SHAPES), st.integers(0, 9))
@settings(max_examples=8)
def test_a_pack_equals_the_solo_runs_in_bfloat16(batch: list[Ask], shape: Shape, seed: int) -> None:
    """In the dtype of production the two differ by roundings alone."""
    sampler = make_sampler(shape, torch.bfloat16)
    runs = [begun(sampler, seed + number, ask) for number, ask in enumerate(batch)]
    assert differences(sampler, sampler, runs)[1] <= RELATIVE


class Faulty(Sampler):
    """A sampler whose forwards run at a wrong site."""

    def __init__(self, sampler: Sampler, fault: Callable[[Site], Site]) -> None:
        super().__init__(sampler.network, sampler.tables)
        self.fault = fault

    def _site(self, conditions: object) -> Site:
        return self.fault(super()._site(conditions))


def merged(site: Site) -> Site:
    """The first two requests attend to each other."""
    first, _, *rest = site.pack.boundaries
    return replace(site, pack=make_pack([first, *rest], site.cos.device))


def shifted(site: Site) -> Site:
    """A token of the second request belongs to the first: a boundary is off by one."""
    first, second, *rest = site.pack.boundaries
    return replace(site, pack=make_pack([first, second + 1, *rest], site.cos.device))


def open_to_all(site: Site) -> Site:
    """No boundaries at all."""
    return replace(site, pack=make_pack([0, site.pack.boundaries[-1]], site.cos.device))


def swapped(rows: Tensor | None) -> Tensor:
    """The first request's tokens use the second's modulation row, and the other way round."""
    assert rows is not None
    return torch.where(rows == 0, 1, torch.where(rows == 1, 0, rows))


def turned_alike(site: Site) -> Site:
    """The first two requests of `FIXED` stand at each other's positions."""
    a, b, c, *_ = site.pack.boundaries
    order = torch.cat([torch.arange(b, c), torch.arange(a, b), torch.arange(c, len(site.cos))])
    return replace(site, cos=site.cos[order], sin=site.sin[order])


LEAKS = {"merged": merged, "off by one": shifted, "open to all": open_to_all}
MODULATED = {
    "text": lambda site: replace(site, text_rows=swapped(site.text_rows)),
    "image": lambda site: replace(site, image_rows=swapped(site.image_rows)),
    "joint": lambda site: replace(site, joint_rows=swapped(site.joint_rows)),
    "target": lambda site: replace(site, last=replace(site.last, rows=swapped(site.last.rows))),
}
FAULTS: dict[str, Callable[[Site], Site]] = LEAKS | MODULATED | {"positions": turned_alike}


@pytest.mark.parametrize("name", FAULTS)
def test_the_bounds_let_no_fault_pass(name: str) -> None:
    """Leakage between requests, another's modulation row, another's positions: each is beyond both bounds."""
    for dtype in (torch.float32, torch.bfloat16):
        sampler = make_sampler(SHAPES[0], dtype)
        runs = [begun(sampler, seed, ask) for seed, ask in enumerate(FIXED)]
        sound, faulty = differences(sampler, sampler, runs), differences(Faulty(sampler, FAULTS[name]), sampler, runs)
        if dtype is torch.float32:
            assert sound[0] <= ABSOLUTE < 1000 * ABSOLUTE < faulty[0]
        else:
            assert sound[1] <= RELATIVE < faulty[1]
