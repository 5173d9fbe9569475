"""What each kind of image segment is to the network: the one table that service and trainer share.

A FLUX DiT that is conditioned on images differs from plain FLUX only in per-segment attributes: where the
segment's tokens lie on the position grid, which learned vectors are added to them, and at which time they are
modulated. This file holds those attributes as data. It imports nothing but the standard library, so the gateway
may read it too.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Literal


class Role(StrEnum):
    """What a reference is for. `subject` is DreamO's `ip` task, `identity` its `id` task."""

    SUBJECT = "subject"
    GARMENT = "garment"
    IDENTITY = "identity"
    STYLE = "style"
    CONTENT = "content"


@dataclass(frozen=True, slots=True)
class SegmentRule:
    """Attributes of one kind of image segment.

    Attributes:
        positions: `grid`: rows and columns from 0, as the target's. `diagonal`: beyond the target and all earlier
            references on both axes, so that no row or column is shared (UNO and DreamO).
        type_row: row of the type-embedding table added to each token (DreamO: 1 target, 0 any reference).
        indexed: whether row `slot` of the index-embedding table is added too.
        clean_time: modulate at t = 0 (DreamFuse, OminiControl) rather than at the target's t (DreamO).
        preparation: what happens to the pixels before the VAE: `cutout` on white, aligned `face` on white, or
            `none`. Every preparation ends with the area resize, except `face`, which has a fixed size.
    """

    positions: Literal["grid", "diagonal"]
    type_row: int
    indexed: bool
    clean_time: bool
    preparation: Literal["cutout", "face", "none"]


def _reference(preparation: Literal["cutout", "face", "none"]) -> SegmentRule:
    return SegmentRule("diagonal", type_row=0, indexed=True, clean_time=False, preparation=preparation)


TARGET = SegmentRule("grid", type_row=1, indexed=False, clean_time=False, preparation="none")

RULES: Mapping[Role, SegmentRule] = MappingProxyType(
    {
        Role.SUBJECT: _reference("cutout"),
        Role.GARMENT: _reference("cutout"),
        Role.IDENTITY: _reference("face"),
        Role.STYLE: _reference("none"),
        Role.CONTENT: _reference("none"),
    }
)

PLACEHOLDERS = tuple(f"[ref#{slot}]" for slot in range(1, 10))
"""Prompt tokens that bind words to the reference in that slot (DreamO §3.2); slots are 1-based."""

ADDED_TOKENS = (*PLACEHOLDERS, "[res]")
"""Everything the released weights add to the T5 vocabulary, in order."""
