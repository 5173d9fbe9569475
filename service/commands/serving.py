"""Everything on one machine: a private Redis, the gateway, its workers and the courier as one process tree."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Self

import httpx2
import uvicorn
from fastapi import FastAPI
from pydantic import ValidationError

from service.callers.auth import OPEN_TO_OTHERS, Auth, refuses_to_open
from service.callers.connections import Deadlines, allow_open_files, connections
from service.commands.process_tree import ProcessTree, Program, TreeFailedError
from service.gateway import Gateway
from service.settings import GatewaySettings
from workers import queues
from workers.redis_process import start_redis
from workers.settings import WorkerSettings, describe_bad_settings
from workers.tenants import TenantBook

WATCH_EVERY_S = 0.2
GRACE_S = 10.0
"""From SIGTERM until what has not ended is killed."""
TRAINING_GRACE_S = 120.0
"""The same for training workers: time for the step at hand and a checkpoint."""
_HAND_BACK_S = 4.0
"""Of a worker's time: until it has noticed, and for handing back what it cannot end."""
MAX_EARLY_RESTARTS = 3
"""Until everything was ready once, crashing this often is a mistake to be shown rather than weather to sit out."""


@dataclass(frozen=True, slots=True)
class Serving:
    """What to serve. Without `redis_url` a private Redis runs in `state_dir`; `port` 0 is any free one.

    `metrics_port`: the gateway's; workers, training workers and the courier get the next ones, in this order.
    `grace_s`: time to end when asked to; training workers have `TRAINING_GRACE_S`.
    """

    host: str
    port: int
    workers: int
    state_dir: Path
    redis_url: str | None
    training_workers: int = 0
    auth: Auth = "auto"
    metrics_port: int | None = None
    grace_s: float = GRACE_S
    worker_command: tuple[str, ...] = (sys.executable, "-m", "workers.inference")


def serve(serving: Serving, *, report: Callable[[str], None], ready: Callable[[str], None]) -> None:
    """Run until SIGINT or SIGTERM; nothing is left running on return. A second SIGINT does not wait for anybody.

    Args:
        report: told what happens to the children.
        ready: told the address, once, when every worker has loaded its model.

    Raises:
        OpenToOthersError: others could connect, and there are no keys.
        TreeFailedError: a child cannot run as configured.
        RedisUnavailableError: no private Redis can be started.
        OSError: the address is taken or the state directory cannot be made.
    """
    asked = _Asked()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, asked.hear)
    serving.state_dir.mkdir(parents=True, exist_ok=True)
    with _listen(serving.host, serving.port) as listener, _Store(serving, report) as store:
        refuse_open(serving.auth, serving.host, store.url)
        readiness = _Readiness(_address(listener), serving.workers, ready)
        tree = ProcessTree(_programs(serving, listener, store.url), report=report)
        try:
            tree.start()
            while not asked.to_stop:
                store.watch()
                tree.watch()
                readiness.look()
                if not readiness.told and tree.restarts >= MAX_EARLY_RESTARTS:
                    raise TreeFailedError("it ended too often before it was ready (its messages are above)")
                time.sleep(WATCH_EVERY_S)
        finally:
            tree.stop(serving.grace_s, lambda: asked.to_hurry)


def run_gateway(application: FastAPI, host: str, port: int, fd: int | None) -> None:
    """Serve HTTP until SIGINT or SIGTERM, on an inherited listening socket if `fd` names one."""
    allow_open_files()
    sockets = None if fd is None else [socket.socket(fileno=fd)]
    settings: GatewaySettings = application.state.gateway.settings
    deadlines = Deadlines(body=settings.body_timeout_s + 10)
    _Server(http_config(application, host, port, deadlines)).run(sockets=sockets)


class _Asked:
    """What signals have asked for. Plain values: a handler that takes a lock may wait for the code it interrupted."""

    def __init__(self) -> None:
        self.to_stop = self.to_hurry = False

    def hear(self, number: int, _frame: FrameType | None) -> None:
        self.to_hurry = self.to_hurry or (self.to_stop and number == signal.SIGINT)
        self.to_stop = True


class _Server(uvicorn.Server):
    """Before its first answer it does what would stop all of them; asked to end, it answers on until others know."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        if isinstance(self.config.app, FastAPI):
            self.config.app.openapi()  # writes the document, which stands still for a tenth of a second
        gc.collect()
        gc.freeze()  # what was imported stays: looking through it for garbage stands still as long, again and again
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        if (gateway := self._gateway()) is not None:
            gateway.readiness.draining = True
            gateway.let_go()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        gateway = self._gateway()
        until = time.monotonic() + (gateway.settings.drain_s if gateway else 0.0)
        while time.monotonic() < until and not self.force_exit:
            await asyncio.sleep(0.05)
        await super().shutdown(sockets)

    def _gateway(self) -> Gateway | None:
        application = self.config.app
        return application.state.gateway if isinstance(application, FastAPI) else None


def http_config(
    application: FastAPI, host: str = "127.0.0.1", port: int = 0, deadlines: Deadlines | None = None
) -> uvicorn.Config:
    """How the gateway speaks HTTP."""
    return uvicorn.Config(
        application,
        host=host,
        port=port,
        http=connections(deadlines or Deadlines(), application.state.gateway.metrics.rejected),
        ws="none",
        log_config=None,  # the process' own format
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=5,
    )


class OpenToOthersError(Exception):
    """Others could connect, and there are no keys; the message says what to do."""


def refuse_open(auth: Auth, host: str, redis_url: str) -> None:
    """Make sure that nobody serves strangers unawares.

    Raises:
        OpenToOthersError: see there.
        redis.exceptions.RedisError: Redis is away.
    """
    with queues.connect(redis_url) as client:
        if refuses_to_open(auth, host, TenantBook(client)):
            raise OpenToOthersError(f"not serving on {host}: {OPEN_TO_OTHERS}")


class _Store:
    """The Redis that is used: the given one, or a private one, which is started again if it ends."""

    def __init__(self, serving: Serving, report: Callable[[str], None]) -> None:
        self._state_dir = serving.state_dir
        self._report = report
        self._private = None if serving.redis_url else start_redis(serving.state_dir)
        self.url = self._private.url if self._private else serving.redis_url or ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._private:
            self._private.stop()

    def watch(self) -> None:
        """Start the private Redis again on the same socket and data, if it has ended."""
        if self._private and self._private.process.poll() is not None:
            self._report(f"Redis ended with status {self._private.process.returncode}; starting it again")
            self._private.stop()
            self._private = start_redis(self._state_dir)


class _Readiness:
    """Asks the gateway until every worker is ready, then says so once."""

    def __init__(self, address: str, workers: int, ready: Callable[[str], None]) -> None:
        self._address = address
        self._workers = workers
        self._ready = ready
        self.told = False

    def look(self) -> None:
        if self.told:
            return
        try:
            answer = httpx2.get(f"{self._address}/readyz", timeout=1.0, trust_env=False)
        except httpx2.HTTPError:
            return
        if answer.status_code == 200 and answer.json()["workers_ready"] >= self._workers:
            self.told = True
            self._ready(self._address)


def _programs(serving: Serving, listener: socket.socket, redis_url: str) -> list[Program]:
    environment = {
        "DREAMSERVE_REDIS_URL": redis_url,
        "DREAMSERVE_STATE_DIR": str(serving.state_dir.resolve()),
    }
    gateway = Program(
        "gateway",
        (sys.executable, "-m", "service.cli", "gateway", "--host", serving.host, "--fd", str(listener.fileno())),
        environment,
        pass_fds=(listener.fileno(),),
    )
    # Several torch processes that each take all cores slow one another down many times over.
    threads: dict[str, str] = {}
    processes = serving.workers + serving.training_workers
    if processes > 1 and "OMP_NUM_THREADS" not in os.environ:
        threads["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // processes))
    workers = [
        Program(f"worker {number}", serving.worker_command, environment | threads | _worker_grace(serving))
        for number in range(1, serving.workers + 1)
    ]
    training = (sys.executable, "-m", "workers.training.worker")
    trainers = [
        Program(f"training worker {number}", training, environment | threads, grace_s=TRAINING_GRACE_S)
        for number in range(1, serving.training_workers + 1)
    ]
    courier = Program("courier", (sys.executable, "-m", "workers.courier"), environment)
    programs = [gateway, *workers, *trainers, courier]
    if not serving.metrics_port:
        return programs
    ports = [{"DREAMSERVE_METRICS_PORT": str(serving.metrics_port + number)} for number in range(len(programs))]
    return [
        replace(program, environment={**program.environment, **port})
        for program, port in zip(programs, ports, strict=True)
    ]


def _worker_grace(serving: Serving) -> dict[str, str]:
    """A worker's own grace, or what fits into ours: it hands back what it has begun before it would be killed.

    Raises:
        TreeFailedError: the workers' settings will not do.
    """
    try:
        configured = WorkerSettings().grace_s
    except ValidationError as error:
        raise TreeFailedError(describe_bad_settings(error)) from None
    return {"DREAMSERVE_GRACE_S": str(max(0.0, min(configured, serving.grace_s - _HAND_BACK_S)))}


def _listen(host: str, port: int) -> socket.socket:
    """Bound here and handed down: a restarted gateway keeps its port, and callers wait instead of failing."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=512)


def _address(listener: socket.socket) -> str:
    """Where to reach the listener from this machine."""
    bound: tuple[str, int] = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(bound[0], bound[0])  # noqa: S104 - read, not bound
    return f"http://[{host}]:{bound[1]}" if ":" in host else f"http://{host}:{bound[1]}"
