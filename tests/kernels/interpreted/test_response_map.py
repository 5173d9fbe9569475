"""The response maps' kernels against their references in float64: odd shapes, strides, types; nothing else touched."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

import kernels.column_mass as mass
import kernels.pooled_response as pooled
from kernels.sites import Reading, Sites, plan_reading
from tests.kernels.interpreted.broken import broken

pytestmark = pytest.mark.gpu

Shapes = list[tuple[int, int, tuple[int, ...]]]
MIXED: Shapes = [(2, 37, (19, 5)), (1, 16, (64,)), (1, 1, (1, 70, 3))]
"""Groups of (requests, target tokens, tokens of each reference): below, at and beyond a program's tokens."""
GUARD = 8


@dataclass(frozen=True)
class Case:
    """Queries and keys as a fused projection leaves them, NaN wherever nothing may be read.

    Attributes:
        query, key: [S, H, d] views; lse: [H, S], of the keys of the targets alone.
    """

    query: Tensor
    key: Tensor
    lse: Tensor
    reading: Reading


def make_case(
    shapes: Shapes, dim: int, dtype: torch.dtype, device: torch.device, heads: int = 2, seed: int = 0
) -> Case:
    """Tokens lie anywhere in the pack, with others between them."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(number * (target + sum(lengths)) for number, target, lengths in shapes) + 7
    places = iter(torch.randperm(total, generator=generator).tolist())

    def site(*shape: int) -> Tensor:
        return torch.tensor([next(places) for _ in range(torch.Size(shape).numel())]).reshape(shape).to(device)

    sites = [Sites(tuple(site(n, length) for length in lengths), site(n, target)) for n, target, lengths in shapes]
    # A group for which no map is wanted lies between the others' tokens in the index.
    aside = Sites((site(1, 2),), None, site(1, 1, 1))
    reading = plan_reading([sites[0], aside, *sites[1:]])
    fused = torch.randn(total, 3, heads, dim + GUARD, generator=generator).to(device, dtype)
    fused[..., dim:] = float("nan")
    query, key = fused[:, 0, :, :dim], fused[:, 1, :, :dim]
    read = torch.cat([index.flatten() for s in sites for index in s.references])
    query[_others(read, total)] = float("nan")
    seen = torch.cat([s.target.flatten() for s in sites if s.target is not None])
    key[_others(seen, total)] = float("nan")
    products = torch.einsum("qhd,khd->hqk", query[read].double(), key[seen].double()) * dim**-0.5
    lse = torch.full((heads, total), float("nan"), device=device)
    lse[:, read] = products.logsumexp(-1).float()
    return Case(query, key, lse, reading)


def _others(tokens: Tensor, total: int) -> Tensor:
    return torch.tensor(sorted(set(range(total)) - set(tokens.tolist())), device=tokens.device)


def _wide(x: Tensor) -> Tensor:
    """A float64 copy; what is not read becomes zero, so that the reference's own zeros stay zeros."""
    return x.detach().double().nan_to_num().requires_grad_()


def check_pooled(module: ModuleType, case: Case, heads: pooled.Heads, tolerance: float) -> None:
    """Maps and both gradients, for a random weight of every element of every map."""
    query, key = case.query.detach().clone().requires_grad_(), case.key.detach().clone().requires_grad_()
    wide_query, wide_key = _wide(query), _wide(key)
    got = module.pooled_maps(_strided(query), _strided(key), case.reading, heads, backend="triton")
    wanted = pooled.pooled_maps_reference(wide_query, wide_key, case.reading, heads)
    loss, wide_loss = torch.zeros((), device=query.device), torch.zeros((), device=query.device, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    for mine, exact in zip(got, wanted, strict=True):
        assert (mine is None) == (exact is None)
        if mine is not None and exact is not None:
            assert mine.dtype is torch.float32
            assert mine.shape == exact.shape
            assert (mine - exact).abs().max() < 1e-5
            weight = torch.randn(mine.shape, generator=generator).to(mine.device)
            loss, wide_loss = loss + (mine * weight).sum(), wide_loss + (exact * weight).sum()
    loss.backward()
    wide_loss.backward()
    for mine, exact in ((query.grad, wide_query.grad), (key.grad, wide_key.grad)):
        assert mine is not None
        assert exact is not None
        assert mine.dtype is query.dtype
        assert ((mine - exact).abs() <= tolerance * (exact.abs() + exact.abs().max() / 10)).all()
        assert (mine[exact == 0] == 0).all()


def _strided(x: Tensor) -> Tensor:
    """The same numbers with foreign ones between tokens, heads and behind the channels; gradients come back to x."""
    return torch.nn.functional.pad(x, (0, GUARD), value=float("nan"))[..., : x.shape[-1]]


def check_mass(module: ModuleType, case: Case, tolerance: float) -> None:
    """Maps, relative to each one's largest value."""
    wide = [x.double() for x in (case.query, case.key, case.lse)]
    got = module.column_mass(case.query, case.key, case.lse, case.reading, backend="triton")
    wanted = mass.column_mass_reference(*wide, case.reading)
    for mine, exact in zip(got, wanted, strict=True):
        assert (mine is None) == (exact is None)
        if mine is not None and exact is not None:
            assert mine.shape == exact.shape
            assert (mine - exact).abs().max() < tolerance * exact.max()


CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
DTYPES = [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)]


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize(("heads", "dim"), [("mean", 64), ("sum", 24), ("per_head", 16)])
def test_pooled_maps(device: torch.device, dtype: torch.dtype, tolerance: float, heads: pooled.Heads, dim: int) -> None:
    """Equation 2 forward and backward: ragged groups, scattered tokens, heads that are no power of two."""
    check_pooled(pooled, make_case(MIXED, dim, dtype, device), heads, tolerance)


def test_more_tokens_than_a_program_walks(device: torch.device) -> None:
    """Long references and targets are summed in pieces."""
    check_pooled(pooled, make_case([(1, 300, (515, 256))], 32, torch.float32, device, heads=1), "mean", 1e-5)


def test_gradcheck(device: torch.device) -> None:
    """Finite differences of the kernels themselves, in float32: eps and tolerance are its own."""
    case = make_case([(1, 5, (4, 2))], 16, torch.float32, device)
    inputs = [x.detach().nan_to_num().clone().requires_grad_() for x in (case.query, case.key)]

    def maps(query: Tensor, key: Tensor) -> Tensor:
        (first, _) = pooled.pooled_maps(query, key, case.reading, "per_head", backend="triton")
        assert first is not None
        return first

    assert torch.autograd.gradcheck(maps, inputs, eps=1e-1, atol=1e-3, rtol=1e-3, fast_mode=True)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("dim", [64, 24])
def test_column_mass(device: torch.device, dtype: torch.dtype, tolerance: float, dim: int) -> None:
    """The softmax's columns: ragged groups, scattered tokens, foreign numbers all around."""
    if device.type == "cuda" and dtype == torch.float32:
        tolerance = 1e-4  # Exponentials of products of three TF32 parts each.
    check_mass(mass, make_case(MIXED, dim, dtype, device), tolerance)


def test_column_mass_beyond_a_tile(device: torch.device) -> None:
    """More queries and more keys than a tile has."""
    check_mass(mass, make_case([(1, 150, (140,))], 64, torch.float16, device, heads=1), 2e-3)


def test_torch_knows_the_operations(device: torch.device) -> None:
    """Shapes without data, schema and autograd registration are what torch.compile relies on."""
    case = make_case(MIXED, 16, torch.float32, device)
    query, key = (x.nan_to_num().requires_grad_() for x in (case.query, case.key))
    r = case.reading
    spans = [r.longest_reference, r.longest_target, r.num_maps]
    arguments = (query, key, r.queries, r.keys, r.pairs, r.requests, spans, 0.25, True)
    torch.library.opcheck(pooled.pooled_response_op, arguments, test_utils=CHECKS)
    arguments = (query.detach(), key.detach(), case.lse.nan_to_num(), r.queries, r.keys, r.pairs, spans[1], spans[2])
    torch.library.opcheck(mass.column_mass_op, arguments, test_utils=CHECKS)


def test_a_pack_without_maps(device: torch.device) -> None:
    """No target anywhere: nothing is launched, nothing comes back."""
    index = torch.zeros(1, 1, dtype=torch.int64, device=device)
    reading = plan_reading([Sites((index,), None, index[..., None])])
    x = torch.zeros(1, 1, 16, device=device)
    assert pooled.pooled_maps(x, x, reading, backend="triton") == (None,)
    assert mass.column_mass(x, x, torch.zeros(1, 1, device=device), reading, backend="triton") == (None,)


POOLED_FAULTS = [
    ("total += values.to(tl.float32)\n    summed", "total = values.to(tl.float32)\n    summed"),
    ("present = place < end", "present = place < end - 1"),
    ("summed = summed / length", "summed = summed / TOKENS"),
    ("start = tl.load(pairs + pair * 5 + 4)\n    if tl", "start = tl.load(pairs + 4)\n    if tl"),
    ("start = tl.load(pairs + (pair + number) * 5 + 4)", "start = tl.load(pairs + pair * 5 + 4)"),
    (
        "head * head_stride + channel[None, :], mask=inside, other=0.0)\n            vector",
        "channel[None, :], mask=inside, other=0.0)\n            vector",
    ),
    ("total += (vector / length)[None, :]", "total += vector[None, :]"),
]


@pytest.mark.parametrize("fault", range(len(POOLED_FAULTS)))
def test_the_check_sees_broken_pooling(device: torch.device, tmp_path: Path, fault: int) -> None:
    """Control: each of these mistakes in a kernel is refused by the check above."""
    case = make_case(MIXED, 16, torch.float32, device)
    module = broken(pooled, *POOLED_FAULTS[fault], tmp_path)
    with pytest.raises(AssertionError):
        check_pooled(module, case, "mean", 1e-5)


MASS_FAULTS = [
    ('mask=asked, other=float("inf")', "mask=asked, other=0.0"),
    ("total += tl.exp2", "total = tl.exp2"),
    ("present = place < num_keys", "present = place < num_keys - 1"),
    ("- level[:, None]", ""),
    ("/ num_queries, mask=present", "/ QUERIES, mask=present"),
]


@pytest.mark.parametrize("fault", range(len(MASS_FAULTS)))
def test_the_check_sees_a_broken_mass(device: torch.device, tmp_path: Path, fault: int) -> None:
    """Control: the same for the column mass."""
    case = make_case([(1, 70, (40, 36))], 16, torch.float32, device, heads=1)
    module = broken(mass, *MASS_FAULTS[fault], tmp_path)
    with pytest.raises(AssertionError):
        check_mass(module, case, 1e-4)
