"""Compiled blocks: the same velocities, a handful of graphs for all sizes, no graph break, a cache that is safe."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from model.blocks import double_block, single_block
from model.compilation import compiled, fingerprint, keep_graphs
from model.errors import WeightsError
from model.network import fused
from model.pipeline import Pipeline
from model.preprocessors.prepare import load_tools
from model.sampling import Denoising, Guidance, Sampler
from model.schedule import sigmas
from model.transformer import Network, embed, run, site_of, split_vectors
from model.weights.checkpoints import LoadedModel
from tests.model.requests import packed, sample

PLAIN = Guidance(3.5, 3.5)
SPLIT = Guidance(scale=3.5, first_step=2.0, true_scale=2.5, start=0, end=4, negative=3.0)
KINDS = 3
"""Kinds of blocks: double, single, the last single one. A graph of each runs one request, another one several."""


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """No graph of another test, before or after."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def counted(network: Network) -> tuple[Network, CompileCounterWithBackend]:
    """Compiled by torch's tracer, without code generation, and what counts the graphs."""
    counter = CompileCounterWithBackend("eager")
    return compiled(network, counter), counter


def begun(sampler: Sampler, model: LoadedModel, references: int, side: int, guidance: Guidance = PLAIN) -> Denoising:
    """A request with references of sides of their own."""
    grids = {slot: (2 + slot, 5) for slot in range(1, references + 1)}
    one = sample(model, references, (side, side), grids, timestep=1.0)
    negative = sample(model, 9, (side, side), {}, timestep=1.0, embedded=False).condition
    return sampler.begin(one.condition, negative, guidance, sigmas(4, side * side, model.shift), one.latents)


@pytest.mark.usefixtures("fresh_compiler")
def test_a_handful_of_graphs_serves_every_size(tiny: LoadedModel) -> None:
    """Compiled blocks give the plain velocities for any sizes, references and company, and once there is a graph for
    one request and one for several, nothing is compiled again: a request never waits for a compiler."""
    network = fused(copy.deepcopy(tiny.transformer))
    fast, counter = counted(network)
    plain, quick = Sampler(network, tiny.tables), Sampler(fast, tiny.tables)

    def agree(*wanted: tuple[int, int, Guidance]) -> None:
        ours = quick.velocities([begun(quick, tiny, *one) for one in wanted])
        theirs = plain.velocities([begun(plain, tiny, *one) for one in wanted])
        for mine, other in zip(ours, theirs, strict=True):
            for a, b in zip(mine, other, strict=True):
                assert (a - b).abs().max() <= 1e-5

    agree((1, 6, PLAIN))
    agree((0, 6, PLAIN), (2, 5, PLAIN))
    assert counter.frame_count == 2 * KINDS
    for references in range(4):
        for side in (4, 7, 9):
            agree((references, side, PLAIN))
    agree((0, 6, PLAIN), (1, 6, PLAIN), (2, 6, PLAIN), (3, 6, PLAIN))
    agree((3, 4, PLAIN), (3, 4, PLAIN), (1, 8, PLAIN))
    agree((2, 6, SPLIT))
    agree((2, 6, SPLIT), (1, 7, PLAIN))
    assert counter.frame_count == 2 * KINDS


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("company", [0, 1])
def test_no_block_breaks_its_graph(tiny: LoadedModel, company: int) -> None:
    """`torch._dynamo.explain` finds one graph and no break in each kind of block, alone and in company."""
    network = fused(copy.deepcopy(tiny.transformer))
    samples = [sample(tiny, seed, (6, 6), {1: (3, 4)}, timestep=0.7) for seed in range(1 + company)]
    sequence = packed(samples)
    site = site_of(network.model, sequence.layout)
    with torch.no_grad():
        start = embed(network.model, tiny.tables, sequence)
        _, image_vectors, text_vectors, *_ = split_vectors(network.model, start.vectors)
        joint, vectors = torch.cat([start.text, start.image]), start.vectors[:, : 3 * start.text.shape[1]]
        double, single = network.model.transformer_blocks[0], network.model.single_transformer_blocks[0]
        explained = [
            torch._dynamo.explain(double_block)(
                double, start.text, start.image, image_vectors, text_vectors, site, network.projections[0]
            ),
            torch._dynamo.explain(single_block)(single, joint, vectors, site, network.projections[-1]),
            torch._dynamo.explain(single_block)(single, joint, vectors, site, network.projections[-1], last=site.last),
        ]
    for found in explained:
        assert (found.graph_count, found.graph_break_count) == (1, 0), found.break_reasons


@pytest.mark.usefixtures("fresh_compiler")
def test_a_break_would_be_seen(tiny: LoadedModel) -> None:
    """The control: a block that reads a number back from its tokens breaks its graph, and `compiled` refuses such."""

    def broken(block: Any, joint: torch.Tensor, *others: Any) -> Any:
        return single_block(block, joint * (2 if joint.sum().item() > 0 else 1), *others)

    network = fused(copy.deepcopy(tiny.transformer))
    sequence = packed([sample(tiny, 1, (6, 6), {}, timestep=0.7)])
    site = site_of(network.model, sequence.layout)
    with torch.no_grad():
        start = embed(network.model, tiny.tables, sequence)
        single = network.model.single_transformer_blocks[0]
        joint, vectors = torch.cat([start.text, start.image]), start.vectors[:, : 3 * start.text.shape[1]]
        found = torch._dynamo.explain(broken)(single, joint, vectors, site, network.projections[-1])
        assert found.graph_break_count > 0
        strict = replace(network, single=torch.compile(broken, fullgraph=True, backend="eager"))
        with pytest.raises(torch._dynamo.exc.TorchDynamoException):
            run(strict, site, start)


def no_compiler(_graph: torch.fx.GraphModule, _inputs: list[torch.Tensor]) -> Any:
    """Fails where inductor does without a C++ compiler."""
    raise RuntimeError("no compiler found\nin any place")


@pytest.mark.usefixtures("fresh_compiler")
def test_without_a_compiler_auto_goes_on_and_on_refuses(tiny: LoadedModel, caplog: pytest.LogCaptureFixture) -> None:
    """A machine without a C++ compiler: `auto` serves uncompiled and says so; `on` is refused with the remedy."""
    tools = load_tools("grabcut", "opencv", "cpu")
    with pytest.raises(WeightsError, match="DREAMSERVE_COMPILE=off") as caught:
        Pipeline(tiny, tools, compile="on", compiler=no_compiler).warm()
    assert caught.value.code == "compile_failed"
    torch.compiler.reset()
    pipeline = Pipeline(tiny, tools, compile="auto", compiler=no_compiler)
    assert pipeline.describe()["compiled"] == "true"
    with caplog.at_level(logging.WARNING):
        pipeline.warm()
    assert "without torch.compile" in caplog.text
    assert pipeline.describe()["compiled"] == "false"


def test_the_cache_is_named_after_what_it_depends_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same process finds its graphs again; another version of torch has a directory of its own."""
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, "")
    cpu = torch.device("cpu")
    first = keep_graphs(tmp_path / "compiled", cpu)
    assert keep_graphs(tmp_path / "compiled", cpu) == first
    assert (tmp_path / "compiled").stat().st_mode & 0o777 == first.stat().st_mode & 0o777 == 0o700
    before = fingerprint(cpu)
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    assert fingerprint(cpu) != before


def test_a_cache_that_others_may_write_to_is_refused(tmp_path: Path) -> None:
    """What lies there runs as code, so a directory open to others is an error that names it and the remedy."""
    root = tmp_path / "compiled"
    root.mkdir()
    root.chmod(0o777)
    with pytest.raises(WeightsError, match="chmod 700") as caught:
        keep_graphs(root, torch.device("cpu"))
    assert caught.value.code == "cache_unsafe"
