"""The native format: what is written is read back, damage is always noticed, and the documented example works."""

from __future__ import annotations

import contextlib
import io
import json
import re
import string
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from model.roles import Role
from tests.workers.training.fabricated_datasets import (
    half_mask,
    native_members,
    native_rows,
    noise,
    write_lines,
    write_tar,
)
from workers.training.datasets import check
from workers.training.datasets.faults import REMEDIES, BadRowError, DatasetError
from workers.training.datasets.native import Native
from workers.training.datasets.shards import write_shard
from workers.training.records import Record, RecordReference

ROOT = Path(__file__).parents[3]
DOCUMENT = (ROOT / "docs" / "datasets.md").read_text()
KEYS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=120)


@st.composite
def records(draw: st.DrawFn, keys: st.SearchStrategy[str] = KEYS) -> Record:
    """Any record that holds together."""
    height, width = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    seed = draw(st.integers(0, 2**32))
    slots = draw(st.lists(st.integers(1, 9), unique=True, max_size=4))
    references: list[RecordReference] = []
    for slot in slots:
        mask = np.random.default_rng(seed + slot).integers(0, 256, (height, width), dtype=np.uint8)
        mask[0, 0] = 255
        pixels = noise(seed + slot, draw(st.integers(1, 5)), draw(st.integers(1, 5)))
        references.append(
            RecordReference(slot, draw(st.sampled_from(Role)), pixels, mask if draw(st.booleans()) else None)
        )
    named = "".join(f"[ref#{slot}]" for slot in slots if draw(st.booleans()))
    text = draw(st.text(st.characters(codec="utf-8", exclude_characters="[]")))
    target = noise(seed, height, width)
    return Record(draw(keys), draw(st.sampled_from(["a", "two_column"])), text + named, tuple(references), target)


def same(one: Record, other: Record) -> bool:
    """Equal in everything, pictures included."""
    if (one.key, one.task, one.prompt) != (other.key, other.task, other.prompt):
        return False
    if not np.array_equal(one.target, other.target) or len(one.references) != len(other.references):
        return False
    return all(
        (a.slot, a.role, a.target_mask is None) == (b.slot, b.role, b.target_mask is None)
        and np.array_equal(a.pixels, b.pixels)
        and (a.target_mask is None or np.array_equal(a.target_mask, b.target_mask))
        for a, b in zip(one.references, other.references, strict=True)
    )


@given(st.lists(records(), min_size=1, max_size=4, unique_by=lambda record: record.key))
@settings(max_examples=40)
def test_a_shard_gives_back_what_was_written(written: list[Record]) -> None:
    """Any key, prompt, slots, roles, sizes and soft masks; order kept; the same bytes again when written again."""
    with tempfile.TemporaryDirectory() as place:
        shard = Path(place) / "a.tar"
        assert write_shard(written, shard) == len(written)
        source = Native.at(shard)
        assert len(source) == len(written)
        assert all(same(read, record) for read, record in zip(source, written, strict=True))
        assert [source.key(index) for index in range(len(source))] == [record.key for record in written]
        assert [source.task(index) for index in range(len(source))] == [record.task for record in written]
        first = shard.read_bytes()
        write_shard(source, shard)
        assert shard.read_bytes() == first


def good(key: str = "k") -> Record:
    return Record(key, "t", "a [ref#1]", (RecordReference(1, Role.SUBJECT, noise(1), half_mask()),), noise(2))


BAD_RECORDS = {
    "repeated key": [good(), good()],
    "empty key": [good("")],
    "placeholder": [Record("k", "t", "a [ref#2]", good().references, noise(2))],
    "mask size": [Record("k", "t", "", good().references, noise(2, 8, 8))],
    "slot": [Record("k", "t", "", good().references * 2, noise(2))],
}


@pytest.mark.parametrize("name", BAD_RECORDS)
def test_what_would_not_be_read_is_not_written(tmp_path: Path, name: str) -> None:
    """The writer refuses, the shard that was there stays, and no draft is left behind."""
    shard = tmp_path / "a.tar"
    write_shard([good("before")], shard)
    with pytest.raises(ValueError, match="record"):
        write_shard(iter(BAD_RECORDS[name]), shard)
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]
    assert Native.at(shard)[0].key == "before"


def test_a_shard_is_replaced_whole(tmp_path: Path) -> None:
    """Who still reads the old shard reads all of it: the new one is another file, moved into its place."""
    shard = tmp_path / "a.tar"
    write_shard([good("before")], shard)
    old = shard.read_bytes()
    with shard.open("rb") as handle:
        write_shard([good("after")], shard)
        assert handle.read() == old
    assert Native.at(shard)[0].key == "after"


def test_lines_and_shards_are_one_dataset(tmp_path: Path) -> None:
    """A directory may hold both; lines keep their numbers past blank lines; a slot need not be the first."""
    rows = native_rows(tmp_path, 2)
    rows[1]["references"] = [{**rows[1]["references"][1], "slot": 7}]
    rows[1]["prompt"] = "nothing named"
    (tmp_path / "b.jsonl").write_text("\ufeff" + json.dumps(rows[0]) + "\r\n\n  \n" + json.dumps(rows[1]))
    write_tar(tmp_path / "a.tar", native_members(2))
    source = Native.at(tmp_path)
    assert [source.key(index) for index in range(4)] == ["0", "1", "sample-0", "sample-1"]
    assert source.rows.where(3).row == 4
    assert [each.slot for each in source[3].references] == [7]
    first = source[2]
    assert [each.role for each in first.references] == [Role.SUBJECT, Role.GARMENT]
    assert np.array_equal(first.references[0].target_mask, half_mask())
    assert first.references[1].target_mask is None
    with pytest.raises(IndexError):
        source[4]


def test_other_peoples_shards(tmp_path: Path) -> None:
    """Leading dots, folders, JPEG, an encoded key, members in any order, GNU headers."""
    buffer = io.BytesIO()
    Image.fromarray(noise(0, 32, 32)).save(buffer, "JPEG")
    members = native_members(1)
    renamed = {
        "./set/a%2Eb.mask1.png": members["0.mask1.png"],
        "./set/a%2Eb.ref1.jpeg": buffer.getvalue(),
        "./set/a%2Eb.json": members["0.json"],
        "./set/a%2Eb.target.png": members["0.target.png"],
    }
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT) as archive:
        folder = tarfile.TarInfo("./set")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name, data in renamed.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    (record,) = Native.at(tmp_path)
    assert record.key == "set/a.b"
    assert record.references[0].pixels.shape == (32, 32, 3)


def test_transparency_becomes_white(tmp_path: Path) -> None:
    """A cut-out with alpha is a cut-out on white, half-way included."""
    rows = native_rows(tmp_path, 1)
    pixels = np.zeros((16, 16, 4), np.uint8)
    pixels[..., 3] = np.linspace(0, 255, 16).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "0.ref1.png")
    write_lines(tmp_path / "a.jsonl", rows)
    reference = Native.at(tmp_path)[0].references[0].pixels
    assert np.array_equal(reference, np.repeat(255 - pixels[..., 3:], 3, axis=2))


def outcome(path: Path) -> tuple[int, int] | None:
    """(good, bad) rows of a dataset; None if it cannot be opened."""
    try:
        source = Native.at(path)
    except DatasetError:
        return None
    good_rows = bad_rows = 0
    for row in range(source.num_rows):
        try:
            good_rows += len(source.samples_of(row))
        except BadRowError:
            bad_rows += 1
    return good_rows, bad_rows


@pytest.fixture(scope="module")
def shard() -> bytes:
    with tempfile.TemporaryDirectory() as place:
        return write_tar(Path(place) / "a.tar", native_members(3)).read_bytes()


@given(st.floats(0, 1, exclude_max=True))
@settings(max_examples=60)
def test_a_cut_shard_never_passes_for_a_whole_one(shard: bytes, place: float) -> None:
    """Cut anywhere before its end mark, in a header, in a picture or between two members: something is wrong."""
    end = len(shard.rstrip(b"\0"))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.tar"
        path.write_bytes(shard[: int(place * end)])
        found = outcome(path)
    assert found is None or found[1] > 0


@given(st.data())
@settings(max_examples=60)
def test_damage_is_met_by_faults_alone(shard: bytes, data: st.DataObject) -> None:
    """Any bytes overwritten anywhere: rows are good or bad, and no row vanishes without a word."""
    start = data.draw(st.integers(0, len(shard.rstrip(b"\0")) - 1))
    dirt = data.draw(st.binary(min_size=1, max_size=40))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.tar"
        path.write_bytes(shard[:start] + dirt + shard[start + len(dirt) :])
        found = outcome(path)
    assert found is None or found[0] == 3 or found[1] > 0


def test_two_tars_in_one_file_are_noticed(tmp_path: Path, shard: bytes) -> None:
    """tarfile reads the first of two concatenated archives and says nothing of the second."""
    (tmp_path / "a.tar").write_bytes(shard + shard)
    assert outcome(tmp_path) == (3, 1)
    (tmp_path / "a.tar").write_bytes(shard)
    assert outcome(tmp_path) == (3, 0)


@given(st.binary(max_size=300) | st.text(string.printable, max_size=200).map(str.encode))
@settings(max_examples=60)
def test_any_bytes_as_lines(data: bytes) -> None:
    """A .jsonl of anything: only faults."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.jsonl"
        path.write_bytes(data)
        found = outcome(path)
    assert found is None or found[0] == 0


def blocks(language: str) -> Iterator[str]:
    yield from re.findall(rf"```{language}\n(.*?)```", DOCUMENT, re.DOTALL)


def test_the_documented_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/datasets.md, run as it stands: the example passes its check, and so does the shard made of it."""
    monkeypatch.chdir(tmp_path)
    write, pack = blocks("python")
    exec(compile(write, "write", "exec"), {})
    assert "dreamserve dataset check stickers\n" in list(blocks("sh"))
    assert run("stickers") == 0
    exec(compile(pack, "pack", "exec"), {})
    assert run("shard-000.tar") == 0
    assert all(same(a, b) for a, b in zip(Native.at(Path("stickers")), Native.at(Path("shard-000.tar")), strict=True))


def run(path: str) -> int:
    with contextlib.redirect_stdout(io.StringIO()):
        return check.main([path])


def test_the_document_names_every_code() -> None:
    """Each code with its remedy, and no other."""
    listed = dict(re.findall(r"^\| `([a-z_]+)` \| (.*) \|$", DOCUMENT.split("## Codes")[1], re.MULTILINE))
    assert listed == dict(REMEDIES)
