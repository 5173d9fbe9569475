"""Walking a whole dataset: what is wrong with it row by row, and what it holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from workers.training.datasets.faults import BadRowError, Code, Fault
from workers.training.datasets.prompts import named_slots
from workers.training.datasets.source import EvaluationItem, Source
from workers.training.records import Record

MAX_FAULTS: Final = 10_000
"""How many faults are kept with their place; all are counted."""


@dataclass(slots=True)
class Report:
    """What a walk found.

    Attributes:
        rows: in the dataset; `checked` of them were walked, and each of those is good, bad or filtered.
        samples: what the good rows give.
        faults: the first `MAX_FAULTS`; `codes` counts all of them.
        target_sizes: samples by WIDTHxHEIGHT. references: samples by their number of references.
        without_placeholders: samples with references whose prompt names none of them.
        references_without_mask: references; the routing loss leaves them out.
    """

    rows: int
    checked: int = 0
    good: int = 0
    bad: int = 0
    filtered: int = 0
    samples: int = 0
    faults: list[Fault] = field(default_factory=list)
    codes: Counter[Code] = field(default_factory=Counter)
    tasks: Counter[str] = field(default_factory=Counter)
    target_sizes: Counter[str] = field(default_factory=Counter)
    references: Counter[int] = field(default_factory=Counter)
    without_placeholders: int = 0
    references_without_mask: int = 0

    def blame(self, *faults: Fault) -> None:
        """Count faults, and keep them while there is room."""
        self.codes.update(fault.code for fault in faults)
        self.faults.extend(faults[: MAX_FAULTS - len(self.faults)])

    def take(self, item: Record | EvaluationItem) -> None:
        """Count a good sample."""
        self.samples += 1
        self.references[len(item.references)] += 1
        self.without_placeholders += bool(item.references) and not named_slots(item.prompt)
        if isinstance(item, Record):
            self.tasks[item.task] += 1
            self.target_sizes[f"{item.target.shape[1]}x{item.target.shape[0]}"] += 1
            self.references_without_mask += sum(each.target_mask is None for each in item.references)


def inspect(source: Source[Record] | Source[EvaluationItem], limit: int | None, advance: Callable[[], None]) -> Report:
    """Read the first `limit` rows, or all, pictures included; `advance` is called after each."""
    report = Report(source.num_rows)
    for row in range(source.num_rows if limit is None else min(limit, source.num_rows)):
        try:
            items = source.samples_of(row)
        except BadRowError as error:
            report.bad += 1
            report.blame(*error.faults)
        else:
            report.good += bool(items)
            report.filtered += not items
            for item in items:
                report.take(item)
        report.checked += 1
        advance()
    return report
