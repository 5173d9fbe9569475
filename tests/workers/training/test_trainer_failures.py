"""A run that cannot go on: what is kept of it is sound, and the message names it and what can be done."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.workers.training.test_trainer import STAGE, recipe, same, trainer, weights
from workers.training import trainer as module
from workers.training.failures import TrainingError
from workers.training.recipes import OptimizerPart
from workers.training.snapshots import newest_snapshot, newest_step
from workers.training.trainer import Trainer

NEW_RUN = "in a new run .another --out"


def kept(directory: Path) -> int | None:
    return newest_step(directory / "checkpoints")


def spoil_output(run: Trainer, step: int) -> None:
    """The loss of a step is not finite, though all weights are."""

    def spoiled(_module: object, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        return output * torch.nan if run.step + 1 == step else output

    run.model.transformer.proj_out.register_forward_hook(spoiled)


def spoil_weights(run: Trainer, step: int) -> None:
    """The weights are not finite after a step."""

    def spoil(report: Any) -> None:
        if report.step == step:
            run.objective.embeddings.type_rows.data[0] = torch.nan

    run.report = spoil


def spoil_gradient(run: Trainer, step: int) -> None:
    run.objective.embeddings.type_rows.register_hook(
        lambda gradient: gradient * torch.inf if run.step + 1 == step else gradient
    )


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (spoil_output, "step 4: the loss is nan"),
        (spoil_gradient, "step 4: the gradient's norm is (nan|inf)"),
        (lambda run, step: spoil_weights(run, step - 1), "step 4: the loss is nan"),
        (spoil_weights, "after step 4: the weights are not finite"),
    ],
)
@pytest.mark.parametrize("clip", [1.0, None])
def test_what_is_not_finite_leaves_the_last_checkpoint(
    tmp_path: Path, spoil: Callable[[Trainer, int], None], what: str, clip: float | None
) -> None:
    """Loss, gradient or weights: nothing is written in place of the checkpoint before, which the message names, with
    a remedy that a changed recipe's refusal does not bar."""
    run = trainer(tmp_path, recipe(stages=[{**STAGE, "optimizer": {"lr": 1e-3, "clip": clip}}]))
    spoil(run, 4)
    with pytest.raises(TrainingError, match=rf"{what}; a checkpoint of step 2 is .*Lower the learning rate {NEW_RUN}"):
        run.run()
    assert kept(tmp_path) == 2
    assert trainer(tmp_path, run.recipe).resume()


@pytest.mark.parametrize("spoil", [spoil_output, spoil_gradient])
def test_the_first_checkpoint_is_of_the_state_before(tmp_path: Path, spoil: Callable[[Trainer, int], None]) -> None:
    """Where there is none yet, the weights that the step has not touched are kept, if they are finite."""
    calm = trainer(tmp_path / "calm", recipe())
    calm.report = lambda _: calm.stop.set()
    calm.run()
    run = trainer(tmp_path / "spoiled", recipe())
    spoil(run, 2)
    with pytest.raises(TrainingError, match="a checkpoint of step 1 is"):
        run.run()
    snapshot = newest_snapshot(tmp_path / "spoiled" / "checkpoints")
    assert snapshot is not None and snapshot.step == 1
    assert same(snapshot.weights, weights(calm))


def test_weights_that_are_not_finite_are_never_kept(tmp_path: Path) -> None:
    """With no checkpoint before: the message says that there is none."""
    run = trainer(tmp_path, recipe())
    spoil_weights(run, 1)
    with pytest.raises(TrainingError, match="step 2: the loss is nan; there is no checkpoint yet"):
        run.run()
    assert kept(tmp_path) is None


def test_running_out_of_memory_ends_with_a_checkpoint(tmp_path: Path) -> None:
    """Torch's own error in the middle of a step: the weights before it are kept, and the message says what to do."""
    for number, part in enumerate(("transformer", "codec")):
        run = trainer(tmp_path / part, recipe())

        def exhausted(*_: object, run: Trainer = run) -> None:
            if run.step == 1:
                raise torch.OutOfMemoryError

        (run.model.transformer.x_embedder, run.model.codec.vae.encoder)[number].register_forward_pre_hook(exhausted)
        with pytest.raises(TrainingError, match=rf"step 2: the device ran out of memory; .* the batch .*{NEW_RUN}"):
            run.run()
        assert kept(tmp_path / part) == 1


def test_running_out_of_memory_half_way_through_the_weights_keeps_the_older(tmp_path: Path) -> None:
    """An optimizer's step that ends in the middle leaves neither the old weights nor the new: they are not kept."""
    run = trainer(tmp_path, recipe())

    def half(report: Any) -> None:
        if report.step == 3:

            def step() -> None:
                run.objective.embeddings.type_rows.data += 1
                raise torch.OutOfMemoryError

            run._now.optimizer.step = step

    run.report = half
    with pytest.raises(TrainingError, match="step 4: the device ran out of memory; a checkpoint of step 2 is"):
        run.run()
    assert kept(tmp_path) == 2


def test_running_out_of_memory_as_a_run_is_resumed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that lacks the room for what the optimizer remembers; with room, the run goes on from there."""
    stopped = trainer(tmp_path, recipe())
    stopped.report = lambda report: stopped.stop.set() if report.step == 3 else None
    assert not stopped.run()

    def exhausted(*_: object) -> None:
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patched:
        patched.setattr(module, "restore_optimizer", exhausted)
        with pytest.raises(
            TrainingError, match=r"resuming after step 3: the device ran out of memory; .* of step 3 is"
        ):
            trainer(tmp_path, recipe()).resume()
    again = trainer(tmp_path, recipe())
    assert again.resume() and again.step == 3


def test_running_out_of_memory_at_the_start_of_a_stage_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The optimizer and the averages of a stage may be what does not fit, in a run and in one that is resumed."""
    make = module.make_optimizer

    def exhausted(part: OptimizerPart, parameters: Any) -> Any:
        if run.step == 6:
            raise torch.OutOfMemoryError
        return make(part, parameters)

    monkeypatch.setattr(module, "make_optimizer", exhausted)
    for act in ("run", "resume"):
        run = trainer(tmp_path, recipe())
        with pytest.raises(TrainingError, match="stage two: the device ran out of memory; a checkpoint of step 6 is"):
            getattr(run, act)()
        assert kept(tmp_path) == 6
