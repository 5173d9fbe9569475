"""Clients of the service: some threads that submit, cancel and poll, and go on when Redis is away."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from redis.exceptions import RedisError

from tests.faults.history import Event, History
from workers import queues
from workers.jobs import CUSTOMIZE, CustomizeJob, CustomizeRecord, JobStatus, Sampling, Webhook
from workers.ledger import CustomizeLedger, Ledger

T = TypeVar("T")
WIDTH, HEIGHT = 16, 32
ENDED = tuple(status for status in JobStatus if status.terminal)
WINDOW = 20
"""A tenant's; of three tenants with this many each in RQ, jobs wait in lines most of the time."""


@dataclass(frozen=True, slots=True)
class Load:
    """What the clients do: `jobs` with at most `waiting` unended, a share of them canceled, sent twice, never sent, to
    be begun within moments, or accepted by a gateway that dies before it rings.

    A ghost is a delivery for a job that was never accepted.
    """

    jobs: int
    waiting: int
    canceled: float = 0.05
    repeated: float = 0.05
    ghosts: float = 0.02
    hurried: float = 0.05
    unrung: float = 0.05


def some_job(number: int, draw: random.Random) -> CustomizeJob:
    """One of few steps and one or two pictures, of some tenant; some want to be told of changes."""
    sampling = Sampling(WIDTH, HEIGHT, draw.randint(1, 5), 4.5, 4.5, draw.randrange(2**64))
    return CustomizeJob(
        f"job_{number}",
        "standin",
        f"toy {number}",
        "",
        (),
        sampling,
        num_images=draw.choice((1, 1, 2)),
        tenant=draw.choice(("a", "a", "a", "b", "c")),
        webhook=draw.choice((None, None, Webhook("https://x.example"), Webhook("https://x.example", ("status",)))),
    )


def insist(act: Callable[[], T], ended: threading.Event) -> T | None:
    """Try again while Redis is away; None once `ended`."""
    while not ended.is_set():
        try:
            return act()
        except RedisError:
            ended.wait(0.05)
    return None


def seen(record: CustomizeRecord) -> Event:
    """What a caller is shown of a record."""
    return {
        "job": record.job.id,
        "status": record.status,
        "attempt": record.attempt,
        "finished_at": record.finished_at,
        "images": [[image.name, image.sha256] for image in record.result.images] if record.result else None,
        "code": record.error.code if record.error else None,
    }


def count_ended(ledger: CustomizeLedger) -> int:
    """How many jobs have ended.

    Raises:
        redis.exceptions.RedisError: Redis is away.
    """
    return sum(int(ledger.redis.zcard(f"{CUSTOMIZE.root}status:{status}")) for status in ENDED)


class Clients:
    """`ended` is how many jobs have; `done` is set once all are submitted. Threads live from `start` to `close`."""

    def __init__(self, url: str, history: History, load: Load, seed: int) -> None:
        self.history = history
        self.load = load
        self.ended = 0
        self.jobs: list[CustomizeJob] = []
        self.done = threading.Event()
        self._url = url
        self._closed = threading.Event()
        self._draw = random.Random(f"clients {seed}")
        self._threads = [threading.Thread(target=act, daemon=True) for act in (self._submit, self._poll)]

    def start(self) -> None:
        """Begin."""
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """End, whatever is left to do."""
        self._closed.set()
        for thread in self._threads:
            thread.join()

    def _submit(self) -> None:
        ledger = self._connect()
        cancels: list[tuple[float, str]] = []
        for number in range(self.load.jobs):
            while len(self.jobs) - self.ended >= self.load.waiting and not self._closed.is_set():
                self._cancel_due(ledger, cancels)
                time.sleep(0.005)
            job = some_job(number, self._draw)
            within = self._draw.choice((0.05, 0.5, 5.0)) if self._draw.random() < self.load.hurried else None
            self._send(ledger, job, within)
            if self._draw.random() < self.load.repeated:
                self._send(ledger, job, within)
            if self._draw.random() < self.load.ghosts:
                insist(lambda number=number: queues.ring(ledger.redis, CUSTOMIZE, f"ghost_{number}"), self._closed)
            if self._draw.random() < self.load.canceled:
                cancels.append((time.monotonic() + self._draw.choice((0.0, 0.05, 0.3, 1.0)), job.id))
            self._cancel_due(ledger, cancels)
        while cancels and not self._closed.is_set():
            self._cancel_due(ledger, cancels)
            time.sleep(0.005)
        self.done.set()

    def _send(self, ledger: CustomizeLedger, job: CustomizeJob, within_s: float | None) -> None:
        """As the gateway does: accept, ring, answer. Whoever gets no answer sends the same again."""
        self.history.note("submit", job=job.id)
        accepted = insist(lambda: ledger.accept(job, start_within_s=within_s), self._closed)
        if accepted is not None and self._draw.random() >= self.load.unrung:
            insist(lambda: queues.ring_accepted(ledger, accepted), self._closed)
        if not self._closed.is_set():
            self.history.note("accepted", job=job.id)
            if not self.jobs or self.jobs[-1].id != job.id:
                self.jobs.append(job)

    def _cancel_due(self, ledger: CustomizeLedger, cancels: list[tuple[float, str]]) -> None:
        for due, job_id in [entry for entry in cancels if entry[0] <= time.monotonic()]:
            cancels.remove((due, job_id))
            record = insist(lambda job_id=job_id: ledger.cancel(job_id), self._closed)
            if record is not None:
                self.history.note("cancel", **seen(record))

    def _poll(self) -> None:
        """Look at the youngest jobs, and now and then at one that has ended long ago."""
        ledger = self._connect()
        draw = random.Random(0)
        shown: dict[str, Event] = {}
        while not self._closed.is_set():
            ended = insist(lambda: count_ended(ledger), self._closed)
            self.ended = ended if ended is not None else self.ended
            young = self.jobs[-2 * self.load.waiting :]
            for job in draw.sample(young, min(16, len(young))) + draw.sample(self.jobs, min(4, len(self.jobs))):
                record = insist(lambda job=job: ledger.get(job.id), self._closed)
                if record is not None and shown.get(job.id) != (view := seen(record)):
                    shown[job.id] = view
                    self.history.note("observed", **view)
            time.sleep(0.02)

    def _connect(self) -> CustomizeLedger:
        return Ledger(queues.connect(self._url), CUSTOMIZE, tenant_window=WINDOW)
