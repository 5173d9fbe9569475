"""Adapter files: which of the released ones belong together, their formats, and the rule by which they are fused.

An adapter changes a weight W [out, in] by scale · B A with A [rank, in], B [out, rank]. DreamO ships its adapters in
the flattened XLabs naming (`double_blocks_0_processor.qkv_lora1.down.weight`), with fused q, k, v; the SFT, DPO and
Turbo adapters come in diffusers' own naming, others in the namings of `layer_names`. All become a mapping from
diffusers module names to pairs, and whatever a file holds beside them is told.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from model.errors import WeightsError
from model.spec import Version
from model.weights.layer_names import Layer, layer_of

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class AdapterFile:
    """One file of a stack: its path in the DreamO directory and the weight it is fused with."""

    name: str
    path: str
    weight: float


@dataclass(frozen=True, slots=True)
class LowRank:
    """One weight's change: scale · up down, with down [rank, in], up [out, rank]; scale is alpha / rank."""

    down: torch.Tensor
    up: torch.Tensor
    scale: float = 1.0

    def delta(self, weight: float, dtype: torch.dtype) -> torch.Tensor:
        """The change at an adapter weight for a base weight of `dtype`: [out, in] in that dtype.

        Both factors are first rounded to `dtype` (peft stores an adapter in its base's dtype); the product and the
        scaling are float32, rounded once.
        """
        up, down = self.up.to(dtype).float(), self.down.to(dtype).float()
        return ((up @ down) * (weight * self.scale)).to(dtype)


@dataclass(frozen=True, slots=True)
class Adapter:
    """A file read: changes by diffusers module name, the embedding tensors in it, and the keys nobody used."""

    source: str
    changes: Mapping[str, LowRank]
    embeddings: Mapping[str, torch.Tensor]
    unused: tuple[str, ...] = ()


MAIN = "dreamo.safetensors"
TURBO = "diffusion_pytorch_model.safetensors"
EMBEDDINGS = ("dreamo_task_embedding", "dreamo_idx_embedding", "dreamo_t5_embedding")
_Scale = Callable[[str, int], float]
"""Of a module's change, by its name and rank."""


def stack(version: Version, *, turbo: bool) -> tuple[AdapterFile, ...]:
    """The files of a version, in fusing order with their released weights (dreamo_pipeline.py)."""
    if version == "main":
        return (AdapterFile("dreamo", MAIN, 1.0),)
    return (
        AdapterFile("dreamo", MAIN, 1.0),
        AdapterFile("cfg", "dreamo_cfg_distill.safetensors", 1.0),
        *((AdapterFile("turbo", TURBO, 1.0),) if turbo else ()),
        *(
            (
                AdapterFile("sft", "v1.1/dreamo_sft_lora.safetensors", 1.0),
                AdapterFile("dpo", "v1.1/dreamo_dpo_lora.safetensors", 1.25),
            )
            if version == "v1.1"
            else (
                AdapterFile("quality_pos", "dreamo_quality_lora_pos.safetensors", 0.15),
                AdapterFile("quality_neg", "dreamo_quality_lora_neg.safetensors", -0.8),
            )
        ),
    )


def read_adapter(file: Path) -> Adapter:
    """Read a file in any format.

    Raises:
        WeightsError: `weights_missing`, `weights_format` (not safetensors, a DoRA, no adapter in it, or a layer twice),
            `weights_key_missing` (half of a pair), `weights_shape` (a fused qkv of other parts than q, k and v).
    """
    if not file.is_file():
        raise WeightsError("weights_missing", f"{file} is missing: put the released DreamO files there")
    if file.suffix != ".safetensors":
        raise WeightsError("weights_format", f"{file}: only safetensors files are loaded")
    try:
        state = load_file(file)
        stated = _stated_scale(file)
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError) as error:
        raise WeightsError("weights_format", f"{file} is not a whole safetensors file: {error}") from error
    if any("dora_scale" in key or "lora_magnitude_vector" in key for key in state):
        raise WeightsError("weights_format", f"{file} is a DoRA, which also scales weights: only LoRA can be read")
    named = {key: key.removesuffix(".weight") for key in state}
    embeddings = {name: state.pop(key) for key, name in named.items() if name in EMBEDDINGS}
    if any(_XLABS.search(key) for key in state):
        changes, unused = _from_xlabs(file.name, state)
    else:
        changes, unused = _from_layers(file.name, state, stated)
    if not changes:
        raise WeightsError("weights_format", f"{file} holds no adapter for a FLUX transformer")
    return Adapter(str(file), changes, embeddings, unused)


def fuse(weights: Mapping[str, torch.Tensor], adapters: Sequence[tuple[Adapter, float]]) -> dict[str, torch.Tensor]:
    """Weights after fusing, for the weights that change; the input is left alone.

    By the released rule: adapter by adapter in order, each change rounded to the weight's dtype, then added. Equal
    to peft 0.15's merge bit for bit in bfloat16; summing first and rounding once is not.

    Args:
        weights: transformer state dict, `<module>.weight` → [out, in].
        adapters: (adapter, weight) in fusing order.

    Raises:
        WeightsError: `weights_key_missing` for a module the transformer lacks, `weights_shape` for one of another
            size; both name file and module.
    """
    fused: dict[str, torch.Tensor] = {}
    for adapter, weight in adapters:
        for module, change in adapter.changes.items():
            key = f"{module}.weight"
            base = _fitting(adapter.source, module, change, fused.get(key, weights.get(key)))
            fused[key] = base + change.delta(weight, base.dtype)
    return fused


def _fitting(source: str, module: str, change: LowRank, base: torch.Tensor | None) -> torch.Tensor:
    """The base weight, once it is known that the change fits it."""
    if base is None:
        raise WeightsError(
            "weights_key_missing",
            f"{source} changes {module}, which this transformer does not have: is it made for another base model?",
        )
    shape = (change.up.shape[0], change.down.shape[1])
    if shape != tuple(base.shape) or change.up.shape[1] != change.down.shape[0]:
        raise WeightsError(
            "weights_shape",
            f"{source}: the change of {module} is {tuple(change.up.shape)} x {tuple(change.down.shape)}, "
            f"but the weight is {tuple(base.shape)}: is it made for another base model?",
        )
    return base


_XLABS = re.compile(r"(double|single)_blocks[_.](\d+).*?(qkv|proj)_lora([12]?)\.(down|up)\.weight$")

_XLABS_TARGETS: Mapping[tuple[str, str, str], tuple[str, ...]] = {
    ("double", "qkv", "1"): ("attn.to_q", "attn.to_k", "attn.to_v"),
    ("double", "qkv", "2"): ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    ("double", "proj", "1"): ("attn.to_out.0",),
    ("double", "proj", "2"): ("attn.to_add_out",),
    ("single", "qkv", ""): ("attn.to_q", "attn.to_k", "attn.to_v"),
    ("single", "proj", ""): ("proj_out",),
}


def _from_xlabs(source: str, state: Mapping[str, torch.Tensor]) -> tuple[dict[str, LowRank], tuple[str, ...]]:
    """XLabs names, flattened or not; only what the pattern names matters, so the middle of a key is free."""
    pairs: dict[tuple[str, int, str, str], dict[str, torch.Tensor]] = {}
    unused: list[str] = []
    for key, tensor in state.items():
        match = _XLABS.search(key)
        if match is None or (match[1], match[3], match[4]) not in _XLABS_TARGETS:
            unused.append(key)
            continue
        _put(source, pairs.setdefault((match[1], int(match[2]), match[3], match[4]), {}), match[5], tensor)
    changes: dict[str, LowRank] = {}
    for (stream, block, part, which), pair in pairs.items():
        targets = _XLABS_TARGETS[stream, part, which]
        prefix = f"{'' if stream == 'double' else 'single_'}transformer_blocks.{block}"
        down, up = _both(source, f"{stream}_blocks_{block} {part}_lora{which}", pair, "down", "up")
        if up.shape[0] % len(targets):
            raise WeightsError(
                "weights_shape",
                f"{source}: {stream} block {block} has a fused qkv of {up.shape[0]} rows, not a multiple of 3",
            )
        for target, rows in zip(targets, up.chunk(len(targets)), strict=True):
            changes[f"{prefix}.{target}"] = LowRank(down, rows.contiguous())
    return changes, tuple(unused)


_PART = re.compile(
    r"^(?:transformer\.|base_model\.model\.|diffusion_model\.)*(.+?)\."
    r"(?:lora_(A|B|down|up)(?:\.default)?\.weight|(alpha))$"
)
_SIDES = {"A": "down", "down": "down", "B": "up", "up": "up"}


def _stated_scale(file: Path) -> _Scale | None:
    """What diffusers has written into a file's header of the configuration it was trained by; None: nothing."""
    with safe_open(file, "pt") as opened:
        stated: dict[str, Any] = json.loads((opened.metadata() or {}).get("lora_adapter_metadata", "{}"))
    config = {key.removeprefix("transformer."): value for key, value in stated.items()}
    if "lora_alpha" not in config:
        return None
    patterns: dict[str, float] = config.get("alpha_pattern") or {}
    usual = float(config["lora_alpha"])

    def scale(module: str, rank: int) -> float:
        alpha = float(patterns.get(get_pattern_key(list(patterns), module), usual))
        return alpha / (rank**0.5 if config.get("use_rslora") else rank)

    return scale


def _from_layers(
    source: str, state: Mapping[str, torch.Tensor], stated: _Scale | None = None
) -> tuple[dict[str, LowRank], tuple[str, ...]]:
    """A pair and perhaps an alpha for each layer, in any of the namings that `layer_names` knows.

    Args:
        stated: goes before the alphas that the file holds as tensors, as in diffusers.
    """
    parts: dict[str, dict[str, str]] = {}
    for key, tensor in state.items():
        match = _PART.match(key)
        if match is None or (match[3] and tensor.numel() != 1):
            continue
        _put(source, parts.setdefault(match[1], {}), match[3] or _SIDES[match[2]], key)
    changes: dict[str, LowRank] = {}
    used: set[str] = set()
    for name, keys in parts.items():
        layer = layer_of(name)
        if layer is None or keys.keys() == {"alpha"}:
            continue
        used.update(keys.values())
        tensors = {part: state[key] for part, key in keys.items()}
        down, up = _both(source, name, tensors, "down", "up")
        alpha = float(tensors["alpha"]) if "alpha" in tensors else len(down)
        for module, rows in _rows_of(source, name, layer, down, up):
            scale = stated(module, len(down)) if stated else alpha / len(down)
            _put(source, changes, module, LowRank(down, rows, scale))
    return changes, tuple(key for key in state if key not in used)


def _rows_of(
    source: str, name: str, layer: Layer, down: torch.Tensor, up: torch.Tensor
) -> list[tuple[str, torch.Tensor]]:
    """Each module's rows of what a layer's change is multiplied up by; q, k and v are as wide as what they read."""
    if layer.swapped:
        up = torch.cat(up.chunk(2)[::-1])
    if len(layer.modules) == 1:
        return [(layer.modules[0], up)]
    width, more = down.shape[1], len(layer.modules) - 3
    rest = len(up) - 3 * width
    if (rest > 0) != bool(more) or rest < 0:
        raise WeightsError("weights_shape", f"{source}: {name} has {len(up)} rows, which are no q, k and v of {width}")
    rows = up.split([width, width, width, *[rest] * more])
    return [(module, part.contiguous()) for module, part in zip(layer.modules, rows, strict=True)]


def _put(source: str, into: dict[str, T], key: str, value: T) -> None:
    if key in into:
        raise WeightsError("weights_format", f"{source} names {key} twice, in two ways: remove one of them")
    into[key] = value


def _both(
    source: str, module: str, pair: Mapping[str, torch.Tensor], first: str, second: str
) -> tuple[torch.Tensor, torch.Tensor]:
    if first not in pair or second not in pair:
        missing = second if first in pair else first
        raise WeightsError("weights_key_missing", f"{source}: {module} has no {missing} matrix")
    down, up = pair[first], pair[second]
    if down.ndim != 2 or up.ndim != 2 or not len(down) == up.shape[1] > 0:
        raise WeightsError("weights_shape", f"{source}: {module} is {tuple(up.shape)} x {tuple(down.shape)}")
    return down, up
