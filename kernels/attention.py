"""Packed variable-length attention: several sequences of different lengths in one call, no padding, no mask.

    out[i] = softmax(q[i] k[i]ᵀ / √d) v[i]        lse[i] = log Σ exp(q[i] k[i]ᵀ / √d)        for each sequence i

Backward, with P the softmax and D = rowsum(dO ∘ O) - dlse:
dV = Pᵀ dO,  dS = P ∘ (dO Vᵀ - D),  dQ = dS K / √d,  dK = dSᵀ Q / √d.

Shapes: S tokens of R sequences of s tokens, H heads, d head dimension (a power of two from 16 to 128 in Triton).
Forward: 4·H·d·Σs² FLOP; 4·S·H·d elements (q, k, v, out) and 4·S·H bytes of lse moved. Backward: 7 products of that
size where the forward has 2 (5, and 2 again, since dQ and dK, dV come of kernels of their own: no atomics, the same
bits every time); 2·S·H·d elements for D, 4·S·H·d + 2·S·H·d for dK and dV, 4·S·H·d + S·H·d for dQ.

After FlashAttention-2 (Dao 2023): online softmax in base 2, scores never leave the chip, the log-sum-exp is kept.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from itertools import groupby, pairwise
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels.dispatch import choose
from kernels.flash import DIMENSIONS, attention_backward_triton, attention_triton
from kernels.packs import Pack, Visibility, make_pack

__all__ = ["Pack", "Visibility", "make_pack", "packed_attention"]


def attention_reference(query: Tensor, key: Tensor, value: Tensor, pack: Pack) -> tuple[Tensor, Tensor]:
    """The equation, sequence by sequence, in float32 or wider: out [S, H, d] and lse [H, S]."""
    wide = torch.promote_types(query.dtype, torch.float32)
    outs: list[Tensor] = []
    sums: list[Tensor] = []
    for start, end in pairwise(pack.boundaries):
        q, k, v = (tokens[start:end].to(wide).transpose(0, 1) for tokens in (query, key, value))
        scores = q @ k.mT * q.shape[-1] ** -0.5
        if pack.visibility is not None:
            scores = scores.masked_fill(~pack.visibility.mask(start, end), float("-inf"))
        sums.append(scores.logsumexp(-1))
        weights = (scores - sums[-1].masked_fill(sums[-1].isneginf(), 0.0)[..., None]).exp()
        outs.append((weights @ v).transpose(0, 1))
    return torch.cat(outs).to(query.dtype), torch.cat(sums, 1)


# Triton as operators of torch, which torch.compile passes over without a graph break.


@torch.library.custom_op("dreamserve::packed_attention", mutates_args=())
def flash(
    query: Tensor, key: Tensor, value: Tensor, tiles: Tensor, kind: Tensor | None, sees: Tensor | None
) -> tuple[Tensor, Tensor]:
    """out [S, H, d] and lse [H, S] by Triton, both differentiable once. `tiles` are a pack's."""
    return attention_triton(query, key, value, (tiles, kind, sees))


@flash.register_fake
def _(query: Tensor, *_: Tensor | None) -> tuple[Tensor, Tensor]:
    num_tokens, num_heads = query.shape[:2]
    return query.new_empty(query.shape), query.new_empty((num_heads, num_tokens), dtype=torch.float32)


@torch.library.custom_op("dreamserve::packed_attention_backward", mutates_args=())
def flash_backward(
    grad: Tensor,
    grad_lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    tiles: Tensor,
    kind: Tensor | None,
    sees: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    return attention_backward_triton(grad, grad_lse, query, key, value, out, lse, (tiles, kind, sees))


@flash_backward.register_fake
def _(_grad: Tensor, _grad_lse: Tensor, query: Tensor, *_: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), query.new_empty(query.shape), query.new_empty(query.shape)


def _keep(ctx: Any, inputs: tuple[Tensor | None, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, *where = inputs
    ctx.save_for_backward(query, key, value, *output, *where)


def _differentiate(ctx: Any, grad: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    return (*flash_backward(grad, grad_lse, *ctx.saved_tensors), None, None, None)


flash.register_autograd(_differentiate, setup_context=_keep)


# Backends: [S, H, d] × 3, pack → [S, H, d].


def _triton(query: Tensor, key: Tensor, value: Tensor, pack: Pack) -> Tensor:
    seen = pack.visibility
    return flash(query, key, value, pack.tiles, seen and seen.kind, seen and seen.sees)[0]


def _reference(query: Tensor, key: Tensor, value: Tensor, pack: Pack) -> Tensor:
    return attention_reference(query, key, value, pack)[0]


def _sdpa(query: Tensor, key: Tensor, value: Tensor, pack: Pack, *, cudnn: bool = False) -> Tensor:
    plain = pack.alone and pack.visibility is None
    if torch.compiler.is_compiling() and (cudnn or not plain) and not _learning(query, key, value):
        seen = pack.visibility
        return grouped(query, key, value, pack.offsets, seen and seen.kind, seen and seen.sees, cudnn)
    with _order(cudnn):
        if plain:
            return _attend(*(tokens[None].transpose(1, 2) for tokens in (query, key, value))).transpose(1, 2)[0]
        return _by_length(query, key, value, pack.boundaries, pack.visibility)


def _cudnn(query: Tensor, key: Tensor, value: Tensor, pack: Pack) -> Tensor:
    return _sdpa(query, key, value, pack, cudnn=True)


@torch.library.custom_op("dreamserve::grouped_attention", mutates_args=())
def grouped(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor,
    kind: Tensor | None,
    sees: Tensor | None,
    cudnn: bool,
) -> Tensor:
    """torch's attention as one node of a graph, whatever the lengths. For inference: it has no gradient.

    Args:
        offsets: a pack's boundaries on the host.
    """
    visibility = None if kind is None or sees is None else Visibility(kind, sees)
    with _order(cudnn):
        return _by_length(query, key, value, offsets.tolist(), visibility).contiguous()


@grouped.register_fake
def _(query: Tensor, *_: Tensor | None) -> Tensor:
    return query.new_empty(query.shape)


def _order(cudnn: bool) -> AbstractContextManager[Any]:
    """Torch's own order of backends, or cuDNN first: torch asks it late, though it is the fastest on Hopper."""
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(order, set_priority=True) if cudnn else nullcontext()


def _by_length(
    query: Tensor, key: Tensor, value: Tensor, boundaries: Sequence[int], visibility: Visibility | None
) -> Tensor:
    """Neighbours of equal length share one call; sort a batch by length to make the most of it."""
    lengths = [end - start for start, end in pairwise(boundaries)]
    parts: list[Tensor] = []
    start = 0
    for length, group in groupby(lengths):
        count = len(list(group))
        end = start + count * length

        def batch(tokens: Tensor, begin: int = start, stop: int = end, num: int = count) -> Tensor:
            return tokens[begin:stop].unflatten(0, (num, -1)).transpose(1, 2)

        masks = None
        if visibility is not None:
            masks = torch.stack([visibility.mask(at, at + length) for at in range(start, end, length)])[:, None]
        attended = _attend(batch(query), batch(key), batch(value), masks)
        parts.append(attended.transpose(1, 2).flatten(0, 1))
        start = end
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _xformers(query: Tensor, key: Tensor, value: Tensor, pack: Pack) -> Tensor:
    if pack.visibility is not None:
        raise ValueError("xformers masks whole blocks: it has no visibility within a sequence")
    ops: Any = importlib.import_module("xformers.ops")
    mask = _block_diagonal(pack.boundaries, query.device)
    return ops.memory_efficient_attention(query[None], key[None], value[None], attn_bias=mask)[0]


@lru_cache(maxsize=8)
def _block_diagonal(boundaries: tuple[int, ...], device: torch.device) -> Any:
    """xFormers' mask, kept because making one copies the boundaries to the device."""
    masks: Any = importlib.import_module("xformers.ops.fmha.attn_bias")
    lengths = [end - start for start, end in pairwise(boundaries)]
    return masks.BlockDiagonalMask.from_seqlens(lengths).to(device)


_BACKENDS: Final[Mapping[str, Callable[[Tensor, Tensor, Tensor, Pack], Tensor]]] = {
    "triton": _triton,
    "sdpa": _sdpa,
    "cudnn": _cudnn,
    "xformers": _xformers,
    "reference": _reference,
}

_SHORT: Final = 512
"""Tokens up to which keeping whole attention matrices for the backward pass is cheaper than SDPA's on a CPU."""


def _attend(query: Tensor, key: Tensor, value: Tensor, masks: Tensor | None = None) -> Tensor:
    """[n, H, s, d]: SDPA, except where it is slow: its backward in bfloat16 on a CPU.

    There, 32 sequences of 129 tokens and 6 heads of 32 take 9 + 52 ms (forward + backward) on one thread; written out,
    with the softmax in float32 as SDPA has it, 5 + 9 ms.
    """
    half_on_cpu = query.device.type == "cpu" and query.dtype == torch.bfloat16
    if masks is not None or not (_learning(query) and half_on_cpu and query.shape[-2] <= _SHORT):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=masks)
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    return scores.softmax(-1, dtype=torch.float32).to(value.dtype) @ value


def _learning(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, pack: Pack | Sequence[int], *, backend: str | None = None
) -> Tensor:
    """Attention within each sequence of a pack.

    Args:
        query, key, value: [S, H, d] with any strides but the last, which is 1: views of a fused projection will do.
        pack: or its boundaries, where it is not worth making one beforehand.
        backend: "triton", "sdpa" (torch), "cudnn" (torch, cuDNN first), "xformers" or "reference"; None leaves the
            choice to `kernels.dispatch`.

    Returns:
        [S, H, d], in the order of the input.

    Raises:
        ValueError: there is no such backend, or it cannot do this.
    """
    pack = pack if isinstance(pack, Pack) else make_pack(pack, query.device)
    if backend is None:
        backend = choose("attention", query, size=pack.longest, gradient=_learning(query, key, value))
        if (backend == "triton" and query.shape[-1] not in DIMENSIONS) or (backend == "xformers" and pack.visibility):
            backend = "sdpa"
    if backend not in _BACKENDS:
        raise ValueError(f"attention has no backend {backend!r}; there are {', '.join(_BACKENDS)}")
    return _BACKENDS[backend](query, key, value, pack)
