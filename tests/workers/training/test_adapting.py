"""What is trained and how it leaves: target sets, shared matrices, both file formats."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel

from model.weights.adapters import fuse, read_adapter
from model.weights.checkpoints import ModelSource, load_transformer
from workers.training.adapting import Embeddings, Targets, add_adapter, changes, module_names
from workers.training.export import CARD, PEFT, ExportError, released_state, write_adapter


def trained(targets: Targets, rank: int = 4) -> FluxTransformer2DModel:
    """A transformer whose adapter does something."""
    transformer = load_transformer(ModelSource(device="cpu")).transformer
    add_adapter(transformer, targets, rank, seed=1)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in transformer.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return transformer


def test_the_released_set_of_flux_is_counted() -> None:
    """FLUX.1-dev at rank 128: 304 matrices and 239.1 M parameters, on the meta device."""
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(guidance_embeds=True)
        names = module_names(transformer, "released")
    assert len(names) == 19 * 8 + 38 * 4
    rank, shapes = 128, {}
    for name in names:
        weight = transformer.get_submodule(name).weight
        stream = name.rsplit(".", 1)[0] + ("|text" if "add_" in name else "|image")
        if name.endswith(("_q", "_k", "_v", "q_proj", "k_proj", "v_proj")):
            shapes[f"{stream}|down"] = rank * weight.shape[1]
            shapes[f"{stream}|up"] = 3 * rank * weight.shape[0]
        else:
            shapes[f"{name}|down"], shapes[f"{name}|up"] = rank * weight.shape[1], rank * weight.shape[0]
    assert len(shapes) == 304
    assert round(sum(shapes.values()) / 1e6, 1) == 239.1


@pytest.mark.parametrize(("targets", "matrices"), [("released", 2 * 12 + 4 * 6), ("attention", 2 * 16 + 4 * 8)])
def test_a_new_adapter_changes_nothing_and_is_small(targets: Targets, matrices: int) -> None:
    """Up matrices start at zero; only the adapter has gradients; `released` shares the down matrices of q, k, v."""
    transformer = load_transformer(ModelSource(device="cpu")).transformer
    add_adapter(transformer, targets, 4, seed=1)
    learning = [name for name, parameter in transformer.named_parameters() if parameter.requires_grad]
    assert all("lora_" in name for name in learning)
    assert len(learning) == matrices
    assert all(not change.delta(1.0, torch.float32).any() for change in changes(transformer).values())


def test_all_adapts_every_linear_layer_of_the_blocks() -> None:
    """MLPs and modulations too, and nothing outside the blocks."""
    transformer = load_transformer(ModelSource(device="cpu")).transformer
    names = module_names(transformer, "all")
    assert "transformer_blocks.0.ff.net.2" in names
    assert "single_transformer_blocks.1.norm.linear" in names
    assert not [name for name in names if name.startswith(("x_embedder", "proj_out"))]


@pytest.mark.parametrize("targets", ["released", "attention"])
def test_both_files_hold_the_same_change(tmp_path: Path, targets: Targets) -> None:
    """Fusing the released file, fusing peft's, and peft's own merge agree."""
    transformer = trained(targets)
    wanted = changes(transformer)
    embeddings = Embeddings(load_transformer(ModelSource(device="cpu")).embeddings)
    exported = write_adapter(tmp_path, wanted, embeddings.tables(), {"recipe": "test"})
    base = load_transformer(ModelSource(device="cpu")).transformer.state_dict()
    released, peft = read_adapter(tmp_path / "dreamo.safetensors"), read_adapter(tmp_path / PEFT)
    assert not released.unused
    assert set(released.embeddings) == set(embeddings.tables())
    one, two = fuse(base, [(released, 1.0)]), fuse(base, [(peft, 1.0)])
    assert one.keys() == two.keys() == {f"{name}.weight" for name in wanted}
    for name, change in wanted.items():
        direct = base[f"{name}.weight"] + change.delta(1.0, torch.float32)
        assert torch.allclose(one[f"{name}.weight"], direct, atol=1e-6)
        assert torch.allclose(two[f"{name}.weight"], direct, atol=1e-6)
    card = json.loads((tmp_path / CARD).read_text())
    assert card["sha256"] == exported.digest


def test_an_mlp_has_no_released_key() -> None:
    """`all` cannot be written in the released format, and says so."""
    with pytest.raises(ExportError, match=r"no key for .*train with targets released or attention"):
        released_state(changes(trained("all")))
