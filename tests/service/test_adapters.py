"""The adapter of a request: which version a job gets, and what a caller sees of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from service.adapters import Bases
from tests.service.conftest import Bench
from tests.waiting import wait_for
from workers import queues
from workers.jobs import CUSTOMIZE
from workers.registry import CARD, LORA, MAIN, PublishedAdapter, Registry

BASE, OTHER = "a" * 32, "b" * 32


def published(
    bench: Bench, folder: Path, content: bytes, *, name: str = "style", file: str = MAIN, base: str | None = None
) -> PublishedAdapter:
    source = folder / content.decode()
    source.mkdir()
    (source / file).write_bytes(content)
    (source / CARD).write_text(json.dumps({"base": base}))
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


def announced(bench: Bench, *cards: dict[str, Any]) -> None:
    """Workers with these cards are live."""
    for number, card in enumerate(cards):
        queues.announce(bench.redis, CUSTOMIZE, f"worker-{number}", {"state": "ready", **card}, 60.0)


def test_an_adapter_of_a_base_that_nobody_serves(bench: Bench, tmp_path: Path) -> None:
    """Refused before it takes a share and waits to fail. Control: one of the served base, and one of which nobody knows
    the base, are accepted beside it."""
    announced(bench, {"base": BASE}, {"base": BASE, "state": "busy"})
    theirs = published(bench, tmp_path, b"theirs", base=OTHER)
    assert faults(bench, {"name": "style"}) == [("/adapter/name", "adapter_mismatch")]
    named = {"name": "style", "version": theirs.version}
    assert faults(bench, named) == [("/adapter/version", "adapter_mismatch")]
    assert bench.ledger.list()[0] == []
    published(bench, tmp_path, b"ours", name="ours", base=BASE)
    published(bench, tmp_path, b"registered", name="registered")
    for name in ("ours", "registered"):
        assert bench.submit(adapter={"name": name})["request"]["adapter"]["name"] == name
    listed = bench.client.get("/v1/adapters").json()["adapters"]
    assert {one["name"]: one["base"] for one in listed} == {"style": OTHER, "ours": BASE, "registered": None}
    assert {card["base"] for card in bench.client.get("/v1/models").json()["workers"]} == {BASE}, "as the remedy says"


@pytest.mark.parametrize(
    "cards",
    [
        [],
        [{"base": BASE}, {"state": "loading"}],
        [{"base": BASE}, {"base": None}],
        [{"base": BASE}, {"base": OTHER}],
        [{"base": BASE, "state": "stopping"}],
    ],
    ids=["none", "loading", "unknown", "both", "leaving"],
)
def test_where_nobody_can_tell_the_worker_decides(bench: Bench, tmp_path: Path, cards: list[dict[str, Any]]) -> None:
    """A fleet that starts, changes its base or is of an older version costs no caller a job."""
    announced(bench, *cards)
    theirs = published(bench, tmp_path, b"theirs", base=OTHER)
    assert bench.submit(adapter={"name": "style"})["request"]["adapter"]["version"] == theirs.version


def test_a_worker_that_leaves_says_nothing_any_more(bench: Bench, tmp_path: Path) -> None:
    """It takes no more jobs, so an adapter of its base would wait for nobody."""
    announced(bench, {"base": OTHER, "state": "stopping"}, {"base": BASE})
    published(bench, tmp_path, b"theirs", base=OTHER)
    assert faults(bench, {"name": "style"}) == [("/adapter/name", "adapter_mismatch")]


def test_the_newest_that_fits_is_taken(bench: Bench, tmp_path: Path) -> None:
    """A version for the next base does not take the name away from those who draw with this one."""
    announced(bench, {"base": BASE})
    published(bench, tmp_path, b"oldest", base=BASE)
    fitting = published(bench, tmp_path, b"older", base=BASE)
    newest = published(bench, tmp_path, b"newest", base=OTHER)
    assert bench.submit(adapter={"name": "style"})["request"]["adapter"]["version"] == fitting.version
    assert faults(bench, {"name": "style", "version": newest.version}) == [("/adapter/version", "adapter_mismatch")]


def test_what_is_served_is_asked_for_again(bench: Bench) -> None:
    """A change of the fleet is noticed within the time that an answer is remembered, and not asked for more often."""
    patient, eager = Bases(bench.redis, 3600.0), Bases(bench.redis, 0.05)
    announced(bench, {"base": BASE})
    assert patient.served() == eager.served() == frozenset({BASE})
    announced(bench, {"base": OTHER})
    wait_for(lambda: eager.served() == frozenset({OTHER}), "the new base")
    assert patient.served() == frozenset({BASE})
