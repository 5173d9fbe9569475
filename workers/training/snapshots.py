"""Checkpoints of a training run: everything the next step depends on, in safetensors and JSON, whole or not there.

All randomness of a step follows from (seed, step), so a step number, the trained weights, their averages and the
optimizer's tensors are the whole state.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from workers.training.storage import StorageError, writing

_TENSORS = "state.safetensors"
_FACTS = "state.json"
_PART = ".part"
_PART_AGE_S = 3600.0


class SnapshotError(StorageError):
    """A checkpoint that is damaged; the message names the directory and the remedy."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The state before step `step`.

    Attributes:
        weights: trained parameters by name. averages: their moving averages, empty without EMA.
        optimizer: per parameter name, the optimizer's tensors.
        facts: what must not change between the parts of a run (recipe, seed), as JSON values.
    """

    step: int
    weights: Mapping[str, torch.Tensor]
    averages: Mapping[str, torch.Tensor]
    optimizer: Mapping[str, Mapping[str, torch.Tensor]]
    facts: Mapping[str, Any]


def write_snapshot(directory: Path, snapshot: Snapshot, *, keep: int = 2) -> Path:
    """Write `step-<n>` in `directory` and remove all but the newest `keep`.

    Raises:
        StorageError: the disk is full or not writable; what was there before is untouched.
    """
    target = directory / f"step-{snapshot.step:08d}"
    with writing("a checkpoint", directory):
        directory.mkdir(parents=True, exist_ok=True)
        _remove(_abandoned(directory))  # first: they may take the room that is needed
        # A name of its own: a worker that was thought lost may still be writing the very same step.
        part = Path(tempfile.mkdtemp(dir=directory, prefix=f".{target.name}.", suffix=_PART))
        try:
            save_file(_flat(snapshot), part / _TENSORS)
            (part / _FACTS).write_text(json.dumps({"step": snapshot.step, "facts": dict(snapshot.facts)}))
            for file in part.iterdir():
                _sync(file)
            shutil.rmtree(target, ignore_errors=True)
            part.rename(target)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        _sync(directory)
    _remove(_steps(directory)[:-keep])
    return target


def newest_step(directory: Path) -> int | None:
    """The step of the latest whole checkpoint; None where there is none."""
    steps = _steps(directory)
    return int(steps[-1].name.removeprefix("step-")) if steps else None


def newest_snapshot(directory: Path) -> Snapshot | None:
    """The latest whole checkpoint; None where there is none.

    Raises:
        SnapshotError: it is damaged.
    """
    steps = _steps(directory)
    if not steps:
        return None
    try:
        tensors = load_file(steps[-1] / _TENSORS)
        facts = json.loads((steps[-1] / _FACTS).read_bytes())
    except (SafetensorError, OSError, ValueError) as error:
        raise SnapshotError(
            f"{steps[-1]} is damaged ({type(error).__name__}): remove it, and training resumes from the one before"
        ) from error
    weights: dict[str, torch.Tensor] = {}
    averages: dict[str, torch.Tensor] = {}
    optimizer: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        kind, _, rest = key.partition("|")
        if kind == "weight":
            weights[rest] = tensor
        elif kind == "average":
            averages[rest] = tensor
        else:
            name, _, field = rest.partition("|")
            optimizer.setdefault(name, {})[field] = tensor
    return Snapshot(facts["step"], weights, averages, optimizer, facts["facts"])


def _flat(snapshot: Snapshot) -> dict[str, torch.Tensor]:
    tensors = {f"weight|{name}": tensor for name, tensor in snapshot.weights.items()}
    tensors |= {f"average|{name}": tensor for name, tensor in snapshot.averages.items()}
    for name, fields in snapshot.optimizer.items():
        tensors |= {f"optimizer|{name}|{field}": tensor for field, tensor in fields.items()}
    # Copies: safetensors refuses tensors that share memory.
    return {key: tensor.detach().cpu().clone().contiguous() for key, tensor in tensors.items()}


def _steps(directory: Path) -> list[Path]:
    return sorted(path for path in directory.glob("step-*") if (path / _FACTS).is_file())


def _abandoned(directory: Path) -> list[Path]:
    """Checkpoints that a killed process was writing."""
    found: list[Path] = []
    for path in directory.glob(f".*{_PART}"):
        with suppress(FileNotFoundError):  # somebody has finished it
            if time.time() - path.stat().st_mtime > _PART_AGE_S:
                found.append(path)
    return found


def _remove(directories: Iterable[Path]) -> None:
    for directory in directories:
        shutil.rmtree(directory, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
