"""Adapter files: both key formats, the fusing rule, and everything that can be wrong with a file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import nn

from model.errors import WeightsError
from model.weights.adapters import Adapter, LowRank, fuse, read_adapter, stack
from tests.model.conftest import GOLDEN

LORA = GOLDEN / "lora"


class Block(nn.Module):
    """A module path as long as the real ones."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.to_q = nn.Linear(24, 16, bias=False, dtype=dtype)


def peft_merge(weight: torch.Tensor, adapters: list[tuple[LowRank, float]]) -> torch.Tensor:
    """peft's own merge, adapter after adapter."""
    block = Block(weight.dtype)
    block.to_q.weight.data = weight.clone()
    for number, (change, scale) in enumerate(adapters):
        rank = change.down.shape[0]
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=["to_q"])
        inject_adapter_in_model(config, block, f"a{number}")
        block.to_q.lora_A[f"a{number}"].to(weight.dtype).weight.data = change.down.to(weight.dtype)
        block.to_q.lora_B[f"a{number}"].to(weight.dtype).weight.data = change.up.to(weight.dtype)
        block.to_q.set_scale(f"a{number}", scale)
    block.to_q.merge(adapter_names=[f"a{n}" for n in range(len(adapters))])
    return block.to_q.get_base_layer().weight.data


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fusing_equals_peft(dtype: torch.dtype) -> None:
    """Bit for bit, in float32 and in bfloat16, for several adapters with weights."""
    torch.manual_seed(0)
    weight = torch.randn(16, 24).to(dtype)
    changes = [(LowRank(torch.randn(4, 24), torch.randn(16, 4)), scale) for scale in (1.0, 1.25, -0.8)]
    adapters = [(Adapter("file", {"x.to_q": change}, {}), scale) for change, scale in changes]
    fused = fuse({"x.to_q.weight": weight}, adapters)["x.to_q.weight"]
    assert fused.dtype == dtype
    assert torch.equal(fused, peft_merge(weight, changes))


def test_rounding_once_is_something_else() -> None:
    """Control: summing in float32 and rounding once does not give the released bfloat16 weights."""
    torch.manual_seed(0)
    weight = torch.randn(64, 64).bfloat16()
    changes = [LowRank(torch.randn(4, 64), torch.randn(64, 4)) for _ in range(3)]
    fused = fuse({"m.weight": weight}, [(Adapter("f", {"m": c}, {}), 1.0) for c in changes])["m.weight"]
    once = weight.float() + sum((c.delta(1.0, torch.float32) for c in changes), torch.zeros(64, 64))
    assert (once.bfloat16() != fused).float().mean() > 0.05


def test_xlabs_names_are_split_into_modules() -> None:
    """A fused qkv becomes three modules that share their down matrix; stream 1 is image, 2 text."""
    adapter = read_adapter(LORA / "dreamo.safetensors")
    raw = load_file(LORA / "dreamo.safetensors")
    query, value = (adapter.changes[f"transformer_blocks.1.attn.{name}"] for name in ("to_q", "to_v"))
    up = raw["double_blocks_1_processor.qkv_lora1.up.weight"]
    assert torch.equal(query.up, up[:128])
    assert torch.equal(value.up, up[256:])
    assert torch.equal(query.down, raw["double_blocks_1_processor.qkv_lora1.down.weight"])
    text = adapter.changes["transformer_blocks.0.attn.add_k_proj"]
    assert torch.equal(text.up, raw["double_blocks_0_processor.qkv_lora2.up.weight"][128:256])
    assert "single_transformer_blocks.1.proj_out" in adapter.changes
    assert set(adapter.embeddings) == {"dreamo_t5_embedding", "dreamo_task_embedding", "dreamo_idx_embedding"}


def test_the_middle_of_an_xlabs_key_is_free(tmp_path: Path) -> None:
    """Only block, part and direction are matched, as in the released converter; XLabs itself writes dots."""
    down, up = torch.randn(2, 128), torch.randn(128, 2)
    for stem in ("double_blocks_3_processor", "double_blocks_3_attn.proc.x", "double_blocks.3.processor"):
        file = tmp_path / f"{stem}.safetensors"
        save_file({f"{stem}.proj_lora2.{d}.weight": t for d, t in (("down", down), ("up", up))}, file)
        assert list(read_adapter(file).changes) == ["transformer_blocks.3.attn.to_add_out"]


def test_alpha_scales_a_diffusers_adapter(tmp_path: Path) -> None:
    """scale = alpha / rank where a file states alpha, 1 where it does not."""
    tensors = {
        "transformer.a.lora_A.weight": torch.randn(4, 8),
        "transformer.a.lora_B.weight": torch.randn(8, 4),
        "transformer.a.alpha": torch.tensor(2.0),
        "transformer.b.lora_A.weight": torch.randn(4, 8),
        "transformer.b.lora_B.weight": torch.randn(8, 4),
        "transformer.stray": torch.zeros(1),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    adapter = read_adapter(tmp_path / "x.safetensors")
    assert (adapter.changes["a"].scale, adapter.changes["b"].scale) == (0.5, 1.0)
    assert adapter.unused == ("transformer.stray",)


def test_kohyas_names_are_read(tmp_path: Path) -> None:
    """A file in kohya's naming: fused qkv split, scaled by its alpha."""
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    down, up = torch.randn(4, 128), torch.randn(384, 4)
    save_file(
        {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(4.0)},
        tmp_path / "k.safetensors",
    )
    adapter = read_adapter(tmp_path / "k.safetensors")
    change = adapter.changes["transformer_blocks.0.attn.to_k"]
    assert torch.allclose(change.delta(1.0, torch.float32), up[128:256] @ down, atol=1e-5)


def test_stacks() -> None:
    """Files, order and weights of both released versions."""
    assert [(f.name, f.weight) for f in stack("v1.1", turbo=True)] == [
        ("dreamo", 1.0), ("cfg", 1.0), ("turbo", 1.0), ("sft", 1.0), ("dpo", 1.25),
    ]  # fmt: skip
    assert [(f.name, f.weight) for f in stack("v1", turbo=False)] == [
        ("dreamo", 1.0), ("cfg", 1.0), ("quality_pos", 0.15), ("quality_neg", -0.8),
    ]  # fmt: skip


def pair(inputs: int, outputs: int) -> dict[str, torch.Tensor]:
    name = "transformer.transformer_blocks.0.attn.to_q"
    return {f"{name}.lora_A.weight": torch.zeros(2, inputs), f"{name}.lora_B.weight": torch.zeros(outputs, 2)}


def test_a_file_for_another_model_is_refused(tmp_path: Path) -> None:
    """Wrong shape and unknown module: each names the file, the module and both sizes."""
    save_file(pair(64, 64), tmp_path / "a.safetensors")
    adapter = read_adapter(tmp_path / "a.safetensors")
    weights = {"transformer_blocks.0.attn.to_q.weight": torch.zeros(128, 128)}
    with pytest.raises(WeightsError, match=r"a\.safetensors.*to_q.*\(64, 2\) x \(2, 64\).*\(128, 128\)") as shape:
        fuse(weights, [(adapter, 1.0)])
    assert shape.value.code == "weights_shape"
    with pytest.raises(WeightsError, match="does not have") as unknown:
        fuse({}, [(adapter, 1.0)])
    assert unknown.value.code == "weights_key_missing"


def test_damaged_and_foreign_files_are_refused(tmp_path: Path) -> None:
    """Missing, truncated, pickled, half a pair, no adapter in it: each its own code, none a traceback."""
    whole = (LORA / "dreamo_cfg_distill.safetensors").read_bytes()
    cases = {
        "missing.safetensors": (None, "weights_missing"),
        "cut.safetensors": (whole[: len(whole) // 2], "weights_format"),
        "header.safetensors": (b"\xff" * 64, "weights_format"),
        "adapter.bin": (whole, "weights_format"),
    }
    for name, (content, code) in cases.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(WeightsError) as caught:
            read_adapter(tmp_path / name)
        assert caught.value.code == code, name
        assert name in caught.value.message
    half = pair(8, 8)
    half.popitem()
    for tensors, code in (
        (half, "weights_key_missing"),
        ({"foo.weight": torch.zeros(2, 2)}, "weights_format"),
    ):
        save_file(tensors, tmp_path / "x.safetensors")
        with pytest.raises(WeightsError) as caught:
            read_adapter(tmp_path / "x.safetensors")
        assert caught.value.code == code
