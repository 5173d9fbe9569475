"""Low precision for the blocks' linear layers, opt-in: float8 products for speed, int8 weights for small GPUs.

Both keep one scale per output row of a weight. They are drifts from the released model, measured in
`tests/benchmarks/precision.py`; nothing here runs unless it is asked for.

Shapes: N tokens of all requests, in and out a layer's features.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal, NoReturn, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.errors import WeightsError
from model.network import fused
from model.transformer import Network

Precision = Literal["fp8", "int8"]

E4M3_MAX = 448.0
"""Largest value of float8_e4m3fn; what exceeds it would become NaN, not infinity."""

_DOUBLE = ("attn.to_out.0", "attn.to_add_out", "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")
_SINGLE = ("proj_mlp", "proj_out")
_DOUBLE_MODULATION = ("norm1.linear", "norm1_context.linear")
_SINGLE_MODULATION = ("norm.linear",)
_IMAGE_QKV = ("attn.to_qkv", ("attn.to_q", "attn.to_k", "attn.to_v"))
_TEXT_QKV = ("attn.to_added_qkv", ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"))


class Fp8Linear(nn.Module):
    """A linear layer whose product is made in float8 (e4m3): [N, in] → [N, out] in the input's dtype.

    The weight is rounded once, with a float32 scale per output row; activations at each call, with one per token. The
    product accumulates in float32 (on CUDA with its fast accumulator) and leaves as bfloat16.

    Raises:
        WeightsError: `precision_unavailable`: the device or the layer's sizes do not allow it.
    """

    weight: nn.Parameter
    scale: Tensor
    bias: nn.Parameter | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        check_device("fp8", linear.weight.device)
        _check_sizes(linear)
        weight, scale = _rows_to_e4m3(linear.weight.detach())
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("scale", scale.t())  # [1, out]
        self.bias = _resting(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        rows, scales = _rows_to_e4m3(x)
        product = torch._scaled_mm(  # pyright: ignore[reportPrivateUsage] - torch has no public name for it in 2.11
            rows,
            self.weight.t(),
            scale_a=scales,
            scale_b=self.scale,
            bias=None if self.bias is None else self.bias.to(torch.bfloat16),
            out_dtype=torch.bfloat16,
            use_fast_accum=x.is_cuda,
        )
        return product.to(x.dtype)


class Int8Linear(nn.Module):
    """A linear layer that keeps its weight in int8 and multiplies in the input's dtype: [N, in] → [N, out].

    Symmetric, one scale per output row: |weight − kept| ≤ scale / 2. The scale is a number of the weight's own dtype,
    so what comes back is rounded once. The weight exists in full for the length of a call.
    """

    weight: nn.Parameter
    scale: Tensor
    bias: nn.Parameter | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        largest = weight.float().abs().amax(1, keepdim=True)
        scale = (largest / 127).to(weight.dtype).clamp(min=torch.finfo(weight.dtype).tiny)
        steps = (weight.float() / scale.float()).round().clamp(-127, 127)
        self.weight = nn.Parameter(steps.to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale)  # [out, 1]
        self.bias = _resting(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


class Absorbed(nn.Module):
    """Stands where a projection was that now is part of a fused one, and holds nothing."""

    def forward(self, _: Tensor) -> NoReturn:
        raise RuntimeError("this projection is part of a fused one: run the network that `quantized` returned")


def quantized(network: Network, precision: Precision) -> Network:
    """The network with its blocks' large linear layers in low precision; fuses q, k and v first if nobody has.

    Changes the model: layers are replaced where they stand, and what a fused projection was made of is released
    (`Absorbed`). The given network no longer runs; let go of it, for it holds the old projections. Replaced are the
    blocks' projections and feed-forwards; under int8 also their modulation layers, a quarter of FLUX's weights, which
    under fp8 stay: they run once per request. Embedders and final layers always stay.

    Raises:
        WeightsError: `precision_unavailable`: the device or a layer's sizes do not allow it. `adapter_attached`: a
            layer is no plain linear one, so an adapter is on it or it has been replaced. The model is unchanged then.
    """
    model = network.model
    check_device(precision, model.device)
    for name in _names(network, precision):
        _check_layer(name, model.get_submodule(name), precision)
    network = network if network.projections else fused(model)
    kind = Fp8Linear if precision == "fp8" else Int8Linear
    for name in _names(network, precision, projections=False):
        model.set_submodule(name, kind(cast("nn.Linear", model.get_submodule(name))))
    return replace(network, projections=tuple(_requantized(network, kind)))


def check_device(precision: Precision, device: torch.device, capability: tuple[int, int] | None = None) -> None:
    """Refuse a device that cannot run a precision. To be asked of the serving device before a model is moved there.

    Args:
        capability: compute capability of a CUDA device; None asks it.

    Raises:
        WeightsError: `precision_unavailable`.
    """
    if precision == "int8" or device.type == "cpu":
        return
    if device.type == "cuda" and (capability or torch.cuda.get_device_capability(device)) >= (8, 9):
        return
    raise WeightsError(
        "precision_unavailable",
        "fp8 needs a GPU of compute capability 8.9 or newer (Ada, Hopper, Blackwell): choose int8, or full precision",
    )


def held_bytes(network: Network) -> int:
    """Bytes of the weights that a network keeps alive, each storage counted once and whole."""
    modules = [network.model, *(layer for projections in network.projections for layer in projections)]
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def _resting(bias: nn.Parameter | None) -> nn.Parameter | None:
    """The same values, out of any graph of gradients: there is none through rounded weights."""
    return None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)


def _rows_to_e4m3(x: Tensor) -> tuple[Tensor, Tensor]:
    """[N, in] → e4m3 [N, in] and float32 scales [N, 1], each row's largest value becoming `E4M3_MAX`."""
    wide = x.float()
    scales = (wide.abs().amax(1, keepdim=True) / E4M3_MAX).clamp(min=torch.finfo(torch.float32).tiny)
    return (wide / scales).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scales


def _blocks(network: Network) -> Iterator[tuple[str, bool]]:
    """Path of each block, in the order of `Network.projections`, and whether it is a double block."""
    for number in range(len(network.model.transformer_blocks)):
        yield f"transformer_blocks.{number}", True
    for number in range(len(network.model.single_transformer_blocks)):
        yield f"single_transformer_blocks.{number}", False


def _names(network: Network, precision: Precision, *, projections: bool = True) -> Iterator[str]:
    """Paths of the layers that a precision replaces; with `projections` also those that the fused ones absorb."""
    for block, double in _blocks(network):
        names = _DOUBLE if double else _SINGLE
        if precision == "int8":
            names += _DOUBLE_MODULATION if double else _SINGLE_MODULATION
        if projections:
            names += _IMAGE_QKV[1] + (_TEXT_QKV[1] if double else ())
        yield from (f"{block}.{name}" for name in names)


def _requantized(network: Network, kind: type[Fp8Linear | Int8Linear]) -> Iterator[tuple[nn.Module, ...]]:
    """Each block's projections in low precision, registered under diffusers' names for them; their parts released."""
    model = network.model
    for (block, double), layers in zip(_blocks(network), network.projections, strict=True):
        made: list[nn.Module] = []
        for (name, parts), layer in zip((_TEXT_QKV, _IMAGE_QKV) if double else (_IMAGE_QKV,), layers, strict=True):
            made.append(kind(cast("nn.Linear", layer)))
            model.set_submodule(f"{block}.{name}", made[-1])
            for part in parts:
                model.set_submodule(f"{block}.{part}", Absorbed())
        yield tuple(made)


def _check_layer(name: str, layer: nn.Module, precision: Precision) -> None:
    """Refuse what low precision would lose or cannot do."""
    if type(layer) is not nn.Linear:
        raise WeightsError(
            "adapter_attached",
            f"{name} is a {type(layer).__name__}, not a plain linear layer: fuse or remove its adapter first",
        )
    if precision == "fp8":
        _check_sizes(layer)


def _check_sizes(linear: nn.Linear) -> None:
    if linear.in_features % 16 or linear.out_features % 16:
        raise WeightsError(
            "precision_unavailable",
            f"fp8 needs layers whose sizes are multiples of 16, not {linear.in_features} × {linear.out_features}: "
            "choose int8, or full precision",
        )
