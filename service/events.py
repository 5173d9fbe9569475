"""Following jobs: one question to Redis at a time serves every long poll and event stream of this process.

    Watch ×n ─▶ Watcher ─one XREAD─▶ Redis          Watch ─▶ server-sent events, or the end of a long poll

A watch knows the last event it took, so nothing is missed between two questions, nor between two gateways.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from dataclasses import dataclass, field
from typing import Any, Final

import anyio
import structlog
from anyio import to_thread
from redis.exceptions import RedisError

from service.problems import Problem
from workers.jobs import JobStatus
from workers.ledger import Event, Ledger

BLOCK_S: Final = 0.1
"""A question waits so long for an answer; a new watch takes part in the next one."""
AWAY_S: Final = 0.5
CHECK_S: Final = 1.5
"""How often a silent stream asks whether its caller may still listen; with what `auth` remembers, within 5 s."""
HEARTBEAT_S: Final = 10.0

_LOG = structlog.stdlib.get_logger("service.events")


@dataclass(eq=False, slots=True)
class Watch:
    """One follower of one job. `known`: id of the last event it has taken."""

    job_id: str
    known: str
    news: list[Event] = field(default_factory=list[Event])
    stirred: asyncio.Event = field(default_factory=asyncio.Event)

    async def next(self, timeout_s: float) -> list[Event]:
        """What happened since; nothing if nothing does in time, or if the process is about to end."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self.stirred.wait()
        taken, self.news = self.news, []
        if taken:
            self.known = taken[-1].id
            self.stirred.clear()
        return taken


class Watcher:
    """Asks for all watches of a ledger together. Belongs to one event loop."""

    def __init__(self, ledger: Ledger[Any, Any, Any]) -> None:
        self.ledger = ledger
        self.leaving = False
        """The process is about to end: streams end, and their callers come back to another."""
        self._watches: set[Watch] = set()
        self._thread = anyio.CapacityLimiter(1)
        self._asking: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    @contextlib.contextmanager
    def watch(self, job_id: str, known: str = "0") -> Generator[Watch]:
        """Follow a job from the event after `known`."""
        watch = Watch(job_id, known)
        if self.leaving:
            watch.stirred.set()
        self._watches.add(watch)
        if self._asking is None or self._asking.done():
            self._loop = asyncio.get_running_loop()
            self._asking = self._loop.create_task(self._ask())
        try:
            yield watch
        finally:
            self._watches.discard(watch)

    @property
    def watching(self) -> int:
        """How many follow something now."""
        return len(self._watches)

    def leave_soon(self) -> None:
        """`leave`, from a signal handler or another thread."""
        self.leaving = True
        if self._loop is not None and not self._loop.is_closed():  # in one that is closed nobody waits
            self._loop.call_soon_threadsafe(self.leave)

    def leave(self) -> None:
        """Let all who wait go."""
        self.leaving = True
        for watch in self._watches:
            watch.stirred.set()

    async def _ask(self) -> None:
        away = False
        while self._watches and not self.leaving:
            hungry = [watch for watch in self._watches if not watch.news]
            if not hungry:  # all of them are still writing to slow callers
                await asyncio.sleep(BLOCK_S)
                continue
            cursors: dict[str, str] = {}
            for watch in hungry:
                cursors[watch.job_id] = min(cursors.get(watch.job_id, watch.known), watch.known, key=int)
            try:
                news = await to_thread.run_sync(self.ledger.follow, cursors, BLOCK_S, limiter=self._thread)
                away = False
            except RedisError as error:
                if not away:
                    _LOG.warning("redis failed", exception=type(error).__name__)
                away = True
                await asyncio.sleep(AWAY_S)
                continue
            for watch in hungry:
                watch.news = [event for event in news.get(watch.job_id, ()) if int(event.id) > int(watch.known)]
                if watch.news:
                    watch.stirred.set()


async def stream(
    watcher: Watcher,
    job_id: str,
    known: int,
    *,
    missed: bool,
    body: Callable[[], Awaitable[str]],
    allowed: Callable[[], Awaitable[object]],
) -> AsyncGenerator[str]:
    """The job's events after number `known` as text/event-stream, up to the one that ends it.

    Args:
        missed: some before it were not told, and are no longer kept.
        body: the job's body as it is now, as JSON, for who has missed events.
        allowed: raises a `Problem` once the caller may not listen any more, or there is nothing to listen to.
    """
    yield "retry: 1000\n\n"
    if missed:
        yield _text(known, "reset", await body())
    checked_at = said_at = time.monotonic()
    with watcher.watch(job_id, str(known)) as watch:
        while not watcher.leaving:
            events = await watch.next(CHECK_S)
            now = time.monotonic()
            if now - checked_at >= CHECK_S:
                checked_at = now
                if not await _holds(allowed):
                    return
            if events and int(events[0].id) > known + 1:
                yield _text(int(events[0].id) - 1, "reset", await body())
            if events:
                known, said_at = int(events[-1].id), now
                yield "".join(_text(event.id, event.kind, event.data) for event in events)
                if any(_ends(event) for event in events):
                    return
            elif now - said_at >= HEARTBEAT_S:
                said_at = now
                yield ": still here\n\n"


async def _holds(allowed: Callable[[], Awaitable[object]]) -> bool:
    """Whether the caller may go on listening; while Redis is away nobody can tell, and nothing is told either."""
    try:
        await allowed()
    except Problem:
        return False
    except RedisError:
        return True
    return True


def _ends(event: Event) -> bool:
    return event.kind == "status" and JobStatus(json.loads(event.data)["status"]).terminal


def _text(number: int | str, kind: str, data: str) -> str:
    return f"id: {number}\nevent: {kind}\ndata: {data}\n\n"
