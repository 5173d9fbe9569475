"""What a StickerWorld is asked for: sizes, split, placement law and the mixture of tasks, fixed once per source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Final, Literal, get_args

Split = Literal["train", "held_out"]
Placement = Literal["grid9", "free"]
Sizes = Literal["fixed", "named"]

LARGEST: Final = 1024
"""Side of the largest target in pixels."""

_WORDS: Final[Mapping[str, tuple[str, ...]]] = {
    "split": get_args(Split),
    "placement": get_args(Placement),
    "sizes": get_args(Sizes),
}
_SIDES: Final = ("size", "reference_size", "style_size")
_SHARES: Final = ("plain", "same_shape", "shape_words", "unnamed", "loose", "sized")

DREAMO_MIXTURE = (
    ("text_to_image", 2.0),
    ("single_subject", 2.0),
    ("multi_subject", 3.0),
    ("two_column", 1.0),
    ("identity_like", 1.0),
    ("try_on_like", 1.0),
    ("style_text", 1.0),
    ("style_content", 1.0),
)
"""Everything but the quality stage. DreamO's own ratios are not public."""


@dataclass(frozen=True, slots=True)
class Settings:
    """One StickerWorld source.

    Attributes:
        size: side of a target in pixels; a two-column target is twice as wide.
        reference_size: side of a subject's, face's or garment's reference, and of a sticker of fixed size.
        style_size: side of a style reference.
        mixture: (task, weight) pairs; weights need not add up to one.
        split: `held_out` draws looks and phrases that `train` never shows (see `splits`).
        placement: `grid9` puts stickers on the centres of a 3×3 grid, `free` anywhere with the centre in the cell
            that the prompt names.
        sizes: `fixed`: as the reference. `named`: small or large, as the prompt says.
        max_subjects: two or three: how many subjects a multi-subject record can have.
        plain: share of prompts without placeholders.
        same_shape: share of multi-subject and two-column records whose subjects have one shape.
        shape_words: share of subject prompts that name the shape, which otherwise only the reference carries.
        unnamed: share of text-to-image records that leave the stickers' looks open; nothing but their place can be
            judged then.
        loose: share of the records that are placed freely and name their sizes, whatever `placement` and `sizes` say.
        sized: share of the others that name their sizes, whatever `sizes` says.
    """

    size: int = 72
    reference_size: int = 24
    style_size: int = 48
    mixture: tuple[tuple[str, float], ...] = DREAMO_MIXTURE
    split: Split = "train"
    placement: Placement = "grid9"
    sizes: Sizes = "fixed"
    max_subjects: int = 3
    plain: float = 0.5
    same_shape: float = 0.3
    shape_words: float = 0.0
    unnamed: float = 0.0
    loose: float = 0.0
    sized: float = 0.0

    def __post_init__(self) -> None:
        self._check_kinds()
        if not 36 <= self.size <= LARGEST:
            raise ValueError(f"size must be 36 to {LARGEST}")
        if self.reference_size < 12 or 3 * self.reference_size > self.size:
            raise ValueError(f"reference_size must be 12 to a third of size, which is {self.size}")
        if not 36 <= self.style_size <= self.size:
            raise ValueError(f"style_size must be 36 to size, which is {self.size}")
        if type(self.max_subjects) is not int or self.max_subjects not in (2, 3):
            raise ValueError("max_subjects must be 2 or 3")
        if not self.mixture or any(not weight >= 0 for _, weight in self.mixture):
            raise ValueError("mixture needs at least one task, and no weight below 0")
        if not sum(weight for _, weight in self.mixture) > 0:
            raise ValueError("mixture needs a task with a weight above 0")

    def _check_kinds(self) -> None:
        """Whether each value is of its kind, whatever the others are."""
        for name, words in _WORDS.items():
            if getattr(self, name) not in words:
                raise ValueError(f"{name} must be {' or '.join(words)}")
        for name in _SIDES:
            if type(getattr(self, name)) is not int:
                raise ValueError(f"{name} must be a whole number")
        for name in _SHARES:
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 <= value <= 1:
                raise ValueError(f"{name} must lie in [0, 1]")

    def changed(self, values: Mapping[str, Any]) -> Settings:
        """With some of them replaced, as a recipe names them; the mixture is not among these.

        Raises:
            UnknownSettingError: a name that there is not.
            ValueError: a value that does not fit, or not to the others; the message says which.
        """
        for name in values:
            if name not in _NAMED:
                raise UnknownSettingError(name)
        return replace(self, **values)

    def side(self, named: str | None) -> int:
        """Pixels of a sticker's box: `small` is two thirds of the reference, `large` four thirds, None the same."""
        factor = {None: 3, "small": 2, "large": 4}[named]
        return round(self.reference_size * factor / 3)


class UnknownSettingError(ValueError):
    """A name that is no setting's.

    Attributes:
        name: which.
    """

    def __init__(self, name: str) -> None:
        known = "the mixture is the stage's own" if name == "mixture" else f"there are {', '.join(_NAMED)}"
        super().__init__(f"StickerWorld has no such setting here: {known}")
        self.name = name


_NAMED: Final = tuple(field.name for field in fields(Settings) if field.name != "mixture")
