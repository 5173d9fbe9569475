"""Response maps against the explicit attention products they stand for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import kernels.column_mass as mass
from kernels.pooled_response import pooled_maps
from kernels.response_map import Heads, Sites, placeholder_response, plan_reading, pooled_response, read, respond
from kernels.sites import read_placeholders

HEADS, DIM = 3, 4


@dataclass(frozen=True)
class Pack:
    """Queries and keys with groups of requests whose tokens lie anywhere in the pack."""

    query: Tensor
    key: Tensor
    sites: list[Sites]


def pack(shapes: list[tuple[int, int, tuple[int, ...]]], seed: int, dtype: torch.dtype = torch.float64) -> Pack:
    """One group per (number of requests, target length, reference lengths); two placeholders for each reference."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(number * (target + sum(lengths) + 2 * len(lengths)) for number, target, lengths in shapes) + 5
    places = iter(torch.randperm(total, generator=generator).tolist())

    def site(*shape: int) -> Tensor:
        return torch.tensor([next(places) for _ in range(torch.Size(shape).numel())]).reshape(shape)

    sites = [
        Sites(
            references=tuple(site(number, length) for length in lengths),
            target=site(number, target),
            placeholders=site(number, len(lengths), 2),
            shares=torch.tensor([0.5, 0.5], dtype=torch.float64).expand(number, len(lengths), 2),
        )
        for number, target, lengths in shapes
    ]
    query, key = torch.randn(2, total, HEADS, DIM, dtype=torch.float64, generator=generator).to(dtype)
    return Pack(query, key, sites)


groups = st.lists(
    st.tuples(st.integers(1, 3), st.integers(1, 7), st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple)),
    min_size=1,
    max_size=3,
)


@given(groups, st.integers(0, 99))
@settings(max_examples=30)
def test_pooling_first_equals_the_mean_of_all_products(
    shapes: list[tuple[int, int, tuple[int, ...]]], seed: int
) -> None:
    """mean_q(Q Kᵀ) / sqrt(d), written out with the whole matrix, per head, then mean, sum or neither over heads."""
    p = pack(shapes, seed)
    for site, seen in zip(p.sites, read(p.query, p.key, plan_reading(p.sites)), strict=True):
        assert site.target is not None
        assert seen.target is not None
        maps: dict[Heads, Tensor] = {
            heads: pooled_response(seen.references, seen.target, heads) for heads in ("mean", "sum", "per_head")
        }
        for row in range(len(site.target)):
            for number, reference in enumerate(site.references):
                products = torch.einsum("qhd,xhd->hqx", p.query[reference[row]], p.key[site.target[row]]) / DIM**0.5
                wanted = products.mean(1)
                assert torch.allclose(maps["per_head"][row, number], wanted, atol=1e-12, rtol=0)
                assert torch.allclose(maps["sum"][row, number], wanted.sum(0), atol=1e-12, rtol=0)
                assert torch.allclose(maps["mean"][row, number], wanted.mean(0), atol=1e-12, rtol=0)


@given(groups, st.integers(0, 99), st.booleans())
@settings(max_examples=30)
def test_placeholder_response_written_out(
    shapes: list[tuple[int, int, tuple[int, ...]]], seed: int, scaled: bool
) -> None:
    """Products per head with the mean key of a reference's placeholders, mean over heads, then softmax."""
    p = pack(shapes, seed)
    for site, seen in zip(p.sites, read(p.query, p.key, plan_reading(p.sites)), strict=True):
        assert site.placeholders is not None
        assert seen.placeholders is not None
        got = placeholder_response(seen.references, seen.placeholders, scaled=scaled)
        for row in range(len(site.placeholders)):
            keys = torch.stack([p.key[named].mean(0) for named in site.placeholders[row]])
            for number, reference in enumerate(site.references):
                products = torch.stack([p.query[reference[row], h] @ keys[:, h].T for h in range(HEADS)])
                wanted = (products.mean(0) / (DIM**0.5 if scaled else 1)).softmax(-1)
                assert torch.allclose(got[number][row], wanted, atol=1e-12, rtol=0)


def test_shares_weigh_repeated_placeholders() -> None:
    """Two mentions of one reference are averaged; the filling of the reference mentioned once counts nothing."""
    key = torch.randn(6, HEADS, DIM, dtype=torch.float64)
    shares = torch.tensor([[[0.5, 0.5], [1.0, 0.0]]], dtype=torch.float64)
    site = Sites((torch.tensor([[0]]), torch.tensor([[1]])), None, torch.tensor([[[2, 3], [4, 4]]]), shares)
    (seen,) = read(key, key, plan_reading([site]))
    assert seen.target is None
    assert seen.placeholders is not None
    assert torch.allclose(seen.placeholders[0, 0], (key[2] + key[3]) / 2, atol=1e-12)
    assert torch.allclose(seen.placeholders[0, 1], key[4], atol=1e-12)


def test_bfloat16_is_summed_in_float32() -> None:
    """Half-precision inputs lose nothing on the way: the same numbers in float64 give the same maps."""
    p = pack([(2, 40, (300, 200))], 3, torch.bfloat16)
    (seen,) = read(p.query, p.key, plan_reading(p.sites))
    (exact,) = read(p.query.double(), p.key.double(), plan_reading(p.sites))
    assert seen.target is not None
    assert exact.target is not None
    assert seen.placeholders is not None
    assert exact.placeholders is not None
    got, wanted = pooled_response(seen.references, seen.target), pooled_response(exact.references, exact.target)
    assert got.dtype is torch.float32
    assert (got - wanted).abs().max() < 1e-6
    rounded = pooled_response([r.mean(1, keepdim=True) for r in seen.references], seen.target)
    assert (rounded - wanted).abs().max() > 1e-5
    for a, b in zip(
        placeholder_response(seen.references, seen.placeholders),
        placeholder_response(exact.references, exact.placeholders),
        strict=True,
    ):
        assert (a - b).abs().max() < 1e-6


class _Largest(TorchDispatchMode):
    """Remembers the largest tensor any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, list | tuple) else [out]:
            self.numel = max(self.numel, tensor.numel() if isinstance(tensor, Tensor) else 0)
        return out


def test_no_attention_matrix_forward_or_backward() -> None:
    """Nothing of the size l_ref × l is ever made: the largest tensor is the pack itself."""
    p = pack([(1, 512, (512, 512))], 4, torch.float32)
    query, key = p.query.requires_grad_(), p.key.requires_grad_()
    with _Largest() as largest:
        (seen,) = read(query, key, plan_reading(p.sites))
        assert seen.target is not None
        assert seen.placeholders is not None
        loss = pooled_response(seen.references, seen.target).square().sum()
        (loss + placeholder_response(seen.references, seen.placeholders)[0].square().sum()).backward()
    assert largest.numel <= query.numel() < 512 * 512
    with _Largest() as control:
        torch.einsum("qhd,xhd->qx", p.query[:512], p.key[:512])
    assert control.numel >= 512 * 512


@pytest.mark.parametrize("heads", ["mean", "sum", "per_head"])
def test_gradients(heads: Heads) -> None:
    """Finite differences through gathering, pooling and both responses."""
    p = pack([(2, 3, (2, 4)), (1, 2, (3,))], 5)
    reading = plan_reading(p.sites)

    def outputs(query: Tensor, key: Tensor) -> list[Tensor]:
        values: list[Tensor] = []
        for seen in read(query, key, reading):
            assert seen.target is not None
            assert seen.placeholders is not None
            values += [pooled_response(seen.references, seen.target, heads)]
            values += placeholder_response(seen.references, seen.placeholders)
        return values

    inputs = (p.query.requires_grad_(), p.key.requires_grad_())
    assert torch.autograd.gradcheck(lambda q, k: tuple(outputs(q, k)), inputs, fast_mode=True)


@pytest.mark.parametrize("heads", ["mean", "sum", "per_head"])
def test_one_call_gives_both_responses(heads: Heads) -> None:
    """`respond` and `pooled_maps` are the steps above, for groups with and without a target and placeholders."""
    p = pack([(2, 3, (2, 4)), (1, 2, (3,))], 6)
    sites = [p.sites[0], replace(p.sites[1], placeholders=None, shares=None), replace(p.sites[0], target=None)]
    reading = plan_reading(sites)
    answers = respond(p.query, p.key, reading, heads, scaled=False)
    for seen, answer, route in zip(
        read(p.query, p.key, reading), answers, pooled_maps(p.query, p.key, reading, heads), strict=True
    ):
        if seen.target is None:
            assert answer.route is None
            assert route is None
        else:
            assert answer.route is not None
            assert route is not None
            assert torch.equal(answer.route, route)
            assert torch.equal(route, pooled_response(seen.references, seen.target, heads))
        if seen.placeholders is None:
            assert answer.holder == ()
        else:
            wanted = placeholder_response(seen.references, seen.placeholders, scaled=False)
            assert all(torch.equal(a, b) for a, b in zip(answer.holder, wanted, strict=True))
    assert [answer.route is None for answer in answers] == [False, False, True]


def test_placeholders_are_read_alone_as_with_the_rest() -> None:
    """What the Triton path reads of placeholders is what the common gather reads."""
    p = pack([(2, 3, (2, 4))], 7)
    (whole,) = read(p.query, p.key, plan_reading(p.sites))
    alone = read_placeholders(p.query, p.key, p.sites[0])
    assert all(torch.equal(a, b) for a, b in zip(whole.references, alone.references, strict=True))
    assert whole.placeholders is not None
    assert alone.placeholders is not None
    assert torch.equal(whole.placeholders, alone.placeholders)


@given(groups, st.integers(0, 99))
@settings(max_examples=30)
def test_spans_name_the_tokens_of_every_pair(shapes: list[tuple[int, int, tuple[int, ...]]], seed: int) -> None:
    """The kernels' table leads to the same tokens as the sites, and maps fill their room without overlap."""
    p = pack(shapes, seed)
    reading = plan_reading([*p.sites[:1], replace(p.sites[0], target=None), *p.sites[1:]])
    rows = iter(reading.pairs.tolist())
    used = 0
    for number, site in enumerate(p.sites):
        assert site.target is not None, number
        for request, target in enumerate(site.target):
            for reference in site.references:
                query, num_queries, key, num_keys, start = next(rows)
                assert torch.equal(reading.queries[query : query + num_queries], reference[request])
                assert torch.equal(reading.keys[key : key + num_keys], target)
                assert start == used
                used += num_keys
    assert next(rows, None) is None
    assert reading.num_maps == used
    for key, num_keys, pair, num_pairs in reading.requests.tolist():
        assert {tuple(row[2:4]) for row in reading.pairs[pair : pair + num_pairs].tolist()} == {(key, num_keys)}


@given(groups, st.integers(0, 99), st.sampled_from([1, 7, 2**22]))
@settings(max_examples=30)
def test_column_mass_is_the_mean_softmax(shapes: list[tuple[int, int, tuple[int, ...]]], seed: int, tile: int) -> None:
    """Written out: softmax over the whole pack, then the target's columns; in tiles of any size."""
    p = pack(shapes, seed)
    products = torch.einsum("qhd,khd->hqk", p.query, p.key) / DIM**0.5
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mass, "_TILE", tile)
        lse = mass.log_sum_exp_reference(p.query, p.key, (0, len(p.query)))
        maps = mass.column_mass(p.query, p.key, lse, plan_reading(p.sites))
    assert torch.allclose(lse, products.logsumexp(-1), atol=1e-12)
    for site, got in zip(p.sites, maps, strict=True):
        assert site.target is not None
        assert got is not None
        for request, target in enumerate(site.target):
            for number, reference in enumerate(site.references):
                wanted = products.softmax(-1)[:, reference[request]][:, :, target].mean((0, 1))
                assert torch.allclose(got[request, number], wanted, atol=1e-12, rtol=0)
                assert 0 < got[request, number].sum() < 1


def test_log_sum_exp_stays_within_a_request() -> None:
    """Requests of a pack do not see each other."""
    p = pack([(1, 5, (3,))], 8)
    cut = 4
    lse = mass.log_sum_exp_reference(p.query, p.key, (0, cut, len(p.query)))
    alone = mass.log_sum_exp_reference(p.query[cut:], p.key[cut:], (0, len(p.query) - cut))
    assert torch.allclose(lse[:, cut:], alone, atol=1e-12)
