"""One base has one fingerprint, however its files are cut and in whatever precision; another base has another."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from model.fabricate import TINY, make_transformer
from model.weights.checkpoints import SHIPPED
from model.weights.fingerprints import fingerprint_of

State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    torch.manual_seed(3)
    model = make_transformer(TINY)
    return {name: torch.randn_like(tensor).to(torch.bfloat16) for name, tensor in model.state_dict().items()}


def written(folder: Path, *shards: State) -> str | None:
    folder.mkdir()
    for number, shard in enumerate(shards):
        save_file({name: tensor.contiguous() for name, tensor in shard.items()}, folder / f"s-{number}.safetensors")
    return fingerprint_of(folder)


def test_the_same_base_in_other_files(state: State, tmp_path: Path) -> None:
    """Other shards, other order, float32."""
    one = written(tmp_path / "one", state)
    names = sorted(state)
    halves = [{name: state[name] for name in part} for part in (names[1::2], names[::2])]
    assert one is not None and len(one) == 32
    assert written(tmp_path / "shards", *halves) == one
    assert written(tmp_path / "float32", {name: tensor.float() for name, tensor in state.items()}) == one


def test_another_base(state: State, tmp_path: Path) -> None:
    """The control: a base that was trained on, one with a tensor more, less or under another name, all differ."""
    name = next(name for name in state if name.endswith("to_q.weight"))
    rest = {other: tensor for other, tensor in state.items() if other != name}
    changed = [
        state,
        {other: tensor * 1.01 for other, tensor in state.items()},
        rest,
        rest | {name: state[name] * 1.01},
        rest | {name: state[name][:, :-1]},
        rest | {f"{name}.other": state[name]},
        state | {"more.bias": torch.zeros(3)},
    ]
    prints = [written(tmp_path / str(number), one) for number, one in enumerate(changed)]
    assert len(set(prints)) == len(changed)


def test_without_weights_there_is_none(tmp_path: Path) -> None:
    """A directory without any, as the base beside a fused model may be, is no base and no error."""
    assert fingerprint_of(tmp_path) is None
    assert fingerprint_of(SHIPPED / "transformer") is not None
