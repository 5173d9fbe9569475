"""StickerWorld: procedural scenes with exact truth. Stateless: record (seed, index) is the same in every process."""

from __future__ import annotations

from dataclasses import replace

from workers.training.records import Record
from workers.training.stickerworld.drafts import Carried, Draft
from workers.training.stickerworld.draws import Draws
from workers.training.stickerworld.looks import alone
from workers.training.stickerworld.scenes import Pixels, Scene, SceneReference, render
from workers.training.stickerworld.settings import Settings
from workers.training.stickerworld.styles import stylise
from workers.training.stickerworld.tasks import TASKS


def sample(seed: int, index: int, settings: Settings) -> Record:
    """The training sample at that place of that seed's endless list.

    Raises:
        ValueError: an unknown task in the mixture, or a seed or index that does not fit 64 bits.
    """
    return scene(seed, index, settings).record()


def scene(seed: int, index: int, settings: Settings) -> Scene:
    """The same record with its truth; errors as `sample`'s."""
    draws = Draws(seed, index)
    if settings.loose and draws.chance(settings.loose):
        settings = replace(settings, placement="free", sizes="named")
    elif settings.sized and draws.chance(settings.sized):
        settings = replace(settings, sizes="named")
    task = draws.weighted(settings.mixture)
    if task not in TASKS:
        raise ValueError(f"StickerWorld has no task {task!r}; it has {', '.join(TASKS)}")
    return _paint(f"stickerworld/{settings.split}/{seed}/{index}", task, TASKS[task](draws, settings), settings)


def _paint(key: str, task: str, draft: Draft, settings: Settings) -> Scene:
    plain, id_map = render(draft.parts, draft.panels, settings.size)
    return Scene(
        key=key,
        task=task,
        prompt=draft.prompt,
        parts=draft.parts,
        panels=draft.panels,
        style=draft.style,
        references=tuple(_reference(carried, plain, settings) for carried in draft.carried),
        picture=stylise(plain, draft.style),
        id_map=id_map,
    )


def _reference(carried: Carried, plain: Pixels, settings: Settings) -> SceneReference:
    if carried.look is not None:
        pixels = alone(carried.look, settings.reference_size)
    else:
        pixels = plain if carried.pixels is None else carried.pixels
    return SceneReference(carried.slot, carried.role, pixels, carried.part)
