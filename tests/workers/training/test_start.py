"""Where a training starts: from nothing, from an adapter in released keys, from the base's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from model.adapters import MAIN
from model.checkpoints import SHIPPED
from model.errors import WeightsError
from workers.training.adapting import changes
from workers.training.recipes import Recipe, RecipeError
from workers.training.start import prepare
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
