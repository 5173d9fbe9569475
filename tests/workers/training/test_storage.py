"""A run's files on a disk that is full: it is said so, and nothing half-written stays behind."""

from __future__ import annotations

import os
import resource
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

from model.weights.adapters import LowRank
from model.weights.checkpoints import SHIPPED, load_part
from workers.training.export import write_adapter, write_transformer
from workers.training.snapshots import Snapshot, newest_snapshot, write_snapshot
from workers.training.storage import StorageError
from workers.training.worker import training_error

KIB = 2**10


@contextmanager
def room(size: int) -> Generator[None]:
    """Files may grow to so many bytes; beyond, the system refuses as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def snapshot(step: int, size: int) -> Snapshot:
    return Snapshot(step, {"a": torch.zeros(size)}, {}, {}, {"recipe": "r"})


def left(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_checkpoint_that_finds_no_room_leaves_the_one_before(tmp_path: Path) -> None:
    """The refusal is named with its remedy, whether tensors or facts are too large; the older checkpoint is whole."""
    write_snapshot(tmp_path, snapshot(1, 10))
    for size, limit in ((64 * KIB, 64 * KIB), (1, 10)):
        with room(limit), pytest.raises(StorageError, match=r"cannot write a checkpoint .*File too large.*make room"):
            write_snapshot(tmp_path, snapshot(2, size))
        assert left(tmp_path) == ["step-00000001"]
    newest = newest_snapshot(tmp_path)
    assert newest is not None and newest.step == 1


def test_what_a_killed_process_was_writing_makes_room_first(tmp_path: Path) -> None:
    """Where the next checkpoint fails too, an old part of one that was never finished is gone all the same."""
    (tmp_path / ".step-00000001.x.part").mkdir()
    (tmp_path / ".step-00000002.y.part").mkdir()
    os.utime(tmp_path / ".step-00000001.x.part", (0, 0))
    with room(KIB), pytest.raises(StorageError):
        write_snapshot(tmp_path, snapshot(3, KIB))
    assert left(tmp_path) == [".step-00000002.y.part"]


def test_an_adapter_that_finds_no_room_is_no_adapter(tmp_path: Path) -> None:
    """Neither an adapter nor a trained base is left in half; a version that was there before stays."""
    change = {"transformer_blocks.0.attn.to_out.0": LowRank(torch.ones(4, 8), torch.ones(8, 4))}
    write_adapter(tmp_path / "adapter", change, {}, {"steps": 1})
    before = {name: (tmp_path / "adapter" / name).read_bytes() for name in left(tmp_path / "adapter")}
    large = {"transformer_blocks.0.attn.to_out.0": LowRank(torch.ones(4, KIB), torch.ones(KIB, 4))}
    with room(KIB), pytest.raises(StorageError, match="make room"):
        write_adapter(tmp_path / "adapter", large, {}, {"steps": 2})
    assert {name: (tmp_path / "adapter" / name).read_bytes() for name in left(tmp_path / "adapter")} == before
    transformer = load_part(FluxTransformer2DModel, SHIPPED, "transformer", torch.float32)
    with room(64 * KIB), pytest.raises(StorageError, match="make room"):
        write_transformer(tmp_path / "transformer", transformer)
    assert not list((tmp_path / "transformer").glob("*safetensors*"))


def test_a_tenant_hears_of_a_full_disk_without_its_place() -> None:
    """Not a fault of the recipe: it may be submitted again."""
    error = training_error(StorageError("cannot write a checkpoint to /srv/state: full"))
    assert (error.code, error.retryable) == ("storage_unavailable", True)
    assert "/srv" not in error.message
