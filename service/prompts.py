"""What a prompt may hold: normal form, length, characters, and placeholders that have a reference."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection

from model.roles import PLACEHOLDERS
from service.problems import Fault

_PLACEHOLDER = re.compile(r"\[ref#([0-9]+)\]")
_BIDI_OVERRIDES = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_ALLOWED_CONTROLS = frozenset("\t\n\r")


def clean_text(text: str, pointer: str, *, max_characters: int, faults: list[Fault]) -> str:
    """`text` in NFC; what is wrong with it is added to `faults` (`prompt_too_long`, `prompt_characters`)."""
    # Before normalising too: reordering a long run of combining marks takes quadratic time.
    normal = unicodedata.normalize("NFC", text) if len(text) <= max_characters else text
    if len(normal) > max_characters:
        detail = f"At most {max_characters} characters: shorten it."
        faults.append(Fault(pointer, "prompt_too_long", detail))
    elif any(_forbidden(character) for character in normal):
        detail = "Control characters and bidirectional overrides are refused: remove them."
        faults.append(Fault(pointer, "prompt_characters", detail))
    return normal


def check_prompt(prompt: str, slots: Collection[int]) -> list[Fault]:
    """Faults of a prompt beside its 1-based occupied `slots` (`prompt_empty`, `placeholder_…`)."""
    if not prompt.strip():
        return [Fault("/prompt", "prompt_empty", "Say in words what the picture shall show.")]
    named = {int(digits[:4]) for digits in _PLACEHOLDER.findall(prompt)}
    faults: list[Fault] = []
    for slot in sorted(named - set(slots)):
        if 1 <= slot <= len(PLACEHOLDERS):
            detail = f"The prompt names [ref#{slot}], but that slot is empty: fill it or drop the placeholder."
        else:
            detail = f"Placeholders run from {PLACEHOLDERS[0]} to {PLACEHOLDERS[-1]}."
        faults.append(Fault("/prompt", "placeholder_without_reference", detail))
    return faults


def with_trigger(prompt: str, trigger: str) -> str:
    """The prompt with the sentence in front that style references need, unless it is there already."""
    if not trigger or prompt.lstrip().casefold().startswith(trigger.casefold()):
        return prompt
    return f"{trigger} {prompt}"


def _forbidden(character: str) -> bool:
    category = unicodedata.category(character)
    return category == "Cs" or character in _BIDI_OVERRIDES or (category == "Cc" and character not in _ALLOWED_CONTROLS)
