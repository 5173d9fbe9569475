"""Adapters by job: an adapted network is the one with the same change fused in, and the served one never notices."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from safetensors.torch import load_file, save_file

from model.errors import AdapterError
from model.fabricate import TINY, TINY_SPEC, write_model
from model.network import fused
from model.pipeline import Pipeline
from model.precision import quantized
from model.preprocessors.prepare import Tools, load_tools
from model.transformer import EmbeddingTables, Network
from model.weights.adapted import Adaptation
from model.weights.adapters import MAIN, fuse, read_adapter
from model.weights.checkpoints import LoadedModel, ModelSource, load_model, write_fused
from model.weights.fingerprints import fingerprint_of
from model.weights.parts import load_part
from tests.model.drawing import begun, drawn, off
from tests.model.unfolding import unfolded
from tests.model.weights.adapters import another_dreamo, lora_files, plain_lora

SCALES = (1.0, 0.6, -0.5)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    """A fabricated model with the whole v1.1 stack."""
    base = tmp_path_factory.mktemp("model")
    write_model(base, TINY, dtype=torch.float32)
    (base / "dreamserve.json").write_text(json.dumps({"spec": TINY_SPEC}))
    return ModelSource(base_model=str(base), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def tools() -> Tools:
    return load_tools("auto", "auto", "cpu")


@pytest.fixture(scope="module")
def model(source: ModelSource) -> LoadedModel:
    return load_model(source)


@pytest.fixture(scope="module")
def pipeline(model: LoadedModel, tools: Tools) -> Pipeline:
    return Pipeline(model, tools, lanes=1)


@pytest.fixture(scope="module")
def dreamo(source: ModelSource, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of DreamO files whose main file is another one."""
    directory = tmp_path_factory.mktemp("other") / "dreamo"
    shutil.copytree(Path(source.base_model) / "dreamo", directory)
    another_dreamo(directory / MAIN, directory / MAIN, seed=1)
    return directory


def main_of(source: ModelSource) -> Path:
    return Path(source.base_model) / "dreamo" / MAIN


def fused_between(source: ModelSource, served: LoadedModel, other: Path, scale: float) -> LoadedModel:
    """The oracle: a fresh base whose weights are fused by the released rule, the main file's part moved to another's;
    its embeddings, too."""
    theirs, own = read_adapter(other), read_adapter(main_of(source))
    stack = [(read_adapter(main_of(source).parent / file.path), file.weight) for file in source.stack()]
    transformer = load_part(FluxTransformer2DModel, Path(source.base_model), "transformer", torch.float32)
    weights = fuse(transformer.state_dict(), [*stack, (theirs, scale), (own, -scale)])
    transformer.load_state_dict(weights, strict=False)
    rows = {
        name: own.embeddings[name] + scale * (theirs.embeddings[name] - own.embeddings[name]) for name in own.embeddings
    }
    text = load_model(source).text
    with torch.no_grad():
        text.t5.get_input_embeddings().weight[-10:] = rows["dreamo_t5_embedding"]
    tables = EmbeddingTables(rows["dreamo_task_embedding"], rows["dreamo_idx_embedding"])
    transformer.eval().requires_grad_(False)
    return replace(served, transformer=transformer, tables=tables, text=text)


@pytest.mark.parametrize("scale", SCALES)
def test_a_whole_adapter_equals_fused_weights(
    pipeline: Pipeline, tools: Tools, source: ModelSource, dreamo: Path, scale: float
) -> None:
    """After all steps, with references, placeholders and true CFG: the latents of a model that was fused so."""
    wanted = drawn(Pipeline(fused_between(source, pipeline.model, dreamo / MAIN, scale), tools, lanes=1))
    assert off(drawn(pipeline), wanted) > 0.05, "the control: unadapted, it is another picture"
    assert off(drawn(pipeline, pipeline.load_adapter(dreamo / MAIN).at(scale)), wanted) <= 1e-5


def test_scale_one_stands_in_the_main_files_place(
    pipeline: Pipeline, tools: Tools, source: ModelSource, dreamo: Path
) -> None:
    """As if the service had been started with that file; the other files of the stack stay."""
    wanted = drawn(Pipeline(load_model(replace(source, dreamo=dreamo)), tools, lanes=1))
    assert off(drawn(pipeline, pipeline.load_adapter(dreamo / MAIN).at(1.0)), wanted) <= 1e-5


def test_scale_nought_is_the_served_model(pipeline: Pipeline, dreamo: Path, tmp_path: Path) -> None:
    """To the bit, for both kinds of adapter."""
    plain = plain_lora(tmp_path / "plain.safetensors", pipeline.model.transformer, seed=2)
    served = drawn(pipeline)
    for file in (dreamo / MAIN, plain):
        adaptation = pipeline.load_adapter(file).at(0.0)
        assert adaptation.network != pipeline.lanes.samplers[0].network, "it did run the changed layers"
        assert torch.equal(drawn(pipeline, adaptation), served)


def test_the_served_file_itself_changes_nothing(pipeline: Pipeline, source: ModelSource) -> None:
    """A registered copy of it leaves no change at all, so its runs even share forwards with the others."""
    loaded = pipeline.load_adapter(main_of(source))
    assert loaded.nbytes == 0
    for scale in (1.0, 0.3):
        run = begun(pipeline, loaded.at(scale))
        assert pipeline.group(run) == pipeline.group(begun(pipeline))
        assert torch.equal(drawn(pipeline, loaded.at(scale)), drawn(pipeline))


@pytest.mark.parametrize(
    "form",
    ["every linear layer", "with alphas", "one projection of three", "kohya", "with its configuration in the header"],
)
def test_a_plain_lora_equals_diffusers(
    pipeline: Pipeline, tools: Tools, source: ModelSource, form: str, tmp_path: Path
) -> None:
    """What `FluxPipeline.load_lora_weights` makes of the file on a model of its own, at two scales."""
    file = lora_files(pipeline.model.transformer, tmp_path)[form]
    served = load_model(source)
    parts: dict[str, Any] = dict.fromkeys(
        ("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    )
    theirs = FluxPipeline(**parts, transformer=served.transformer)
    theirs.load_lora_weights(file.parent, weight_name=file.name, adapter_name="it")
    loaded = pipeline.load_adapter(file)
    for scale in (1.0, 0.4):
        served.transformer.set_adapters("it", weights=scale)
        wanted = drawn(Pipeline(served, tools, lanes=1))
        assert off(drawn(pipeline), wanted) > 1e-3, "the control: unadapted, it is another picture"
        assert off(drawn(pipeline, loaded.at(scale)), wanted) <= 1e-5


def with_fused(model: LoadedModel) -> Network:
    return fused(model.transformer)


def in_int8(model: LoadedModel) -> Network:
    return quantized(Network(model.transformer), "int8")


def in_fp8(model: LoadedModel) -> Network:
    return quantized(Network(model.transformer), "fp8")


@pytest.mark.parametrize(
    ("prepare", "tolerance"), [(with_fused, 1e-5), (in_int8, 1e-5), (in_fp8, 0.05)], ids=["fused", "int8", "fp8"]
)
def test_adapters_go_onto_fused_and_low_precision_layers(
    source: ModelSource, tools: Tools, dreamo: Path, prepare: Callable[[LoadedModel], Network], tolerance: float
) -> None:
    """q, k and v as one layer, and layers in int8 or fp8: as if the change were in what the layers' weights stand for.

    fp8 rounds activations, which the change has moved, so it is held to its own error.
    """
    model = load_model(source)
    network = prepare(model)
    pipeline = Pipeline(model, tools, lanes=1)
    pipeline._network = network  # pyright: ignore[reportPrivateUsage]  # as on CUDA, or with a precision
    pipeline._lay_lanes(network)  # pyright: ignore[reportPrivateUsage]
    before = drawn(pipeline)
    adaptation = pipeline.load_adapter(dreamo / MAIN).at(0.6)
    transformer = unfolded(network, source)
    changes = [(read_adapter(dreamo / MAIN), 0.6), (read_adapter(main_of(source)), -0.6)]
    transformer.load_state_dict(fuse(transformer.state_dict(), changes), strict=False)
    whole = Pipeline(replace(model, transformer=transformer), tools, lanes=1)
    wanted = drawn(whole, Adaptation(whole.lanes.samplers[0].network, adaptation.tables, adaptation.placeholders))
    assert off(before, wanted) > 0.05, "the control: unadapted, it is another picture"
    assert off(drawn(pipeline, adaptation), wanted) <= tolerance
    assert torch.equal(drawn(pipeline, pipeline.load_adapter(dreamo / MAIN).at(0.0)), before)


@pytest.mark.gpu
@pytest.mark.parametrize("compile", ["off", "auto"])
def test_cuda_agrees_with_the_cpu(
    source: ModelSource, tools: Tools, dreamo: Path, pipeline: Pipeline, compile: Literal["off", "auto"]
) -> None:
    """Onto fused projections there, beside compiled blocks or not: the latents of the CPU, as near as float32 is."""
    there = Pipeline(load_model(replace(source, device="cuda")), tools, compile=compile)
    wanted = drawn(pipeline, pipeline.load_adapter(dreamo / MAIN).at(0.6))
    got = drawn(there, there.load_adapter(dreamo / MAIN).at(0.6)).cpu()
    assert off(drawn(there).cpu(), wanted) > 0.05, "the control: unadapted, it is another picture"
    assert off(got, wanted) <= 1e-2


def test_nothing_of_the_base_is_copied_or_changed(pipeline: Pipeline, dreamo: Path) -> None:
    """An adapted network holds the base's own tensors and its factors, which all of its scales share."""
    own = {id(tensor) for tensor in pipeline.model.transformer.parameters()}
    before = {name: tensor.clone() for name, tensor in pipeline.model.transformer.state_dict().items()}
    loaded = pipeline.load_adapter(dreamo / MAIN)
    factors: set[int] = set()
    for scale in (1.0, 0.5):
        network = loaded.at(scale).network.model
        assert {id(tensor) for tensor in network.parameters()} == own
        factors |= {buffer.untyped_storage().data_ptr() for buffer in network.buffers()}
    sizes = {b.untyped_storage().data_ptr(): b.untyped_storage().nbytes() for b in network.buffers()}
    assert set(sizes) == factors and sum(sizes.values()) == loaded.nbytes
    drawn(pipeline, loaded.at(1.0))
    after = pipeline.model.transformer.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_runs_of_several_networks_go_on_side_by_side(pipeline: Pipeline, dreamo: Path, tmp_path: Path) -> None:
    """Threads that step the served model and two adapters at once draw what each draws alone: nothing is switched."""
    plain = plain_lora(tmp_path / "plain.safetensors", pipeline.model.transformer, seed=2)
    adaptations = [None, pipeline.load_adapter(dreamo / MAIN).at(0.7), pipeline.load_adapter(plain).at(1.0)]
    alone = [drawn(pipeline, adaptation) for adaptation in adaptations]
    beside: dict[int, torch.Tensor] = {}

    def draw(number: int) -> None:
        own = Pipeline(pipeline.model, pipeline.tools, lanes=1)  # a sampler serves one thread; the modules are shared
        beside[number] = drawn(own, adaptations[number])

    threads = [threading.Thread(target=draw, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(beside[number], wanted) for number, wanted in enumerate(alone))
    assert off(alone[1], alone[0]) > 0.01 and off(alone[2], alone[0]) > 0.01


def test_a_forward_has_one_network(pipeline: Pipeline, dreamo: Path) -> None:
    """Runs of several are refused, nobody having moved; equal scales share a network, others do not."""
    loaded = pipeline.load_adapter(dreamo / MAIN)
    half = loaded.at(0.5)
    runs = [begun(pipeline), begun(pipeline, half), begun(pipeline, loaded.at(1.0)), begun(pipeline, loaded.at(0.5))]
    assert [len({pipeline.group(run) for run in some}) for some in (runs, runs[1::2])] == [3, 1]
    assert all(run.step == 1 for run in pipeline.step(runs[1::2]))
    for lanes in (pipeline, Pipeline(pipeline.model, pipeline.tools, lanes=2)):
        for mixed in (runs[:2], runs[1:3]):
            with pytest.raises(ValueError, match="several networks"):
                lanes.step(mixed)


def test_an_adaptation_lives_as_long_as_it_is_used(pipeline: Pipeline, dreamo: Path) -> None:
    """A run that goes on keeps its network though the adapter has been let go of; nobody else's is held."""
    loaded = pipeline.load_adapter(dreamo / MAIN)
    run = begun(pipeline, loaded.at(0.5))
    wanted = drawn(pipeline, loaded.at(0.5))
    del loaded
    while not run.done:
        (run,) = pipeline.step([run])
    assert torch.equal(run.latents, wanted)


def test_compiled_blocks_stay_the_served_models(
    model: LoadedModel, tools: Tools, dreamo: Path, pipeline: Pipeline
) -> None:
    """With compilation, adapted networks run the blocks as they are, and draw the same."""
    quick = Pipeline(model, tools, compile="on", compiler="eager", lanes=1)
    adaptation = quick.load_adapter(dreamo / MAIN).at(0.6)
    assert adaptation.network.double is not quick.lanes.samplers[0].network.double
    assert torch.equal(drawn(quick, adaptation), drawn(pipeline, pipeline.load_adapter(dreamo / MAIN).at(0.6)))


def test_prompts_are_known_by_the_rows_they_are_read_with(
    pipeline: Pipeline, source: ModelSource, dreamo: Path
) -> None:
    """A cache must tell prompts apart that other placeholder rows encode, and need not where they are the same."""
    loaded, same = pipeline.load_adapter(dreamo / MAIN), pipeline.load_adapter(main_of(source))
    assert len({loaded.at(scale).prompts for scale in (0.0, 0.5, 1.0)}) == 3
    assert loaded.at(0.0).prompts == same.at(1.0).prompts
    text = [pipeline.encode_prompt("[ref#1]", adaptation).text for adaptation in (None, loaded.at(0.0), loaded.at(1.0))]
    assert torch.equal(text[0], text[1]) and not torch.equal(text[0], text[2])


def refusal(pipeline: Pipeline, file: Path) -> str:
    with pytest.raises(AdapterError) as caught:
        pipeline.load_adapter(file)
    assert str(file) not in caught.value.message, "a job's error names no path"
    return caught.value.code


def test_an_adapter_for_another_base_is_refused(pipeline: Pipeline, dreamo: Path, tmp_path: Path) -> None:
    """A module that is not there, another size, other embeddings; and a file that is no adapter at all."""
    tensors = load_file(plain_lora(tmp_path / "a.safetensors", pipeline.model.transformer, seed=1, only="to_q"))
    save_file({k.replace("blocks.0", "blocks.70"): v for k, v in tensors.items()}, tmp_path / "b.safetensors")
    save_file({k: v.repeat(2, 2) for k, v in tensors.items()}, tmp_path / "c.safetensors")
    whole = load_file(dreamo / MAIN)
    wide = {k: v.repeat(1, 2) if "t5" in k else v for k, v in whole.items()}
    save_file(wide, tmp_path / "d.safetensors")
    save_file({k: v.repeat(2, 2) if "lora" in k else v for k, v in whole.items()}, tmp_path / "e.safetensors")
    save_file({k: v[0] for k, v in tensors.items()}, tmp_path / "f.safetensors")
    save_file({k: v[:0] if "lora_A" in k else v[:, :0] for k, v in tensors.items()}, tmp_path / "g.safetensors")
    (tmp_path / "h.safetensors").write_bytes(b"no tensors")
    codes = [refusal(pipeline, tmp_path / f"{name}.safetensors") for name in "bcdefgh"]
    assert codes == ["adapter_mismatch"] * 6 + ["adapter_corrupt"]


def test_an_adapter_that_was_trained_on_another_base_is_refused(
    source: ModelSource, pipeline: Pipeline, dreamo: Path, tmp_path: Path
) -> None:
    """Although its shapes fit: its card says so. Control: for this base, or by a card that says nothing, it is loaded.
    A fused model knows which base it was made of, also without that base's files.
    """
    base = pipeline.model.base
    assert base == fingerprint_of(Path(source.base_model) / "transformer")
    with pytest.raises(AdapterError, match="name another adapter, or train it anew") as caught:
        pipeline.load_adapter(dreamo / MAIN, "0" * 32)
    assert caught.value.code == "adapter_mismatch"
    for known in (base, None):
        assert pipeline.load_adapter(dreamo / MAIN, known).nbytes > 0
    write_fused(source, tmp_path / "fused")
    bare = tmp_path / "bare"
    shutil.copytree(source.base_model, bare)
    for file in (bare / "transformer").glob("*.safetensors"):
        file.unlink()
    assert load_model(replace(source, base_model=str(bare), fused=tmp_path / "fused")).base == base


def test_a_fused_model_needs_dreamos_own_file(
    source: ModelSource, tools: Tools, dreamo: Path, pipeline: Pipeline, tmp_path: Path
) -> None:
    """Without it whole adapters are refused by a code, with it they are exact; another DreamO's is not taken for it.

    Plain LoRAs need none.
    """
    write_fused(replace(source, dreamo=main_of(source).parent, dtype="float32"), tmp_path / "fused")
    bare = tmp_path / "bare"
    shutil.copytree(source.base_model, bare, ignore=shutil.ignore_patterns("dreamo"))
    served = replace(source, base_model=str(bare), fused=tmp_path / "fused")

    def started(directory: Path | None) -> Pipeline:
        return Pipeline(load_model(replace(served, dreamo=directory)), tools, lanes=1)

    assert refusal(started(None), dreamo / MAIN) == "adapter_base_missing"
    assert refusal(started(dreamo), dreamo / MAIN) == "adapter_base_missing"
    given = started(main_of(source).parent)
    wanted = drawn(pipeline, pipeline.load_adapter(dreamo / MAIN).at(0.6))
    assert off(drawn(given, given.load_adapter(dreamo / MAIN).at(0.6)), wanted) <= 1e-5
    plain = plain_lora(tmp_path / "plain.safetensors", pipeline.model.transformer, seed=2)
    without = started(None)
    wanted = drawn(pipeline, pipeline.load_adapter(plain).at(1.0))
    assert off(drawn(without, without.load_adapter(plain).at(1.0)), wanted) <= 1e-5


def test_a_dora_is_no_lora(pipeline: Pipeline, tmp_path: Path) -> None:
    """Half of what such a file says would be lost: it is refused, not read in part."""
    tensors = load_file(plain_lora(tmp_path / "a.safetensors", pipeline.model.transformer, seed=1, only="to_q"))
    name = "transformer.transformer_blocks.0.attn.to_q.lora_magnitude_vector"
    save_file(tensors | {name: torch.ones(4)}, tmp_path / "dora.safetensors")
    assert refusal(pipeline, tmp_path / "dora.safetensors") == "adapter_corrupt"
