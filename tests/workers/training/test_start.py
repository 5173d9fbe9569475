"""Where a training starts: from nothing, from an adapter in released keys, from the base's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from model.errors import WeightsError
from model.weights.adapters import MAIN
from model.weights.checkpoints import SHIPPED, ModelSource
from workers.training import start
from workers.training.adapting import changes
from workers.training.recipes import Recipe, RecipeError
from workers.training.start import load_start, own_device, prepare
from workers.training.trainer import Trainer


def started(tmp_path: Path, adapter: Any, *, rank: int = 64, targets: str = "released") -> Trainer:
    recipe = Recipe.model_validate(
        {
            "name": "on",
            "model": {"adapter": adapter, "placeholders": "spare"},
            "lora": {"rank": rank, "targets": targets},
            "stages": [{"name": "one", "steps": 1, "batch": 1, "mixture": {"multi_subject": 1}}],
        }
    )
    return prepare(recipe, tmp_path / "run", lambda _: None)


@pytest.mark.parametrize(("rank", "targets"), [(64, "released"), (80, "attention")])
def test_an_exported_adapter_is_gone_on_with(tmp_path: Path, rank: int, targets: str) -> None:
    """The base's own adapter, at its rank or a higher one, starts as the same change: export gives it back."""
    own = started(tmp_path, "own", rank=rank, targets=targets)
    from_file = started(tmp_path, str(SHIPPED / "dreamo" / MAIN), rank=rank, targets=targets)
    fresh = started(tmp_path, None)
    mine, theirs = changes(own.model.transformer), changes(from_file.model.transformer)
    for name, change in changes(fresh.model.transformer).items():
        assert change.delta(1.0, torch.float32).abs().max() == 0, "a fresh adapter changes nothing"
        assert torch.equal(mine[name].delta(1.0, torch.float32), theirs[name].delta(1.0, torch.float32))
        assert mine[name].delta(1.0, torch.float32).abs().max() > 0
    exported = own.export()
    again = started(tmp_path, str(exported.directory), rank=3 * rank, targets=targets)
    for name, change in changes(again.model.transformer).items():
        torch.testing.assert_close(change.delta(1.0, torch.float32), mine[name].delta(1.0, torch.float32))
    for name, table in own.objective.embeddings.tables().items():
        torch.testing.assert_close(again.objective.embeddings.tables()[name], table)


def test_a_start_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    """A higher rank than the recipe's would be cut, a missing file ignored: both are said instead."""
    with pytest.raises(RecipeError, match=r"raise lora\.rank from 8"):
        started(tmp_path, "own", rank=8)
    with pytest.raises(WeightsError, match="missing"):
        started(tmp_path, str(tmp_path / "nothing.safetensors"))
    with pytest.raises(ValueError, match="name one of them"):
        Recipe.model_validate(
            {
                "name": "x",
                "model": {"adapter": "own", "dreamo": "d"},
                "stages": [{"name": "a", "steps": 1, "batch": 1, "mixture": {"t": 1}}],
            }
        )


def test_a_process_of_several_has_the_gpu_of_its_number() -> None:
    """Not the first one for all: what accelerate does not move would stay there. Alone, or without CUDA, as ever."""
    assert [own_device({"LOCAL_RANK": str(n)}, cuda=True) for n in range(3)] == ["cuda:0", "cuda:1", "cuda:2"]
    assert own_device({"LOCAL_RANK": "1"}, cuda=False) == "auto"
    assert own_device({}, cuda=True) == "auto"


def test_the_whole_model_is_loaded_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the launcher's number, whether DreamO is fused in or not."""
    asked: list[str] = []

    class Asked(Exception):  # noqa: N818
        pass

    def load(source: ModelSource, *_: object) -> None:
        asked.append(source.device)
        raise Asked

    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(start, "load_plain", load)
    monkeypatch.setattr(start, "load_model", load)
    stage = {"name": "one", "steps": 1, "batch": 1, "mixture": {"multi_subject": 1}}
    for model in ({}, {"adapter": "own"}, {"dreamo": str(SHIPPED / "dreamo")}):
        with pytest.raises(Asked):
            load_start(Recipe.model_validate({"name": "on", "model": model, "stages": [stage]}))
    assert asked == ["cuda:1"] * 3
