"""Runs a recipe: stage after stage, step after step, every step a function of (recipe, seed, step number).

Because of that, a run that was stopped or killed and resumed ends with the same weights as one that was not: bit for
bit on a CPU. Checkpoints are written every `save_every` steps, at the end of a stage, and when asked to stop.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from accelerate import Accelerator
from peft.tuners.lora import LoraLayer
from torch import nn

from model.checkpoints import LoadedModel
from model.losses import LossCounts, Losses, LossWeights
from workers.training.adapting import add_adapter, changes
from workers.training.batches import compose
from workers.training.export import Exported, write_adapter, write_transformer
from workers.training.objective import Objective
from workers.training.optimizers import make_optimizer, optimizer_state, restore_optimizer
from workers.training.recipes import LossPart, Recipe, Stage
from workers.training.records import Record
from workers.training.snapshots import Snapshot, newest_snapshot, write_snapshot


class Source(Protocol):
    """Where records come from; the same index always gives the same record."""

    def record(self, index: int, stage: Stage) -> Record: ...


class TrainingError(Exception):
    """A run that cannot go on; a checkpoint has been written and the message says what to do."""


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one step did. `losses`: mean of each part over its units, nan where there were none."""

    step: int
    total_steps: int
    stage: str
    loss: float
    losses: Mapping[str, float]
    samples: int


@dataclass(slots=True)
class _Running:
    """What changes from step to step."""

    step: int = 0
    stage: Stage | None = None
    optimizer: Any = None
    averages: dict[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])


class Trainer:
    """One run of a recipe.

    Args:
        model: the base and its encoders; its transformer is adapted in place.
        directory: checkpoints go to `checkpoints/`, results to `adapter/` and, trained, `transformer/`.
        report: called after each step, in the main process.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: LoadedModel,
        embeddings: Any,
        source: Source,
        directory: Path,
        report: Callable[[StepReport], None],
    ) -> None:
        self.recipe = recipe
        self.model = model
        self.source = source
        self.directory = directory
        self.report = report
        self.stop = threading.Event()
        """Set it to end after the step at hand, with a checkpoint."""
        mixed = {"float32": "no", "bfloat16": "bf16"}[recipe.precision]
        self.accelerator = Accelerator(mixed_precision=mixed, cpu=model.transformer.device.type == "cpu")
        add_adapter(model.transformer, recipe.lora.targets, recipe.lora.rank, seed=recipe.seed)
        self.objective = Objective(model, embeddings, checkpointing=recipe.gradient_checkpointing)
        self._prepared: nn.Module = self.accelerator.prepare(self.objective)
        self._now = _Running()

    @property
    def step(self) -> int:
        """Steps done."""
        return self._now.step

    def resume(self) -> bool:
        """Continue from the newest checkpoint; False if there is none.

        Raises:
            TrainingError: the checkpoint is of another recipe.
            SnapshotError: it is damaged.
        """
        snapshot = newest_snapshot(self.directory / "checkpoints")
        if snapshot is None:
            return False
        if snapshot.facts != self._facts():
            raise TrainingError(
                f"the checkpoint in {self.directory} is of another recipe: name a new directory, or restore the recipe"
            )
        parameters = dict(self.objective.named_parameters())
        with torch.no_grad():
            for name, tensor in snapshot.weights.items():
                parameters[name].copy_(tensor)
        self._now.step = snapshot.step
        if snapshot.step < self.recipe.steps:
            stage, within = self.recipe.at(snapshot.step)
            self._enter(stage)
            if within:
                restore_optimizer(self._now.optimizer, self._learning(), snapshot.optimizer)
                self._now.averages = {name: tensor.clone() for name, tensor in snapshot.averages.items()}
        return True

    def run(self) -> bool:
        """Train to the end of the recipe; False if stopped before.

        Raises:
            TrainingError: a loss is not finite, or memory ran out.
        """
        while self._now.step < self.recipe.steps:
            if self.stop.is_set():
                self.save()
                return False
            stage, within = self.recipe.at(self._now.step)
            if stage is not self._now.stage:
                self._enter(stage)
            self._one(stage, within)
            if self._now.step % self.recipe.save_every == 0 or within + 1 == stage.steps:
                if within + 1 == stage.steps:
                    self._leave()
                self.save()
        return True

    def save(self) -> None:
        """Write a checkpoint of the state before the next step."""
        if not self.accelerator.is_main_process:
            return
        optimizer = self._now.optimizer
        state = optimizer_state(optimizer, self._learning()) if optimizer is not None else {}
        trained = {name: p for name, p in self.objective.named_parameters() if self._was_trained(name)}
        snapshot = Snapshot(self._now.step, trained, self._now.averages, state, self._facts())
        write_snapshot(self.directory / "checkpoints", snapshot)

    def export(self) -> Exported:
        """Write the adapter in both formats, and the base's transformer where a stage has trained it."""
        if any(stage.train == "base" for stage in self.recipe.stages):
            write_transformer(self.directory / "transformer", self.model.transformer)
        return write_adapter(
            self.directory / "adapter",
            changes(self.model.transformer),
            self.objective.embeddings.tables(),
            {**self._facts(), "steps": self._now.step},
        )

    def _one(self, stage: Stage, within: int) -> None:
        process, processes = self.accelerator.process_index, self.accelerator.num_processes
        first = (self._now.step * processes + process) * stage.batch
        records = [self.source.record(first + number, stage) for number in range(stage.batch)]
        batch = compose(records, stage, self.model.codec, self._generator(f"{self._now.step}.{process}"))
        parts = _ramped(stage.losses, within)
        try:
            losses, _ = self._prepared(batch, parts)
            total = losses.total(LossWeights(parts.flow, parts.route, parts.holder), self._counts(losses))
            if not torch.isfinite(total):
                raise TrainingError(self._broken(f"the loss is {float(total.detach())}"))
            self.accelerator.backward(total)
        except torch.OutOfMemoryError as error:
            raise TrainingError(self._broken("the device ran out of memory")) from error
        optimizer = self._now.optimizer
        if stage.optimizer.clip is not None:
            self.accelerator.clip_grad_norm_(self._learning().values(), stage.optimizer.clip)
        for group in optimizer.param_groups:
            group["lr"] = stage.rate(within)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self._average(stage)
        self._now.step += 1
        if self.accelerator.is_main_process:
            values = {name: _mean(getattr(losses, name)) for name in ("flow", "route", "holder")}
            samples = stage.batch * processes
            loss = float(total.detach())
            self.report(StepReport(self._now.step, self.recipe.steps, stage.name, loss, values, samples))

    def _enter(self, stage: Stage) -> None:
        """Set what learns in a stage, and a fresh optimizer for it."""
        for module in self.objective.modules():
            if isinstance(module, LoraLayer):
                cast("Any", module).enable_adapters(stage.train == "adapter")
        for name, parameter in self.objective.named_parameters():
            parameter.requires_grad_(_learns(name, stage))
        self._now.stage = stage
        self._now.optimizer = make_optimizer(stage.optimizer, list(self._learning().values()))
        self._now.averages = {}
        if stage.ema is not None:
            self._now.averages = {name: p.detach().clone() for name, p in self._learning().items()}

    def _leave(self) -> None:
        """At the end of a stage the averages become the weights."""
        with torch.no_grad():
            for name, parameter in self._learning().items():
                if name in self._now.averages:
                    parameter.copy_(self._now.averages[name])
        self._now.averages = {}

    @torch.no_grad()
    def _average(self, stage: Stage) -> None:
        for name, average in self._now.averages.items():
            average.lerp_(self._learning()[name].detach(), 1 - (stage.ema or 0.0))

    def _learning(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.objective.named_parameters() if p.requires_grad}

    def _was_trained(self, name: str) -> bool:
        """Whether any stage up to this one trains a parameter."""
        stages: Sequence[Stage] = self.recipe.stages
        done = 0
        for stage in stages:
            if done <= self._now.step and _learns(name, stage):
                return True
            done += stage.steps
        return False

    def _counts(self, losses: Losses) -> LossCounts | None:
        if self.accelerator.num_processes == 1:
            return None
        counts = torch.tensor(
            [losses.flow.count, losses.route.count, losses.holder.count],
            dtype=torch.float32,
            device=self.accelerator.device,
        )
        mean = cast("torch.Tensor", self.accelerator.reduce(counts, "mean")).clamp_min(1e-6)
        return LossCounts(*mean.tolist())

    def _generator(self, what: str) -> torch.Generator:
        digest = hashlib.sha256(f"{self.recipe.seed} {what}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))

    def _facts(self) -> dict[str, Any]:
        return {"recipe": self.recipe.model_dump(mode="json")}

    def _broken(self, what: str) -> str:
        """Checkpoint the weights, which this step has not touched, and say what to do."""
        self.save()
        return (
            f"step {self._now.step + 1}: {what}; a checkpoint of the step before is in {self.directory}. "
            "Lower the learning rate or the batch, or look at the records of this step."
        )


def _learns(name: str, stage: Stage) -> bool:
    adapter = "lora_" in name or name.startswith("embeddings.")
    return adapter if stage.train == "adapter" else not adapter


def _ramped(losses: LossPart, within: int) -> LossPart:
    if losses.route_ramp == 0:
        return losses
    return losses.model_copy(update={"route": losses.route * min(1.0, (within + 1) / losses.route_ramp)})


def _mean(term: Any) -> float:
    return float(term.value.detach()) if term.count else float("nan")
