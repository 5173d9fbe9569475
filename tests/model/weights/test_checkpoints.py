"""Loading: what is missing or does not fit is named; a fused directory gives the same model."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from model.errors import WeightsError
from model.fabricate import Shape, write_model
from model.weights.checkpoints import (
    FUSED_EMBEDDINGS,
    ModelSource,
    load_model,
    load_transformer,
    write_fused,
)
from model.weights.fuse import app
from tests.model.requests import sample
from tests.model.test_transformer import ours

MAIN = "dreamo/dreamo.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with every file of both released stacks."""
    folder = tmp_path_factory.mktemp("whole")
    write_model(folder, Shape())
    return folder


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    """The same, to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "model"))


def refusal(source: ModelSource) -> WeightsError:
    with pytest.raises(WeightsError) as caught:
        load_model(replace(source, device="cpu"))
    return caught.value


def edit(file: Path, **changes: torch.Tensor | None) -> None:
    """Replace or remove tensors of a safetensors file; `__` in a name stands for a dot."""
    tensors = load_file(file)
    for name, tensor in changes.items():
        key = name.replace("__", ".")
        assert key in tensors
        del tensors[key]
        if tensor is not None:
            tensors[key] = tensor
    save_file(tensors, file, metadata={"format": "pt"})


def test_a_wrong_path_names_the_setting(tmp_path: Path) -> None:
    """Neither a directory nor a hub id: the message names DREAMSERVE_BASE_MODEL."""
    error = refusal(ModelSource(base_model=str(tmp_path / "nowhere")))
    assert error.code == "model_not_found"
    assert "DREAMSERVE_BASE_MODEL" in error.message


def test_an_empty_directory_is_not_a_model(tmp_path: Path) -> None:
    """A directory in another layout says which file was looked for."""
    error = refusal(ModelSource(base_model=str(tmp_path)))
    assert error.code == "model_not_found"
    assert "transformer/config.json" in error.message


@pytest.mark.parametrize("missing", [MAIN, "dreamo/v1.1/dreamo_dpo_lora.safetensors"])
def test_a_missing_dreamo_file_is_named(copy: Path, missing: str) -> None:
    """Every file of the stack is needed."""
    (copy / missing).unlink()
    error = refusal(ModelSource(base_model=str(copy)))
    assert error.code == "weights_missing"
    assert missing in error.message


def test_no_dreamo_directory(copy: Path) -> None:
    """FLUX alone is not this service: the message names DREAMSERVE_DREAMO."""
    shutil.rmtree(copy / "dreamo")
    error = refusal(ModelSource(base_model=str(copy)))
    assert error.code == "weights_missing"
    assert "DREAMSERVE_DREAMO" in error.message


@pytest.mark.parametrize(
    ("key", "tensor", "code"),
    [
        ("dreamo_task_embedding__weight", None, "weights_key_missing"),
        ("dreamo_idx_embedding__weight", torch.zeros(10, 64), "weights_shape"),
        ("dreamo_t5_embedding__weight", torch.zeros(10, 63), "weights_shape"),
        ("double_blocks_0_processor__qkv_lora1__up__weight", torch.zeros(383, 8), "weights_shape"),
        ("double_blocks_0_processor__proj_lora1__up__weight", torch.zeros(64, 8), "weights_shape"),
        ("single_blocks_0_processor__proj_lora__down__weight", None, "weights_key_missing"),
    ],
)
def test_a_wrong_key_of_the_main_file_is_refused(copy: Path, key: str, tensor: torch.Tensor | None, code: str) -> None:
    """Keys missing or of another shape, embeddings and adapters alike."""
    edit(copy / MAIN, **{key: tensor})
    assert refusal(ModelSource(base_model=str(copy))).code == code


@pytest.mark.parametrize(
    ("file", "key", "tensor", "code"),
    [
        (
            "transformer/diffusion_pytorch_model.safetensors",
            "x_embedder__weight",
            None,
            "weights_key_missing",
        ),
        (
            "transformer/diffusion_pytorch_model.safetensors",
            "x_embedder__weight",
            torch.zeros(9, 64),
            "weights_shape",
        ),
        ("vae/diffusion_pytorch_model.safetensors", "decoder__conv_in__bias", None, "weights_key_missing"),
        (
            "text_encoder_2/model.safetensors",
            "encoder__final_layer_norm__weight",
            None,
            "weights_key_missing",
        ),
        ("text_encoder/model.safetensors", "final_layer_norm__weight", torch.zeros(3), "weights_shape"),
    ],
)
def test_a_damaged_base_is_refused(copy: Path, file: str, key: str, tensor: torch.Tensor | None, code: str) -> None:
    """A tensor the libraries would quietly fill with noise is an error, in every network."""
    names = [name for name in load_file(copy / file) if name.endswith(key.replace("__", "."))]
    edit(copy / file, **{names[0].replace(".", "__"): tensor})
    error = refusal(ModelSource(base_model=str(copy)))
    assert error.code == code
    assert file.split("/", maxsplit=1)[0] in error.message


@pytest.mark.parametrize(
    ("folder", "setting", "value"),
    [
        ("transformer", "num_single_layers", 3),
        ("transformer", "num_layers", 1),
        ("transformer", "guidance_embeds", False),
        ("vae", "layers_per_block", 0),
        ("text_encoder", "num_hidden_layers", 1),
        ("text_encoder_2", "num_layers", 1),
    ],
)
def test_a_base_larger_than_its_configuration_is_refused(copy: Path, folder: str, setting: str, value: Any) -> None:
    """A block that the configuration leaves out makes another network, which nobody has trained."""
    file = copy / folder / "config.json"
    config = json.loads(file.read_bytes())
    assert config[setting] > value
    file.write_text(json.dumps(config | {setting: value}))
    error = refusal(ModelSource(str(copy)))
    assert error.code == "weights_key_missing"
    assert folder in error.message and "config.json" in error.message


def test_what_text_encoders_do_without_may_be_there(copy: Path) -> None:
    """Files of a whole CLIP or T5, of which FLUX uses the encoder: old position ids, tied tables, decoders."""
    for file, names in {
        "text_encoder/model.safetensors": [
            "text_model.embeddings.position_ids", "text_projection.weight", "vision_model.encoder.layers.0.norm.bias",
        ],
        "text_encoder_2/model.safetensors": [
            "encoder.embed_tokens.weight", "decoder.block.0.layer.0.SelfAttention.q.weight", "lm_head.weight",
        ],
    }.items():  # fmt: skip
        tensors = load_file(copy / file)
        same = tensors.get("shared.weight", torch.zeros(2, 2))
        save_file(tensors | {name: same.clone() for name in names}, copy / file, metadata={"format": "pt"})
    load_model(ModelSource(str(copy), device="cpu"))


@pytest.mark.parametrize("index", [{"metadata": {}}, {"weight_map": ["a"]}, {"weight_map": {"a": 1}}, [], None])
@pytest.mark.parametrize("folder", ["transformer", "text_encoder_2"])
def test_an_index_that_is_none_is_refused(copy: Path, folder: str, index: object) -> None:
    """Of shards, in diffusers' and in transformers' naming: the file is named."""
    (file,) = (copy / folder).glob("*.safetensors")
    beside = file.with_name(f"{file.name}.index.json")
    beside.write_text("{" if index is None else json.dumps(index))
    error = refusal(ModelSource(str(copy)))
    assert error.code == "weights_format" and beside.name in error.message


def test_a_truncated_file_is_refused(copy: Path) -> None:
    """Half a download."""
    file = copy / "vae" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    assert refusal(ModelSource(base_model=str(copy))).code == "weights_format"


def test_cuda_is_not_assumed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking for CUDA where there is none is a sentence, not an assertion in torch."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(WeightsError, match="no CUDA device"):
        load_model(ModelSource(device="cuda"))


@pytest.mark.parametrize(("version", "turbo"), [("v1", False), ("v1.1", True)])
def test_a_fused_directory_is_the_same_model(whole: Path, tmp_path: Path, version: str, turbo: bool) -> None:
    """`write_fused` and loading it give bit for bit what fusing at start gives."""
    source = ModelSource(str(whole), version=version, turbo=turbo, device="cpu", dtype="bfloat16")  # type: ignore[arg-type]
    write_fused(source, tmp_path / "fused")
    direct = load_transformer(source)
    fused = load_transformer(replace(source, fused=tmp_path / "fused"))
    for key, tensor in direct.transformer.state_dict().items():
        assert torch.equal(fused.transformer.state_dict()[key], tensor), key
    for key, tensor in direct.embeddings.items():
        assert torch.equal(fused.embeddings[key], tensor)
    with pytest.raises(WeightsError, match="not empty"):
        write_fused(source, tmp_path / "fused")
    (tmp_path / "fused" / FUSED_EMBEDDINGS).unlink()
    with pytest.raises(WeightsError, match="is missing"):
        load_transformer(replace(source, fused=tmp_path / "fused"))


@pytest.mark.parametrize(
    ("version", "turbo", "asked", "fits"),
    [
        ("v1", False, {}, False),
        ("v1", False, {"version": "v1"}, False),
        ("v1", False, {"version": "v1", "turbo": False}, True),
        ("v1.1", True, {"turbo": False}, False),
        ("v1.1", True, {}, True),
        ("main", True, {"version": "main", "turbo": False}, True),
        ("main", True, {}, False),
    ],
)
def test_a_fused_directory_is_served_as_what_it_is(
    whole: Path, tmp_path: Path, version: str, turbo: bool, asked: dict[str, Any], fits: bool
) -> None:
    """Default steps and guidance follow from the settings: those of another stack are refused, with the right ones.
    The main file alone has no Turbo adapter, so that the setting says how many steps are made and nothing else."""
    command = ["--base", str(whole), "--out", str(tmp_path / "fused"), "--version", version]
    said = CliRunner().invoke(app, [*command, "--turbo" if turbo else "--no-turbo", "--dtype", "float32"])
    assert said.exit_code == 0, said.output
    wanted = f"DREAMSERVE_VERSION={version} DREAMSERVE_TURBO={str(turbo).lower()}"
    assert said.stdout.strip().endswith(wanted)
    source = ModelSource(str(whole), fused=tmp_path / "fused", device="cpu", **asked)
    if fits:
        direct = load_model(replace(source, fused=None))
        assert load_model(source).spec == direct.spec
    else:
        error = refusal(source)
        assert error.code == "fused_mismatch" and wanted in error.message


def test_a_fused_directory_without_its_recipe(whole: Path, tmp_path: Path) -> None:
    """An older one is served as the settings say; one that cannot be read is refused."""
    source = ModelSource(str(whole), device="cpu", dtype="float32")
    write_fused(source, tmp_path / "fused")
    file = tmp_path / "fused" / FUSED_EMBEDDINGS
    tensors = load_file(file)
    save_file(tensors, file)
    assert load_model(replace(source, fused=tmp_path / "fused", version="v1")).spec.guidance.default == 3.5
    for recipe in ("{", "[1]"):
        save_file(tensors, file, metadata={"recipe": recipe})
        assert refusal(replace(source, fused=tmp_path / "fused")).code == "weights_format"


def test_another_size_runs_by_the_same_code(tmp_path: Path) -> None:
    """A model with FLUX's VAE factor, other axes and more heads loads and answers; nothing assumes the tiny one."""
    shape = Shape(double_blocks=1, single_blocks=1, heads=2, axes=(4, 6, 6), vae_blocks=(8, 8, 16, 16))
    write_model(tmp_path, shape, seed=1)
    model = load_model(ModelSource(base_model=str(tmp_path), device="cpu"))
    assert (model.codec.cell, model.spec.cell, model.spec.width.default) == (16, 16, 1024)
    velocity = ours(model, [sample(model, 1, (4, 6), {1: (2, 2)}, timestep=0.5)])[0]
    assert velocity.shape == (24, 64)


def test_a_base_names_the_stack_it_comes_with(copy: Path) -> None:
    """Without a wish, `dreamserve.json` decides: main needs one file alone; a version that is none is refused."""
    shutil.rmtree(copy / "dreamo" / "v1.1")
    assert "v1.1" in refusal(ModelSource(str(copy))).message
    (copy / "dreamserve.json").write_text('{"version": "main"}')
    assert load_model(ModelSource(str(copy), device="cpu")).spec.guidance.default == 3.5
    assert refusal(ModelSource(str(copy), version="v1.1")).code == "weights_missing"
    (copy / "dreamserve.json").write_text('{"version": "v9"}')
    assert "no version 'v9'" in refusal(ModelSource(str(copy))).message
