"""References at URLs, from a job in the outbox to one in the line, over a real Redis, store and TLS."""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import redis
from PIL import Image

from model.roles import Role
from tests.fuzz.urls import PUBLIC_HOST
from tests.workers.conftest import MakeJob
from tests.workers.courier.hosts import PATIENT, Host, Seen, World, always, said
from workers import queues
from workers.artifacts import ArtifactStore
from workers.books.values import Fetch
from workers.courier.egress import Egress
from workers.courier.fetching import FetchError, ReferenceFetcher
from workers.courier.worker import Fetches
from workers.jobs import CUSTOMIZE, CustomizeJob, JobError, JobStatus, ReferenceInput
from workers.ledger import CustomizeLedger, Ledger

CANARY = "Signature=canary"


def picture(size: tuple[int, int] = (8, 6), kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (20, 200, 40)).save(buffer, kind)
    return buffer.getvalue()


STORED = hashlib.sha256(b"stored").hexdigest()
PNG, JPEG = picture(), picture(kind="JPEG")
BOMB = PNG[:16] + (100_000).to_bytes(4, "big") * 2 + PNG[24:]


def at(slot: int, path: str, host: str = PUBLIC_HOST) -> ReferenceInput:
    return ReferenceInput(slot, Role.SUBJECT, "", url=f"https://{host}{path}?{CANARY}")


def job_of(make_job: MakeJob, *references: ReferenceInput, tenant: str = "a") -> CustomizeJob:
    return make_job("job_1", references=references, tenant=tenant)


def fetch(fetcher: ReferenceFetcher, job: CustomizeJob) -> CustomizeJob:
    return asyncio.run(fetcher.fetch(job))


def failure(fetcher: ReferenceFetcher, job: CustomizeJob) -> JobError:
    with pytest.raises(FetchError) as caught:
        fetch(fetcher, job)
    return caught.value.error


async def by_path(seen: Seen, writer: asyncio.StreamWriter) -> None:
    """A host of pictures."""
    path = seen.target.partition("?")[0]
    bodies = {"/png": PNG, "/jpeg": JPEG, "/bomb": BOMB, "/page": b"<html>", "/large": PNG + os.urandom(3000)}
    bodies["/cut"] = PNG[:20]
    writer.write(said(200, bodies[path]) if path in bodies else said(404))


def test_urls_become_keys(make_job: MakeJob, store: ArtifactStore) -> None:
    """Each URL is fetched once and stored as its tenant's; what was stored before stays; no URL is left in the job."""
    with Host(by_path) as public:
        job = job_of(make_job, at(1, "/png"), ReferenceInput(2, Role.STYLE, STORED), at(3, "/jpeg"), at(5, "/png"))
        job = replace(job, references=(*job.references, replace(at(6, "/png"), role=Role.IDENTITY, mask=STORED)))
        done = fetch(ReferenceFetcher(World(public.port, 1).egress(), store, caps=PATIENT), job)
        assert sorted(seen.target for seen in public.seen) == [f"/jpeg?{CANARY}", f"/png?{CANARY}"]
    keys = [reference.image for reference in done.references]
    png, jpeg = hashlib.sha256(PNG).hexdigest(), hashlib.sha256(JPEG).hexdigest()
    assert keys == [png, STORED, jpeg, png, png]
    assert store.read("a", png) == PNG
    assert store.read("a", jpeg) == JPEG
    assert not done.fetching
    assert CANARY not in repr(done)
    assert replace(done, references=()) == replace(job, references=())
    assert [replace(r, image="", url=None) for r in done.references] == [
        replace(r, image="", url=None) for r in job.references
    ]


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("/page", "image_unsupported"),
        ("/cut", "image_undecodable"),
        ("/bomb", "image_too_large"),
        ("/large", "image_too_large"),
        ("/absent", "reference_unreachable"),
    ],
)
def test_what_cannot_be_taken(make_job: MakeJob, store: ArtifactStore, path: str, code: str) -> None:
    """The code says what is wrong, the message in which slot, and neither where it was; nothing is stored."""
    with Host(by_path) as public:
        fetcher = ReferenceFetcher(World(public.port, 1).egress(), store, caps=replace(PATIENT, max_bytes=2000))
        error = failure(fetcher, job_of(make_job, at(4, path)))
    assert error.code == code
    assert "Reference 4" in error.message
    assert CANARY not in error.message
    assert PUBLIC_HOST not in error.message
    assert not [path for path in store.root.rglob("*") if path.is_file()]


def test_blocked_and_unreachable_are_one_answer(make_job: MakeJob, store: ArtifactStore) -> None:
    """Nobody learns from a failed job what a name resolves to inside."""
    with Host(by_path) as public:
        world = World(public.port, 1)
        world.name("inside.example", ("10.0.0.1",))
        world.name("untrusted.example", ("93.184.216.34",))
        fetcher = ReferenceFetcher(world.egress(), store, caps=PATIENT)
        hosts = ("inside.example", "nowhere.example", "untrusted.example")
        errors = {failure(fetcher, job_of(make_job, at(1, "/png", host))) for host in hosts}
        errors.add(failure(fetcher, job_of(make_job, at(1, "/absent"))))
    assert {(error.code, error.retryable) for error in errors} == {("reference_unreachable", True)}
    assert len(errors) == 1


def test_a_job_has_one_budget(make_job: MakeJob, store: ArtifactStore) -> None:
    """Many pictures, none of them too large, are too many bytes for one job."""
    with Host(by_path) as public:
        fetcher = ReferenceFetcher(World(public.port, 1).egress(), store, caps=PATIENT, job_bytes=5000)
        assert not fetch(fetcher, job_of(make_job, at(1, "/large"))).fetching
        job = job_of(make_job, at(1, "/large"), at(2, "/large", f"b.{PUBLIC_HOST}"))
        assert failure(fetcher, job).code == "image_too_large"


def test_the_first_failure_ends_the_job(make_job: MakeJob, store: ArtifactStore) -> None:
    """A picture that never comes does not hold up what is known to fail already."""

    async def answer(seen: Seen, writer: asyncio.StreamWriter) -> None:
        if seen.target.startswith("/never"):
            await asyncio.Event().wait()
        writer.write(said(404))

    with Host(answer) as public:
        began = time.monotonic()
        fetcher = ReferenceFetcher(World(public.port, 1).egress(), store, caps=replace(PATIENT, total_s=120.0))
        error = failure(fetcher, job_of(make_job, at(1, "/never"), at(2, "/absent")))
    assert "Reference 2" in error.message
    assert time.monotonic() - began < 60


def test_a_full_disk_is_retryable(make_job: MakeJob, tmp_path: Path) -> None:
    """The server's own trouble is told as such."""
    (tmp_path / "store").write_bytes(b"a file where a directory has to be")
    with Host(by_path) as public:
        fetcher = ReferenceFetcher(World(public.port, 1).egress(), ArtifactStore(tmp_path / "store"), caps=PATIENT)
        error = failure(fetcher, job_of(make_job, at(1, "/png")))
    assert (error.code, error.retryable) == ("storage_unavailable", True)


# With the ledger


@pytest.fixture
def ledger(client: redis.Redis) -> CustomizeLedger:
    return Ledger(client, CUSTOMIZE)


def delivered(client: redis.Redis) -> list[str]:
    """What RQ holds for the workers."""
    return queues.queue(client, CUSTOMIZE).job_ids


def work(ledger: CustomizeLedger, egress: Egress, store: ArtifactStore) -> list[Fetch]:
    """Take all that is due and settle it."""
    due = ledger.due_fetches()
    fetches = Fetches(ledger, ReferenceFetcher(egress, store, caps=PATIENT))
    for entry in due:
        asyncio.run(fetches.handle(entry))
    return due


def test_a_job_waits_for_its_pictures(ledger: CustomizeLedger, make_job: MakeJob, store: ArtifactStore) -> None:
    """No worker hears of it before all of them are in the store; then it is rung for at once."""
    ledger.accept(job_of(make_job, at(1, "/png")))
    queues.ring_due(ledger)
    assert delivered(ledger.redis) == []
    with Host(by_path) as public:
        assert len(work(ledger, World(public.port, 1).egress(), store)) == 1
    assert delivered(ledger.redis) == ["job_1"]
    record = ledger.get("job_1")
    assert record
    assert store.read("a", record.job.references[0].image) == PNG
    assert ledger.due_fetches() == []
    assert CANARY.encode() not in b"".join(ledger.redis.hvals("dreamserve:job:job_1"))  # pyright: ignore[reportCallIssue, reportArgumentType]  # sync client


def test_a_job_without_its_pictures_fails(ledger: CustomizeLedger, make_job: MakeJob, store: ArtifactStore) -> None:
    """It ends, with the reason, and takes no worker's time."""
    ledger.accept(job_of(make_job, at(1, "/absent")))
    with Host(by_path) as public:
        work(ledger, World(public.port, 1).egress(), store)
    record = ledger.get("job_1")
    assert record
    assert record.error
    assert (record.status, record.error.code) == (JobStatus.FAILED, "reference_unreachable")
    assert delivered(ledger.redis) == []


@pytest.mark.parametrize("meanwhile", ["canceled", "taken by another"])
def test_a_fetch_that_comes_too_late_changes_nothing(
    ledger: CustomizeLedger, make_job: MakeJob, store: ArtifactStore, meanwhile: str
) -> None:
    """Whoever was canceled stays so; of two couriers only one resolves."""
    changes: dict[str, Callable[[], object]] = {
        "canceled": lambda: ledger.cancel("job_1"),
        "taken by another": lambda: ledger.redis.hset("dreamserve:job:job_1", "fetch_token", 999),
    }

    async def answer(_seen: Seen, writer: asyncio.StreamWriter) -> None:
        await asyncio.to_thread(changes[meanwhile])
        writer.write(said(200, PNG))

    ledger.accept(job_of(make_job, at(1, "/png")))
    with Host(answer) as public:
        work(ledger, World(public.port, 1).egress(), store)
    record = ledger.get("job_1")
    assert record
    assert record.status is (JobStatus.CANCELED if meanwhile == "canceled" else JobStatus.QUEUED)
    assert record.job.fetching
    assert delivered(ledger.redis) == []


def test_a_deleted_job_is_passed_over(ledger: CustomizeLedger, store: ArtifactStore) -> None:
    """An entry whose record is gone is nobody's trouble."""
    with Host(always(said(200, PNG))) as public:
        fetches = Fetches(ledger, ReferenceFetcher(World(public.port, 1).egress(), store))
        asyncio.run(fetches.handle(Fetch("job_gone", 1, "a")))
        assert not public.seen
