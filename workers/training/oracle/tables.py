"""Scores of many pictures as the rows that evaluation prints."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from workers.training.oracle.scores import Scores

RESPONSE = "response map peaks inside its subject"
"""Of the network, not of its picture: see `attending`."""

ROWS = (
    "present where asked",
    "right background",
    "dominant colour ΔE < 15",
    "shape class",
    "shape IoU",
    "texture class",
    "size as asked",
    "all right, per sticker",
    "all right, whole record",
    "swapped",
    "count",
    "seen pairs, all right",
    "never-seen pairs, all right",
    "person, share of attributes",
    "person, all attributes",
    "expression",
    "garment, all right",
    "style",
    "content",
    RESPONSE,
)


@dataclass(frozen=True, slots=True)
class Rate:
    """A mean and how many it was taken over."""

    value: float
    count: int


@dataclass(frozen=True, slots=True)
class Summary:
    """Rates by row of `ROWS`; a row that nothing speaks to is missing."""

    records: int
    rates: Mapping[str, Rate]

    def __getitem__(self, row: str) -> float:
        """The rate of a row.

        Raises:
            KeyError: no picture says anything about it.
        """
        return self.rates[row].value


def summarise(scores: Iterable[Scores]) -> Summary:
    """Rates over all pictures; a sticker counts once, a picture once."""
    pictures = list(scores)
    stickers = [one for picture in pictures for one in picture.stickers if not one.garment]
    judged = [one for one in stickers if one.judged]
    faces = [one for picture in pictures for one in picture.faces]
    garments = [one for picture in pictures for one in picture.stickers if one.garment]
    things = [*stickers, *faces, *garments]
    columns: Sequence[tuple[str, Iterable[float | None]]] = (
        ("present where asked", (one.present for one in things)),
        ("right background", (one.background for one in pictures)),
        ("dominant colour ΔE < 15", (one.colour for one in judged)),
        ("shape class", (one.shape for one in judged)),
        ("shape IoU", (one.iou for one in judged)),
        ("texture class", (one.texture for one in judged)),
        ("size as asked", (one.size for one in stickers)),
        ("all right, per sticker", (one.all_right for one in judged)),
        ("all right, whole record", (one.all_right for one in pictures)),
        ("swapped", (one.swapped for one in pictures)),
        ("count", (one.count for one in pictures)),
        ("seen pairs, all right", (one.all_right for one in judged if not one.unseen_pair)),
        ("never-seen pairs, all right", (one.all_right for one in judged if one.unseen_pair)),
        ("person, share of attributes", (one.agreement for one in faces)),
        ("person, all attributes", (one.identity for one in faces)),
        ("expression", (one.expression for one in faces)),
        ("garment, all right", (one.all_right for one in garments)),
        ("style", (one.style for one in pictures)),
        ("content", (one.content for one in pictures)),
    )
    rates: dict[str, Rate] = {}
    for row, values in columns:
        known = [float(value) for value in values if value is not None]
        if known:
            rates[row] = Rate(sum(known) / len(known), len(known))
    return Summary(len(pictures), rates)


def table(columns: Mapping[str, Summary]) -> str:
    """A Markdown table: a row per rate that any column knows, a column per summary."""
    lines = [["", *columns], ["---"] * (len(columns) + 1)]
    lines += [
        [row, *(_cell(one, row) for one in columns.values())]
        for row in ROWS
        if any(row in one.rates for one in columns.values())
    ]
    lines.append(["records", *(str(one.records) for one in columns.values())])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cell(summary: Summary, row: str) -> str:
    return f"{summary[row]:.3f}" if row in summary.rates else "–"
