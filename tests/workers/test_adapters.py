"""`dreamserve adapters`: a file that is registered is whole, fits the model and is all used; others are refused."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from model.weights.adapters import MAIN
from model.weights.checkpoints import SHIPPED, LoadedModel, ModelSource, load_model
from tests.model.weights.adapters import another_dreamo, kohya_lora, plain_lora
from workers.adapters import app
from workers.registry import LORA, Registry


@dataclass(frozen=True)
class Desk:
    """The command, and where it registers."""

    registry: Registry

    def run(self, *arguments: str) -> Result:
        return CliRunner().invoke(app, list(arguments))

    def refused(self, file: Path, name: str = "style") -> str:
        """What is said; nothing has been registered."""
        result = self.run("add", name, str(file))
        assert result.exit_code == 2 and self.registry.versions() == [], result.output
        return result.stderr


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    monkeypatch.setenv("DREAMSERVE_ADAPTERS_DIR", str(tmp_path / "adapters"))
    return Desk(Registry(tmp_path / "adapters"))


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return load_model(ModelSource(device="cpu"))


def test_each_kind_of_file_is_registered_as_it_is(desk: Desk, model: LoadedModel, tmp_path: Path) -> None:
    """Under the digest of its own bytes, its kind told apart by its embeddings; the newest version is what jobs get."""
    files = {
        "whole": another_dreamo(tmp_path / "whole.safetensors", SHIPPED / "dreamo" / MAIN, seed=1),
        "plain": plain_lora(tmp_path / "plain.safetensors", model.transformer, seed=2),
        "kohya": kohya_lora(tmp_path / "kohya.safetensors", model.transformer, seed=3),
    }
    for name, file in files.items():
        result = desk.run("add", name, str(file))
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        assert result.exit_code == 0 and digest in result.stdout, result.output
        adapter = desk.registry.find(name)
        assert adapter.version == digest and adapter.file.read_bytes() == file.read_bytes()
        assert adapter.file.name == (MAIN if name == "whole" else LORA) and not adapter.file.is_symlink()
        assert adapter.card["file"] == file.name and adapter.card["modules"] > 0
    assert desk.run("add", "plain", str(files["kohya"])).exit_code == 0
    assert desk.registry.find("plain").version == desk.registry.find("kohya").version
    lines = [line.split() for line in desk.run("list").stdout.splitlines()]
    assert {(line[0], line[1]) for line in lines} == {("whole", "dreamo"), ("plain", "lora"), ("kohya", "lora")}
    assert len(lines) == 4


class Payload:
    """What runs when a pickle is read."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, ...]]:
        return (Path.touch, (self.trace,))  # pyright: ignore[reportReturnType]  # the more it does, the better


def test_pickles_and_damaged_files_are_refused(desk: Desk, model: LoadedModel, tmp_path: Path) -> None:
    """By name and by content, and nothing in them runs. The control: the payload does run when it is unpickled."""
    trace = tmp_path / "trace"
    pickled = pickle.dumps(Payload(trace))
    pickle.loads(pickled)
    assert trace.exists()
    trace.unlink()
    whole = plain_lora(tmp_path / "whole.safetensors", model.transformer, seed=1).read_bytes()
    files = {
        "lora.bin": whole,
        "lora.ckpt": pickled,
        "lora.safetensors": pickled,
        "cut.safetensors": whole[: len(whole) // 2],
        "header.safetensors": (2**62).to_bytes(8, "little") + b"{}",
        "empty.safetensors": b"",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        assert "weights_format" in desk.refused(tmp_path / name), name
    assert "weights_missing" in desk.refused(tmp_path / "absent.safetensors")
    assert not trace.exists()


def test_an_adapter_for_another_model_is_refused_at_the_desk(desk: Desk, model: LoadedModel, tmp_path: Path) -> None:
    """Not when a job first needs it."""
    tensors = load_file(plain_lora(tmp_path / "a.safetensors", model.transformer, seed=1, only="to_q"))
    save_file({key: tensor.repeat(2, 2) for key, tensor in tensors.items()}, tmp_path / "wide.safetensors")
    assert "weights_shape" in desk.refused(tmp_path / "wide.safetensors")
    far = {key.replace("blocks.0", "blocks.40"): tensor for key, tensor in tensors.items()}
    save_file(far, tmp_path / "far.safetensors")
    assert "weights_key_missing" in desk.refused(tmp_path / "far.safetensors")
    whole = load_file(SHIPPED / "dreamo" / MAIN)
    name = next(key for key in whole if "t5" in key)
    save_file(whole | {name: torch.zeros(10, 8)}, tmp_path / "rows.safetensors")
    assert "weights_shape" in desk.refused(tmp_path / "rows.safetensors")


def test_what_would_be_left_out_is_refused(desk: Desk, model: LoadedModel, tmp_path: Path) -> None:
    """A text encoder's part, a DoRA's magnitudes, a scale that stands elsewhere: half an adapter is another picture."""
    tensors = load_file(plain_lora(tmp_path / "a.safetensors", model.transformer, seed=1, only="to_q"))
    text = {f"text_encoder.layer.lora_{side}.weight": torch.zeros(4, 4) for side in "AB"}
    save_file(tensors | text | {"stray.diff": torch.zeros(1)}, tmp_path / "text.safetensors")
    assert "weights_" in desk.refused(tmp_path / "text.safetensors")
    save_file(tensors | {"stray.diff": torch.zeros(1)}, tmp_path / "stray.safetensors")
    assert "stray.diff" in desk.refused(tmp_path / "stray.safetensors")
    name = next(iter(tensors))
    save_file(tensors | {name: torch.full_like(tensors[name], torch.nan)}, tmp_path / "nan.safetensors")
    assert "not finite" in desk.refused(tmp_path / "nan.safetensors")
    peft = tmp_path / "adapter_model.safetensors"
    save_file({key.replace("transformer.", "base_model.model.", 1): value for key, value in tensors.items()}, peft)
    beside = tmp_path / "adapter_config.json"
    beside.write_text(json.dumps({"r": 4, "lora_alpha": 8}))
    assert "adapter_config.json" in desk.refused(peft)
    beside.write_text(json.dumps({"r": 4, "lora_alpha": 4}))
    assert desk.run("add", "style", str(peft)).exit_code == 0


@pytest.mark.parametrize("rank_pattern", [{}, {"to_k": 2}])
def test_a_scale_is_refused_that_peft_gives_and_the_file_lacks(
    desk: Desk, model: LoadedModel, tmp_path: Path, rank_pattern: dict[str, int]
) -> None:
    """peft divides alpha by a module's own rank: where a pattern makes ranks differ, it gives such an adapter another
    strength than a file without alphas says, and the desk lets nothing pass that peft scales differently."""
    from peft import LoraConfig, get_peft_model  # pyright: ignore[reportMissingTypeStubs]

    layers = torch.nn.ModuleDict({"to_q": torch.nn.Linear(8, 8), "to_k": torch.nn.Linear(8, 8)})
    config = LoraConfig(r=4, lora_alpha=4, rank_pattern=rank_pattern, target_modules=["to_q", "to_k"])
    adapted = get_peft_model(layers, config)  # pyright: ignore[reportArgumentType]
    scales = {scale for module in adapted.modules() for scale in getattr(module, "scaling", {}).values()}
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(plain_lora(tmp_path / "a.safetensors", model.transformer, seed=1, only="to_q"))
    save_file({key.replace("transformer.", "base_model.model.", 1): value for key, value in tensors.items()}, file)
    config.save_pretrained(str(tmp_path))
    assert scales == ({1.0, 2.0} if rank_pattern else {1.0})
    if scales == {1.0}:
        assert desk.run("add", "style", str(file)).exit_code == 0
    else:
        assert "adapter_config.json" in desk.refused(file)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe"])
def test_a_damaged_configuration_is_refused(desk: Desk, tmp_path: Path, content: bytes) -> None:
    """What the scale stands in must be read; the line says which file it is."""
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    (tmp_path / "adapter_config.json").write_bytes(content)
    assert "adapter_config.json cannot be read" in desk.refused(tmp_path / "adapter_model.safetensors")


@pytest.mark.parametrize("name", ["../evil", "UPPER", "a/b", ".hidden", "x" * 65])
def test_a_name_is_no_path(desk: Desk, name: str) -> None:
    """It becomes a directory."""
    assert "name" in desk.refused(SHIPPED / "dreamo" / MAIN, name)
