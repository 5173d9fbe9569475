"""A training run as data: which model, which records, and the stages one after the other.

A recipe is a YAML file, validated here; nothing about a stage lives in code. Numbers of the shipped FLUX recipe are
the paper's (DreamO §4.1) where it gives them; the others are marked in the file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal, cast

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from workers.training.stickerworld.orders import Misfit, misfits
from workers.training.stickerworld.settings import Settings

SHIPPED = Path(__file__).parent / "recipes"
"""Recipes that come with the project; `dreamserve train NAME` finds them by name."""

Share = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
Weight = Annotated[float, Field(gt=0, le=1e6)]

MAX_STEPS: Final = 10_000_000
MAX_BATCH: Final = 1024
MAX_RANK: Final = 1024
"""Beyond what anybody trains with, and what a machine still takes: a batch's records are made in one go."""


class RecipeError(Exception):
    """A recipe that cannot be read or does not make sense; the message names the field and the remedy."""


class OverrideError(Exception):
    """Changes to a recipe that do not fit.

    Attributes:
        faults: (path of the field, what helps) for each.
    """

    def __init__(self, faults: Sequence[tuple[tuple[str, ...], str]]) -> None:
        super().__init__("; ".join(f"{'.'.join(path) or 'recipe'}: {detail}" for path, detail in faults))
        self.faults = tuple(faults)


OVERRIDABLE = frozenset({"seed", "lora", "precision", "gradient_checkpointing", "save_every", "stages"})
"""Fields that a caller of the training service can change."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelPart(_Part):
    """Where training starts from.

    Attributes:
        base: directory or hub id; None takes the shipped model.
        dreamo: train on top of these DreamO files, fused; None starts from the base alone, embeddings fresh.
        version: which of the files' stacks.
        dtype: of the frozen base; trained weights are float32.
        adapter: the adapter starts as this one in released keys, or as the base's own (`own`); None starts one that
            changes nothing. Its rank is at most the recipe's.
        placeholders: how the added tokens' T5 rows start: `fresh`, or `spare`: as the rows that the base's T5 has after
            its vocabulary, where text encoders trained with the placeholders keep them.
    """

    base: str | None = None
    dreamo: Path | None = None
    version: Literal["v1.1", "v1", "main"] = "v1.1"
    dtype: Literal["float32", "bfloat16"] = "float32"
    adapter: Path | Literal["own"] | None = None
    placeholders: Literal["fresh", "spare"] = "fresh"

    @model_validator(mode="after")
    def _one_start(self) -> ModelPart:
        if self.adapter is not None and self.dreamo is not None:
            raise ValueError(
                "adapter goes on training an adapter, dreamo trains another on top of it: name one of them"
            )
        return self


class LoraPart(_Part):
    """The adapter.

    Attributes:
        targets: `released` are exactly the modules of the released files, with q, k and v sharing their down matrix;
            `attention` adapts the same modules with a down matrix each; `all` every linear layer of the blocks.
        rank: DreamO: 128. alpha equals rank, so the scale is 1.
    """

    targets: Literal["released", "attention", "all"] = "released"
    rank: int = Field(default=128, ge=1, le=MAX_RANK)


class OptimizerPart(_Part):
    """AdamW with decoupled weight decay, or Prodigy, which finds its own step size (`lr` is then a factor, 1).

    Attributes:
        warmup, cooldown: steps over which the rate grows to `lr` at a stage's start and falls to nothing at its end.
    """

    name: Literal["adamw", "prodigy"] = "adamw"
    lr: Positive = 4e-5
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    weight_decay: float = Field(default=0.0, ge=0)
    warmup: int = Field(default=0, ge=0, le=MAX_STEPS)
    cooldown: int = Field(default=0, ge=0, le=MAX_STEPS)
    clip: Positive | None = 1.0


class LossPart(_Part):
    """Weights of the losses; 0 leaves one out. `route_ramp`: steps over which the routing loss grows to its weight."""

    flow: float = Field(default=1.0, ge=0)
    route: float = Field(default=1.0, ge=0)
    holder: float = Field(default=1.0, ge=0)
    route_ramp: int = Field(default=0, ge=0, le=MAX_STEPS)


class TimePart(_Part):
    """The law of t; see `model.losses.TimestepLaw`, whose fields these are."""

    kind: Literal["logit_normal", "uniform"] = "logit_normal"
    mean: float = 0.0
    std: Positive = 1.0
    shift: float = 0.0
    high_share: Share = 0.0


class Stage(_Part):
    """One stage: what is trained on what, and how long.

    Attributes:
        train: `adapter` (LoRA and embeddings, the base frozen) or `base` (every weight of the transformer).
        mixture: task of the records → weight.
        plain_text: share of prompts whose placeholders are taken out (DreamO: 0.5).
        token_drop: share of each reference's tokens that are left out (DreamO's last stage: 0.95).
        prompt_drop, reference_drop: share of samples without prompt, without references.
        guidance: distilled guidance is drawn between the two (DreamFuse trains with 1).
        ema: decay of the weights' moving average; None keeps none.
        settings: of StickerWorld, where this stage differs from `data.settings`.
    """

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    steps: int = Field(ge=1, le=MAX_STEPS)
    batch: int = Field(ge=1, le=MAX_BATCH)
    train: Literal["adapter", "base"] = "adapter"
    optimizer: OptimizerPart = OptimizerPart()
    losses: LossPart = LossPart()
    time: TimePart = TimePart()
    mixture: Mapping[str, Weight] = Field(min_length=1)
    plain_text: Share = 0.0
    token_drop: Share = 0.0
    prompt_drop: Share = 0.0
    reference_drop: Share = 0.0
    guidance: tuple[Positive, Positive] = (1.0, 1.0)
    ema: Share | None = None
    settings: Mapping[str, Any] = Field(default_factory=dict[str, Any])

    def rate(self, within: int) -> float:
        """The learning rate of a step of this stage."""
        warm = (within + 1) / max(1, self.optimizer.warmup)
        cool = (self.steps - within) / max(1, self.optimizer.cooldown)
        return self.optimizer.lr * min(1.0, warm, cool)


class DataPart(_Part):
    """Where records come from: StickerWorld with its settings, or a directory that `dataset check` accepts.

    Attributes:
        cache_gib: how much disk a directory's encoded pictures and prompts may take (`encodings`); 0 keeps none.
        cache_directory: where; None takes `cache/` in the run's directory. Runs may share one.
    """

    source: Literal["stickerworld", "directory"] = "stickerworld"
    path: Path | None = None
    settings: Mapping[str, Any] = Field(default_factory=dict[str, Any])
    cache_gib: float = Field(default=50.0, ge=0)
    cache_directory: Path | None = None

    @model_validator(mode="after")
    def _path_where_needed(self) -> DataPart:
        if (self.source == "directory") != (self.path is not None):
            raise ValueError("a directory source needs a path, StickerWorld takes none")
        return self


class Recipe(_Part):
    """A whole run.

    Attributes:
        save_every: steps between checkpoints.
        pictures_every: steps between sheets of sample pictures (`sheets`); 0 draws none.
    """

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    seed: int = Field(default=0, ge=0, lt=2**63)
    model: ModelPart = ModelPart()
    data: DataPart = DataPart()
    lora: LoraPart = LoraPart()
    precision: Literal["float32", "bfloat16"] = "float32"
    gradient_checkpointing: bool = False
    save_every: int = Field(default=500, ge=1, le=MAX_STEPS)
    pictures_every: int = Field(default=500, ge=0, le=MAX_STEPS)
    stages: tuple[Stage, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _distinct_stages(self) -> Recipe:
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise ValueError("stage names must differ")
        if self.data.source == "directory" and any(stage.settings for stage in self.stages):
            raise ValueError("a stage can change StickerWorld's settings alone, and the records come from a directory")
        return self

    def changed(self, overrides: Mapping[str, Any]) -> Recipe:
        """The recipe with some of its fields replaced; `stages` maps a stage's name to changes of that stage.

        What a recipe is made on (`model`, `data`) is not for a caller to change.

        Raises:
            OverrideError: naming each field that does not exist or does not fit.
        """
        plan: dict[str, Any] = self.model_dump(mode="json")
        names = [stage.name for stage in self.stages]
        faults: list[tuple[tuple[str, ...], str]] = []
        for key, value in overrides.items():
            if key == "stages" and isinstance(value, Mapping):
                for name, changes in cast("Mapping[str, Any]", value).items():
                    if name in names and isinstance(changes, Mapping):
                        _merge(plan["stages"][names.index(name)], cast("Mapping[str, Any]", changes))
                    else:
                        faults.append((("stages", name), f"changes to one of the stages {', '.join(names)} go here"))
            elif key in OVERRIDABLE - {"stages"}:
                _merge(plan, {key: value})
            else:
                faults.append(((key,), f"one of {', '.join(sorted(OVERRIDABLE))} can be changed"))
        if faults:
            raise OverrideError(faults)
        try:
            changed = Recipe.model_validate(plan)
        except ValidationError as error:
            found = error.errors(include_url=False, include_context=False, include_input=False)
            raise OverrideError([(_named(item["loc"], names), item["msg"]) for item in found]) from None
        if unknown := changed.misfits():
            raise OverrideError(unknown)
        return changed

    def misfits(self) -> list[Misfit]:
        """What the stages ask of StickerWorld and it does not have, with the paths of the fields.

        Of a dataset this is known where it lies: `sources.check_stages`.
        """
        if self.data.source == "directory":
            return []
        try:
            settings = Settings().changed(self.data.settings)
        except ValueError as error:
            return [(("data", "settings"), str(error))]
        return [
            (("stages", stage.name, *path), detail)
            for stage in self.stages
            for path, detail in misfits(settings, stage.settings, stage.mixture, stage.batch)
        ]

    def with_overrides(self, *, base: str | None = None, data: Path | None = None) -> Recipe:
        """The recipe on another base model or dataset, which is read with the settings of the one it replaces.

        Raises:
            RecipeError: the stages have settings of StickerWorld, which no dataset has.
        """
        plan: dict[str, Any] = self.model_dump()
        if base is not None:
            plan["model"]["base"] = base
        if data is not None:
            settings = self.data.settings if self.data.source == "directory" else {}
            plan["data"] |= {"source": "directory", "path": data, "settings": settings}
        return _validated(plan)

    @property
    def essence(self) -> Mapping[str, Any]:
        """What decides the weights that a run ends with, as JSON values: all but pictures and cache."""
        spectators = {"pictures_every": True, "data": {"cache_gib", "cache_directory"}}
        return self.model_dump(mode="json", exclude=spectators)

    @property
    def steps(self) -> int:
        """Optimizer steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    def at(self, step: int) -> tuple[Stage, int]:
        """The stage a step of the whole run lies in, and the step within it."""
        for stage in self.stages:
            if step < stage.steps:
                return stage, step
            step -= stage.steps
        raise IndexError("past the last stage")


def _merge(into: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Replace values; where both sides are mappings, those inside, except a mixture, which is replaced whole."""
    for key, value in changes.items():
        there = into.get(key)
        if isinstance(there, dict) and isinstance(value, Mapping) and key not in ("mixture", "settings"):
            _merge(cast("dict[str, Any]", there), cast("Mapping[str, Any]", value))
        else:
            into[key] = value


def _named(location: Sequence[int | str], stages: Sequence[str]) -> tuple[str, ...]:
    """pydantic's place of a fault, with a stage's name for its number."""
    if len(location) > 1 and location[0] == "stages" and isinstance(location[1], int):
        location = ("stages", stages[location[1]], *location[2:])
    return tuple(str(part) for part in location)


def recipe_names(also: Path | None = None) -> dict[str, Path]:
    """Recipes that can be asked for by name: the shipped ones, and those of a directory, which go first."""
    folders = [SHIPPED, *([also] if also else [])]
    return {file.stem: file for folder in folders for file in sorted(folder.glob("*.yaml"))}


def load_recipe(name_or_path: str) -> Recipe:
    """Read a recipe by the name of a shipped one, or by path.

    Raises:
        RecipeError: not found, not YAML, or a field that does not fit.
    """
    shipped = SHIPPED / f"{name_or_path}.yaml"
    file = shipped if shipped.is_file() else Path(name_or_path)
    if not file.is_file():
        known = ", ".join(sorted(path.stem for path in SHIPPED.glob("*.yaml")))
        raise RecipeError(f"no recipe {name_or_path!r}: name a file, or one of {known}")
    try:
        content = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{file} is not YAML: {' '.join(str(error).split())}") from error
    try:
        return _validated(content)
    except RecipeError as error:
        raise RecipeError(f"{file}: {error}") from error


def _validated(content: Any) -> Recipe:
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        faults = [
            f"{'.'.join(str(part) for part in item['loc']) or 'recipe'}: {item['msg']}"
            for item in error.errors(include_url=False, include_context=False)
        ]
        raise RecipeError("; ".join(faults)) from error
