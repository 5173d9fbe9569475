"""Packed variable-length attention: several sequences of different lengths in one call, no padding, no mask.

    out[i] = softmax(q[i] k[i]^T / sqrt(d)) v[i]        for each sequence i of the pack

Shapes: S = total tokens, H = heads, d = head dimension.
"""

from collections.abc import Sequence
from itertools import groupby, pairwise

import torch
from torch.nn import functional as F


def packed_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, boundaries: Sequence[int]
) -> torch.Tensor:
    """Attention within each sequence of a pack, through torch SDPA.

    Neighbours of equal length share one call; sort a batch by length to make the most of it.

    Args:
        query, key, value: [S, H, d], sequences one after the other.
        boundaries: num_sequences + 1 growing offsets; the first is 0, the last S ("cu_seqlens").

    Returns:
        [S, H, d], in the order of the input.
    """
    lengths = [end - start for start, end in pairwise(boundaries)]
    parts: list[torch.Tensor] = []
    start = 0
    for length, group in groupby(lengths):
        count = len(list(group))
        end = start + count * length

        def batch(tokens: torch.Tensor, begin: int = start, stop: int = end, num: int = count) -> torch.Tensor:
            return tokens[begin:stop].unflatten(0, (num, -1)).transpose(1, 2)

        attended = _attend(batch(query), batch(key), batch(value))
        parts.append(attended.transpose(1, 2).flatten(0, 1))
        start = end
    return parts[0] if len(parts) == 1 else torch.cat(parts)


_SHORT = 512
"""Tokens up to which keeping whole attention matrices for the backward pass is cheaper than SDPA's on a CPU."""


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """[n, H, s, d]: SDPA, except where it is slow: its backward in bfloat16 on a CPU.

    There, 32 sequences of 129 tokens and 6 heads of 32 take 9 + 52 ms (forward + backward) on one thread; written out,
    with the softmax in float32 as SDPA has it, 5 + 9 ms.
    """
    learning = torch.is_grad_enabled() and query.requires_grad
    half_on_cpu = query.device.type == "cpu" and query.dtype == torch.bfloat16
    if not (learning and half_on_cpu and query.shape[-2] <= _SHORT):
        return F.scaled_dot_product_attention(query, key, value)
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    return scores.softmax(-1, dtype=torch.float32).to(value.dtype) @ value
