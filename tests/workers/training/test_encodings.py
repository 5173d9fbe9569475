"""What is kept on disk of a dataset's encodings: never something else than what would be encoded now."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from model.weights.checkpoints import LoadedModel, ModelSource, load_model
from tests.workers.training.test_trainer import fresh_embeddings
from workers.training.encodings import Encodings, Shelf
from workers.training.recipes import Recipe
from workers.training.records import Pixels
from workers.training.reports import StepReport
from workers.training.start import records_of
from workers.training.trainer import Trainer

ROOM = 2**30


@pytest.fixture
def model() -> LoadedModel:
    return load_model(ModelSource(device="cpu", dtype="float32"))


def noise(seed: int, height: int = 16, width: int = 24) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def counted(model: LoadedModel) -> list[str]:
    """Grows by one name at each call of an encoder."""
    calls: list[str] = []

    def count(name: str) -> Callable[..., None]:
        return lambda *_: calls.append(name)

    model.codec.vae.encoder.register_forward_pre_hook(count("vae"))
    model.text.clip.register_forward_pre_hook(count("text"))
    return calls


def dataset(folder: Path, pictures: int = 0) -> Path:
    """Four records of two references, two with placeholders in the prompt and two without."""
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, object]] = []
    for number in range(4):
        for place, part in enumerate(("target", "ref1", "ref2")):
            Image.fromarray(noise(10 * number + place + 1000 * pictures, 48, 64)).save(folder / f"{number}.{part}.png")
        prompt = "a cat [ref#1] beside a dog [ref#2]" if number % 2 else f"pets in room {number}"
        references = [{"slot": slot, "role": "subject", "image": f"{number}.ref{slot}.png"} for slot in (1, 2)]
        row = {"key": f"r{number}", "task": "multi_subject", "prompt": prompt, "target": f"{number}.target.png"}
        rows.append(row | {"references": references})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def trained(folder: Path, data: Path, **settings: object) -> tuple[list[float], list[str]]:
    """Losses of a short run, and the encoders' calls in it."""
    stage = {"name": "one", "steps": 4, "batch": 2, "mixture": {"multi_subject": 1}, "optimizer": {"lr": 1e-3}}
    sizes = {"resolution": 48, "reference_resolution": 16}
    recipe = Recipe.model_validate(
        {"name": "x", "lora": {"rank": 2}, "stages": [{**stage, "plain_text": 0.3}]}
        | {"data": {"source": "directory", "path": data, "settings": sizes, **settings}}
    )
    model = load_model(ModelSource(device="cpu", dtype="float32"))
    calls = counted(model)
    reports: list[StepReport] = []
    run = Trainer(recipe, model, fresh_embeddings(model), records_of(recipe), folder, reports.append)
    assert run.run()
    return [report.loss for report in reports], calls


def test_losses_do_not_depend_on_the_cache(tmp_path: Path) -> None:
    """No cache, a cold one and a warm one give the same bits; a warm one spares the VAE and plain prompts wholly."""
    data = dataset(tmp_path / "data")
    without, every = trained(tmp_path / "a", data, cache_gib=0)
    assert not (tmp_path / "a" / "cache").exists()
    cold, once = trained(tmp_path / "b", data)
    warm, again = trained(tmp_path / "c", data, cache_directory=tmp_path / "b" / "cache")
    assert without == cold == warm
    assert every.count("vae") == 4 * 2 * 3
    assert once.count("vae") == 4 * 3
    assert "vae" not in again
    # What is left are prompts with placeholders, whose features change with every step.
    assert 0 < again.count("text") < once.count("text")
    assert not (tmp_path / "c" / "cache").exists()


def test_changed_pictures_are_not_mistaken(tmp_path: Path) -> None:
    """Files of the same names with other pixels: the same losses as with a cache that has never seen the old ones."""
    trained(tmp_path / "old", dataset(tmp_path / "data"), cache_directory=tmp_path / "cache")
    dataset(tmp_path / "data", pictures=1)
    mixed, _ = trained(tmp_path / "new", tmp_path / "data", cache_directory=tmp_path / "cache")
    assert mixed == trained(tmp_path / "clean", tmp_path / "data", cache_gib=0)[0]


def change_vae(model: LoadedModel) -> None:
    model.codec.vae.encoder.conv_in.weight[0] += 0.5


def change_t5(model: LoadedModel) -> None:
    model.text.t5.get_input_embeddings().weight[:-10] *= 1.5


def change_clip(model: LoadedModel) -> None:
    model.text.clip.get_input_embeddings().weight.mul_(1.5)


@pytest.mark.parametrize("change", [change_vae, change_t5, change_clip])
def test_a_changed_encoder_never_meets_old_entries(
    tmp_path: Path, model: LoadedModel, change: Callable[[LoadedModel], None]
) -> None:
    """One changed tensor of any encoder, and what is read is what that encoder makes."""
    Encodings(model.codec, model.text, tmp_path, ROOM).moments([noise(1)])
    Encodings(model.codec, model.text, tmp_path, ROOM).prompt("a cat")
    with torch.no_grad():
        change(model)
    kept, fresh = (Encodings(model.codec, model.text, folder, ROOM) for folder in (tmp_path, None))
    assert torch.equal(kept.moments([noise(1)])[0], fresh.moments([noise(1)])[0])
    found, made = kept.prompt("a cat"), fresh.prompt("a cat")
    assert torch.equal(found.text, made.text)
    assert torch.equal(found.pooled, made.pooled)


def test_trained_rows_leave_plain_prompts_alone(tmp_path: Path, model: LoadedModel) -> None:
    """The added tokens' rows are no part of the key: another run's entries serve, and are exact."""
    Encodings(model.codec, model.text, tmp_path, ROOM).prompt("a cat")
    with torch.no_grad():
        model.text.t5.get_input_embeddings().weight[-10:] += 1
    made = Encodings(model.codec, model.text, None, 0).prompt("a cat")
    calls = counted(model)
    found = Encodings(model.codec, model.text, tmp_path, ROOM).prompt("a cat")
    assert calls == []
    assert torch.equal(found.text, made.text)


def test_precisions_are_kept_apart(tmp_path: Path, model: LoadedModel) -> None:
    """Under autocast the text encoders give other numbers, which are not handed to a run without it."""
    encodings = Encodings(model.codec, model.text, tmp_path, ROOM)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = encodings.prompt("a cat")
    full = encodings.prompt("a cat")
    assert not torch.equal(mixed.text, full.text)
    assert torch.equal(full.text, Encodings(model.codec, model.text, None, 0).prompt("a cat").text)


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flipped(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.parametrize("damage", [cut, flipped, lambda _: b"", lambda _: b"x" * 100])
def test_a_damaged_entry_is_made_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[bytes], bytes]
) -> None:
    """Cut off, one bit flipped, empty, or no safetensors at all: a warning names the file, the next write mends it."""
    shelf = Shelf(tmp_path, ROOM)
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1, 2], dtype=torch.bfloat16)}
    shelf.write("ab12", tensors)
    (file,) = tmp_path.rglob("*.safetensors")
    file.write_bytes(damage(file.read_bytes()))
    assert shelf.read("ab12") is None
    assert str(file) in caplog.text
    shelf.write("ab12", tensors)
    found = shelf.read("ab12")
    assert found is not None
    assert all(torch.equal(found[name], tensors[name]) and found[name].dtype == tensors[name].dtype for name in tensors)


def test_a_shelf_keeps_to_its_limit(tmp_path: Path) -> None:
    """Nothing is written beyond it, by a second process either; what is there is still read."""
    for name in ("aa1", "bb2", "cc3", "dd4"):
        Shelf(tmp_path, 10_000).write(name, {"x": torch.zeros(1000)})
    assert sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()) <= 10_000
    assert [Shelf(tmp_path, 0).read(name) is not None for name in ("aa1", "bb2", "cc3")] == [True, True, False]


def test_a_disk_that_refuses_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Training goes on without a cache where it cannot be written, and leaves no parts behind."""
    (tmp_path / "cache").write_text("a file where the directory should be")
    shelf = Shelf(tmp_path / "cache", ROOM)
    with caplog.at_level(logging.WARNING):
        for name in ("aa1", "bb2"):
            shelf.write(name, {"x": torch.zeros(3)})
    assert len(caplog.records) == 1
    assert "nothing more is kept" in caplog.text
