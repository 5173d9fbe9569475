"""Where placeholders go in other people's prompts, and how they come out again without a trace."""

from __future__ import annotations

import re
from typing import Final

from model.roles import PLACEHOLDERS

TWO_COLUMNS: Final = "Generate a two-column image. The left is {left}. The right is {right}."
"""DreamO's pattern for two subjects side by side."""

_PLACEHOLDER: Final = re.compile(r"\[ref#([0-9]+)\]")
_WITH_JOINT: Final = re.compile(r"(?:\s+(?:shown\s+in|from|in|of|like|with))?\s*\[ref#[0-9]+\]", re.IGNORECASE)
_IMAGE_TAG: Final = re.compile(r"(?:<img>\s*)?<\|image_([0-9]{1,4})\|>(?:\s*</img>)?")


def named_slots(prompt: str) -> frozenset[int]:
    """The 1-based slots that placeholders name, those beyond the known ones too."""
    return frozenset(int(digits[:4]) for digits in _PLACEHOLDER.findall(prompt))


def place_after(prompt: str, noun: str, slot: int) -> str:
    """`prompt` with slot's placeholder straight after the noun phrase, or else after its last word.

    Unchanged where neither occurs: a free prompt without placeholders is valid.
    """
    for phrase in (noun, noun.rsplit(maxsplit=1)[-1] if noun.split() else ""):
        # Word boundaries, so that "cat" is not found in "cathedral"; the descriptions are English.
        match = (
            re.search(rf"(?<!\w){re.escape(phrase.strip())}(?!\w)", prompt, re.IGNORECASE) if phrase.strip() else None
        )
        if match:
            return f"{prompt[: match.end()]} {PLACEHOLDERS[slot - 1]}{prompt[match.end() :]}"
    return prompt


def from_image_tags(instruction: str) -> str:
    """OmniGen's `<img><|image_k|></img>` as `[ref#k]`, with one space on either side where words touch it."""
    text = _IMAGE_TAG.sub(lambda match: f" [ref#{int(match[1])}] ", instruction)
    return _tidy(text)


def without_placeholders(prompt: str) -> str:
    """`prompt` as plain text: placeholders go, and with them a preposition that would dangle ("from [ref#1]")."""
    return _tidy(_WITH_JOINT.sub("", prompt)) if _PLACEHOLDER.search(prompt) else prompt


def renumbered(prompt: str, slot: int) -> str:
    """A prompt with one reference, its placeholders renamed to `slot`."""
    return _PLACEHOLDER.sub(PLACEHOLDERS[slot - 1], prompt)


def _tidy(text: str) -> str:
    return re.sub(r" +([.,;:!?])", r"\1", re.sub(r"[ \t]{2,}", " ", text)).strip()
