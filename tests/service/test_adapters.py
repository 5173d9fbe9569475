"""The adapter of a request: which version a job gets, and what a caller sees of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.service.conftest import Bench
from workers.registry import LORA, MAIN, PublishedAdapter, Registry


def published(bench: Bench, folder: Path, content: bytes, *, name: str = "style", file: str = MAIN) -> PublishedAdapter:
    source = folder / content.decode()
    source.mkdir()
    (source / file).write_bytes(content)
    return Registry(bench.home / "adapters").publish(name, source)


def faults(bench: Bench, adapter: dict[str, Any]) -> list[tuple[str, str]]:
    answer = bench.client.post("/v1/customize", json={"prompt": "a toy", "adapter": adapter})
    assert answer.status_code == 422, answer.text
    return [(fault["pointer"], fault["code"]) for fault in answer.json()["errors"]]


def test_a_job_keeps_the_version_that_was_newest(bench: Bench, tmp_path: Path) -> None:
    """What is published later changes no accepted job, and the caller reads which version and scale it has."""
    first = published(bench, tmp_path, b"one")
    job = bench.submit(adapter={"name": "style", "scale": 0.8})
    second = published(bench, tmp_path, b"two")
    later = bench.submit(adapter={"name": "style"})
    wanted = {"name": "style", "version": first.version, "scale": 0.8}
    assert job["request"]["adapter"] == wanted
    assert bench.client.get(f"/v1/jobs/{job['id']}").json()["request"]["adapter"] == wanted
    assert later["request"]["adapter"] == {"name": "style", "version": second.version, "scale": 1.0}
    record = bench.ledger.get(job["id"])
    assert record is not None and record.job.adapter is not None and record.job.adapter.version == first.version


def test_a_version_can_be_named(bench: Bench, tmp_path: Path) -> None:
    """What a job's `request` shows can be sent again, and is the same later; one that is not there is refused."""
    first = published(bench, tmp_path, b"one")
    published(bench, tmp_path, b"two")
    job = bench.submit(adapter={"name": "style", "version": first.version})
    assert bench.submit(adapter=job["request"]["adapter"])["request"]["adapter"]["version"] == first.version
    assert faults(bench, {"name": "style", "version": "0" * 64}) == [("/adapter/version", "adapter_unknown")]


def test_jobs_without_one_say_so(bench: Bench) -> None:
    """Nothing is chosen for the caller."""
    assert bench.submit()["request"]["adapter"] is None


@pytest.mark.parametrize("scale", [2.01, -2.01, 1e300])
def test_a_scale_has_bounds(bench: Bench, tmp_path: Path, scale: float) -> None:
    """Beyond them pictures are noise; every fault is told at once."""
    published(bench, tmp_path, b"one")
    assert faults(bench, {"name": "style", "scale": scale}) == [("/adapter/scale", "adapter_scale_out_of_range")]
    both = [("/adapter/scale", "adapter_scale_out_of_range"), ("/adapter/name", "adapter_unknown")]
    assert faults(bench, {"name": "other", "scale": scale}) == both
    for kept in (2.0, -2.0, 0, 1):
        assert bench.submit(adapter={"name": "style", "scale": kept})["request"]["adapter"]["scale"] == kept


def test_another_tenants_adapter_is_unknown(bench: Bench, tmp_path: Path) -> None:
    """Its name answers as one that nobody has."""
    source = tmp_path / "theirs"
    source.mkdir()
    (source / MAIN).write_bytes(b"theirs")
    Registry(bench.home / "adapters", "them").publish("private", source)
    assert faults(bench, {"name": "private"}) == faults(bench, {"name": "nobodys"})


def test_registered_files_are_listed_beside_trained_ones(bench: Bench, tmp_path: Path) -> None:
    """A caller can tell a LoRA from a whole DreamO adapter, and finds both by name."""
    published(bench, tmp_path, b"whole")
    published(bench, tmp_path, b"plain", name="lora", file=LORA)
    listed = bench.client.get("/v1/adapters").json()["adapters"]
    assert [(adapter["name"], adapter["kind"], adapter["files"]) for adapter in listed] == [
        ("lora", "lora", [LORA]),
        ("style", "dreamo", [MAIN]),
    ]
