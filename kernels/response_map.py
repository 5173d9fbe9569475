"""How strongly references answer to target tokens, and placeholders to references, without an attention matrix.

    map_i[x]      = mean_q(Q_i[q]) · K[x] / sqrt(d)          x over the target's l tokens (DreamO Eq. 2)
    A_i[q, k]     = softmax_k(Q_i[q] · R_k / sqrt(d))        k over the n placeholders    (DreamO Eq. 4)

Q_i are the queries of reference i, K the keys of the target, R_k the key of placeholder k. The mean over queries is
taken before the product, with which it commutes: O((l_i + l)·H·d) time and memory instead of O(l_i·l·H).

Shapes: S tokens of a pack in request order, H heads, d head dimension; R requests of the same shape are read
together: n references of l_1 … l_n tokens each, a target of l tokens. Everything is summed in float32 or wider.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Heads = Literal["mean", "sum", "per_head"]
"""What becomes of the heads' maps: their mean (the default), their sum, or one map each."""


@dataclass(frozen=True, slots=True)
class Sites:
    """Where in a pack the tokens of R requests of the same shape lie. All numbers are places in request order.

    Attributes:
        references: per reference of a request, [R, l_j].
        target: [R, l]; None where no map is wanted.
        placeholders: [R, n, D], up to D text tokens name each reference; None where no response is wanted.
        shares: [R, n, D] float64, what each of them counts: 1 / their number, 0 for filling; None where D is 1.
    """

    references: tuple[Tensor, ...]
    target: Tensor | None = None
    placeholders: Tensor | None = None
    shares: Tensor | None = None

    @property
    def keys(self) -> tuple[Tensor, ...]:
        """The sites that are read from the keys."""
        return tuple(site for site in (self.target, self.placeholders) if site is not None)


@dataclass(frozen=True, slots=True)
class Reading:
    """All sites of a pack, flattened, so that one gather of queries and one of keys fetch them.

    Attributes:
        queries, keys: token numbers, the sites one after the other.
    """

    sites: tuple[Sites, ...]
    queries: Tensor
    keys: Tensor


@dataclass(frozen=True, slots=True)
class ReadTokens:
    """Queries and keys of R requests of the same shape.

    Attributes:
        references: per reference of a request, its queries [R, l_j, H, d].
        target: keys [R, l, H, d]. placeholders: mean key of each reference's placeholders [R, n, H, d], summed wide.
    """

    references: tuple[Tensor, ...]
    target: Tensor | None
    placeholders: Tensor | None


def plan_reading(sites: Sequence[Sites]) -> Reading:
    """What `read` needs, made once for all layers."""
    queries = [index.flatten() for site in sites for index in site.references]
    keys = [index.flatten() for site in sites for index in site.keys]
    return Reading(tuple(sites), torch.cat(queries), torch.cat(keys))


def read(query: Tensor, key: Tensor, reading: Reading) -> tuple[ReadTokens, ...]:
    """Fetch the tokens of each group of `reading.sites` from query and key [S, H, d]."""
    query_sizes = [index.numel() for site in reading.sites for index in site.references]
    key_sizes = [index.numel() for site in reading.sites for index in site.keys]
    queries = iter(query.index_select(0, reading.queries).split(query_sizes))
    keys = iter(key.index_select(0, reading.keys).split(key_sizes))
    return tuple(
        ReadTokens(
            references=tuple(next(queries).unflatten(0, index.shape) for index in site.references),
            target=None if site.target is None else next(keys).unflatten(0, site.target.shape),
            placeholders=None if site.placeholders is None else _named(next(keys), site.placeholders, site.shares),
        )
        for site in reading.sites
    )


def pooled_response(references: Sequence[Tensor], target: Tensor, heads: Heads = "mean") -> Tensor:
    """Equation 2 averaged over each reference's queries.

    Args:
        references: n tensors [R, l_j, H, d]. target: [R, l, H, d].

    Returns:
        [R, n, l], or [R, n, H, l] for `per_head`; float32 or wider.
    """
    wide = torch.promote_types(target.dtype, torch.float32)
    num_heads, head_dim = target.shape[-2:]
    pooled = torch.stack([query.mean(1, dtype=wide) for query in references], 1) * head_dim**-0.5
    if heads == "per_head":
        return torch.einsum("rnhd,rlhd->rnhl", pooled, target.to(wide))
    # The heads' products add up in one product over all H·d channels.
    share = 1 / num_heads if heads == "mean" else 1.0
    return (pooled * share).flatten(2) @ target.to(wide).flatten(2).mT


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


def _named(keys: Tensor, sites: Tensor, shares: Tensor | None) -> Tensor:
    """Keys [R·n·D, H, d] of placeholders → their mean for each reference, [R, n, H, d]."""
    wide = keys.to(torch.promote_types(keys.dtype, torch.float32)).unflatten(0, sites.shape)
    return wide.squeeze(2) if shares is None else (wide * shares[..., None, None].to(wide.dtype)).sum(2)
