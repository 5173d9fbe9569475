"""DreamO's training with one thing changed: what `ablations` compares.

A variant is data; applied to a recipe of the three adapter stages it gives another recipe. Where batches have one size,
a step draws the same records in all of them as long as its stage has the same mixture.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from workers.training.recipes import Recipe, RecipeError, Stage

WARM_UP, ALL_TASKS, QUALITY = "warm-up", "all-tasks", "quality"
REFERENCE = "reference"


@dataclass(frozen=True, slots=True)
class Variant:
    """One change to the reference recipe.

    Attributes:
        losses: weights, in every stage.
        without: a stage that is left out. heir: the stage that begins as it would have and takes on its samples.
    """

    losses: Mapping[str, float] = field(default_factory=dict[str, float])
    without: str | None = None
    heir: str | None = None


VARIANTS: Mapping[str, Variant] = {
    REFERENCE: Variant(),
    "no-route": Variant(losses={"route": 0.0}),
    "no-holder": Variant(losses={"holder": 0.0}),
    "at-once": Variant(without=WARM_UP, heir=ALL_TASKS),
    "no-quality": Variant(without=QUALITY),
}
"""`at-once` keeps the quality stage, which `no-quality` judges: one thing changes at a time."""


@dataclass(frozen=True, slots=True)
class Run:
    """One row to be made."""

    variant: str
    recipe: Recipe
    count: int

    @property
    def name(self) -> str:
        return f"{self.variant}-{self.recipe.seed}"

    @property
    def plan(self) -> str:
        """Two rows are comparable if they agree in it."""
        return hashlib.sha256(f"{self.recipe.model_dump_json()} {self.count}".encode()).hexdigest()


def varied(recipe: Recipe, name: str) -> Recipe:
    """The reference recipe with a variant's change.

    Raises:
        RecipeError: it is not made of DreamO's three adapter stages, or their samples do not add up.
    """
    wanted = [(name, "adapter") for name in (WARM_UP, ALL_TASKS, QUALITY)]
    if [(stage.name, stage.train) for stage in recipe.stages] != wanted:
        raise RecipeError(f"{recipe.name}: ablations vary adapter stages {WARM_UP}, {ALL_TASKS} and {QUALITY}")
    variant = VARIANTS[name]
    left_out = [stage for stage in recipe.stages if stage.name == variant.without]
    stages = [stage for stage in recipe.stages if stage.name != variant.without]
    for gone in left_out:
        stages = [_inheriting(stage, gone) if stage.name == variant.heir else stage for stage in stages]
    changed = [s.model_copy(update={"losses": s.losses.model_copy(update=dict(variant.losses))}) for s in stages]
    return recipe.model_copy(update={"name": f"{recipe.name}-{name}", "stages": tuple(changed)})


def _inheriting(heir: Stage, gone: Stage) -> Stage:
    extra, rest = divmod(gone.steps * gone.batch, heir.batch)
    if rest:
        raise RecipeError(f"stage {gone.name}: its samples do not divide into batches of stage {heir.name}")
    return heir.model_copy(
        update={
            "steps": heir.steps + extra,
            "optimizer": heir.optimizer.model_copy(update={"warmup": gone.optimizer.warmup}),
            "losses": heir.losses.model_copy(update={"route_ramp": gone.losses.route_ramp}),
        }
    )


def planned(recipe: Recipe, names: Iterable[str], seeds: int, count: int) -> list[Run]:
    """Runs in the order they are made: all variants of a seed, then the next seed."""
    recipes = {name: varied(recipe, name) for name in names}
    return [
        Run(name, one.model_copy(update={"seed": seed}), count)
        for seed in range(recipe.seed, recipe.seed + seeds)
        for name, one in recipes.items()
    ]
