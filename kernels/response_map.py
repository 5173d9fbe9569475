"""How strongly references answer to target tokens, and placeholders to references, without an attention matrix.

    map_i[x]      = mean_q(Q_i[q]) · K[x] / sqrt(d)          x over the target's l tokens (DreamO Eq. 2)
    A_i[q, k]     = softmax_k(Q_i[q] · R_k / sqrt(d))        k over the n placeholders    (DreamO Eq. 4)

Q_i are the queries of reference i, K the keys of the target, R_k the key of placeholder k. The mean over queries is
taken before the product, with which it commutes: O((l_i + l)·H·d) time and memory instead of O(l_i·l·H).

Shapes: as in `kernels.sites`. Everything is summed in float32 or wider. Equation 2 is `kernels.pooled_response`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.pooled_response import Heads, chosen, pooled_maps, pooled_response
from kernels.sites import Reading, ReadTokens, Sites, plan_reading, read, read_placeholders

__all__ = [
    "GroupResponse",
    "Heads",
    "ReadTokens",
    "Reading",
    "Sites",
    "placeholder_response",
    "plan_reading",
    "pooled_response",
    "read",
    "respond",
]


@dataclass(frozen=True, slots=True)
class GroupResponse:
    """What one block's queries and keys say of a group of requests of the same shape.

    Attributes:
        route: [R, n, l], or [R, n, H, l] for `per_head`; None where no map is wanted.
        holder: n tensors [R, l_j, n] that sum to 1 over n; empty where no response is wanted.
    """

    route: Tensor | None
    holder: tuple[Tensor, ...]


def placeholder_response(
    references: Sequence[Tensor], placeholders: Tensor, *, scaled: bool = True
) -> tuple[Tensor, ...]:
    """The inside of equation 4: which placeholder each query of a reference answers to.

    Products are averaged over heads before the softmax. The paper shows no 1/sqrt(d): `scaled=False` leaves it out.

    Args:
        references: n tensors [R, l_j, H, d]. placeholders: [R, n, H, d].

    Returns:
        n tensors [R, l_j, n] that sum to 1 over n; float32 or wider.
    """
    wide = torch.promote_types(placeholders.dtype, torch.float32)
    num_heads, head_dim = placeholders.shape[-2:]
    scale = (head_dim**-0.5 if scaled else 1.0) / num_heads
    keys = (placeholders.to(wide) * scale).flatten(2).mT
    return tuple((query.to(wide).flatten(2) @ keys).softmax(-1) for query in references)


def respond(
    query: Tensor,
    key: Tensor,
    reading: Reading,
    heads: Heads = "mean",
    *,
    scaled: bool = True,
    backend: str | None = None,
) -> tuple[GroupResponse, ...]:
    """Both equations for all groups of a pack.

    Args:
        query, key: [S, H, d] in request order, any strides but the last, which is 1.
        backend: of equation 2, "triton" or "reference"; otherwise `kernels.dispatch` chooses.
    """
    backend = backend or chosen(query)
    if backend == "reference":  # One gather of queries and one of keys serve both.
        return tuple(
            GroupResponse(
                route=None if seen.target is None else pooled_response(seen.references, seen.target, heads),
                holder=_holder(seen, scaled),
            )
            for seen in read(query, key, reading)
        )
    routes = pooled_maps(query, key, reading, heads, backend=backend)
    return tuple(
        GroupResponse(route, () if site.placeholders is None else _holder(read_placeholders(query, key, site), scaled))
        for route, site in zip(routes, reading.sites, strict=True)
    )


def _holder(seen: ReadTokens, scaled: bool) -> tuple[Tensor, ...]:
    if seen.placeholders is None:
        return ()
    return placeholder_response(seen.references, seen.placeholders, scaled=scaled)
