"""Every kind of broken shard is named by file, sample, field, code and remedy."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.workers.training.fabricated_datasets import (
    half_mask,
    native_members,
    native_rows,
    places,
    run,
    write_lines,
    write_tar,
)
from workers.pictures import encode


def change(members: dict[str, bytes], name: str, data: bytes) -> None:
    members[name] = data


SHARDS: list[tuple[str, Callable[[dict[str, bytes]], object], str, str]] = [
    ("no json", lambda members: members.pop("1.json"), "1.json", "file_missing"),
    ("bad json", lambda members: change(members, "1.json", b"{"), "1.json", "bad_json"),
    ("json too long", lambda members: change(members, "1.json", b" " * (2**20 + 1)), "1.json", "bad_json"),
    ("field missing", lambda members: change(members, "1.json", b'{"task": "t"}'), "prompt", "missing_field"),
    ("no target", lambda members: members.pop("1.target.png"), "target", "file_missing"),
    ("no reference", lambda members: members.pop("1.ref1.png"), "ref1", "file_missing"),
    ("reference too many", lambda members: change(members, "1.ref2.png", b"x"), "ref2", "unknown_field"),
    ("misspelt member", lambda members: change(members, "1.refs.png", b"x"), "1.refs.png", "unknown_field"),
    ("two targets", lambda members: change(members, "1.target.jpg", b"x"), "1.target.jpg", "duplicate_key"),
    (
        "empty mask",
        lambda members: change(members, "1.mask1.png", encode(half_mask() * 0, "png")),
        "references[0].target_mask",
        "mask_empty",
    ),
    (
        "large picture",
        lambda members: change(members, "1.target.png", b"\0" * (20 * 2**20 + 1)),
        "target",
        "image_too_large",
    ),
]


@pytest.mark.parametrize(("spoil", "field", "code"), [case[1:] for case in SHARDS], ids=[case[0] for case in SHARDS])
def test_shard_samples(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    spoil: Callable[[dict[str, bytes]], object],
    field: str,
    code: str,
) -> None:
    """One broken sample among three in a tar."""
    members = native_members()
    spoil(members)
    # A member added behind the others belongs to its sample all the same.
    write_tar(tmp_path / "a.tar", members)
    status, report = run(capfd, tmp_path)
    assert places(report) == [("a.tar", 2, field, code)]
    assert (status, report["good"], report["bad"]) == (1, 2, 1)


def test_large_files_are_refused_by_size(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Before a byte is read: `found` is the file's own size, not what a decoder said of its bytes."""
    members = native_members(1)
    members["0.target.png"] = b"\0" * (20 * 2**20 + 1)
    write_tar(tmp_path / "a.tar", members)
    rows = native_rows(tmp_path, 1)
    with (tmp_path / "0.target.png").open("wb") as handle:
        handle.truncate(2**40)
    write_lines(tmp_path / "b.jsonl", rows)
    _, report = run(capfd, tmp_path)
    assert [fault["found"] for fault in report["faults"]] == [
        f"0.target.png, {20 * 2**20 + 1} bytes",
        f"0.target.png, {2**40} bytes",
    ]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_members_are_regular_files(tmp_path: Path, capfd: pytest.CaptureFixture[str], kind: bytes) -> None:
    """A link to the machine's files, or a device, is refused by name; nothing is followed."""
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, data in native_members(1).items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            if name.endswith("target.png"):
                info.type, info.linkname, info.size = kind, "/etc/passwd", 0
            archive.addfile(info, io.BytesIO(data))
    status, report = run(capfd, tmp_path)
    assert ("a.tar", 1, "0.target.png", "member_not_regular") in places(report)
    assert status == 1


def test_members_stay_inside(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Nothing is unpacked, yet names that would lead out are refused: other tools do unpack."""
    write_tar(tmp_path / "a.tar", {f"../{name}": data for name, data in native_members(1).items()})
    _, report = run(capfd, tmp_path)
    assert {fault["code"] for fault in report["faults"]} == {"path_escape", "file_missing"}


def test_a_compressed_shard_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """gzip under the name .tar: the remedy says to uncompress it."""
    with tarfile.open(tmp_path / "a.tar", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("0.json"))
    status, report = run(capfd, tmp_path)
    assert (status, places(report)) == (1, [("a.tar", None, "", "shard_damaged")])
