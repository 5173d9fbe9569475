"""A worker process around one runner: its signals, its card, its deliveries and its way back to Redis.

    start ─▶ announce ─▶ load ─▶ RQ's loop: delivery ─▶ run(job) ─▶ … until a signal, Redis away or not

What kind of jobs it runs is the runner's affair.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from types import FrameType
from typing import Any, Protocol

import redis
import structlog
from prometheus_client import CollectorRegistry
from redis.exceptions import RedisError
from rq.exceptions import StopRequested

from workers import queues
from workers.caretaker import Caretaker, Holder
from workers.delivery import DeliveryWorker
from workers.jobs import AnyKind
from workers.ledger import Ledger
from workers.redis_process import find_redis
from workers.settings import QueueSettings
from workers.telemetry.exposition import PortTakenError, open_exposition

_LOG = structlog.stdlib.get_logger("workers.process")


class ConfigurationError(Exception):
    """The environment does not say what a worker needs; the message names the remedy and holds no secret."""


class BrokenRunnerError(Exception):
    """The runner's device is lost: another process has to go on."""


class Runner(Holder, Protocol):
    """Runs claimed jobs of one kind. `broken`: it cannot go on in this process."""

    @property
    def broken(self) -> bool: ...

    def wait_for_room(self, timeout_s: float) -> bool:
        """Whether another job may be delivered, now or within this time."""
        ...

    def run(self, job_id: str) -> None:
        """Claim a job and bring it to an end, now or later; nothing if it cannot be claimed."""
        ...

    def wait(self) -> object:
        """Until no job is in hand."""
        ...

    def stop(self) -> None:
        """The process is asked to leave; called once, from a signal handler."""
        ...

    def close(self) -> None:
        """The process leaves: end what has begun, hand back the rest."""
        ...


_RUNNER: ContextVar[Runner] = ContextVar("runner")
"""The hot runner of this process; RQ calls functions, not objects."""


def run_delivered(job_id: str) -> None:
    """What every delivered function does."""
    _RUNNER.get().run(job_id)


@dataclass(frozen=True, slots=True)
class Station:
    """Where a worker process works.

    Attributes:
        open_ledger: the ledger of its kind over a client.
        stall_s: a job without any progress for so long gives up its lease.
        sweep: clears what expired jobs have left, now and then, by the ledger it is given.
    """

    url: str
    kind: AnyKind
    open_ledger: Callable[[redis.Redis], Ledger[Any, Any, Any]]
    stall_s: float
    sweep: Callable[[Ledger[Any, Any, Any]], object]

    def connect(self) -> redis.Redis:
        """A client of one's own."""
        return queues.connect(self.url, timeout_s=3.0)


class WorkerProcess:
    """One worker process.

    Args:
        card: what it announces beside its state.
        registry: what it counts.
    """

    def __init__(
        self, station: Station, card: dict[str, Any], settings: QueueSettings, registry: CollectorRegistry
    ) -> None:
        self.station = station
        self.settings = settings
        self.registry = registry
        # A container that starts again has host name and process number as before: RQ would take it for the old one.
        self.name = f"{socket.gethostname()}.{secrets.token_hex(3)}.{os.getpid()}"
        self.stop = threading.Event()
        self.card: dict[str, Any] = {"pid": os.getpid(), **card}
        self.runner: Runner | None = None

    def run(self, load: Callable[[str], tuple[Runner, dict[str, Any]]], *, burst: bool) -> None:
        """Announce, load, serve until stopped.

        Args:
            load: given the process' name, makes the runner and what to add to the card; its errors pass.
            burst: end when no job is left.

        Raises:
            ConfigurationError: its port for metrics is taken.
        """
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)
        client = self.station.connect()
        ledger = self.station.open_ledger(client)
        caretaker = Caretaker(
            client,
            self.station.kind,
            ledger,
            self.name,
            card=lambda: {**self.card, "state": self.state()},
            holder=lambda: self.runner,
            stall_s=self.station.stall_s,
            sweep=lambda: self.station.sweep(ledger),
        )
        try:
            exposition = open_exposition(
                self.settings,
                self.registry,
                alive=lambda: self._failing(caretaker),
                ready=lambda: self._unready(caretaker),
            )
        except PortTakenError as error:
            raise ConfigurationError(str(error)) from error
        caretaker.start()
        try:
            runner, details = load(self.name)
            self.card |= details
            self.runner = runner
            _RUNNER.set(runner)
            _LOG.info("ready", **self.card)
            self._serve(caretaker, runner, burst=burst)
            runner.close()
            if runner.broken:
                raise BrokenRunnerError
        finally:
            caretaker.halt()
            if exposition is not None:
                exposition.close()

    def _failing(self, caretaker: Caretaker) -> Mapping[str, str]:
        """What only a new process mends."""
        failed: dict[str, str] = {}
        if self.runner is not None and self.runner.broken:
            failed["device"] = "lost"
        if caretaker.ident is not None and not caretaker.is_alive() and not self.stop.is_set():
            failed["caretaker"] = "ended"
        return failed

    def _unready(self, caretaker: Caretaker) -> Mapping[str, str]:
        """Why it takes no job now. Redis counts as away once leases may have lapsed."""
        failed = dict(self._failing(caretaker))
        if (state := self.state()) in ("loading", "stopping"):
            failed["model"] = state
        if time.monotonic() - caretaker.heard_at > self.settings.lease_s:
            failed["redis"] = "not heard of"
        return failed

    def state(self) -> str:
        """One word for the card."""
        if self.stop.is_set():
            return "stopping"
        if self.runner is None:
            return "loading"
        return "busy" if self.runner.claims else "ready"

    def _serve(self, caretaker: Caretaker, runner: Runner, *, burst: bool) -> None:
        """Let RQ's loop run; when it gives up because Redis is away, wait and begin anew, the runner hot."""
        life = 0
        while not (self.stop.is_set() or runner.broken):
            life += 1
            try:
                caretaker.announce()
                # A new name each time: RQ refuses one whose last life could not be signed off.
                client = queues.connect(self.station.url)
                worker = DeliveryWorker(client, self.station.kind, f"{self.name}.{life}", self.stop, runner)
                worker.work(burst=burst)
                if burst:
                    runner.wait()
                    return
            except (RedisError, StopRequested) as error:
                _LOG.warning("queue loop interrupted", exception=type(error).__name__)
            self.stop.wait(0.5)

    def _on_signal(self, signum: int, _frame: FrameType | None) -> None:
        """Let the runner end its job its own way, then leave. Loading is dropped; a second Ctrl-C does not wait."""
        if self.runner is None or (signum == signal.SIGINT and self.stop.is_set()):
            raise SystemExit(0 if self.runner is None else 130)
        if not self.stop.is_set():
            self.stop.set()
            self.runner.stop()


def find_url(settings: QueueSettings) -> str:
    """The configured Redis, or the private one of a service that runs on the same state directory.

    Raises:
        ConfigurationError: neither is there, or the URL is none.
    """
    url = settings.redis_url or find_redis(settings.state_dir)
    if url is None:
        raise ConfigurationError(
            f"no Redis: set DREAMSERVE_REDIS_URL, or start the service on {settings.state_dir} first"
        )
    try:
        queues.connect(url).close()
    except ValueError as error:
        raise ConfigurationError(f"DREAMSERVE_REDIS_URL: {error}") from error
    return url


def refuse(message: str, process: str = "worker") -> int:
    """Say in one line why the process cannot work; returns its exit code."""
    sys.stderr.write(f"dreamserve {process}: {message}\n")
    return 2
