"""Reading jobs: whoever asks while a question is on its way is answered by the next one, together with all others.

    read ×n ─▶ Reader ─one thread, one script─▶ Redis

A question is asked after all whom it answers have come, so nobody gets to see less than what was true when he came.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from itertools import chain
from typing import Final, Generic

import anyio
from anyio import to_thread

from service.records import DrainGauge, own, queue_view
from service.schemas import QueueView
from workers.books.values import DamagedRecordError, Look
from workers.jobs import (
    CustomizeJob,
    JobRecord,
    JobResult,
    JobT,
    Progress,
    ProgressT,
    ResultT,
    TrainingJob,
    TrainingProgress,
    TrainingResult,
)
from workers.ledger import Ledger, Looks

AT_ONCE: Final = 64
"""Jobs in a question: Redis answers one after the other."""

_Asked = tuple[Look[JobT, ProgressT, ResultT] | DamagedRecordError, float | None]


@dataclass(frozen=True, slots=True)
class Seen(Generic[JobT, ProgressT, ResultT]):
    """A job, and its place in line as far as it was asked for and is queued."""

    record: JobRecord[JobT, ProgressT, ResultT]
    queue: QueueView | None = None


class Reader(Generic[JobT, ProgressT, ResultT]):
    """Asks for all who read together. Belongs to one event loop."""

    def __init__(self, ledger: Ledger[JobT, ProgressT, ResultT], gauge: DrainGauge) -> None:
        self.ledger = ledger
        self.gauge = gauge
        self._waiting: dict[str, list[asyncio.Future[_Asked[JobT, ProgressT, ResultT]]]] = {}
        self._thread = anyio.CapacityLimiter(1)
        self._asking: asyncio.Task[None] | None = None

    async def read(self, job_id: str, tenant: str) -> Seen[JobT, ProgressT, ResultT]:
        """A tenant's job as it is now.

        Raises:
            Problem: 404 or 410, as `records.found`.
            DamagedRecordError: what Redis holds is not a record.
            redis.exceptions.RedisError: Redis is away.
        """
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[_Asked[JobT, ProgressT, ResultT]] = loop.create_future()
        self._waiting.setdefault(job_id, []).append(answer)
        if self._asking is None or self._asking.done():
            self._asking = loop.create_task(self._ask())
        look, rate = await answer
        if isinstance(look, DamagedRecordError):
            raise look
        return Seen(own(look, tenant), None if look.place is None else queue_view(look.place, rate))

    async def _ask(self) -> None:
        while self._waiting:
            asked = {job_id: self._waiting.pop(job_id) for job_id in list(self._waiting)[:AT_ONCE]}
            try:
                looks, rate = await to_thread.run_sync(self._look, list(asked), limiter=self._thread)
            except Exception as error:  # noqa: BLE001 - whatever it is, all who wait have to hear of it
                # Also those who have come meanwhile: if Redis is away, they need not wait as long again.
                late, self._waiting = self._waiting, {}
                for answer in chain(*asked.values(), *late.values()):
                    if not answer.done():
                        answer.set_exception(error)
                continue
            for answers, look in zip(asked.values(), looks, strict=True):
                for answer in answers:
                    if not answer.done():  # its caller has given up
                        answer.set_result((look, rate))

    def _look(self, job_ids: list[str]) -> tuple[Looks[JobT, ProgressT, ResultT], float | None]:
        looks = self.ledger.look(job_ids)
        queued = any(isinstance(look, Look) and look.place is not None for look in looks)
        return looks, self.gauge.rate() if queued else None


SeenJob = Seen[CustomizeJob, Progress, JobResult]
JobReader = Reader[CustomizeJob, Progress, JobResult]
SeenTraining = Seen[TrainingJob, TrainingProgress, TrainingResult]
TrainingReader = Reader[TrainingJob, TrainingProgress, TrainingResult]
