"""Every kind of broken data is named by file, row, field, code and remedy."""

# ruff: noqa: ARG005 - every case takes the folder and the row

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.workers.training.fabricated_datasets import (
    half_mask,
    native_rows,
    noise,
    places,
    run,
    save,
    subject_rows,
    uno_rows,
    write_lines,
    x2i_rows,
)

Row = dict[str, Any]
Break = Callable[[Path, Row], object]


def text(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)


@dataclass(frozen=True)
class Case:
    """What is done to the second row of a sound dataset, and the one fault that must come of it."""

    name: str
    spoil: Break
    field: str
    code: str


NATIVE = [
    Case("missing file", lambda folder, row: (folder / row["target"]).unlink(), "target", "file_missing"),
    Case("no picture", lambda folder, row: text(folder, row["target"], b"hello"), "target", "image_unsupported"),
    Case(
        "picture cut off",
        lambda folder, row: text(folder, "1.ref2.png", (folder / "1.ref2.png").read_bytes()[:60]),
        "references[1].image",
        "image_undecodable",
    ),
    Case(
        "picture that promises too much",
        lambda folder, row: text(
            folder, row["target"], (folder / row["target"]).read_bytes()[:16] + b"\x7f\xff\xff\xff" * 2 + b"\0" * 60
        ),
        "target",
        "image_too_large",
    ),
    Case(
        "thin target",
        lambda folder, row: (
            save(folder / row["target"], noise(0, 1, 1040)),
            [reference.pop("target_mask", None) for reference in row["references"]],
        ),
        "target",
        "image_too_thin",
    ),
    Case("missing field", lambda folder, row: row.pop("prompt"), "prompt", "missing_field"),
    Case(
        "missing field of a reference",
        lambda folder, row: row["references"][0].pop("role"),
        "references[0].role",
        "missing_field",
    ),
    Case("wrong type", lambda folder, row: row.update(prompt=7), "prompt", "wrong_type"),
    Case("slot as text", lambda folder, row: row["references"][0].update(slot="1"), "references[0].slot", "wrong_type"),
    Case("slot 10", lambda folder, row: row["references"][1].update(slot=10), "references[1].slot", "invalid_value"),
    Case("misspelt field", lambda folder, row: row.update(targets="x"), "targets", "unknown_field"),
    Case(
        "unknown role",
        lambda folder, row: row["references"][0].update(role="hat"),
        "references[0].role",
        "unknown_role",
    ),
    Case(
        "placeholder without reference",
        lambda folder, row: row.update(prompt="a cat [ref#1] and [ref#3]"),
        "prompt",
        "placeholder_without_reference",
    ),
    Case(
        "one slot twice",
        lambda folder, row: row.update(prompt="", references=row["references"][:1] * 2),
        "references[1].slot",
        "duplicate_slot",
    ),
    Case(
        "ten references",
        lambda folder, row: row.update(references=row["references"] * 5),
        "references",
        "too_many_references",
    ),
    Case(
        "mask of another size",
        lambda folder, row: save(folder / "1.mask1.png", half_mask(8, 16)),
        "references[0].target_mask",
        "mask_size",
    ),
    Case(
        "mask of another width",
        lambda folder, row: save(folder / "1.mask1.png", half_mask(16, 15)),
        "references[0].target_mask",
        "mask_size",
    ),
    Case(
        "empty mask",
        lambda folder, row: save(folder / "1.mask1.png", np.full((16, 16), 90, np.uint8)),
        "references[0].target_mask",
        "mask_empty",
    ),
    Case("key of another row", lambda folder, row: row.update(key="sample-0"), "key", "duplicate_key"),
    Case("path escape", lambda folder, row: row.update(target="../../etc/passwd"), "target", "path_escape"),
    Case("absolute path", lambda folder, row: row.update(target="/etc/passwd"), "target", "path_escape"),
    Case(
        "link out",
        lambda folder, row: ((folder / "away.png").symlink_to("/etc/passwd"), row.update(target="away.png")),
        "target",
        "path_escape",
    ),
    Case(
        "pipe", lambda folder, row: (os.mkfifo(folder / "pipe"), row.update(target="pipe")), "target", "file_unreadable"
    ),
    Case("directory", lambda folder, row: row.update(target="."), "target", "file_unreadable"),
    Case("name too long", lambda folder, row: row.update(target="x" * 5000), "target", "file_unreadable"),
]


@pytest.mark.parametrize("case", NATIVE, ids=lambda case: case.name)
def test_native_rows(tmp_path: Path, capfd: pytest.CaptureFixture[str], case: Case) -> None:
    """One broken row among three: one fault, in its place; the others stay good."""
    rows = native_rows(tmp_path)
    case.spoil(tmp_path, rows[1])
    write_lines(tmp_path / "train.jsonl", rows)
    status, report = run(capfd, tmp_path)
    assert places(report) == [("train.jsonl", 2, case.field, case.code)]
    assert (status, report["format"], report["good"], report["bad"]) == (1, "native", 2, 1)


@pytest.mark.parametrize(
    ("line", "code", "found"),
    [
        (b'{"key": "x", }', "bad_json", "column"),
        (b'{"key": NaN}', "bad_json", "column"),
        (b"\xff\xfe{}", "bad_json", "column"),
        (b"[" * 5000, "bad_json", "column"),
        (b'"' + b"x" * 2**20 + b'"', "bad_json", "bytes in a line"),
        (b"[1, 2]", "wrong_type", "list"),
        (b"null", "wrong_type", "NoneType"),
    ],
    ids=["comma", "nan", "encoding", "depth", "length", "list", "null"],
)
def test_lines_that_are_no_rows(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], line: bytes, code: str, found: str
) -> None:
    """The line's number counts blank lines too, and the lines behind it are still read."""
    first, last = (json.dumps(row).encode() for row in native_rows(tmp_path, 2))
    (tmp_path / "train.jsonl").write_bytes(b"\n".join([first, b"", line, last]))
    status, report = run(capfd, tmp_path)
    assert places(report) == [("train.jsonl", 3, "", code)]
    assert found in report["faults"][0]["found"]
    assert (status, report["good"]) == (1, 2)


def test_everything_wrong_with_a_row_is_said_at_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Three faults of one row need one run, not three."""
    rows = native_rows(tmp_path)
    (tmp_path / "0.target.png").unlink()
    (tmp_path / "0.ref2.png").write_bytes(b"")
    rows[0]["prompt"] = "[ref#9]"
    write_lines(tmp_path / "train.jsonl", rows)
    _, report = run(capfd, tmp_path)
    assert {fault["field"] for fault in report["faults"]} == {"target", "references[1].image", "prompt"}
    assert report["bad"] == 1


def test_keys_repeat_across_files(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The second of two files with the same keys is at fault."""
    for name in ("a", "b"):
        write_lines(tmp_path / f"{name}.jsonl", native_rows(tmp_path, 1))
    _, report = run(capfd, tmp_path)
    assert places(report) == [("b.jsonl", 1, "key", "duplicate_key")]


SUBJECT = [
    Case("missing file", lambda folder, row: (folder / row["image"]).unlink(), "image", "file_missing"),
    Case(
        "too narrow", lambda folder, row: save(folder / row["image"], noise(0, 528, 1039)), "image", "image_too_narrow"
    ),
    Case("too low", lambda folder, row: save(folder / row["image"], noise(0, 519, 1056)), "image", "image_too_narrow"),
    Case("no item", lambda folder, row: row["description"].pop("item"), "description.item", "missing_field"),
    Case(
        "score as text",
        lambda folder, row: row["quality_assessment"].update(imageQuality="5"),
        "quality_assessment.imageQuality",
        "wrong_type",
    ),
    Case("no description", lambda folder, row: row.update(description=None), "description", "wrong_type"),
    Case("bytes in JSON", lambda folder, row: row.update(image={"bytes": "x"}), "image.bytes", "wrong_type"),
    Case("path escape", lambda folder, row: row.update(image="../x.png"), "image", "path_escape"),
    Case(
        "mask of another size",
        lambda folder, row: (save(folder / "m.png", half_mask()), row.update(mask_1="m.png")),
        "references[0].target_mask",
        "mask_size",
    ),
]


@pytest.mark.parametrize("case", SUBJECT, ids=lambda case: case.name)
def test_subject200k_rows(tmp_path: Path, capfd: pytest.CaptureFixture[str], case: Case) -> None:
    """One broken pair of two: said once, though the pair serves in both directions."""
    rows = subject_rows(tmp_path)
    case.spoil(tmp_path, rows[1])
    write_lines(tmp_path / "rows.jsonl", rows)
    status, report = run(capfd, tmp_path)
    assert places(report) == [("rows.jsonl", 2, case.field, case.code)]
    assert (status, report["format"], report["good"], report["samples"]) == (1, "subject200k", 1, 2)


def test_low_quality_is_filtered_not_blamed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Some rows below the bar are counted; nothing but such rows is a fault."""
    rows = subject_rows(tmp_path)
    rows[0]["quality_assessment"]["imageQuality"] = 3
    write_lines(tmp_path / "rows.jsonl", rows)
    status, report = run(capfd, tmp_path)
    assert (status, report["filtered"], report["good"], report["samples"]) == (0, 1, 1, 2)
    rows[1]["quality_assessment"] = None
    write_lines(tmp_path / "rows.jsonl", rows)
    status, report = run(capfd, tmp_path)
    assert (status, report["error"]["code"]) == (1, "all_filtered")


X2I = [
    Case("missing input", lambda folder, row: (folder / "images/1b.png").unlink(), "input_images[1]", "file_missing"),
    Case("no output", lambda folder, row: row.pop("output_image"), "output_image", "missing_field"),
    Case("one input as text", lambda folder, row: row.update(input_images="a.png"), "input_images", "wrong_type"),
    Case("number among inputs", lambda folder, row: row["input_images"].append(3), "input_images[2]", "wrong_type"),
    Case(
        "tag without picture", lambda folder, row: row["input_images"].pop(), "prompt", "placeholder_without_reference"
    ),
    Case("empty instruction", lambda folder, row: row.update(instruction=""), "instruction", "invalid_value"),
    Case("masks of other number", lambda folder, row: row.update(masks=[None]), "masks", "invalid_value"),
    Case(
        "ten inputs",
        lambda folder, row: row.update(input_images=row["input_images"] * 5),
        "references",
        "too_many_references",
    ),
]


@pytest.mark.parametrize("case", X2I, ids=lambda case: case.name)
def test_x2i_rows(tmp_path: Path, capfd: pytest.CaptureFixture[str], case: Case) -> None:
    """One broken line of two."""
    rows = x2i_rows(tmp_path)
    case.spoil(tmp_path, rows[1])
    write_lines(tmp_path / "list.jsonl", rows)
    status, report = run(capfd, tmp_path)
    expected = [("list.jsonl", 2, case.field, case.code)]
    if case.code == "too_many_references":  # slot 10 has no placeholder either
        expected.append(("list.jsonl", 2, "references[9].slot", "invalid_value"))
    assert places(report) == expected
    assert (status, report["format"], report["good"]) == (1, "x2i", 1)


UNO = [
    Case(
        "missing picture", lambda folder, row: (folder / "dreambooth/1.png").unlink(), "image_paths[0]", "file_missing"
    ),
    Case("no prompt", lambda folder, row: row.pop("prompt"), "prompt", "missing_field"),
    Case("no pictures", lambda folder, row: row.update(image_paths=[]), "image_paths", "invalid_value"),
    Case("path escape", lambda folder, row: row.update(image_paths=["../x.png"]), "image_paths[0]", "path_escape"),
]


@pytest.mark.parametrize("case", UNO, ids=lambda case: case.name)
def test_uno_rows(tmp_path: Path, capfd: pytest.CaptureFixture[str], case: Case) -> None:
    """One broken element of two; the row is the element's number."""
    rows = uno_rows(tmp_path)
    case.spoil(tmp_path, rows[1])
    (tmp_path / "dreambench.json").write_text(json.dumps(rows))
    status, report = run(capfd, tmp_path)
    assert places(report) == [("dreambench.json", 2, case.field, case.code)]
    assert (status, report["format"], report["good"]) == (1, "uno", 1)


def test_a_broken_list_is_one_fault(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A .json that does not parse names line and column; one that is no list says so."""
    (tmp_path / "a.json").write_text('[{"prompt": "x"},\n {"prompt": }]')
    (tmp_path / "b.json").write_text('{"prompt": "x"}')
    status, report = run(capfd, tmp_path, "--format", "uno")
    assert (status, places(report)) == (1, [("a.json", None, "", "bad_json"), ("b.json", None, "", "bad_json")])
    assert report["faults"][0]["found"].startswith("line 2, column 13")
