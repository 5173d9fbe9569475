"""`dreamserve dataset check`: what is wrong with training data, row by row, and what it holds.

Exit status: 0 all good, 1 something is wrong with the data, 2 it could not be checked.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Final

import orjson
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from workers.training.datasets.faults import Code, DatasetError, Fault
from workers.training.datasets.formats import FORMATS, Format, detect, open_for_check
from workers.training.datasets.inspection import Report, inspect

SHOWN_FAULTS: Final = 50
_SHOWN_SIZES: Final = 5
_ABOUT_THE_DATA: Final[frozenset[Code]] = frozenset({"dataset_empty", "all_filtered"})
"""Reasons not to open a dataset that are faults of the data, not of the call."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Check the dataset that the command line names; returns the exit status."""
    options = _parser().parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names in the data may exceed the terminal's encoding
    error_console = Console(stderr=True, soft_wrap=True)
    try:
        format: Format = detect(options.path) if options.format == "auto" else options.format
        source = open_for_check(options.path, format, images=options.images)
        report = _walk(
            error_console,
            lambda advance: inspect(source, options.limit, advance),
            _total(source.num_rows, options.limit),
        )
    except DatasetError as error:
        if options.json:
            _print_json({"path": str(options.path), "error": _plain(error.fault)})
        else:
            error_console.print(f"dreamserve: {printable(str(error.fault))}", markup=False, highlight=False)
        return 1 if error.fault.code in _ABOUT_THE_DATA else 2
    except KeyboardInterrupt:
        return 130
    if options.json:
        _print_json({"path": str(options.path), "format": format, **as_json(report)})
    else:
        _print_report(Console(soft_wrap=True), format, report)
    return 1 if report.bad else 0


def printable(text: str) -> str:
    """Text of the data as one line that no terminal obeys and any encoding can hold."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )


def as_json(report: Report) -> dict[str, Any]:
    """The report as JSON values."""
    return {
        "rows": report.rows,
        "checked": report.checked,
        "good": report.good,
        "bad": report.bad,
        "filtered": report.filtered,
        "samples": report.samples,
        "codes": dict(report.codes.most_common()),
        "faults": [_plain(fault) for fault in report.faults],
        "faults_left_out": report.codes.total() - len(report.faults),
        "tasks": {printable(task): count for task, count in report.tasks.most_common()},
        "target_sizes": dict(report.target_sizes.most_common()),
        "references": {str(number): count for number, count in sorted(report.references.items())},
        "without_placeholders": report.without_placeholders,
        "references_without_mask": report.references_without_mask,
    }


def _plain(fault: Fault) -> dict[str, str | int | None]:
    return {
        "file": printable(fault.where.file),
        "row": fault.where.row,
        "field": printable(fault.field),
        "code": fault.code,
        "found": printable(fault.found),
        "remedy": fault.remedy,
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dreamserve dataset check", description="Say what is wrong with a dataset, row by row."
    )
    parser.add_argument("path", type=Path, help="directory of the dataset, or one of its files of rows")
    parser.add_argument("--format", choices=("auto", *FORMATS), default="auto", help="default: found out")
    parser.add_argument("--images", type=Path, help="where the names of pictures start; default: beside the rows")
    parser.add_argument("--limit", type=_positive, help="check only the first so many rows")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def _total(rows: int, limit: int | None) -> int:
    return rows if limit is None else min(limit, rows)


def _walk(console: Console, walk: Callable[[Callable[[], None]], Report], total: int) -> Report:
    columns = (TextColumn("checking"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total)
        return walk(lambda: bar.advance(task))


def _print_json(value: dict[str, Any]) -> None:
    sys.stdout.buffer.write(orjson.dumps(value, option=orjson.OPT_INDENT_2) + b"\n")
    sys.stdout.flush()


def _print_report(console: Console, format: Format, report: Report) -> None:
    for fault in report.faults[:SHOWN_FAULTS]:
        console.print(printable(str(fault)), markup=False, highlight=False)
    left_out = report.codes.total() - min(len(report.faults), SHOWN_FAULTS)
    if left_out:
        console.print(f"… and {left_out} more: --json lists up to 10000", highlight=False)
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in _summary(format, report):
        table.add_row(name, value)
    console.print(table)


def _summary(format: Format, report: Report) -> Iterable[tuple[str, str]]:
    part = f" of {report.rows}" if report.checked < report.rows else ""
    yield "format", format
    yield "rows", f"{report.checked}{part}: {report.good} good, {report.bad} bad, {report.filtered} filtered out"
    for code, count in report.codes.most_common():
        yield f"  {code}", str(count)
    yield "samples", str(report.samples)
    for task, count in report.tasks.most_common():
        yield f"  {printable(task)}", str(count)
    sizes = report.target_sizes.most_common(_SHOWN_SIZES)
    if sizes:
        more = len(report.target_sizes) - len(sizes)
        listed = [f"{size} ({count})" for size, count in sizes] + ([f"{more} other sizes"] if more else [])
        yield "target sizes", ", ".join(listed)
    numbers = sorted(report.references.items())
    yield "references each", ", ".join(f"{number} ({count})" for number, count in numbers) or "–"
    yield "prompts without placeholders", str(report.without_placeholders)
    yield "references without a mask", str(report.references_without_mask)


if __name__ == "__main__":
    sys.exit(main())
