"""Triton where it runs: the probe is a real kernel, and the choice holds inside a compiled graph."""

from __future__ import annotations

from collections.abc import Generator

import pytest
import torch
from torch import Tensor

from kernels import dispatch
from kernels.pooled_response import pooled_maps
from kernels.sites import Sites, plan_reading

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _asked_for(monkeypatch: pytest.MonkeyPatch) -> Generator[None]:
    """The operator wants Triton."""
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    dispatch.reset()
    yield
    dispatch.reset()


def test_triton_is_chosen_where_it_runs(device: torch.device) -> None:
    """All operations have it; not in float64, which it does not compute in."""
    for op, (default, *_) in dispatch.OPERATIONS.items():
        for dtype in (torch.float32, torch.bfloat16):
            assert dispatch.choose(op, torch.zeros(1, device=device, dtype=dtype), size=9) == "triton"
        assert dispatch.choose(op, torch.zeros(1, device=device, dtype=torch.float64), size=9) == default


def test_a_kernel_that_computes_something_else_is_not_chosen(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control: the probe compares."""
    real = dispatch._increment

    class Twice:
        def __getitem__(self, grid: tuple[int]) -> object:
            return lambda *args, **named: [real[grid](*args, **named) for _ in range(2)]

    Twice.__name__ = type(real).__name__
    monkeypatch.setattr(dispatch, "_increment", Twice())
    assert dispatch.choose("modulate", torch.zeros(1, device=device), size=9) == "reference"


def test_inside_a_compiled_graph(device: torch.device) -> None:
    """The first choice, probe included, is made while dynamo traces; the operation passes without a graph break."""
    place = torch.arange(4, device=device)
    reading = plan_reading([Sites((place[None, :2],), place[None, 2:])])

    def total(query: Tensor, key: Tensor) -> Tensor:
        (maps,) = pooled_maps(query, key, reading)
        assert maps is not None
        return maps.square().sum()

    torch.compiler.reset()
    compiled = torch.compile(total, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (4, 9):
        query, key = torch.randn(2, tokens, 2, 16, device=device, requires_grad=True).unbind(0)
        wanted = torch.autograd.grad(total(query, key), (query, key), retain_graph=True)
        dispatch.reset()
        got = torch.autograd.grad(compiled(query, key), (query, key))
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(got, wanted, strict=True))
    assert dispatch.describe()["pooled_response"] == "triton"
