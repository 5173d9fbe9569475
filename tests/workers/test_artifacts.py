"""The artifact store: whole files or none, and no byte served that was not stored."""

from __future__ import annotations

import hashlib
import os
import time
from io import FileIO
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.churning import churning, plain_walk_fails
from workers.artifacts import ArtifactError, ArtifactStore, Incoming

NAME = "job_1.3.0.png"
TENANT = "default"


def code_of(error: pytest.ExceptionInfo[ArtifactError]) -> str:
    return error.value.code


def files(store: ArtifactStore) -> list[Path]:
    return [path for path in store.root.rglob("*") if path.is_file()]


@settings(max_examples=20)
@given(data=st.binary(max_size=300))
def test_what_was_put_is_read(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    """Content addressing: the key is the sha256, and putting the same bytes twice leaves one file."""
    store = ArtifactStore(tmp_path_factory.mktemp("store"))
    key = store.put(TENANT, data)
    assert key == hashlib.sha256(data).hexdigest()
    assert store.put(TENANT, data) == key
    assert store.read(TENANT, key) == data
    assert len(files(store)) == 1


def test_flipped_bit_is_detected_and_mended(store: ArtifactStore) -> None:
    """A reference or picture whose bytes changed on disk is never served; putting it again repairs it."""
    key = store.put(TENANT, b"reference")
    digest = store.publish(NAME, b"picture")
    for path in files(store):
        path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    with pytest.raises(ArtifactError) as reference:
        store.read(TENANT, key)
    with pytest.raises(ArtifactError) as picture:
        store.read_picture(NAME, digest)
    assert code_of(reference) == code_of(picture) == "artifact_corrupt"
    store.put(TENANT, b"reference")
    assert store.read(TENANT, key) == b"reference"


def test_missing(store: ArtifactStore) -> None:
    """What was never stored is said to be missing, and reading makes no directories."""
    with pytest.raises(ArtifactError) as error:
        store.read(TENANT, "0" * 64)
    assert code_of(error) == "artifact_missing"
    with pytest.raises(ArtifactError) as error:
        store.read_picture(NAME, "0" * 64)
    assert code_of(error) == "artifact_missing"
    assert not store.root.exists()


@pytest.mark.parametrize("key", ["", "../../etc/passwd", "0" * 63, "0" * 65, "G" * 64, "A" * 64, "0" * 64 + "\n"])
def test_keys_are_no_paths(store: ArtifactStore, key: str) -> None:
    """Only a sha256 in lower-case hex reaches the file system."""
    with pytest.raises(ArtifactError) as error:
        store.read(TENANT, key)
    assert code_of(error) == "artifact_missing"


@pytest.mark.parametrize(
    "name",
    ["", "..", "../x.1.0.png", "job_1.png", "job_1.1.0.gif", "job/1.1.0.png", ".1.0.png", "job_1.1.0.png\n"],
)
def test_names_are_no_paths(store: ArtifactStore, name: str) -> None:
    """Only `<job id>.<token>.<n>.<extension>` names a picture."""
    with pytest.raises(ArtifactError):
        store.path(name)
    with pytest.raises(ArtifactError):
        store.publish(name, b"x")


@pytest.mark.parametrize("foreign", ["b", "A", "../a", "a/", "a\n", ""])
def test_tenants_share_no_file(store: ArtifactStore, foreign: str) -> None:
    """What one tenant stored, another neither finds nor deletes, and storing it there is a first time again.

    The control: the same calls of the owner do find, renew and delete it.
    """
    key = store.put("a", b"picture")
    for touch in (store.read, store.require, store.renew):
        with pytest.raises(ArtifactError) as error:
            touch(foreign, key)
        assert code_of(error) == "artifact_missing"
        touch("a", key)
    store.delete(foreign, key)
    assert store.read("a", key) == b"picture"
    first = store._reference("a", key).stat()
    assert store.put(foreign, b"picture") == key
    assert len(files(store)) == 2, "the same bytes are two files: the time to store them tells nothing"
    assert store._reference("a", key).stat() == first
    store.delete("a", key)
    assert store.read(foreign, key) == b"picture"
    with pytest.raises(ArtifactError):
        store.require("a", key)


@settings(max_examples=20)
@given(pieces=st.lists(st.binary(max_size=50), max_size=5))
def test_what_came_in_pieces_is_read(tmp_path_factory: pytest.TempPathFactory, pieces: list[bytes]) -> None:
    """A received reference is the same as one that was put whole, again and again."""
    store = ArtifactStore(tmp_path_factory.mktemp("store"))
    data = b"".join(pieces)
    for _ in range(2):
        with store.receive(TENANT) as incoming:
            for piece in pieces:
                incoming.write(piece)
            assert (incoming.size, incoming.read()) == (len(data), data)
            assert incoming.keep() == hashlib.sha256(data).hexdigest()
    assert store.read(TENANT, store.put(TENANT, data)) == data
    assert len(files(store)) == 1


def test_what_is_not_kept_is_gone(store: ArtifactStore) -> None:
    """An upload that is refused, or breaks off, leaves no byte behind."""
    with store.receive(TENANT) as incoming:
        incoming.write(b"half")
        assert len(files(store)) == 1
    with pytest.raises(RuntimeError, match="broken off"), store.receive(TENANT) as incoming:
        incoming.write(b"half")
        raise RuntimeError("broken off")
    assert files(store) == []


def test_deleting(store: ArtifactStore) -> None:
    """Deleting is idempotent, takes digests only, and one who has the file open reads on."""
    key = store.put(TENANT, b"picture")
    with store._reference(TENANT, key).open("rb") as file:
        for _ in range(2):
            store.delete(TENANT, key)
        assert file.read() == b"picture"
    assert files(store) == []
    for wrong in ("../" + key, "", "*"):
        with pytest.raises(ArtifactError) as error:
            store.delete(TENANT, wrong)
        assert code_of(error) == "artifact_missing"


def test_published_picture(store: ArtifactStore) -> None:
    """The digest that goes into the ledger is that of the bytes on disk; discarding is idempotent."""
    digest = store.publish(NAME, b"picture")
    assert digest == hashlib.sha256(store.path(NAME).read_bytes()).hexdigest()
    assert store.read_picture(NAME, digest) == b"picture"
    for _ in range(2):
        store.discard(NAME)
    assert files(store) == []


def test_storage_that_cannot_be_written(tmp_path: Path) -> None:
    """Every way of writing says `storage_unavailable`, and no path appears in the message."""
    blocked = tmp_path / "secret-file"
    blocked.write_bytes(b"")
    store = ArtifactStore(blocked / "artifacts")
    writes = (
        lambda: store.put(TENANT, b"x"),
        lambda: store.publish(NAME, b"x"),
        lambda: store.receive(TENANT).__enter__(),
        store.check_writable,
    )
    for write in writes:
        with pytest.raises(ArtifactError) as error:
            write()
        assert code_of(error) == "storage_unavailable"
        assert "secret-file" not in error.value.message


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_full_disk_leaves_nothing_behind(store: ArtifactStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """ENOSPC in the middle of a write: an error, no file under the name, no unfinished file."""
    store.put(TENANT, b"first")
    before = files(store)
    real = os.fdopen

    def full(handle: int, mode: str, **options: int) -> object:
        os.close(handle)
        return real(os.open("/dev/full", os.O_WRONLY), mode, **options)

    monkeypatch.setattr(os, "fdopen", full)
    with pytest.raises(ArtifactError) as error:
        store.publish(NAME, b"picture")
    assert code_of(error) == "storage_unavailable"
    assert files(store) == before
    with pytest.raises(ArtifactError) as error, store.receive(TENANT) as incoming:
        incoming.write(b"picture")
        incoming.keep()
    assert code_of(error) == "storage_unavailable"
    assert files(store) == before


@pytest.mark.parametrize("reserve", [2**62, pytest.param(0, id="control")])
def test_the_reserve_is_for_finished_pictures(store: ArtifactStore, tmp_path: Path, reserve: int) -> None:
    """With less than the reserve free, which a piece of an upload finds out too, nothing of a tenant is taken, and
    nothing is left of it; what it had stored is renewed and read, and a picture is published. Control: no reserve.
    """
    kept = store.put(TENANT, b"before")
    store = ArtifactStore(store.root, reserve)

    def receive() -> None:
        with store.receive(TENANT) as incoming:
            incoming.keep()

    def go_on() -> None:
        with FileIO(tmp_path / "part", "wb") as file:
            Incoming(file, tmp_path / "part", tmp_path, reserve).write(b"piece")

    for write in (lambda: store.put(TENANT, b"new"), receive, go_on):
        if reserve:
            with pytest.raises(ArtifactError) as error:
                write()
            assert code_of(error) == "storage_unavailable"
        else:
            write()
    assert len(files(store)) == (1 if reserve else 3)
    assert (tmp_path / "part").read_bytes() == (b"" if reserve else b"piece")
    assert store.read(TENANT, store.put(TENANT, b"before")) == b"before"
    assert store.require(TENANT, kept) is None
    assert store.read_picture(NAME, store.publish(NAME, b"picture")) == b"picture"


def test_sweep(store: ArtifactStore) -> None:
    """Age decides: old files and old unfinished ones go; what was asked for lately stays."""
    old, young, asked, renewed = (store.put(TENANT, data) for data in (b"old", b"young", b"asked for", b"renewed"))
    store.publish(NAME, b"picture")
    unfinished = store.path(NAME).with_suffix(".part")
    unfinished.write_bytes(b"")
    past = time.time() - 5000
    for path in files(store):
        if path.name != young:
            os.utime(path, (past, past))
    store.put(TENANT, b"asked for")
    store.renew(TENANT, renewed)
    assert store.sweep(10_000) == 1, "only the unfinished one is too old for its kind"
    assert store.sweep(4000) == 2
    assert {path.name for path in files(store)} == {young, asked, renewed}
    assert old not in {path.name for path in files(store)}


def test_sweep_beside_others_at_work(store: ArtifactStore) -> None:
    """Directories that vanish before the sweep do not end it, and it goes on to what lies behind them."""
    store.put(TENANT, b"stays")
    falls = 0
    with churning(store.root / "references"):
        while falls < 20:
            store.sweep(3600.0)
            falls += plain_walk_fails(store.root)
    assert store.sweep(-1.0) == 1, "what was there all the time was spared, and goes when it is old"
