"""Runners over a real Redis and store, around a stand-in pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis

from tests.workers.standin import StandinPipeline
from workers.artifacts import ArtifactStore
from workers.inference.runner import JobRunner
from workers.jobs import CUSTOMIZE
from workers.ledger import Ledger
from workers.settings import WorkerSettings

Make = Callable[..., JobRunner]


@pytest.fixture
def make_runner(client: redis.Redis, store: ArtifactStore) -> Iterator[Make]:
    """Runners on this pipeline; they are closed at the end."""
    made: list[JobRunner] = []

    def make(pipeline: StandinPipeline | None = None, **changes: Any) -> JobRunner:
        settings = WorkerSettings(**{"commit_patience_s": 5.0, "grace_s": 0.0, **changes})
        made.append(JobRunner(pipeline or StandinPipeline(), Ledger(client, CUSTOMIZE), store, settings, "w"))
        return made[-1]

    yield make
    for runner in made:
        runner.close()
