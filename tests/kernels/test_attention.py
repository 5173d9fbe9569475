"""Packed attention against one dense attention with a block-diagonal mask."""

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from kernels.attention import packed_attention


@given(st.lists(st.integers(1, 4), min_size=1, max_size=6), st.integers(0, 99))
@example([3, 3, 2, 2, 2, 3], 0)
@settings(max_examples=40, deadline=None)
def test_equals_a_block_diagonal_mask(lengths: list[int], seed: int) -> None:
    """Each sequence attends to itself alone, whatever the lengths."""
    torch.manual_seed(seed)
    total = sum(lengths)
    query, key, value = (torch.randn(total, 2, 8, dtype=torch.float64) for _ in range(3))
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    mask = owner[:, None] == owner[None, :]
    wanted = F.scaled_dot_product_attention(
        query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1), attn_mask=mask
    ).transpose(0, 1)
    boundaries = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    assert torch.allclose(packed_attention(query, key, value, boundaries), wanted, atol=1e-12)
