"""How adapter files name FLUX's layers, and which of diffusers' modules a name stands for.

There are Black Forest Labs' names (`double_blocks.0.img_attn.qkv`), where one layer may be several modules, and
diffusers' (`transformer_blocks.0.attn.to_q`). Either comes with dots, or flattened: kohya writes `lora_unet_`,
OneTrainer `lora_transformer_` and underscores.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Layer:
    """The modules that a layer is, in the order of its rows. `swapped`: diffusers has its halves the other way."""

    modules: tuple[str, ...]
    swapped: bool = False


_DOUBLE: Mapping[str, tuple[str, ...]] = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn.proj": ("attn.to_out.0",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "img_mod.lin": ("norm1.linear",),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn.proj": ("attn.to_add_out",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
    "txt_mod.lin": ("norm1_context.linear",),
}
_SINGLE: Mapping[str, tuple[str, ...]] = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation.lin": ("norm.linear",),
}
_SWAPPED = "final_layer.adaLN_modulation.1"
_OUTSIDE: Mapping[str, tuple[str, ...]] = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "final_layer.linear": ("proj_out",),
    _SWAPPED: ("norm_out.linear",),
}


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _flattened(names: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """By flattened name: the layers as they are called there, and diffusers' modules by themselves."""
    modules = {_flat(module): (module,) for group in names.values() for module in group}
    return modules | {_flat(name): group for name, group in names.items()}


_BLOCK = re.compile(r"(?:(double|single)_blocks|((?:single_)?transformer_blocks))_(\d+)_(.+)")
_BY_STREAM = {"transformer_blocks": _flattened(_DOUBLE), "single_transformer_blocks": _flattened(_SINGLE)}
_BY_NAME = _flattened(_OUTSIDE)


def layer_of(name: str) -> Layer | None:
    """What a layer is, by its name in a file without prefixes that end with a dot.

    Returns:
        None: nothing of the transformer. A name with dots that is not known is taken for a module's own.
    """
    flat = _flat(re.sub("^lora_(unet|transformer)_", "", name))
    if match := _BLOCK.fullmatch(flat):
        blocks = match[2] or ("transformer_blocks" if match[1] == "double" else "single_transformer_blocks")
        modules = _BY_STREAM[blocks].get(match[4])
        found = modules and tuple(f"{blocks}.{int(match[3])}.{module}" for module in modules)
    else:
        found = _BY_NAME.get(flat)
    if found:
        return Layer(found, swapped=flat == _flat(_SWAPPED))
    return None if name.startswith(("lora_", "text_encoder")) else Layer((name,))
