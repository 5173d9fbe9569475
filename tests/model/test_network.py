"""What is computed before the steps, and the fused projections: the same velocities as the plain forward."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch

from model.network import fused
from model.packing import lay_out, pack
from model.pipeline import Pipeline
from model.preprocessors.prepare import load_tools
from model.sampling import Denoising, Guidance, Sampler
from model.schedule import sigmas
from model.transformer import Network, forward
from model.weights.checkpoints import LoadedModel
from tests.model.drawing import whole_request
from tests.model.requests import packed, sample

CFG = Guidance(scale=3.5, first_step=2.0, true_scale=2.5, start=1, end=3, negative=3.0)


def begun(sampler: Sampler, model: LoadedModel, seed: int, references: int, guidance: Guidance) -> Denoising:
    one = sample(model, seed, (6, 6), dict.fromkeys(range(1, references + 1), (3, 4)), timestep=1.0)
    negative = sample(model, seed + 100, (6, 6), {}, timestep=1.0, embedded=False).condition
    return sampler.begin(one.condition, negative, guidance, sigmas(4, 36, model.shift), one.latents)


def test_what_is_computed_once_serves_every_step(tiny: LoadedModel) -> None:
    """At each step, with and without true CFG, alone and in company, the sampler's velocity is the plain forward's."""
    network = Network(tiny.transformer)
    sampler = Sampler(network, tiny.tables)
    for step in range(4):
        runs = [replace(begun(sampler, tiny, seed, seed, CFG), step=step) for seed in (0, 1, 2)]
        for run, parts in zip(runs, sampler.velocities(runs), strict=True):
            branches = [(run.condition, CFG.at(step))]
            if CFG.splits(step):
                assert run.negative is not None
                branches.append((run.negative, CFG.negative))
            assert len(parts) == len(branches)
            for velocity, (condition, scale) in zip(parts, branches, strict=True):
                sequence = pack(lay_out([condition]), [condition], [run.latents], [run.timestep], [scale])
                wanted = forward(network, tiny.tables, sequence)
                assert (velocity - wanted).abs().max() <= 1e-5


def test_images_of_a_request_share_what_no_seed_changes(tiny: LoadedModel) -> None:
    """Text and modulation vectors of all steps, a hundred megabytes of FLUX's, are held once; pictures are the same,
    to the bit, as by themselves."""
    pipeline = Pipeline(tiny, load_tools("grabcut", "opencv", "cpu"))
    encoded = whole_request(pipeline)
    first = pipeline.start(encoded, 1)
    beside, alone = pipeline.start(encoded, 2, beside=first), pipeline.start(encoded, 2)
    for mine, theirs in ((beside.standing, first.standing), (beside.negative_standing, first.negative_standing)):
        assert mine is not None and theirs is not None
        assert mine.vectors is theirs.vectors and mine.text is theirs.text and mine.target is theirs.target
    assert not torch.equal(beside.standing.references, first.standing.references), "a draw of its own"
    while not beside.done:
        (beside,), (alone,) = pipeline.step([beside]), pipeline.step([alone])
    assert torch.equal(beside.latents, alone.latents)


def test_what_stands_holds_nothing_else(tiny: LoadedModel) -> None:
    """No tensor of it is a view of a larger one, which would be held for as long as the run."""
    standing = begun(Sampler(Network(tiny.transformer), tiny.tables), tiny, 1, 2, CFG).standing
    for tensor in (standing.text, standing.references, standing.target, standing.vectors):
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_the_sampler_forgets_old_batches(tiny: LoadedModel) -> None:
    """What is kept per kind of batch is bounded, and made anew without a difference."""
    small = Sampler(Network(tiny.transformer), tiny.tables, keep=1)
    runs = [begun(small, tiny, 1, references, Guidance(3.5, 3.5)) for references in (0, 1, 2)]
    first = [small.velocities([run])[0][0] for run in runs]
    again = [small.velocities([run])[0][0] for run in runs]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_fused_projections_are_the_same_layers(tiny: LoadedModel) -> None:
    """One product for q, k and v gives what three do and holds no second copy: the layers' weights are views of it."""
    model = copy.deepcopy(tiny.transformer)
    samples = [sample(tiny, 1, (6, 6), {1: (3, 4), 2: (2, 2)}, timestep=0.7), sample(tiny, 2, (4, 4), {}, timestep=0.3)]
    wanted = forward(Network(model), tiny.tables, packed(samples))
    size = sum(parameter.numel() for parameter in model.parameters())
    network = fused(model)
    assert len(network.projections) == len(model.transformer_blocks) + len(model.single_transformer_blocks)
    assert (forward(network, tiny.tables, packed(samples)) - wanted).abs().max() <= 1e-5
    block = model.transformer_blocks[0]
    text, image = network.projections[0]
    assert block.attn.to_k.weight.untyped_storage().data_ptr() == image.weight.untyped_storage().data_ptr()
    assert block.attn.add_v_proj.weight.untyped_storage().data_ptr() == text.weight.untyped_storage().data_ptr()
    assert sum(parameter.numel() for parameter in model.parameters()) == size
    assert torch.equal(forward(Network(model), tiny.tables, packed(samples)), wanted), "its own layers still work"
