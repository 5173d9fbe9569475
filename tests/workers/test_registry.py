"""Published adapters: whole or absent, known by their digest, newest first."""

from __future__ import annotations

import os
import shutil
import threading
import time
from pathlib import Path

import pytest

from workers.registry import MAIN, Registry, RegistryError, check
from workers.tenants import SOLE_TENANT


def exported(folder: Path, content: bytes) -> Path:
    folder.mkdir()
    (folder / MAIN).write_bytes(content)
    (folder / "adapter.json").write_text('{"steps": 3}')
    return folder


def test_the_newest_version_is_found_and_old_ones_stay(tmp_path: Path) -> None:
    """Jobs pin versions: a new one must neither hide nor replace the one before."""
    registry = Registry(tmp_path / "adapters")
    first = registry.publish("toy", exported(tmp_path / "a", b"one"))
    second = registry.publish("toy", exported(tmp_path / "b", b"two"))
    other = registry.publish("mug", exported(tmp_path / "c", b"one"))
    assert registry.find("toy") == second
    assert registry.find("toy", first.version).directory.joinpath(MAIN).read_bytes() == b"one"
    assert {adapter.name for adapter in registry.versions()} == {"toy", "mug"}
    assert other.version == first.version and first.card == {"steps": 3}


def test_publishing_again_changes_nothing(tmp_path: Path) -> None:
    """A worker that lost its job may publish what its successor has published: one version, first come."""
    registry = Registry(tmp_path / "adapters")
    source = exported(tmp_path / "a", b"one" * 1000)
    found: list[object] = []
    threads = [threading.Thread(target=lambda: found.append(registry.publish("toy", source))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and len({repr(adapter) for adapter in found}) == 1
    assert len(list((tmp_path / "adapters" / "toy").iterdir())) == 1, "nothing half-made is left"


def test_a_changed_file_is_never_handed_out(tmp_path: Path) -> None:
    """Weights that are not the published ones must not be loaded."""
    registry = Registry(tmp_path / "adapters")
    adapter = registry.publish("toy", exported(tmp_path / "a", b"one"))
    (adapter.directory / MAIN).write_bytes(b"two")
    with pytest.raises(RegistryError) as refused:
        registry.find("toy")
    assert refused.value.code == "adapter_corrupt"


def test_publishing_again_mends_a_changed_file(tmp_path: Path) -> None:
    """What the refusal advises works: the same bytes have the same version, and take the place of the damaged ones,
    without becoming the newest by it."""
    registry = Registry(tmp_path / "adapters")
    source = exported(tmp_path / "a", b"one")
    first = registry.publish("toy", source)
    newest = registry.publish("toy", exported(tmp_path / "b", b"two"))
    for damage in (lambda: first.file.write_bytes(b"bad"), first.file.unlink):
        damage()
        assert registry.publish("toy", source) == first
        assert registry.find("toy", first.version).file.read_bytes() == b"one"
        assert registry.find("toy") == newest
    assert len(list((tmp_path / "adapters" / "toy").iterdir())) == 2, "nothing damaged or half-made is left"


def test_a_copy_that_went_wrong_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A version is never taken for whole because its directory is there."""
    registry = Registry(tmp_path / "adapters")
    monkeypatch.setattr(shutil, "copyfile", lambda _source, target: target.write_bytes(b"half"))
    with pytest.raises(RegistryError) as refused:
        registry.publish("toy", exported(tmp_path / "a", b"one"))
    assert refused.value.code == "storage_unavailable" and registry.versions() == []


def test_what_a_killed_publisher_leaves_is_swept(tmp_path: Path) -> None:
    """Copies of a gigabyte that are nobody's would fill the disk; one that is being made is left alone."""
    registry = Registry(tmp_path / "adapters")
    old, young = (tmp_path / "adapters" / "mug" / f".part-{name}" for name in ("old", "young"))
    for part in (old, young):
        part.mkdir(parents=True)
        (part / MAIN).write_bytes(b"half")
    two_days_ago = time.time() - 2 * 24 * 3600
    os.utime(old, (two_days_ago, two_days_ago))
    registry.publish("toy", exported(tmp_path / "a", b"one"))
    assert young.is_dir() and not old.exists()


@pytest.mark.parametrize("name", ["../evil", "", "UPPER", "a/b", ".hidden", "x" * 65])
def test_names_are_no_paths(tmp_path: Path, name: str) -> None:
    """A name becomes a directory: what could lead elsewhere is refused, for reading and for writing."""
    registry = Registry(tmp_path / "adapters")
    for call in (lambda: registry.publish(name, exported(tmp_path / "a", b"one")), lambda: registry.find(name)):
        with pytest.raises(RegistryError) as refused:
            call()
        assert refused.value.code == "adapter_unknown"
    assert not (tmp_path / "adapters").exists()


def test_a_registry_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    """A trained adapter is not lost silently: the job fails with a code that says what to do."""
    (tmp_path / "adapters").write_text("a file where the directory should be")
    with pytest.raises(RegistryError) as refused:
        Registry(tmp_path / "adapters").publish("toy", exported(tmp_path / "a", b"one"))
    assert refused.value.code == "storage_unavailable" and str(tmp_path) not in refused.value.message


def test_locating_reads_no_weights(tmp_path: Path) -> None:
    """A gateway that pins a version must not hash a gigabyte; who loads the file does, and refuses a changed one."""
    registry = Registry(tmp_path / "adapters")
    adapter = registry.publish("toy", exported(tmp_path / "a", b"one"))
    adapter.file.write_bytes(b"two")
    located = registry.locate("toy", adapter.version)
    assert located == adapter
    with pytest.raises(RegistryError) as refused:
        check(located)
    assert refused.value.code == "adapter_corrupt"
    shutil.rmtree(adapter.directory)
    for call in (lambda: registry.locate("toy"), lambda: check(located)):
        with pytest.raises(RegistryError) as refused:
            call()
        assert refused.value.code == "adapter_unknown"


def test_an_adapter_knows_whose_it_is(tmp_path: Path) -> None:
    """What is kept of a tenant's is kept for that tenant alone; what lies on top is everybody's."""
    registry = Registry(tmp_path / "adapters")
    registry.publish("toy", exported(tmp_path / "a", b"one"))
    registry.of("ann").publish("toy", exported(tmp_path / "b", b"two"))
    owners = {adapter.version[:8]: adapter.owner for adapter in registry.of("ann").versions("toy")}
    assert sorted(owners.values()) == ["ann", SOLE_TENANT]
    assert [adapter.owner for adapter in registry.of("bob").versions("toy")] == [SOLE_TENANT]
    assert registry.of("ann").publish("mug", exported(tmp_path / "c", b"three")).owner == "ann"
