"""Adapters as others write them: each naming is read whole and at its strength, and what is left out is told.

The oracle is alpha / rank · up @ down of the file's own layers, and diffusers' converters where they take a file.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from diffusers.loaders.lora_pipeline import FluxLoraLoaderMixin
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from safetensors.torch import save_file
from torch import Tensor, nn

from model.errors import WeightsError
from model.weights.adapters import read_adapter
from model.weights.changes import examine
from model.weights.checkpoints import SHIPPED

WIDTH, RANK = 8, 2
LAYERS = {  # rows and columns in widths, then diffusers' modules with theirs
    "double_blocks.3.img_attn.qkv": (3, 1, {f"transformer_blocks.3.attn.to_{x}": 1 for x in "qkv"}),
    "double_blocks.3.img_attn.proj": (1, 1, {"transformer_blocks.3.attn.to_out.0": 1}),
    "double_blocks.3.img_mlp.0": (4, 1, {"transformer_blocks.3.ff.net.0.proj": 4}),
    "double_blocks.3.img_mlp.2": (1, 4, {"transformer_blocks.3.ff.net.2": 1}),
    "double_blocks.3.img_mod.lin": (6, 1, {"transformer_blocks.3.norm1.linear": 6}),
    "double_blocks.3.txt_attn.qkv": (3, 1, {f"transformer_blocks.3.attn.add_{x}_proj": 1 for x in "qkv"}),
    "double_blocks.3.txt_attn.proj": (1, 1, {"transformer_blocks.3.attn.to_add_out": 1}),
    "double_blocks.3.txt_mlp.0": (4, 1, {"transformer_blocks.3.ff_context.net.0.proj": 4}),
    "double_blocks.3.txt_mlp.2": (1, 4, {"transformer_blocks.3.ff_context.net.2": 1}),
    "double_blocks.3.txt_mod.lin": (6, 1, {"transformer_blocks.3.norm1_context.linear": 6}),
    "single_blocks.17.linear1": (
        7,
        1,
        {f"single_transformer_blocks.17.attn.to_{x}": 1 for x in "qkv"} | {"single_transformer_blocks.17.proj_mlp": 4},
    ),
    "single_blocks.17.linear2": (1, 5, {"single_transformer_blocks.17.proj_out": 1}),
    "single_blocks.17.modulation.lin": (3, 1, {"single_transformer_blocks.17.norm.linear": 3}),
    "img_in": (1, 1, {"x_embedder": 1}),
    "txt_in": (1, 1, {"context_embedder": 1}),
    "time_in.in_layer": (1, 1, {"time_text_embed.timestep_embedder.linear_1": 1}),
    "time_in.out_layer": (1, 1, {"time_text_embed.timestep_embedder.linear_2": 1}),
    "vector_in.in_layer": (1, 1, {"time_text_embed.text_embedder.linear_1": 1}),
    "vector_in.out_layer": (1, 1, {"time_text_embed.text_embedder.linear_2": 1}),
    "guidance_in.in_layer": (1, 1, {"time_text_embed.guidance_embedder.linear_1": 1}),
    "guidance_in.out_layer": (1, 1, {"time_text_embed.guidance_embedder.linear_2": 1}),
    "final_layer.linear": (1, 1, {"proj_out": 1}),
    "final_layer.adaLN_modulation.1": (2, 1, {"norm_out.linear": 2}),
}
KOHYA, PEFT = ("lora_down.weight", "lora_up.weight"), ("lora_A.weight", "lora_B.weight")
Written = dict[str, Tensor]


def layers(width: int = WIDTH, seed: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
    """down and up of every layer that FLUX has."""
    draw = torch.Generator().manual_seed(seed)
    return {
        name: (
            torch.randn(RANK, columns * width, generator=draw),
            torch.randn(rows * width, RANK, generator=draw),
        )
        for name, (rows, columns, _) in LAYERS.items()
    }


def by_module(whole: dict[str, tuple[Tensor, Tensor]], width: int = WIDTH) -> dict[str, tuple[Tensor, Tensor]]:
    """The same in diffusers' modules: rows cut by hand, shift and scale of the last norm exchanged."""
    cut: dict[str, tuple[Tensor, Tensor]] = {}
    for name, (down, rows_up) in whole.items():
        at = 0
        up = torch.cat([rows_up[width:], rows_up[:width]]) if "adaLN" in name else rows_up
        for module, rows in LAYERS[name][2].items():
            cut[module] = down, up[at : at + rows * width]
            at += rows * width
    return cut


def written(
    pairs: dict[str, tuple[Tensor, Tensor]], name: Callable[[str], str], sides: tuple[str, str], alpha: float | None
) -> Written:
    """A file's tensors."""
    tensors: Written = {}
    for layer, pair in pairs.items():
        tensors |= {f"{name(layer)}.{side}": tensor.clone() for side, tensor in zip(sides, pair, strict=True)}
        if alpha is not None:
            tensors[f"{name(layer)}.alpha"] = torch.tensor(alpha)
    return tensors


def applied(down: Tensor, up: Tensor) -> Tensor:
    """What a change makes of some inputs: enough to tell it from any other, and small where it is not."""
    return up @ (down @ torch.randn(down.shape[1], 3, generator=torch.Generator().manual_seed(5)))


def changes(file: Path, tensors: Written) -> dict[str, Tensor]:
    """What a file changes, read here, all of it."""
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file)
    adapter = read_adapter(file)
    assert adapter.unused == ()
    return {module: change.scale * applied(change.down, change.up) for module, change in adapter.changes.items()}


def diffusers_changes(tensors: Written) -> dict[str, Tensor]:
    """What diffusers' converter makes of them."""
    state = cast("Written", FluxLoraLoaderMixin.lora_state_dict({k: v.clone() for k, v in tensors.items()}))
    return {
        key.removeprefix("transformer.").removesuffix(".lora_A.weight"): applied(down, state[key.replace("_A.", "_B.")])
        for key, down in state.items()
        if key.endswith("lora_A.weight")
    }


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for module, change in theirs.items():
        torch.testing.assert_close(ours[module], change, rtol=1e-4, atol=1e-4, msg=module)


def dotted(prefix: str) -> Callable[[str], str]:
    return lambda name: prefix + name


def flat(prefix: str) -> Callable[[str], str]:
    return lambda name: prefix + name.replace(".", "_")


@pytest.mark.parametrize("alpha", [None, 1.0], ids=["no alpha", "alpha"])
@pytest.mark.parametrize(
    ("name", "sides", "split"),
    [
        (flat("lora_unet_"), KOHYA, False),
        (dotted("diffusion_model."), PEFT, False),
        (dotted("diffusion_model."), KOHYA, False),
        (dotted("base_model.model."), PEFT, False),
        (dotted(""), PEFT, False),
        (flat("lora_transformer_"), KOHYA, True),
        (dotted("transformer."), PEFT, True),
        (dotted("transformer."), KOHYA, True),
        (dotted("base_model.model."), PEFT, True),
    ],
    ids=[
        "kohya", "ComfyUI", "ComfyUI, kohya's ends", "fal", "BFL", "OneTrainer", "diffusers",
        "diffusers, kohya's ends", "peft",
    ],
)  # fmt: skip
def test_each_naming_is_read_whole_and_at_its_strength(
    name: Callable[[str], str], sides: tuple[str, str], split: bool, alpha: float | None, tmp_path: Path
) -> None:
    """Every layer of FLUX in every naming is alpha / rank · up @ down of the module that it stands for."""
    modules = by_module(layers())
    tensors = written(modules if split else layers(), name, sides, alpha)
    scale = 1.0 if alpha is None else alpha / RANK
    found = changes(tmp_path / "a.safetensors", tensors)
    assert_same(found, {module: scale * applied(down, up) for module, (down, up) in modules.items()})


def test_every_module_has_its_name() -> None:
    """The table above is all that a FLUX transformer has."""
    config: Any = FluxTransformer2DModel.load_config(str(SHIPPED / "transformer"))
    transformer = FluxTransformer2DModel.from_config(config)
    linears = {name for name, module in cast("nn.Module", transformer).named_modules() if isinstance(module, nn.Linear)}
    first = {name.replace("blocks.3.", "blocks.0.").replace("blocks.17.", "blocks.0.") for name in by_module(layers())}
    assert first == {name for name in linears if "blocks." not in name or "blocks.0." in name}


@pytest.mark.parametrize("alpha", [None, 1.0], ids=["no alpha", "alpha"])
def test_kohyas_names_are_what_diffusers_makes_of_them(alpha: float | None, tmp_path: Path) -> None:
    """At FLUX's own width, which diffusers' converter takes alone, but for the alphas that it leaves out."""
    width = 3072
    whole = layers(width)
    last = {name: whole.pop(name) for name in list(whole) if "adaLN" in name}
    tensors = written(whole, flat("lora_unet_"), KOHYA, alpha)
    theirs = diffusers_changes(tensors)
    if alpha is not None:  # diffusers has the last layers at rank / alpha times their strength
        theirs["proj_out"] *= alpha / RANK
    assert_same(changes(tmp_path / "a.safetensors", tensors), theirs)
    tensors = written(last, flat("lora_unet_"), KOHYA, None)
    assert_same(changes(tmp_path / "b.safetensors", tensors), diffusers_changes(tensors))


def test_fals_names_are_what_diffusers_makes_of_them(tmp_path: Path) -> None:
    """A whole file, which is all that diffusers' converter takes."""
    tensors: Written = {}
    for name, (rows, columns, _) in LAYERS.items():
        blocks = {"do": range(19), "si": range(38), "fi": range(1)}.get(name[:2], range(0))
        if "adaLN" in name:
            continue
        for block in blocks:
            stem = "base_model.model." + name.replace(".3.", f".{block}.").replace(".17.", f".{block}.")
            tensors[f"{stem}.lora_A.weight"] = torch.randn(1, columns * 3072)
            tensors[f"{stem}.lora_B.weight"] = torch.randn(rows * 3072, 1)
    save_file(tensors, tmp_path / "a.safetensors")
    adapter = read_adapter(tmp_path / "a.safetensors")
    state = cast("Written", FluxLoraLoaderMixin.lora_state_dict(dict(tensors)))
    assert adapter.unused == () and 2 * len(adapter.changes) == len(state)
    for module, change in adapter.changes.items():
        assert change.scale == 1.0
        assert torch.equal(change.down, state[f"transformer.{module}.lora_A.weight"]), module
        assert torch.equal(change.up, state[f"transformer.{module}.lora_B.weight"]), module


def test_namings_may_be_mixed(tmp_path: Path) -> None:
    """Half a file in OneTrainer's names and half in kohya's: both halves are read."""
    modules = by_module(layers())
    one = {name: pair for name, pair in layers().items() if name.startswith("single")}
    other = {name: pair for name, pair in modules.items() if not name.startswith("single")}
    mixed = written(one, flat("lora_unet_"), KOHYA, 1.0) | written(other, flat("lora_transformer_"), KOHYA, 1.0)
    found = changes(tmp_path / "a.safetensors", mixed)
    assert_same(found, {module: applied(down, up) / RANK for module, (down, up) in modules.items()})


@pytest.mark.parametrize(
    "stray",
    [
        {"lora_unet_double_blocks_0_img_attn_proj.diff_b": torch.ones(128)},
        {"lora_unet_double_blocks_0_img_attn.norm.query_norm.diff": torch.ones(32)},
        {"lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(2, 8)},
        {"lora_te3_encoder_block_0_layer_0_SelfAttention_q.alpha": torch.tensor(1.0)},
        {"text_encoders.t5xxl.transformer.encoder.block.0.x.lora_up.weight": torch.ones(8, 2)},
        {"text_encoders.clip_l.transformer.text_model.embeddings.position_embedding.diff": torch.ones(77, 8)},
        {"lora_unet_double_blocks_0_img_attn_conv.lora_down.weight": torch.ones(2, 8)},
        {"lora_unet_double_blocks_1_img_attn_proj.alpha": torch.tensor(1.0)},
        {"lora_unet_double_blocks_1_img_attn_proj.hada_w1_a": torch.ones(2, 8)},
        {"double_blocks.0.img_attn.proj.lora_B.bias": torch.ones(128)},
        {"whatever.weight": torch.ones(3)},
    ],
    ids=lambda stray: next(iter(stray)),
)
def test_what_is_left_out_is_told(stray: Written, tmp_path: Path) -> None:
    """Whatever is beside a file's factors, and refused before it is registered."""
    stem = "lora_unet_double_blocks_0_img_attn_proj"
    whole = {f"{stem}.lora_down.weight": torch.ones(2, 192), f"{stem}.lora_up.weight": torch.ones(192, 2)}
    save_file(whole, tmp_path / "whole.safetensors")
    assert examine(tmp_path / "whole.safetensors", str(SHIPPED)).modules == 1
    save_file(whole | stray, tmp_path / "stray.safetensors")
    assert read_adapter(tmp_path / "stray.safetensors").unused == tuple(stray)
    with pytest.raises(WeightsError, match="left out") as refused:
        examine(tmp_path / "stray.safetensors", str(SHIPPED))
    assert refused.value.code == "weights_format" and next(iter(stray)) in refused.value.message


def test_a_layer_that_is_named_twice_is_refused(tmp_path: Path) -> None:
    """Neither change would be the file's."""
    pair = torch.ones(2, 128), torch.ones(128, 2)
    kohya = written({"double_blocks.0.img_attn.proj": pair}, flat("lora_unet_"), KOHYA, None)
    peft = written({"transformer_blocks.0.attn.to_out.0": pair}, dotted("transformer."), PEFT, None)
    other = written({"transformer_blocks.0.attn.to_out.0": pair}, dotted("base_model.model."), PEFT, None)
    for tensors in (kohya | peft, peft | other):
        save_file(tensors, tmp_path / "a.safetensors")
        with pytest.raises(WeightsError, match="twice") as refused:
            read_adapter(tmp_path / "a.safetensors")
        assert refused.value.code == "weights_format"


@pytest.mark.parametrize("rows", [2, 3, 8])
def test_a_layer_of_other_proportions_is_refused(rows: int, tmp_path: Path) -> None:
    """Rows that are no q, k and v beside what follows them are not cut somewhere."""
    name = "single_blocks.0.linear1" if rows < 8 else "double_blocks.0.img_attn.qkv"
    pair = {name: (torch.ones(2, 128), torch.ones(rows * 128, 2))}
    save_file(written(pair, flat("lora_unet_"), KOHYA, None), tmp_path / "a.safetensors")
    with pytest.raises(WeightsError) as refused:
        read_adapter(tmp_path / "a.safetensors")
    assert refused.value.code == "weights_shape"


def test_a_strength_that_is_no_number_is_refused(tmp_path: Path) -> None:
    """Its factors may all be finite."""
    pair = {"transformer_blocks.0.attn.to_out.0": (torch.ones(2, 192), torch.ones(192, 2))}
    save_file(written(pair, dotted("transformer."), PEFT, float("nan")), tmp_path / "a.safetensors")
    with pytest.raises(WeightsError, match="not finite"):
        examine(tmp_path / "a.safetensors", str(SHIPPED))
