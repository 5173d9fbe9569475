"""What `ops` measures: each operation on packs as the forward makes them, with random data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from kernels.attention import packed_attention
from kernels.column_mass import column_mass
from kernels.modulation import gate_residual, gate_residual_modulate, modulate
from kernels.packs import make_pack
from kernels.pooled_response import pooled_maps
from kernels.qk_norm_rope import QKNorms, qk_norm_rope
from kernels.sites import Sites, plan_reading


@dataclass(frozen=True, slots=True)
class Request:
    """Tokens of a request's text and target, and of each of its references."""

    text: int
    target: int
    references: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        return self.text + self.target + sum(self.references)


@dataclass(frozen=True, slots=True)
class Setting:
    """A model's width, and a pack. learning: the backward pass is measured too."""

    name: str
    heads: int
    dim: int
    requests: tuple[Request, ...]
    learning: bool = False

    @property
    def tokens(self) -> int:
        return sum(request.tokens for request in self.requests)

    @property
    def width(self) -> int:
        return self.heads * self.dim

    @property
    def boundaries(self) -> tuple[int, ...]:
        return tuple(accumulate((request.tokens for request in self.requests), initial=0))


def _flux(name: str, target: int, *references: int, learning: bool = False) -> Setting:
    """Requests with a target of `target` tokens and so many references of half its sides each, on FLUX.1-dev."""
    requests = tuple(Request(512, target, (target // 4,) * number) for number in references)
    return Setting(name, 24, 128, requests, learning)


def _narrow(name: str, *references: int, learning: bool = False) -> Setting:
    """FLUX's proportions on a narrow model that a CPU runs."""
    return Setting(name, 4, 32, tuple(Request(128, 1024, (256,) * number) for number in references), learning)


SETTINGS = {
    # One setting at least for each size class from 2048 to 32768 tokens that requests fall into.
    "cuda": (
        _flux("512², 1 reference", 1024, 1, learning=True),
        _flux("768², 1 reference", 2304, 1),
        _flux("1024², 0 references", 4096, 0),
        _flux("1024², 1 reference", 4096, 1),
        _flux("1024², 2 references", 4096, 2, learning=True),
        _flux("1024², 3 references", 4096, 3),
        _flux("1024², 1 and 1 references", 4096, 1, 1),
        _flux("1024², 0–3 references", 4096, 0, 1, 2, 3),
    ),
    "cpu": (_narrow("2 references", 2, learning=True), _narrow("0–3 references", 0, 1, 2, 3)),
}


@dataclass(frozen=True, slots=True)
class Case:
    """One operation on one pack.

    Attributes:
        size: as `kernels.dispatch` counts it.
        run: the operation by the name of a backend. inputs: what learns.
        moved: bytes that must be read and written, forward. moved_learning: forward and backward; 0 where not counted.
        flop: of matrix products, forward; 0 where memory is what counts.
    """

    op: str
    setting: str
    size: int
    run: Callable[[str], Tensor | tuple[Tensor | None, ...]]
    inputs: tuple[Tensor, ...]
    learning: bool = False
    moved: int = 0
    moved_learning: int = 0
    flop: int = 0


def cases(device: str, dtype: torch.dtype) -> Iterator[Case]:
    """All cases of a kind of device, one after the other: the last one's tensors can go."""
    for setting in SETTINGS[device]:
        for make in (_attention, _modulation, _qk_norm_rope, _responses):
            yield from make(setting, device, dtype)


def _fused(setting: Setting, device: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Query, key and value [S, H, d] as views of one projection."""
    return torch.randn(setting.tokens, 3, setting.heads, setting.dim, device=device, dtype=dtype).unbind(1)


def _attention(setting: Setting, device: str, dtype: torch.dtype) -> Iterator[Case]:
    query, key, value = _fused(setting, device, dtype)
    pack = make_pack(setting.boundaries, device)
    squares = sum((end - start) ** 2 for start, end in pairwise(setting.boundaries))
    yield Case(
        "attention",
        setting.name,
        pack.longest,
        lambda backend: packed_attention(query, key, value, pack, backend=backend),
        (query, key, value),
        setting.learning,
        flop=4 * setting.width * squares,
    )


def _modulation(setting: Setting, device: str, dtype: torch.dtype) -> Iterator[Case]:
    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    x, update = draw(setting.tokens, setting.width), draw(setting.tokens, setting.width)
    shift, scale, gate, *_ = draw(len(setting.requests), 6 * setting.width).chunk(6, dim=1)
    lengths = torch.tensor([request.tokens for request in setting.requests])
    rows = torch.repeat_interleave(torch.arange(len(lengths)), lengths).to(device) if len(lengths) > 1 else None
    size = x.numel() * x.element_size()
    common = (setting.name, setting.tokens)
    yield Case(
        "modulate",
        *common,
        lambda backend: modulate(x, shift, scale, rows, backend=backend),
        (x,),
        setting.learning,
        moved=2 * size,
        moved_learning=5 * size,
    )
    yield Case(
        "gate_residual",
        *common,
        lambda backend: gate_residual(x, update, gate, rows, backend=backend),
        (x, update),
        setting.learning,
        moved=3 * size,
    )
    yield Case(
        "gate_residual_modulate",
        *common,
        lambda backend: gate_residual_modulate(x, update, gate, shift, scale, rows, backend=backend),
        (x, update),
        setting.learning,
        moved=4 * size,
    )


def _qk_norm_rope(setting: Setting, device: str, dtype: torch.dtype) -> Iterator[Case]:
    """As a double block has it: text and image apart, brought into request order where there are several."""
    num_text = sum(request.text for request in setting.requests)
    fused = torch.randn(setting.tokens, 3, setting.heads, setting.dim, device=device, dtype=dtype)
    text, image = fused[:num_text], fused[num_text:]
    angles = torch.rand(setting.tokens, setting.dim // 2, device=device).repeat_interleave(2, dim=1) * 6.28
    cos, sin = angles.cos(), angles.sin()
    norms = QKNorms(*(torch.rand(setting.dim, device=device, dtype=dtype) + 0.5 for _ in range(4)))
    order = _request_order(setting).to(device) if len(setting.requests) > 1 else None
    size = fused.numel() * fused.element_size()
    yield Case(
        "qk_norm_rope",
        setting.name,
        setting.tokens,
        lambda backend: qk_norm_rope(text, image, norms, cos, sin, order, backend=backend),
        (text, image),
        setting.learning,
        moved=2 * size + 8 * cos.numel(),
    )


def _request_order(setting: Setting) -> Tensor:
    """Stream token of each token in request order."""
    text, image = 0, sum(request.text for request in setting.requests)
    parts: list[Tensor] = []
    for request in setting.requests:
        own = request.tokens - request.text
        parts += [torch.arange(text, text + request.text), torch.arange(image, image + own)]
        text, image = text + request.text, image + own
    return torch.cat(parts)


def _responses(setting: Setting, device: str, dtype: torch.dtype) -> Iterator[Case]:
    sites = [
        Sites(tuple(spans[2:]), spans[1])
        for start, request in zip(setting.boundaries, setting.requests, strict=False)
        if request.references
        for spans in [_spans(start, request, device)]
    ]
    if not sites:
        return
    reading = plan_reading(sites)
    query, key, _ = _fused(setting, device, dtype)
    # Any sums will do for the speed; these are near what attention has.
    lse = torch.full((setting.heads, setting.tokens), 9.0, device=device) + torch.rand(setting.tokens, device=device)
    tokens = reading.queries.numel() + sum(site.target.numel() for site in sites if site.target is not None)
    products = sum(row[1] * row[3] for row in reading.pairs.tolist())
    yield Case(
        "pooled_response",
        setting.name,
        setting.tokens,
        lambda backend: pooled_maps(query, key, reading, backend=backend),
        (query, key),
        setting.learning,
        moved=tokens * setting.width * query.element_size() + 4 * reading.num_maps,
    )
    yield Case(
        "column_mass",
        setting.name,
        setting.tokens,
        lambda backend: column_mass(query, key, lse, reading, backend=backend),
        (query, key),
        flop=2 * setting.width * products,
    )


def _spans(start: int, request: Request, device: str) -> list[Tensor]:
    """[1, length] token numbers of text, target and references."""
    bounds = accumulate((request.text, request.target, *request.references), initial=start)
    return [torch.arange(begin, end, device=device)[None] for begin, end in pairwise(bounds)]
