"""From a typed training request to an accepted training, and from its record to what a caller sees."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from service.admission import check_metadata
from service.callers.limits import training_cost_s
from service.intake import faults_of
from service.problems import Fault, Problem
from service.records import common_fields, time_text
from service.schemas import QueueView, RecordUrls
from service.submissions import Submitted, Terms, submit, webhook_of
from service.training_schemas import (
    AdapterView,
    EffectiveTraining,
    RecipeView,
    TrainingBody,
    TrainingProgressView,
    TrainingRequest,
)
from workers.courier.addresses import Rules
from workers.jobs import TrainingJob, TrainingProgress, TrainingRecord, TrainingResult
from workers.ledger import TrainingLedger
from workers.registry import MAIN, NAME, PublishedAdapter
from workers.settings import QueueSettings
from workers.training.recipes import OverrideError, Recipe, RecipeError, load_recipe, recipe_names

_DATASET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_MAX_RECIPE_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class TrainingAdmission:
    """What admitting trainings needs; one per process.

    Attributes:
        webhooks: the rules for theirs; None where none is signed.
        sample_s: estimated GPU-seconds of a sample.
    """

    settings: QueueSettings
    ledger: TrainingLedger
    webhooks: Rules | None
    sample_s: float

    def train(self, request: TrainingRequest, terms: Terms) -> Submitted[TrainingJob, TrainingProgress, TrainingResult]:
        """Accept one training and ring for it.

        Raises:
            Problem: 422 with every fault found; what `submit` raises.
            redis.exceptions.RedisError: Redis is away.
        """
        faults = check_metadata(request.metadata)
        recipe = self._recipe(request, faults)
        name = request.adapter if request.adapter is not None else request.recipe
        if not NAME.fullmatch(name) and (recipe is not None or request.adapter is not None):
            detail = "Lowercase letters, digits, `.`, `_` and `-`, at most 64, ending with a letter or digit."
            faults.append(Fault("/adapter", "invalid_value", detail))
        self._check_dataset(request, recipe, faults)
        webhook = webhook_of(request.webhook, self.webhooks, faults)
        if faults or recipe is None:
            raise Problem.of_faults(faults)
        job = TrainingJob(
            id=f"train_{secrets.token_hex(16)}",
            adapter=name,
            recipe=recipe.model_dump(mode="json"),
            dataset=request.dataset,
            metadata=request.metadata,
            tenant=terms.tenant,
            webhook=webhook,
            request_id=terms.request_id,
            traceparent=terms.traceparent,
        )
        return submit(self.ledger, job, terms, training_cost_s(recipe, self.sample_s))

    def offers(self) -> list[RecipeView]:
        """The recipes that can be asked for."""
        views: list[RecipeView] = []
        for name, file in sorted(recipe_names(self.settings.recipes_dir).items()):
            try:
                recipe = _usable(file)
            except RecipeError:
                continue  # the operator's `train --dry-run` says what is wrong with it
            if _adapts(recipe):
                stages = [stage.name for stage in recipe.stages]
                views.append(RecipeView(name=name, steps=recipe.steps, stages=stages, needs_dataset=_needs(recipe)))
        return views

    def datasets(self) -> list[str]:
        """Names of the datasets that can be asked for."""
        root = self.settings.dataset_root
        return sorted(path.name for path in root.iterdir() if path.is_dir()) if root.is_dir() else []

    def _recipe(self, request: TrainingRequest, faults: list[Fault]) -> Recipe | None:
        file = recipe_names(self.settings.recipes_dir).get(request.recipe)
        if file is None:
            detail = "There are: " + ", ".join(view.name for view in self.offers()) + "."
            faults.append(Fault("/recipe", "recipe_unknown", detail))
            return None
        try:
            recipe = _usable(file).changed(request.overrides)
        except OverrideError as error:
            for path, detail in error.faults:
                faults.append(Fault(_pointer(path), "override_invalid", detail + "."))
            return None
        except RecipeError:
            faults.append(Fault("/recipe", "recipe_unusable", "The server's recipe is faulty: tell its operator."))
            return None
        if not _adapts(recipe):
            detail = "It trains a base model; only recipes whose every stage trains an adapter are served."
            faults.append(Fault("/recipe", "recipe_unusable", detail))
        if len(recipe.model_dump_json()) > _MAX_RECIPE_BYTES:
            faults.append(Fault("/overrides", "override_invalid", "The recipe grows beyond 64 KiB: change less."))
        return recipe

    def _check_dataset(self, request: TrainingRequest, recipe: Recipe | None, faults: list[Fault]) -> None:
        name = request.dataset
        if name is None:
            if recipe is not None and _needs(recipe):
                faults.append(Fault("/dataset", "dataset_missing", "This recipe trains on a dataset: name one."))
        elif not _DATASET.fullmatch(name) or not (self.settings.dataset_root / name).is_dir():
            detail = "There are: " + (", ".join(self.datasets()) or "none, the operator has to add one") + "."
            faults.append(Fault("/dataset", "dataset_unknown", detail))
        elif recipe is not None and not _needs(recipe):
            detail = "This recipe makes its own records: leave the dataset out."
            faults.append(Fault("/dataset", "invalid_value", detail))


def validate_training(value: Any) -> TrainingRequest:
    """The typed request.

    Raises:
        Problem: 422, one fault for each field that is missing, unknown or mistyped.
    """
    try:
        return TrainingRequest.model_validate(value)
    except ValidationError as error:
        raise Problem.of_faults(faults_of(error)) from None


def training_body(record: TrainingRecord, *, queue: QueueView | None, ttl_s: float) -> TrainingBody:
    """The training's body. `queue`: its place, if it is queued; `ttl_s`: life of a terminal record."""
    job = record.job
    url = f"/v1/trainings/{job.id}"
    shown = {key: value for key, value in job.recipe.items() if key not in ("model", "data")}
    return TrainingBody(
        **common_fields(record, queue=queue, ttl_s=ttl_s),
        urls=RecordUrls(self=url, cancel=f"{url}/cancel", events=f"{url}/events"),
        progress=_progress(record.progress) if record.progress else None,
        request=EffectiveTraining(adapter=job.adapter, dataset=job.dataset, recipe=shown),
        result=asdict(record.result) if record.result else None,
    )


def adapter_view(adapter: PublishedAdapter) -> AdapterView:
    """A published adapter, without where it lies."""
    recipe: Any = adapter.card.get("recipe")
    steps: Any = adapter.card.get("steps")
    return AdapterView(
        name=adapter.name,
        version=adapter.version,
        kind="dreamo" if adapter.file.name == MAIN else "lora",
        published_at=time_text(adapter.published_at),
        recipe=str(recipe["name"]) if isinstance(recipe, Mapping) and "name" in recipe else None,
        steps=steps if isinstance(steps, int) else None,
        base=adapter.base,
        files=_files(adapter.directory),
    )


def _progress(progress: TrainingProgress) -> TrainingProgressView:
    left = (progress.total - progress.step) * progress.seconds_per_step
    return TrainingProgressView(
        stage=progress.stage,
        step=progress.step,
        total=progress.total,
        losses=progress.losses,
        samples_per_second=progress.samples_per_second,
        seconds_left=round(left, 1) if progress.seconds_per_step else None,
    )


def _files(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.glob("*.safetensors"))


def _usable(file: Path) -> Recipe:
    """The operator's recipe, before any overrides.

    Raises:
        RecipeError: it cannot be read, or asks for records that there are not.
    """
    recipe = load_recipe(str(file))
    if misfits := recipe.misfits():
        raise RecipeError("; ".join(f"{'.'.join(path)}: {detail}" for path, detail in misfits))
    return recipe


def _adapts(recipe: Recipe) -> bool:
    return all(stage.train == "adapter" for stage in recipe.stages)


def _needs(recipe: Recipe) -> bool:
    return recipe.data.source == "directory"


def _pointer(path: tuple[str, ...]) -> str:
    """JSON pointer below the overrides; it stops above a name of the caller's that we would not print."""
    parts: list[str] = []
    for part in path:
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", part):
            break
        parts.append(part)
    return "".join(f"/{part}" for part in ("overrides", *parts))
