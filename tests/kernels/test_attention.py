"""Packed attention against one dense attention with a block-diagonal mask, and the table its kernels follow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from kernels.attention import Pack, Visibility, attention_reference, grouped, make_pack, packed_attention
from kernels.flash import BLOCKS, DIMENSIONS, FORWARD, KEYS, QUERIES, WIDE_BLOCKS, block_for
from kernels.packs import ROWS

LENGTHS = st.lists(st.integers(1, 4), min_size=1, max_size=6)


def mask_of(pack: Pack) -> Tensor:
    """[S, S]: who attends to whom."""
    lengths = torch.tensor([end - start for start, end in pairwise(pack.boundaries)])
    owner = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    mask = owner[:, None] == owner[None, :]
    if pack.visibility is None:
        return mask
    kind, sees = pack.visibility.kind.tolist(), pack.visibility.sees.tolist()
    return mask & torch.tensor([[bool(bits >> k & 1) for k in kind] for bits in sees])


def dense(query: Tensor, key: Tensor, value: Tensor, pack: Pack) -> Tensor:
    """One attention over everything, masked; zeros for tokens that see nothing."""
    mask = mask_of(pack)
    scores = torch.einsum("qhd,khd->hqk", query, key) / query.shape[-1] ** 0.5
    weights = torch.where(mask, scores, -1e30).softmax(-1) * mask
    return torch.einsum("hqk,khd->qhd", weights, value)


def inputs(total: int, seed: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Query, key and value [total, 2, 8], views of a fused projection."""
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(total, 3, 2, 8, dtype=torch.float64, generator=generator).to(dtype).unbind(1))


@given(LENGTHS, st.integers(0, 99), st.sampled_from([None, "sdpa", "reference"]))
@example([3, 3, 2, 2, 2, 3], 0, None)
@settings(max_examples=40)
def test_equals_a_block_diagonal_mask(lengths: list[int], seed: int, backend: str | None) -> None:
    """Each sequence attends to itself alone, whatever the lengths."""
    boundaries = [0, *accumulate(lengths)]
    query, key, value = inputs(sum(lengths), seed)
    wanted = dense(query, key, value, make_pack(boundaries, "cpu"))
    assert torch.allclose(packed_attention(query, key, value, boundaries, backend=backend), wanted, atol=1e-12)


@given(LENGTHS, st.integers(0, 99), st.sampled_from([None, "sdpa", "reference"]), st.data())
@settings(max_examples=40)
def test_visibility_narrows_it(lengths: list[int], seed: int, backend: str | None, data: Any) -> None:
    """A token attends to the kinds it sees, and gets zeros if it sees none of its sequence."""
    total = sum(lengths)
    kind = torch.tensor(data.draw(st.lists(st.integers(0, 31), min_size=total, max_size=total)), dtype=torch.int32)
    few = st.lists(st.integers(-(2**31), 2**31 - 1) | st.sampled_from([0, -1]), min_size=total, max_size=total)
    sees = torch.tensor(data.draw(few), dtype=torch.int32)
    pack = make_pack([0, *accumulate(lengths)], "cpu", Visibility(kind, sees))
    query, key, value = inputs(total, seed)
    wanted = dense(query, key, value, pack)
    assert torch.allclose(packed_attention(query, key, value, pack, backend=backend), wanted, atol=1e-12)


def test_half_precision_gradients_on_a_cpu() -> None:
    """The way round SDPA's slow backward in bfloat16 is the same attention."""
    total, boundaries = 12, [0, 4, 8, 12]
    rounded = [tensor.requires_grad_() for tensor in inputs(total, 1, torch.bfloat16)]
    exact = [tensor.detach().double().requires_grad_() for tensor in rounded]
    weight = torch.randn(total, 2, 8, dtype=torch.float64)
    got = packed_attention(*rounded, boundaries)
    wanted = dense(*exact, make_pack(boundaries, "cpu"))
    assert (got - wanted).abs().max() < 2e-2
    got = torch.autograd.grad((got * weight).sum(), rounded)
    wanted = torch.autograd.grad((wanted * weight).sum(), exact)
    assert all((a - b).abs().max() < 5e-2 for a, b in zip(got, wanted, strict=True))


def test_reference_gradients() -> None:
    """Finite differences of the reference, with tokens that see little; it is what the kernels are held against."""
    kind = torch.tensor([0, 0, 1, 0, 2, 1, 1], dtype=torch.int32)
    sees = torch.tensor([1, 7, 3, 0, 4, 2, 7], dtype=torch.int32)
    pack = make_pack([0, 3, 7], "cpu", Visibility(kind, sees))
    tensors = [tensor.requires_grad_() for tensor in inputs(7, 2)]
    assert torch.autograd.gradcheck(lambda *qkv: attention_reference(*qkv, pack)[0], tensors, fast_mode=True)
    whole = make_pack([0, 3, 7], "cpu")
    assert torch.autograd.gradcheck(lambda *qkv: attention_reference(*qkv, whole), tensors, fast_mode=True)


def test_log_sum_exp() -> None:
    """The reference's second result, natural logarithm, scale included."""
    query, key, value = inputs(7, 3)
    pack = make_pack([0, 3, 7], "cpu")
    scores = torch.einsum("qhd,khd->hqk", query, key) / 8**0.5
    wanted = scores.masked_fill(~mask_of(pack), float("-inf")).logsumexp(-1)
    assert torch.allclose(attention_reference(query, key, value, pack)[1], wanted, atol=1e-12)


@given(st.lists(st.integers(1, 5 * ROWS), min_size=1, max_size=8))
@settings(max_examples=60)
def test_tiles_cover_each_token_once(lengths: list[int]) -> None:
    """Every token lies in one tile, no tile leaves its sequence, and the tiles of long sequences come first."""
    boundaries = [0, *accumulate(lengths)]
    pack = make_pack(boundaries, "cpu")
    tiles = [tuple(tile) for tile in pack.tiles.tolist()]
    owned = [token for first, _, end in tiles for token in range(first, min(first + ROWS, end))]
    assert sorted(owned) == list(range(boundaries[-1]))
    assert {(start, end) for _, start, end in tiles} == set(pairwise(boundaries))
    assert all(first % ROWS == start % ROWS and start <= first < end for first, start, end in tiles)
    spans = [end - start for _, start, end in tiles]
    assert spans == sorted(spans, reverse=True)
    assert pack.longest == max(lengths)
    assert pack.cu_seqlens.tolist() == boundaries
    assert pack.alone == (len(lengths) == 1)


@pytest.mark.parametrize("boundaries", [[], [0], [1, 3], [0, 3, 3], [0, 3, 2]])
def test_boundaries_that_are_none(boundaries: list[int]) -> None:
    """Offsets that are no offsets are refused, rather than read out of bounds on a device."""
    with pytest.raises(ValueError, match="boundaries"):
        make_pack(boundaries, "cpu")


def test_visibility_of_another_pack() -> None:
    """Kinds are given for every token."""
    few = torch.zeros(2, dtype=torch.int32)
    with pytest.raises(ValueError, match="each token"):
        make_pack([0, 3], "cpu", Visibility(few, few))


def test_unknown_backend() -> None:
    """The message names those there are; xFormers is asked for by name alone, and has no visibility."""
    query, key, value = inputs(3, 0)
    with pytest.raises(ValueError, match="triton, sdpa, cudnn, xformers, reference"):
        packed_attention(query, key, value, [0, 3], backend="flash")
    bits = torch.ones(3, dtype=torch.int32)
    with pytest.raises(ValueError, match="visibility"):
        packed_attention(query, key, value, make_pack([0, 3], "cpu", Visibility(bits, bits)), backend="xformers")


def test_every_device_and_head_has_a_block() -> None:
    """Blocks exist from compute capability 8.0 on, also for ones not yet made, and parts of a tile are equal."""
    for capability in (80, 86, 87, 89, 90, 100, 103, 120, 121, 130):
        for stage in (FORWARD, KEYS, QUERIES):
            for dim in DIMENSIONS:
                for dtype in (torch.float32, torch.bfloat16):
                    assert ROWS % block_for(stage, dim, dtype, capability).rows == 0
    blocks = [block for row in (*BLOCKS.values(), WIDE_BLOCKS) for block in row.values()]
    assert all(block.columns & (block.columns - 1) == 0 for block in blocks)


def check_one_graph(backend: str | None, packs: Sequence[Pack], attend: Callable[[Tensor, Pack], Tensor]) -> None:
    """Compiled as one whole graph each time, at most twice for all packs, attention is `attend`."""
    graphs: list[Any] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def call(query: Tensor, pack: Pack) -> Tensor:
        return packed_attention(query, query, query, pack, backend=backend) * 2

    torch.compiler.reset()
    compiled = torch.compile(call, backend=keep, fullgraph=True)
    for pack in packs:
        query = torch.randn(pack.boundaries[-1], 2, 8)
        assert torch.allclose(compiled(query, pack), attend(query, pack) * 2, atol=1e-6)
    assert len(graphs) <= 2
    torch.compiler.reset()


@pytest.mark.parametrize("backend", [None, "cudnn"])
def test_one_graph_for_all_packs(backend: str | None) -> None:
    """Without gradients a mixed pack's attention is one node too, whatever the number of requests and their lengths."""
    lengths = ([3, 4], [2, 2, 5], [9, 1, 1, 4], [6, 6])
    packs = [make_pack([0, *accumulate(some)], "cpu") for some in lengths]
    check_one_graph(backend, packs, lambda query, pack: dense(query, query, query, pack))
    query = torch.randn(12, 2, 8)
    arguments = (query, query, query, packs[-1].offsets, None, None, backend == "cudnn")
    torch.library.opcheck(grouped, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("backend", [None, "sdpa", "cudnn"])
def test_one_graph_for_all_lengths_of_a_request(backend: str | None) -> None:
    """A single request's attention is one graph, general in its length: the pack's numbers are no part of it."""

    def attend(query: Tensor, _: Pack) -> Tensor:
        heads = query[None].transpose(1, 2)
        return F.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2)[0]

    check_one_graph(backend, [make_pack([0, length], "cpu") for length in (7, 12, 30, 5)], attend)
