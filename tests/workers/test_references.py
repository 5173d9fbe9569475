"""What is known of uploaded references: by tenant, for a time, and gone for good once deleted, also from the caches."""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
import pytest
import redis
from PIL import Image

from model.roles import Role
from tests.workers.conftest import MakeJob
from tests.workers.standin import StandinPipeline
from workers.artifacts import ArtifactError, ArtifactStore
from workers.inference.runner import JobRunner
from workers.jobs import CUSTOMIZE, JobStatus, ReferenceInput
from workers.ledger import Ledger
from workers.references import Purges, References, UploadedReference
from workers.settings import WorkerSettings


@pytest.fixture
def references(client: redis.Redis, store: ArtifactStore) -> References:
    return References(client, store, ttl_s=600)


@pytest.fixture
def runner(client: redis.Redis, store: ArtifactStore) -> Iterator[JobRunner]:
    made = JobRunner(StandinPipeline(), Ledger(client, CUSTOMIZE), store, WorkerSettings(grace_s=0.0), "w")
    yield made
    made.close()


def png() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((8, 6, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def add(references: References, tenant: str, data: bytes) -> UploadedReference:
    return references.add(tenant, references.store.put(tenant, data), "png", (8, 6), len(data))[0]


def outcome(runner: JobRunner, make_job: MakeJob, number: int, tenant: str, picture: str) -> str:
    """How a job with this one reference ends, or, if it succeeds, whether its latents had been kept."""
    job = make_job(f"job_{number}", tenant=tenant, references=(ReferenceInput(1, Role.SUBJECT, picture),))
    runner.ledger.accept(job)
    runner.run(job.id)
    assert runner.wait(60)
    record = runner.ledger.get(job.id)
    assert record is not None
    if record.result is not None:
        return record.result.cache["reference_1"]
    assert record.status is JobStatus.FAILED and record.error is not None
    return record.error.code


def test_deleting_reaches_the_caches(references: References, runner: JobRunner, make_job: MakeJob) -> None:
    """What a worker made of a deleted reference is dropped at its caretaker's next round, and of no other: another
    tenant's same picture stays. The job that asks for it afterwards is told that it is gone."""
    mine, other = (add(references, tenant, png()) for tenant in ("a", "b"))
    assert [outcome(runner, make_job, n, "ab"[n], mine.sha256) for n in (0, 1)] == ["miss", "miss"]
    runner.tidy()
    counts = runner.caches.counts()
    assert counts["prepared"].entries == counts["latents"].entries == 2, "nothing was deleted yet"
    assert references.delete("a", mine.id)
    runner.tidy()
    counts = runner.caches.counts()
    assert counts["prepared"].entries == counts["latents"].entries == 1
    assert outcome(runner, make_job, 2, "b", other.sha256) == "hit"
    assert outcome(runner, make_job, 3, "a", mine.sha256) == "artifact_missing"


def test_lost_purge_is_caught_when_it_matters(
    references: References, client: redis.Redis, runner: JobRunner, make_job: MakeJob
) -> None:
    """A worker that never hears of a deletion serves nothing of it all the same, and drops it then."""
    reference = add(references, "a", png())
    outcome(runner, make_job, 0, "a", reference.sha256)
    references.delete("a", reference.id)
    client.xtrim("dreamserve:references:purges", maxlen=0)
    runner.tidy()
    assert runner.caches.counts()["latents"].entries == 1, "the purge is lost"
    assert outcome(runner, make_job, 1, "a", reference.sha256) == "artifact_missing"
    assert runner.caches.counts()["latents"].entries == 0


def test_each_purge_is_heard_once(references: References, client: redis.Redis) -> None:
    """All that came since the last time, in order, however many; each worker for itself; then silence."""
    heard: list[list[str]] = [[], []]
    purges = [Purges(client), Purges(client)]
    for round_ in range(2):
        for number in range(1500):
            client.xadd("dreamserve:references:purges", {"tenant": "a", "sha256": f"{round_}.{number}"})
        for mine, ours in zip(purges, heard, strict=True):
            for _ in range(3):
                mine.pass_on(lambda tenant, sha256, ours=ours: ours.append(f"{tenant}{sha256}"))
    assert heard[0] == heard[1] == [f"a{round_}.{number}" for round_ in range(2) for number in range(1500)]


def test_purge_that_fails_is_heard_again(references: References) -> None:
    """A worker that could not drop what it was told to is told again."""
    references.delete("a", add(references, "a", png()).id)
    purges, heard = Purges(references.redis), []

    def fail(*_: str) -> None:
        raise RuntimeError("not now")

    with pytest.raises(RuntimeError):
        purges.pass_on(fail)
    purges.pass_on(lambda *told: heard.append(told))
    assert len(heard) == 1


def test_deleting_beside_a_use(references: References, store: ArtifactStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A use that had begun before a deletion does not bring the reference back to life."""
    reference = add(references, "a", png())
    renew = store.renew

    def renew_late(tenant: str, key: str) -> None:
        renew(tenant, key)
        references.delete("a", reference.id)

    monkeypatch.setattr(store, "renew", renew_late)
    assert references.find("a", reference.id, renew=True) is None
    assert references.find("a", reference.id) is None
    with pytest.raises(ArtifactError):
        store.require("a", reference.sha256)


def test_damaged_entry_is_none(references: References, client: redis.Redis) -> None:
    """What somebody else wrote into Redis is not shown to anybody; an upload mends it."""
    reference = add(references, "a", png())
    (key,) = client.keys("dreamserve:reference:ref_*")
    client.set(key, b'{"sha256": "../../etc/passwd"}')
    assert references.find("a", reference.id) is None
    assert not references.delete("a", reference.id)
    assert add(references, "a", png()).id == reference.id


def test_ids(references: References) -> None:
    """One per tenant and picture: nothing that two of them share, whatever the tenants are called."""
    names = ["a", "A", "b", "a b", "", "ä", "a:b"]
    ids = {add(references, tenant, data).id for tenant in names for data in (png(), png() + b"x")}
    assert len(ids) == 2 * len(names)
    assert all(len(each) == 36 for each in ids)
    for tenant in names:
        assert {references.find(other, add(references, tenant, png()).id) for other in names if other != tenant} == {
            None
        }
