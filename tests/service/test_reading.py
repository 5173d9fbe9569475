"""Readers who share their questions: each gets his own job, as it was when he came or later; nobody is forgotten."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import redis
from redis.exceptions import RedisError

from service.problems import Problem
from service.reading import Reader, Seen
from service.records import DrainGauge
from tests.service.conftest import Bench
from workers.books.values import DamagedRecordError
from workers.jobs import CUSTOMIZE, JobStatus
from workers.ledger import Ledger

TENANT = "default"


@pytest.fixture
def reader(bench: Bench) -> Reader:
    return Reader(bench.ledger, DrainGauge(bench.ledger))


def questions(bench: Bench) -> int:
    """Scripts that Redis has run so far."""
    stats: dict[str, Any] = bench.redis.info("commandstats")
    return stats.get("cmdstat_evalsha", {"calls": 0})["calls"]


async def together(reader: Reader, job_ids: list[str]) -> list[Any]:
    """All reads at once; what each came to."""
    return await asyncio.gather(*(reader.read(job_id, TENANT) for job_id in job_ids), return_exceptions=True)


def test_many_readers_are_few_questions(bench: Bench, reader: Reader) -> None:
    """Each gets his own job and its place, and a hundred of them cost a handful of questions."""
    jobs = [bench.submit(prompt=f"toy {number}")["id"] for number in range(10)]
    asyncio.run(together(reader, jobs))  # the gauge asks too, once a second
    before = questions(bench)
    seen: list[Seen] = asyncio.run(together(reader, jobs * 10))
    assert [each.record.job.id for each in seen] == jobs * 10
    assert [each.queue.position for each in seen if each.queue] == list(range(10)) * 10
    assert questions(bench) - before < 10


def test_one_by_one_they_are_many_questions(bench: Bench, reader: Reader) -> None:
    """The control: the count above does count; nothing is answered from before."""
    job = bench.submit()["id"]

    async def in_turn() -> None:
        for _ in range(20):
            await reader.read(job, TENANT)

    before = questions(bench)
    asyncio.run(in_turn())
    assert questions(bench) - before >= 20


def test_what_has_happened_is_seen(bench: Bench, reader: Reader) -> None:
    """Whoever reads after a change sees it, even while questions of others are on their way."""
    jobs = [bench.submit(prompt=f"toy {number}")["id"] for number in range(20)]

    async def crowd() -> list[JobStatus]:
        others = [asyncio.create_task(again()) for _ in range(8)]
        seen: list[JobStatus] = []
        for job in jobs:
            await asyncio.to_thread(bench.ledger.cancel, job)
            seen.append((await reader.read(job, TENANT)).record.status)
        for other in others:
            other.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        return seen

    async def again() -> None:
        while True:
            await asyncio.gather(*(reader.read(job, TENANT) for job in jobs))

    assert asyncio.run(crowd()) == [JobStatus.CANCELED] * len(jobs)


def test_a_damaged_record_hides_no_other(bench: Bench, reader: Reader) -> None:
    """It fails for who asked for it; what is not there is not there for him who asked for that."""
    good, damaged = bench.submit()["id"], bench.submit()["id"]
    bench.redis.hset(f"dreamserve:job:{damaged}", "job", "{}")
    first, second, third = asyncio.run(together(reader, [good, damaged, "job_none"]))
    assert first.record.job.id == good
    assert isinstance(second, DamagedRecordError)
    assert isinstance(third, Problem) and third.details.code == "not_found"


def test_a_foreign_job_is_none(bench: Bench, reader: Reader) -> None:
    """Also beside its owner, who asks for it at the same time."""
    job = bench.submit()["id"]

    async def both() -> list[Any]:
        reads = reader.read(job, TENANT), reader.read(job, "other")
        return [*await asyncio.gather(*reads, return_exceptions=True)]

    mine, theirs = asyncio.run(both())
    assert mine.record.job.id == job
    assert isinstance(theirs, Problem) and theirs.details.code == "not_found"


def test_without_redis_all_hear_of_it() -> None:
    """Nobody waits for ever, neither who was asked for nor who came meanwhile, and the next one is tried again."""
    ledger = Ledger(redis.Redis(port=1, socket_connect_timeout=1.0, retry=None), CUSTOMIZE)
    reader = Reader(ledger, DrainGauge(ledger))

    async def run() -> list[Any]:
        first = asyncio.create_task(together(reader, ["job_a", "job_b"]))
        await asyncio.sleep(0)
        late = asyncio.create_task(together(reader, ["job_a"]))
        return [*await first, *await late, *await together(reader, ["job_c"])]

    answers = asyncio.run(asyncio.wait_for(run(), 60))
    assert len(answers) == 4
    assert all(isinstance(answer, RedisError) for answer in answers)


def test_who_gives_up_holds_up_nobody(bench: Bench, reader: Reader) -> None:
    """A caller who is gone before his answer leaves the others theirs."""
    job = bench.submit()["id"]

    async def run() -> Seen:
        gone = asyncio.create_task(reader.read(job, TENANT))
        stays = asyncio.create_task(reader.read(job, TENANT))
        await asyncio.sleep(0)
        gone.cancel()
        return await stays

    assert asyncio.run(run()).record.job.id == job
