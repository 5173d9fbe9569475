"""The inference worker process: loads the model once, then runs customize jobs, many at once.

    python -m workers.inference [--burst]

Exit codes: 0 stopped by SIGTERM or SIGINT, or with `--burst` all done; 2 configuration or weights do not fit; 3 the
device is lost, and a new process may do better.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from model.errors import WeightsError
from workers.artifacts import ArtifactStore
from workers.inference.metrics import WorkerMetrics
from workers.inference.runner import HotPipeline, JobRunner
from workers.jobs import CUSTOMIZE
from workers.ledger import open_ledger
from workers.process import (
    BrokenRunnerError,
    ConfigurationError,
    Station,
    WorkerProcess,
    find_url,
    refuse,
    run_delivered,
)
from workers.settings import WorkerSettings, describe_bad_settings
from workers.telemetry.logs import configure_logging
from workers.telemetry.tracing import Tracing, open_tracing

if TYPE_CHECKING:
    from model.pipeline import Pipeline

Load = Callable[[WorkerSettings], HotPipeline]


def customize(job_id: str) -> None:
    """Run one job: the only function that a delivery can name."""
    run_delivered(job_id)


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
            compile=settings.compile,
            graphs=settings.graph_root,
            precision=settings.precision,
        )
    )


def run_worker(settings: WorkerSettings, load: Load = load_pipeline, *, burst: bool = False) -> int:
    """Run a worker until it is stopped.

    Returns:
        The exit code.
    """
    configure_logging(settings.log_level)
    metrics, tracing = WorkerMetrics.fresh(), open_tracing("worker")
    try:
        station = open_station(settings)
        WorkerProcess(station, {"model": Path(settings.base_model).name}, settings, metrics.registry).run(
            lambda name: _runner(settings, station, name, load, metrics, tracing), burst=burst
        )
    except ConfigurationError as error:
        return refuse(str(error))
    except WeightsError as error:
        return refuse(f"the model cannot be loaded ({error.code}): {error.message}")
    except BrokenRunnerError:
        return 3
    finally:
        tracing.flush()
    return 0


def open_station(settings: WorkerSettings) -> Station:
    """Where this worker works.

    Raises:
        ConfigurationError: no Redis, or a URL that is none.
    """
    store = ArtifactStore(settings.artifact_root)
    return Station(
        find_url(settings),
        CUSTOMIZE,
        lambda client: open_ledger(client, CUSTOMIZE, settings),
        settings.stall_s,
        lambda _: store.sweep(settings.artifact_ttl_s),
    )


def _runner(
    settings: WorkerSettings, station: Station, name: str, load: Load, metrics: WorkerMetrics, tracing: Tracing
) -> tuple[JobRunner, dict[str, Any]]:
    pipeline = load(settings)
    pipeline.warm()
    ledger = station.open_ledger(station.connect())
    store = ArtifactStore(settings.artifact_root)
    runner = JobRunner(pipeline, ledger, store, settings, name, metrics, tracing)
    return runner, {**pipeline.describe(), "model": pipeline.spec.name}


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m workers.inference", description="Run customize jobs.")
    parser.add_argument("--burst", action="store_true", help="end when no job is left")
    burst: bool = parser.parse_args(arguments).burst
    try:
        settings = WorkerSettings()
    except ValidationError as error:
        return refuse(describe_bad_settings(error))
    return run_worker(settings, burst=burst)
