"""Where in a pack the tokens lie that response maps are read from.

Shapes: S tokens of a pack in request order, H heads, d head dimension; R requests of the same shape are read
together: n references of l_1 … l_n tokens each, a target of l tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Sites:
    """Where in a pack the tokens of R requests of the same shape lie. All numbers are places in request order.

    A token belongs to one target or one reference at most.

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
    """All sites of a pack, flattened: for torch, which gathers them at once, and for kernels, which follow the numbers.

    A *pair* is a reference and its request's target; it has one map. Pairs are ordered by group, request, reference.

    Attributes:
        queries, keys: token numbers, the sites one after the other.
        pairs: int32 [P, 5]: first entry and number in `queries`, first entry and number in `keys`, first element of the
            map among all maps.
        requests: int32 [Q, 4], requests with a target: first entry and number in `keys`, first pair and number of it.
        longest_reference, longest_target: tokens. num_maps: elements of all maps.
    """

    sites: tuple[Sites, ...]
    queries: Tensor
    keys: Tensor
    pairs: Tensor
    requests: Tensor
    longest_reference: int
    longest_target: int
    num_maps: int


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
    """What reading needs, made once for all layers."""
    queries = torch.cat([index.flatten() for site in sites for index in site.references])
    keys = torch.cat([index.flatten() for site in sites for index in site.keys])
    pairs, requests = _spans(sites)

    def table(rows: list[tuple[int, ...]], width: int) -> Tensor:
        return torch.tensor(rows, dtype=torch.int32).reshape(-1, width).to(queries.device)

    return Reading(
        sites=tuple(sites),
        queries=queries,
        keys=keys,
        pairs=table(pairs, 5),
        requests=table(requests, 4),
        longest_reference=max((pair[1] for pair in pairs), default=0),
        longest_target=max((pair[3] for pair in pairs), default=0),
        num_maps=sum(pair[3] for pair in pairs),
    )


def _spans(sites: Sequence[Sites]) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Rows of `Reading.pairs` and `Reading.requests`."""
    pairs: list[tuple[int, ...]] = []
    requests: list[tuple[int, ...]] = []
    query_start = key_start = map_start = 0
    for site in sites:
        if site.target is not None:
            number, length = site.target.shape
            starts = [
                query_start + sum(index.numel() for index in site.references[:j]) for j in range(len(site.references))
            ]
            for request in range(number):
                keys = (key_start + request * length, length)
                requests.append((*keys, len(pairs), len(site.references)))
                for start, index in zip(starts, site.references, strict=True):
                    own = index.shape[1]
                    pairs.append((start + request * own, own, *keys, map_start))
                    map_start += length
        query_start += sum(index.numel() for index in site.references)
        key_start += sum(index.numel() for index in site.keys)
    return pairs, requests


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


def read_placeholders(query: Tensor, key: Tensor, site: Sites) -> ReadTokens:
    """What `read` gives for one group, without the target's keys."""
    references = tuple(query.index_select(0, index.flatten()).unflatten(0, index.shape) for index in site.references)
    if site.placeholders is None:
        return ReadTokens(references, None, None)
    keys = key.index_select(0, site.placeholders.flatten())
    return ReadTokens(references, None, _named(keys, site.placeholders, site.shares))


def split_maps(maps: Tensor, reading: Reading, num_heads: int | None = None) -> tuple[Tensor | None, ...]:
    """All maps [elements], ordered as the pairs, → per group [R, n, l], or [R, n, H, l]; None without a target."""
    heads = () if num_heads is None else (num_heads,)
    shapes = [
        None if s.target is None else (len(s.target), len(s.references), *heads, s.target.shape[1])
        for s in reading.sites
    ]
    parts = iter(maps.split([torch.Size(shape).numel() for shape in shapes if shape is not None]))
    return tuple(None if shape is None else next(parts).reshape(shape) for shape in shapes)


def _named(keys: Tensor, sites: Tensor, shares: Tensor | None) -> Tensor:
    """Keys [R·n·D, H, d] of placeholders → their mean for each reference, [R, n, H, d]."""
    wide = keys.to(torch.promote_types(keys.dtype, torch.float32)).unflatten(0, sites.shape)
    return wide.squeeze(2) if shares is None else (wide * shares[..., None, None].to(wide.dtype)).sum(2)
