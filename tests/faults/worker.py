"""A worker process as in production, around a stand-in pipeline; it notes what the ledger answers.

    python -m tests.faults.worker

`FAULTS_HISTORY` is the file of the history, `FAULTS_VARIANT` one of `VARIANTS`, `FAULTS_STEP_S` a step's seconds.
Failpoints are armed from `DREAMSERVE_FAILPOINTS` at start and from lines on standard input. Only this file does that.
"""

from __future__ import annotations

import hashlib
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import redis
from prometheus_client import CollectorRegistry

from tests.faults.history import History
from tests.workers.standin import Run, StandinPipeline
from workers import failpoints
from workers.artifacts import ArtifactStore
from workers.books import scripts as ledger_scripts
from workers.inference.runner import JobRunner
from workers.inference.turns import Turns
from workers.inference.worker import open_station
from workers.inference.works import Work
from workers.jobs import CUSTOMIZE, CustomizeJob, JobResult, Progress
from workers.ledger import Ledger
from workers.process import WorkerProcess
from workers.settings import WorkerSettings
from workers.telemetry.logs import configure_logging

POISONED_STEP = 20
_GUARDS = (
    "if not holds(id, token) then return 0 end\n",
    "if status == to then return 1 end\n",
    "if status ~= 'running' then return 0 end\n",
)


class WitnessLedger(Ledger[CustomizeJob, Progress, JobResult]):
    """The ledger, its claims and commits noted."""

    history: History

    def claim(self, job_id: str, worker: str, *, waits: bool = False) -> int | None:
        token = super().claim(job_id, worker, waits=waits)
        if token is not None:
            self.history.note("claim", job=job_id, token=token, pid=os.getpid())
        return token

    def commit(self, job_id: str, token: int, result: JobResult) -> bool:
        self.history.note("commit", job=job_id, token=token, pid=os.getpid())
        taken = super().commit(job_id, token, result)
        self.history.note("commit", job=job_id, token=token, pid=os.getpid(), taken=taken)
        return taken


class UnfencedLedger(WitnessLedger):
    """Control: whoever ends a job is believed."""

    def __init__(self, client: redis.Redis, *arguments: Any, **options: Any) -> None:
        super().__init__(client, *arguments, **options)
        self._end = client.register_script(unfenced(ledger_scripts.END))


class ForgetfulLedger(WitnessLedger):
    """Control: nobody takes back what a lost worker held."""

    def reap(self) -> list[str]:
        return []


class LateStore(ArtifactStore):
    """Control: pictures are written once their job is committed."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self._late: dict[str, bytes] = {}

    def publish(self, name: str, data: bytes) -> str:
        self._late[name] = data
        return hashlib.sha256(data).hexdigest()

    def write_late(self, job_id: str) -> None:
        for name in [name for name in self._late if name.startswith(f"{job_id}.")]:
            super().publish(name, self._late.pop(name))


class HastyLedger(WitnessLedger):
    """Control: commits before the picture is there."""

    store: LateStore

    def commit(self, job_id: str, token: int, result: JobResult) -> bool:
        taken = super().commit(job_id, token, result)
        self.store.write_late(job_id)
        return taken


class Crowd(Turns):
    """Control: whatever it did to its workers, a job goes on beside any other."""

    def next(self, at_work: Sequence[Work]) -> Work | None:  # noqa: ARG002
        return super().next(())


class CrowdedRunner(JobRunner):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._turns = Crowd(self.settings.jobs_in_hand)


VARIANTS: dict[str, type[WitnessLedger]] = {
    "product": WitnessLedger,
    "crowded": WitnessLedger,
    "unfenced": UnfencedLedger,
    "hasty": HastyLedger,
    "forgetful": ForgetfulLedger,
}


def step(run: Run) -> None:
    """Take a little time; a job that asks for poison takes the process with it, once others can be beside it."""
    if "poison" in run.request.prompt and run.step == POISONED_STEP:
        os._exit(9)
    time.sleep(float(os.environ["FAULTS_STEP_S"]))


def unfenced(script: str) -> str:
    """The script without its guards."""
    for guard in _GUARDS:
        assert script.count(guard) == 1, "the control no longer fits the script"
        script = script.replace(guard, "")
    return script


def main() -> None:
    """Serve until stopped."""
    settings = WorkerSettings()
    configure_logging(settings.log_level)
    variant = os.environ["FAULTS_VARIANT"]
    kind = VARIANTS[variant]
    store = LateStore(settings.artifact_root) if kind is HastyLedger else ArtifactStore(settings.artifact_root)
    history = History(Path(os.environ["FAULTS_HISTORY"]))

    def open_ledger(client: redis.Redis) -> WitnessLedger:
        ledger = kind(client, CUSTOMIZE, lease_s=settings.lease_s, tenant_window=settings.tenant_window)
        ledger.history = history
        if isinstance(ledger, HastyLedger) and isinstance(store, LateStore):
            ledger.store = store
        return ledger

    station = replace(open_station(settings), open_ledger=open_ledger)

    def load(name: str) -> tuple[JobRunner, dict[str, str]]:
        ledger = open_ledger(station.connect())
        runner = CrowdedRunner if variant == "crowded" else JobRunner
        return runner(StandinPipeline(step), ledger, store, settings, name), {}

    failpoints.arm(os.environ.get("DREAMSERVE_FAILPOINTS", ""))
    threading.Thread(target=_listen, args=(failpoints.arm,), daemon=True).start()
    WorkerProcess(station, {}, settings, CollectorRegistry()).run(load, burst=False)


def _listen(arm: Callable[[str], None]) -> None:
    for line in sys.stdin:
        arm(line.strip())


if __name__ == "__main__":
    main()
