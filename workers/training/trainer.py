"""Runs a recipe: stage after stage, step after step, every step a function of (recipe, seed, step number).

Because of that, a run that was stopped or killed and resumed ends with the same weights as one that was not: bit for
bit on a CPU. Checkpoints are written every `save_every` steps, at the end of a stage, and when asked to stop.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from accelerate import Accelerator, DistributedType
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from model.losses import LossCounts, Losses, LossWeights
from model.weights.checkpoints import LoadedModel
from model.weights.fingerprints import fingerprint_of
from workers.training import sheets
from workers.training.adapting import add_adapter, changes
from workers.training.batches import compose, step_generator
from workers.training.encodings import Encodings
from workers.training.export import Exported, write_adapter, write_transformer
from workers.training.failures import DIVERGED, EXHAUSTED, BrokenStepError, TrainingError, check_goes_on, finite
from workers.training.objective import Objective
from workers.training.optimizers import make_optimizer, optimizer_state, restore_optimizer
from workers.training.recipes import LossPart, Recipe, RecipeError, Stage
from workers.training.records import Pixels, Record
from workers.training.reports import StepReport
from workers.training.snapshots import Snapshot, newest_snapshot, newest_step, write_snapshot

_LOG = logging.getLogger(__name__)


class Source(Protocol):
    """Where records come from; the same index always gives the same record."""

    def record(self, index: int, stage: Stage) -> Record: ...


_SPREADS = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)


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
        directory: checkpoints go to `checkpoints/`, sheets of samples to `pictures/`, what is kept of a dataset's
            encodings to `cache/`, results to `adapter/` and, trained, `transformer/`.
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
        # Precision is set step by step: accelerate's own is the whole process', and trainings of both may run in one.
        self.accelerator = Accelerator(mixed_precision="no", cpu=model.transformer.device.type == "cpu")
        if self.accelerator.distributed_type not in _SPREADS:
            raise TrainingError(
                f"{self.accelerator.distributed_type} is not supported: the packed forward reads the blocks' weights "
                "itself, so they cannot be sharded by block; use one process or DDP (`torchrun`)"
            )
        add_adapter(model.transformer, recipe.lora.targets, recipe.lora.rank, seed=recipe.seed)
        self._encodings = _encodings(recipe, model, directory)
        checkpointing = recipe.gradient_checkpointing
        self.objective = Objective(model, embeddings, checkpointing=checkpointing, encodings=self._encodings)
        self._whole: nn.Module = self.accelerator.prepare_model(self.objective, evaluation_mode=True)
        self._prepared = self._whole
        self._now = _Running()

    @property
    def leads(self) -> bool:
        """Whether this is the process that reports, saves and exports."""
        return self.accelerator.is_main_process

    @property
    def step(self) -> int:
        """Steps done."""
        return self._now.step

    def resume(self) -> bool:
        """Continue from the newest checkpoint; False if there is none.

        Raises:
            OtherRunError: the checkpoint is of another run.
            SnapshotError: it is damaged.
            TrainingError: memory ran out.
        """
        snapshot = newest_snapshot(self.directory / "checkpoints")
        if snapshot is None:
            return False
        check_goes_on(snapshot.facts, self.recipe, self.accelerator.num_processes, self.directory)
        parameters = dict(self.objective.named_parameters())
        with torch.no_grad():
            for name, tensor in snapshot.weights.items():
                parameters[name].copy_(tensor)
        self._now.step = snapshot.step
        if snapshot.step < self.recipe.steps:
            stage, within = self.recipe.at(snapshot.step)
            self._enter(stage)
            if within:
                try:
                    restore_optimizer(self._now.optimizer, self._learning(), snapshot.optimizer)
                except torch.OutOfMemoryError as error:
                    raise self._exhausted(f"resuming after step {snapshot.step}", save=False) from error
                for name, average in self._now.averages.items():
                    average.copy_(snapshot.averages[name])
        return True

    def run(self) -> bool:
        """Train to the end of the recipe; False if stopped before.

        Raises:
            TrainingError: a loss, a gradient or the weights are not finite, or memory ran out.
        """
        while self._now.step < self.recipe.steps:
            if self._agreed(self.stop.is_set()):
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
        """Write a checkpoint of the state before the next step.

        Raises:
            TrainingError: its weights are not finite: the checkpoint before it stays the newest.
        """
        if not finite(self._state()):
            raise self._broken(f"after step {self._now.step}: the weights are not finite", DIVERGED, save=False)
        self._write()

    def _write(self) -> None:
        if not self.leads:
            return
        optimizer = self._now.optimizer
        state = optimizer_state(optimizer, self._learning()) if optimizer is not None else {}
        facts = {**self._facts(), "processes": self.accelerator.num_processes}
        snapshot = Snapshot(self._now.step, self._trained(), self._now.averages, state, facts)
        write_snapshot(self.directory / "checkpoints", snapshot)

    def export(self) -> Exported:
        """Write the adapter in both formats, and the base's transformer where a stage has trained it.

        For the process that leads.
        """
        base = self.model.base
        if any(stage.train == "base" for stage in self.recipe.stages):
            write_transformer(self.directory / "transformer", self.model.transformer)
            base = fingerprint_of(self.directory / "transformer")
        return write_adapter(
            self.directory / "adapter",
            changes(self.model.transformer),
            self.objective.embeddings.tables(),
            {**self._facts(), "steps": self._now.step, "base": base},
        )

    def _one(self, stage: Stage, within: int) -> None:
        process, processes = self.accelerator.process_index, self.accelerator.num_processes
        first = (self._now.step * processes + process) * stage.batch
        records = [self.source.record(first + number, stage) for number in range(stage.batch)]
        generator = step_generator(self.recipe.seed, self._now.step, process)
        moments = None if self._encodings is None else self._encodings.moments
        parts = _ramped(stage.losses, within)
        try:
            batch = compose(records, stage, self.model.codec, generator, moments)
            with torch.autocast(self.accelerator.device.type, torch.bfloat16, self.recipe.precision == "bfloat16"):
                losses, _ = self._prepared(batch, parts)
            total = losses.total(LossWeights(parts.flow, parts.route, parts.holder), self._counts(losses))
            self._require_finite(total.detach(), "the loss")
            self.accelerator.backward(total)
            clip = math.inf if stage.optimizer.clip is None else stage.optimizer.clip
            norm = self.accelerator.clip_grad_norm_(self._learning().values(), clip)
            self._require_finite(cast("torch.Tensor", norm), "the gradient's norm")
        except torch.OutOfMemoryError as error:
            raise self._exhausted(f"step {self._now.step + 1}", save=True) from error
        try:
            self._apply(stage, stage.rate(within))
        except torch.OutOfMemoryError as error:  # some of the weights have been changed by now, others not
            raise self._exhausted(f"step {self._now.step + 1}", save=False) from error
        self._now.step += 1
        if self.leads:
            values = {name: _mean(getattr(losses, name)) for name in ("flow", "route", "holder")}
            samples = stage.batch * processes
            loss, sheet = float(total.detach()), self._sheet(stage)
            self.report(StepReport(self._now.step, self.recipe.steps, stage.name, loss, values, samples, sheet))

    def _apply(self, stage: Stage, rate: float) -> None:
        optimizer = self._now.optimizer
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self._average(stage)

    def _enter(self, stage: Stage) -> None:
        """Set what learns in a stage, and a fresh optimizer for it."""
        try:
            self._set_up(stage)
        except torch.OutOfMemoryError as error:
            raise self._exhausted(f"stage {stage.name}", save=False) from error

    def _set_up(self, stage: Stage) -> None:
        for module in self.objective.modules():
            if isinstance(module, LoraLayer):
                cast("Any", module).enable_adapters(stage.train == "adapter")
        for name, parameter in self.objective.named_parameters():
            parameter.requires_grad_(_learns(name, stage))
        if self.accelerator.num_processes > 1:
            # Anew in each stage: DDP takes up what learns when it is made. Embeddings of placeholders and of slots are
            # without a gradient in a step whose records have none.
            self._prepared = DistributedDataParallel(self._whole, find_unused_parameters=True)
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

    def _state(self) -> list[torch.Tensor]:
        return [*self._trained().values(), *self._now.averages.values()]

    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.objective.named_parameters() if self._was_trained(name)}

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

    def _agreed(self, mine: Any) -> bool:
        """Whether any process says so; all processes must ask, and get one answer."""
        if self.accelerator.num_processes == 1:
            return bool(mine)
        said = torch.tensor([float(mine)], device=self.accelerator.device)
        return float(cast("torch.Tensor", self.accelerator.reduce(said, "sum"))) > 0

    def _sheet(self, stage: Stage) -> Pixels | None:
        """Samples of the weights as they would be kept, where a step is due for them; the run goes on without, if
        they cannot be made."""
        every = self.recipe.pictures_every
        if not every or self._now.step % every:
            return None
        try:
            records = [self.source.record(sheets.FIRST + number, stage) for number in range(sheets.RECORDS)]
            with self._averaged():
                sheet = sheets.draw(self.model, self.objective.embeddings, records)
            sheets.write(self.directory / "pictures", self._now.step, sheet)
        except (RecipeError, OSError, torch.OutOfMemoryError) as error:
            _LOG.warning("step %d: no pictures (%s: %s)", self._now.step, type(error).__name__, error)
            return None
        return sheet

    @contextmanager
    def _averaged(self) -> Generator[None]:
        """The averages in the weights' places, where there are any."""
        learning = self._learning()
        weights = {name: learning[name].data for name in self._now.averages}
        for name, average in self._now.averages.items():
            learning[name].data = average
        try:
            yield
        finally:
            for name, weight in weights.items():
                learning[name].data = weight

    def _facts(self) -> dict[str, Any]:
        return {"recipe": self.recipe.model_dump(mode="json")}

    def _require_finite(self, value: torch.Tensor, what: str) -> None:
        """End a step whose outcome is not finite, before the weights are touched. The weights may have gone astray
        before: they are kept only where no older ones are."""
        if self._agreed(not torch.isfinite(value)):
            first = newest_step(self.directory / "checkpoints") is None
            raise self._broken(f"step {self._now.step + 1}: {what} is {float(value)}", DIVERGED, save=first)

    def _exhausted(self, where: str, *, save: bool) -> BrokenStepError:
        return self._broken(f"{where}: the device ran out of memory", EXHAUSTED, save=save)

    def _broken(self, reason: str, remedy: str, *, save: bool) -> BrokenStepError:
        """What to say of an end; `save`: the weights are those before the next step, and are kept if finite."""
        if save and finite(self._state()):
            self._write()
        newest = newest_step(self.directory / "checkpoints")
        kept = (
            "there is no checkpoint yet" if newest is None else f"a checkpoint of step {newest} is in {self.directory}"
        )
        return BrokenStepError(reason, f"{kept}. {remedy}")


def _encodings(recipe: Recipe, model: LoadedModel, directory: Path) -> Encodings | None:
    """Of a dataset's records; StickerWorld's never come again, and are encoded together, which is faster."""
    if recipe.data.source == "stickerworld":
        return None
    kept = recipe.data.cache_directory or directory / "cache"
    return Encodings(model.codec, model.text, kept, int(recipe.data.cache_gib * 2**30))


def _learns(name: str, stage: Stage) -> bool:
    adapter = "lora_" in name or name.startswith("embeddings.")
    return adapter if stage.train == "adapter" else not adapter


def _ramped(losses: LossPart, within: int) -> LossPart:
    if losses.route_ramp == 0:
        return losses
    return losses.model_copy(update={"route": losses.route * min(1.0, (within + 1) / losses.route_ramp)})


def _mean(term: Any) -> float:
    return float(term.value.detach()) if term.count else float("nan")
