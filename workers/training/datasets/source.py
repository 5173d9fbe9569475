"""What every dataset looks like from outside, and how a row becomes a sample or a list of faults."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final, Protocol, TypeVar

import numpy as np

from model.roles import PLACEHOLDERS
from workers.pictures import PictureError, PictureLimits, decode, decode_mask
from workers.training.datasets.faults import BadRowError, Code, Fault, UnusableFileError, Where
from workers.training.datasets.prompts import named_slots
from workers.training.records import Pixels, Record, RecordReference

LIMITS: Final = PictureLimits()

_THINNEST: Final = (512 // 16) ** 2
"""Sides of a picture, one to the other, beyond which DreamO's references of 512² pixels have no token of 16 on one."""

_UNREAD: Final = np.zeros((0, 0, 3), np.uint8)
"""Stands for a picture that could not be read until the row is refused."""


@dataclass(frozen=True, slots=True)
class EvaluationItem:
    """A prompt with references and no target: what an evaluation list holds. `key` as in `Record`."""

    key: str
    prompt: str
    references: tuple[RecordReference, ...]


Item_co = TypeVar("Item_co", Record, EvaluationItem, covariant=True)
Item = TypeVar("Item", Record, EvaluationItem)


class Source(Protocol[Item_co]):
    """A dataset: samples by index, read when asked for. May be shared between processes."""

    def __len__(self) -> int:
        """The number of samples."""
        ...

    def __getitem__(self, index: int, /) -> Item_co:
        """One sample.

        Raises:
            BadRowError: it cannot be read; `dreamserve dataset check` finds these beforehand.
            IndexError: no such sample.
        """
        ...

    def key(self, index: int, /) -> str:
        """That sample's key, without reading its pictures."""
        ...

    def task(self, index: int, /) -> str:
        """That sample's task, without reading its pictures; mixtures go by it.

        Raises:
            BadRowError: the row does not say.
        """
        ...

    @property
    def num_rows(self) -> int:
        """The number of rows; a row may give no sample (filtered), one, or several."""
        ...

    def samples_of(self, row: int, /) -> tuple[Item_co, ...]:
        """What that row gives, from 0; empty if it is filtered out.

        Raises:
            BadRowError: as above.
        """
        ...


@dataclass(slots=True)
class Assembly:
    """One row on its way to a sample: reads pictures, collects everything that is wrong."""

    where: Where
    faults: list[Fault] = field(default_factory=list)

    def fault(self, name: str, code: Code, found: str = "") -> None:
        """Note a fault of the field `name`."""
        self.faults.append(Fault(self.where, name, code, found))

    def picture(self, name: str, load: Callable[[], bytes]) -> Pixels:
        """Pixels [h, w, 3]; transparency becomes white. An empty array stands for what cannot be read."""
        pixels = self._decoded(name, load, decode)
        return pixels if pixels is _UNREAD or pixels.shape[2] == 3 else on_white(pixels)

    def mask(self, name: str, load: Callable[[], bytes]) -> Pixels | None:
        """A mask [h, w], 255 = inside; None for what cannot be read."""
        pixels = self._decoded(name, load, decode_mask)
        return None if pixels is _UNREAD else pixels

    def _decoded(
        self, name: str, load: Callable[[], bytes], decoder: Callable[[bytes, PictureLimits], Pixels]
    ) -> Pixels:
        try:
            return decoder(load(), LIMITS)
        except UnusableFileError as error:
            self.fault(name, error.code, error.found)
        except PictureError as error:
            self.fault(name, error.code, error.message)
        return _UNREAD

    def finish(self, item: Item) -> Item:
        """The sample, if nothing is wrong with its parts or their fit.

        Raises:
            BadRowError: otherwise.
        """
        self.faults.extend(Fault(self.where, *flaw) for flaw in flaws(item))
        if self.faults:
            raise BadRowError(*self.faults)
        return item


def flaws(item: Record | EvaluationItem) -> Iterator[tuple[str, Code, str]]:
    """What does not fit together in a sample, as (field, code, found)."""
    if any("\ud800" <= character <= "\udfff" for character in item.key):  # a tar's names may be any bytes
        yield "key", "invalid_value", "not UTF-8"
    slots = [reference.slot for reference in item.references]
    if len(slots) > len(PLACEHOLDERS):
        yield "references", "too_many_references", str(len(slots))
    for index, slot in enumerate(slots):
        if not 1 <= slot <= len(PLACEHOLDERS):
            yield f"references[{index}].slot", "invalid_value", str(slot)
        if slot in slots[:index]:
            yield f"references[{index}].slot", "duplicate_slot", str(slot)
    for slot in sorted(named_slots(item.prompt) - set(slots)):
        yield "prompt", "placeholder_without_reference", f"[ref#{slot}]"
    pictures = [(f"references[{index}]", reference.pixels) for index, reference in enumerate(item.references)]
    if isinstance(item, Record):
        pictures.append(("target", item.target))
    for name, pixels in pictures:
        height, width = pixels.shape[:2]
        if max(height, width) > _THINNEST * max(1, min(height, width)):
            yield name, "image_too_thin", f"{width}×{height}"
    if isinstance(item, Record) and item.target.size:
        yield from _mask_flaws(item)


def _mask_flaws(record: Record) -> Iterator[tuple[str, Code, str]]:
    height, width = record.target.shape[:2]
    for index, reference in enumerate(record.references):
        mask, name = reference.target_mask, f"references[{index}].target_mask"
        if mask is None:
            continue
        if mask.shape != (height, width):
            yield name, "mask_size", f"{mask.shape[1]}×{mask.shape[0]}, the target is {width}×{height}"
        # A mask of greys alone would teach the routing loss that the subject is nowhere.
        if not mask.size or mask.max() < 128:
            yield name, "mask_empty", ""


def on_white(pixels: Pixels) -> Pixels:
    """[h, w, 4] with straight alpha, as [h, w, 3] over white."""
    color, alpha = pixels[..., :3].astype(np.uint32), pixels[..., 3:].astype(np.uint32)
    return ((color * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def subject_task(num_references: int) -> str:
    """The task of a sample with that many subject references."""
    return ("text_to_image", "single_subject")[num_references] if num_references < 2 else "multi_subject"
