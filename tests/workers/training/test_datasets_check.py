"""`dreamserve dataset check` as a command: sums, limits, exit status, and what a terminal gets to see."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.workers.training.fabricated_datasets import (
    native_members,
    native_rows,
    places,
    run,
    subject_rows,
    uno_rows,
    write_lines,
    write_tar,
    x2i_rows,
)
from workers.training.datasets import check
from workers.training.datasets.faults import REMEDIES


def test_sound_data_passes_and_is_summed_up(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The control of test_datasets_broken: nothing is found in sound data, of any format, and the counts are right."""
    native = tmp_path / "native"
    native.mkdir()
    rows = native_rows(native)
    rows[0]["prompt"] = "no names"
    rows.append({**rows[0], "key": "text", "task": "text_to_image", "references": []})
    write_lines(native / "a.jsonl", rows)
    write_tar(native / "b.tar", native_members())
    status, report = run(capfd, native)
    assert (status, report["good"], report["bad"], report["codes"], report["faults"]) == (0, 7, 0, {}, [])
    assert report["tasks"] == {"multi_subject": 3, "single_subject": 3, "text_to_image": 1}
    assert report["references"] == {"0": 1, "1": 3, "2": 3}
    assert report["target_sizes"] == {"16x16": 7}
    assert (report["without_placeholders"], report["references_without_mask"]) == (1, 3)
    for name, format, fabricate in (("s", "subject200k", subject_rows), ("x", "x2i", x2i_rows), ("u", "uno", uno_rows)):
        folder = tmp_path / name
        folder.mkdir()
        rows = fabricate(folder)
        write_lines(folder / "rows.jsonl", rows)
        status, report = run(capfd, folder)
        assert (status, report["format"], report["good"], report["bad"]) == (0, format, 2, 0)


def test_a_limit_stops_early(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A look at the first rows of a large dataset; a limit of none is refused."""
    rows = native_rows(tmp_path)
    rows[2]["target"] = "gone.png"
    write_lines(tmp_path / "a.jsonl", rows)
    status, report = run(capfd, tmp_path, "--limit", "2")
    assert (status, report["rows"], report["checked"], report["good"]) == (0, 3, 2, 2)
    with pytest.raises(SystemExit) as caught:
        check.main([str(tmp_path), "--limit", "0"])
    assert caught.value.code == 2


@pytest.mark.parametrize(
    ("files", "arguments", "status", "code"),
    [
        ({}, (), 1, "dataset_empty"),
        ({"notes.txt": "x"}, (), 1, "dataset_empty"),
        ({"a.jsonl": "\n \n"}, ("--format", "native"), 1, "dataset_empty"),
        ({"a.json": "[]"}, ("--format", "uno"), 1, "dataset_empty"),
        ({"a.jsonl": '{"caption": "x"}\n'}, (), 2, "unknown_format"),
        ({"a.jsonl": '{"target": "x", "prompt": ""}\n'}, ("--images", "nowhere"), 2, "path_missing"),
    ],
)
def test_datasets_that_cannot_be_opened(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    files: dict[str, str],
    arguments: tuple[str, ...],
    status: int,
    code: str,
) -> None:
    """Empty data is a fault of the data (1); what cannot be found or guessed is one of the call (2)."""
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    got, report = run(capfd, tmp_path, *arguments)
    assert (got, report["error"]["code"]) == (status, code)
    assert check.main([str(tmp_path), *arguments]) == status
    assert REMEDIES[report["error"]["code"]] in capfd.readouterr().err


def test_no_such_path(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A path that is not there, or is a loop of links."""
    (tmp_path / "loop").symlink_to("loop")
    for name in ("gone", "loop", "a/b"):
        status, report = run(capfd, tmp_path / name)
        assert (status, report["error"]["code"]) == (2, "path_missing")


def test_what_people_see(tmp_path: Path) -> None:
    """The command as typed: one line for each fault, with the remedy, then the table; the data commands no terminal."""
    rows = native_rows(tmp_path)
    rows[0]["target"] = "[bold]gone\x1b[2J猫.png"
    rows[1]["task"] = "evil\x1b[31m"
    write_lines(tmp_path / "train.jsonl", rows)
    ran = subprocess.run(
        [sys.executable, "-m", "service.cli", "dataset", "check", str(tmp_path)],
        capture_output=True,
        check=False,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    out = ran.stdout.decode()
    assert ran.returncode == 1
    assert ran.stderr == b""
    first = out.splitlines()[0]
    assert first.startswith("train.jsonl:1: file_missing: target ([bold]gone\\x1b[2J\\u732b.png)")
    assert first.endswith(REMEDIES["file_missing"])
    assert "\x1b" not in out
    for pattern in (
        r"rows +3: 2 good, 1 bad",
        r"file_missing +1\s",
        r"evil\\x1b\[31m +1\s",
        r"target sizes +16x16 \(2\)",
    ):
        assert re.search(pattern, out), pattern


def test_names_in_no_encoding(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A tar's names are bytes; those that are no text are refused, and printed, as JSON too."""
    write_tar(tmp_path / "a.tar", {f"\udcff{name}": data for name, data in native_members(1).items()} | {"\udcfe": b""})
    status, report = run(capfd, tmp_path)
    assert (status, report["bad"]) == (1, 2)
    assert places(report)[:2] == [("a.tar", 1, "key", "invalid_value"), ("a.tar", 2, "\\udcfe", "unknown_field")]
    assert check.main([str(tmp_path)]) == 1


def test_many_faults_are_counted_and_cut(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Fifty lines on the screen; all of them counted."""
    write_lines(tmp_path / "train.jsonl", [{"target": "x", "prompt": ""}] * 60)
    assert check.main([str(tmp_path)]) == 1
    out = capfd.readouterr().out
    assert len([line for line in out.splitlines() if line.startswith("train.jsonl:")]) == check.SHOWN_FAULTS
    assert "… and 70 more" in out  # key and task are missing in each
    assert re.search(r"missing_field +120\s", out)
