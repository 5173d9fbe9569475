"""What a stage may ask of StickerWorld, checked before a record is made: tasks, settings, pixels at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from workers.training.stickerworld.settings import Settings, UnknownSettingError
from workers.training.stickerworld.tasks import TASKS

Misfit = tuple[tuple[str, ...], str]
"""(path of the field within the stage, what helps)."""

MOST_PIXELS: Final = 2**26
"""Of one batch's targets, 64 of the largest: about 3 GiB and half a minute, with references and masks."""


def misplaced(settings: Settings, changes: Mapping[str, Any], cell: int) -> Iterator[Misfit]:
    """Sizes of a stage's pictures that a model does not take: its tokens are `cell` pixels wide. `changes` are known
    to fit."""
    chosen = settings.changed(changes)
    for name in ("size", "reference_size", "style_size"):
        if getattr(chosen, name) % cell:
            yield ("settings", name), f"must be a multiple of {cell} for this base model"


def misfits(settings: Settings, changes: Mapping[str, Any], tasks: Iterable[str], batch: int) -> Iterator[Misfit]:
    """What a stage asks for that there is not.

    Args:
        settings: of all stages. changes: the stage's.
        tasks: which its mixture names.
        batch: samples that are made at once.
    """
    for task in tasks:
        if task not in TASKS:
            yield ("mixture", task), f"there are no records of this task; there are {', '.join(TASKS)}"
    try:
        size = settings.changed(changes).size
    except UnknownSettingError as error:
        yield ("settings", error.name), str(error)
    except ValueError as error:
        yield ("settings",), str(error)
    else:
        if batch * size**2 > MOST_PIXELS:
            yield ("batch",), f"at most {MOST_PIXELS // size**2} samples of size {size}"
