"""The inference worker process: loads the model once, then runs one customize job after the other.

    python -m workers.inference [--burst]

Exit codes: 0 stopped by SIGTERM or SIGINT, or with `--burst` all done; 2 configuration or weights do not fit.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from contextvars import ContextVar
from types import FrameType
from typing import TYPE_CHECKING, Any

import structlog
from pydantic import ValidationError
from redis.exceptions import RedisError
from rq.exceptions import StopRequested

from model.errors import WeightsError
from workers import queues
from workers.artifacts import ArtifactStore
from workers.caretaker import Caretaker
from workers.delivery import DeliveryWorker
from workers.ledger import Ledger
from workers.logs import configure_logging
from workers.redis_process import find_redis
from workers.runner import HotPipeline, JobRunner
from workers.settings import WorkerSettings

if TYPE_CHECKING:
    from model.pipeline import Pipeline

_LOG = structlog.stdlib.get_logger("workers.inference")
_RUNNER: ContextVar[JobRunner] = ContextVar("runner")
"""The hot pipeline of this process; RQ calls functions, not objects."""

Load = Callable[[WorkerSettings], HotPipeline]


def customize(job_id: str) -> None:
    """Run one job: the only function that a delivery can name."""
    _RUNNER.get().run(job_id)


def load_pipeline(settings: WorkerSettings) -> Pipeline:
    """The configured model.

    Raises:
        WeightsError: it cannot be loaded.
    """
    from model import pipeline  # noqa: PLC0415 - torch, only in the process that runs the model

    return pipeline.load_pipeline(
        pipeline.ModelSource(
            base_model=settings.base_model,
            dreamo=settings.dreamo,
            fused=settings.fused,
            version=settings.version,
            turbo=settings.turbo,
            dtype=settings.dtype,
            device=settings.device,
            cutout=settings.cutout,
            faces=settings.faces,
        )
    )


class InferenceWorker:
    """One worker process: its signals, its card, its model and its way back to Redis.

    Args:
        url: of Redis.
    """

    def __init__(self, settings: WorkerSettings, url: str) -> None:
        self.settings = settings
        self.url = url
        self.name = f"{socket.gethostname()}.{os.getpid()}"
        self.stop = threading.Event()
        self.loaded = False
        self.card: dict[str, Any] = {"pid": os.getpid(), "model": settings.base_model}
        self.runner: JobRunner | None = None

    def run(self, load: Load, *, burst: bool) -> None:
        """Announce, load, serve until stopped.

        Raises:
            WeightsError: the model cannot be loaded.
        """
        self._install_signals()
        client = queues.connect(self.url, timeout_s=3.0)
        caretaker = Caretaker(
            client,
            self.settings,
            self.name,
            card=self._card,
            claim=lambda: self.runner.claim if self.runner else None,
        )
        caretaker.start()
        try:
            self._load(load)
            self._serve(caretaker, burst=burst)
        finally:
            caretaker.halt()

    def _load(self, load: Load) -> None:
        pipeline = load(self.settings)
        pipeline.warm()
        self.card |= {**pipeline.describe(), "model": pipeline.spec.name}
        self.runner = JobRunner(
            pipeline=pipeline,
            ledger=Ledger(
                queues.connect(self.url, timeout_s=3.0),
                job_ttl_s=self.settings.job_ttl_s,
                lease_s=self.settings.lease_s,
            ),
            store=ArtifactStore(self.settings.artifact_root),
            settings=self.settings,
            worker=self.name,
        )
        _RUNNER.set(self.runner)
        self.loaded = True
        _LOG.info("model loaded", **self.card)

    def _serve(self, caretaker: Caretaker, *, burst: bool) -> None:
        """Let RQ's loop run; when it gives up because Redis is away, wait and begin anew, the model hot."""
        life = 0
        while not self.stop.is_set():
            life += 1
            try:
                caretaker.announce()
                # A new name each time: RQ refuses one whose last life could not be signed off.
                worker = DeliveryWorker(queues.connect(self.url), f"{self.name}.{life}", self.stop)
                worker.work(burst=burst)
                if burst:
                    return
            except (RedisError, StopRequested) as error:
                _LOG.warning("queue loop interrupted", exception=type(error).__name__)
            self.stop.wait(0.5)

    def _card(self) -> dict[str, Any]:
        busy = self.runner is not None and self.runner.claim is not None
        state = "stopping" if self.stop.is_set() else "loading" if not self.loaded else "busy" if busy else "ready"
        return {**self.card, "state": state}

    def _install_signals(self) -> None:
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)

    def _on_signal(self, signum: int, _frame: FrameType | None) -> None:
        """Finish the running job, then leave. Nothing runs while loading; a second Ctrl-C does not wait."""
        if not self.loaded or (signum == signal.SIGINT and self.stop.is_set()):
            raise SystemExit(0 if not self.loaded else 130)
        self.stop.set()


def run_worker(settings: WorkerSettings, load: Load = load_pipeline, *, burst: bool = False) -> int:
    """Run a worker until it is stopped.

    Returns:
        The exit code.
    """
    configure_logging(settings.log_level)
    url = settings.redis_url or find_redis(settings.state_dir)
    if url is None:
        return _refuse(f"no Redis: set DREAMSERVE_REDIS_URL, or start the service on {settings.state_dir} first")
    try:
        queues.connect(url).close()
    except ValueError as error:
        return _refuse(f"DREAMSERVE_REDIS_URL: {error}")
    try:
        InferenceWorker(settings, url).run(load, burst=burst)
    except WeightsError as error:
        return _refuse(f"the model cannot be loaded ({error.code}): {error.message}")
    return 0


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m workers.inference", description="Run customize jobs.")
    parser.add_argument("--burst", action="store_true", help="end when no job is left")
    burst: bool = parser.parse_args(arguments).burst
    try:
        settings = WorkerSettings()
    except ValidationError as error:
        return _refuse(describe_bad_settings(error))
    return run_worker(settings, burst=burst)


def describe_bad_settings(error: ValidationError) -> str:
    """One line that names each wrong variable, without its value: it may be a URL with a password."""
    return "; ".join(
        f"DREAMSERVE_{'_'.join(str(part) for part in item['loc']).upper()}: {item['msg']}"
        for item in error.errors(include_input=False, include_url=False, include_context=False)
    )


def _refuse(message: str) -> int:
    sys.stderr.write(f"dreamserve worker: {message}\n")
    return 2


if __name__ == "__main__":
    # RQ imports this module by name to find `customize`: what runs must be that module, not a second copy.
    from workers.inference import main as _main

    sys.exit(_main())
