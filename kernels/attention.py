"""Packed variable-length attention: several sequences of different lengths in one call, no padding, no mask.

    out[i] = softmax(q[i] k[i]^T / sqrt(d)) v[i]        for each sequence i of the pack

Shapes: S = total tokens, H = heads, d = head dimension.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch.nn import functional as F


def packed_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, boundaries: Sequence[int]
) -> torch.Tensor:
    """Attention within each sequence of a pack, by one torch SDPA call per sequence.

    Args:
        query, key, value: [S, H, d], sequences one after the other.
        boundaries: num_sequences + 1 growing offsets; the first is 0, the last S ("cu_seqlens").

    Returns:
        [S, H, d], in the order of the input.
    """
    parts = [
        F.scaled_dot_product_attention(
            query[start:end].transpose(0, 1)[None],
            key[start:end].transpose(0, 1)[None],
            value[start:end].transpose(0, 1)[None],
        )[0].transpose(0, 1)
        for start, end in pairwise(boundaries)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
