"""One worker at a time fails at one point with a job in hand; and the same with a promise's mechanism taken out."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.faults.campaign import conclude
from tests.faults.checker import Verdict, check
from tests.faults.clients import count_ended, some_job
from tests.faults.crew import Crew, Member
from tests.faults.history import History
from tests.waiting import wait_for
from workers import queues
from workers.failpoints import POINTS
from workers.jobs import CUSTOMIZE

KILLS = tuple(f"{point}=kill" for point in POINTS)
STOPS = tuple(f"{point}=stop" for point in POINTS)
CONTROLS = {"unfenced": "before_commit=stop", "hasty": "before_file=kill", "forgetful": "step=kill"}
"""The fault that each variant without a mechanism must be caught by."""


@dataclass(frozen=True, slots=True)
class Drilled:
    """`caught`: drills whose job broke a promise; each drill is one worker that failed where it should."""

    drills: int
    caught: int
    verdict: Verdict


def run_drills(home: Path, plans: Sequence[str], *, variant: str = "product", lease_s: float, seed: int = 0) -> Drilled:
    """Drill by drill with two workers of a variant; the history lies in `home`/history.jsonl."""
    history = History(home / "history.jsonl")
    history.note("begin", plans=list(plans), variant=variant, seed=seed)
    with Crew(home, history, size=2, lease_s=lease_s, variant=variant) as crew:
        drilling = _Drilling(crew, random.Random(seed))
        jobs: list[str] = []
        for plan in plans:
            jobs.append(drilling.drill(plan))
            if variant != "forgetful":
                drilling.wait_for_ends()
        conclude(crew)
    verdict = check(history.read())
    guilty = {violation.job for violation in verdict.violations}
    return Drilled(len(jobs), sum(job in guilty for job in jobs), verdict)


class _Drilling:
    def __init__(self, crew: Crew, draw: random.Random) -> None:
        self.crew = crew
        self.draw = draw
        self.jobs = 0

    def drill(self, plan: str) -> str:
        """Let one worker fail; the id of the job it had in hand."""
        victim = wait_for(self._ready, "a ready worker")
        self.crew.arm(victim, plan)
        while True:
            ends = count_ended(self.crew.ledger)
            job_id = self._send()
            wait_for(lambda ends=ends: self._failed(victim) or count_ended(self.crew.ledger) > ends, "an end")
            if self._holder(job_id) == victim.pid:
                wait_for(lambda: self._failed(victim), "the fault")
            if self._failed(victim):
                break
        if victim in self.crew.members:
            victim.resume_at = math.inf
            self.wait_for_ends()  # by the other
            self.crew.resume(victim)
        return job_id

    def wait_for_ends(self) -> None:
        """All jobs sent have ended."""
        wait_for(lambda: self._tended() and count_ended(self.crew.ledger) >= self.jobs, "all ends")

    def _send(self) -> str:
        job = some_job(self.jobs, self.draw)
        self.jobs += 1
        self.crew.history.note("submit", job=job.id)
        accepted = self.crew.ledger.accept(job)
        assert accepted.outcome == "new"
        queues.ring_accepted(self.crew.ledger, accepted)
        self.crew.history.note("accepted", job=job.id)
        return job.id

    def _holder(self, job_id: str) -> int:
        """The worker that claimed a job last; 0 if it waits for one."""
        name = self.crew.client.hget(f"{CUSTOMIZE.root}job:{job_id}", "worker")
        return int(str(name, "ascii").rpartition(".")[2]) if name else 0

    def _ready(self) -> Member | None:
        self.crew.tend()
        ready = self.crew.ready()
        return self.draw.choice(ready) if ready else None

    def _failed(self, victim: Member) -> bool:
        self.crew.tend()
        time.sleep(0.005)
        return victim not in self.crew.members or victim.resume_at is not None

    def _tended(self) -> bool:
        self.crew.tend()
        time.sleep(0.005)
        return True
