"""What callers may count on beyond the invariants, each tried on real worker processes and then judged by its history.

Cancels at random moments, workers that are asked to leave under load, workers that share a line and come and go, and a
tenant that floods it.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count, pairwise
from pathlib import Path

from tests.faults.campaign import conclude
from tests.faults.checker import check
from tests.faults.clients import HEIGHT, WIDTH, WINDOW, count_ended, seen
from tests.faults.crew import Crew
from tests.faults.history import History
from tests.waiting import wait_for
from workers import queues
from workers.jobs import CustomizeJob, CustomizeRecord, JobStatus, Sampling

STEPS = 12
"""Of each job here; one picture each."""
QUEUED_S = 0.1
"""A cancel of a job that waits takes no longer."""


@dataclass(frozen=True, slots=True)
class Tried:
    """`figures` by name; `broken` says which promises were not kept."""

    name: str
    figures: dict[str, float | str]
    broken: tuple[str, ...]


class Line:
    """Jobs for a crew, one after the other."""

    def __init__(self, crew: Crew, seed: int) -> None:
        self.crew = crew
        self.draw = random.Random(f"promises {seed}")
        self.open: list[str] = []
        self._numbers = count()

    def send(self, tenant: str = "a") -> str:
        """One more job; its id."""
        number = next(self._numbers)
        sampling = Sampling(WIDTH, HEIGHT, STEPS, 4.5, 4.5, self.draw.randrange(2**64))
        job = CustomizeJob(f"job_{number}", "standin", f"toy {number}", "", (), sampling, tenant=tenant)
        self.crew.history.note("submit", job=job.id)
        queues.ring_accepted(self.crew.ledger, self.crew.ledger.accept(job))
        self.crew.history.note("accepted", job=job.id)
        self.open.append(job.id)
        return job.id

    def fill(self, waiting: int) -> None:
        """So many are open, of those that this has sent."""
        self.open = [job_id for job_id in self.open if not self.record(job_id).status.terminal]
        while len(self.open) < waiting:
            self.send()

    def record(self, job_id: str) -> CustomizeRecord:
        """As it is now."""
        record = self.crew.ledger.get(job_id)
        assert record is not None, job_id
        return record

    def wait(self, job_id: str) -> CustomizeRecord:
        """The record once it has ended."""
        while not (record := self.record(job_id)).status.terminal:
            time.sleep(0.001)
        return record

    def empty(self) -> None:
        """All that was sent has ended."""

        def done() -> bool:
            self.crew.tend()
            self.fill(0)
            return not self.open

        wait_for(done, "the last jobs")


def try_cancels(home: Path, number: int, seed: int = 0) -> Tried:
    """Cancels at random moments: a job that waits is canceled at once, one that runs makes one step more at most."""
    waited: list[float] = []
    ran: list[float] = []
    steps: list[int] = []
    canceled: set[str] = set()
    with trial(home, seed, size=2, step_s=0.003) as line:
        while len(canceled) < number:
            line.crew.tend()
            line.fill(24)
            time.sleep(line.draw.uniform(0, 0.03))
            running = [job_id for job_id in line.open if line.record(job_id).progress is not None]
            job_id = line.draw.choice(running if running and line.draw.random() < 0.6 else line.open)
            began = time.monotonic()
            answer = line.crew.ledger.cancel(job_id)
            answered = time.monotonic()
            assert answer is not None
            line.crew.history.note("cancel", **seen(answer))
            end = line.wait(job_id)
            if answer.status is JobStatus.CANCELED:
                waited.append(answered - began)
            elif end.status is JobStatus.CANCELED:
                ran.append(time.monotonic() - began)
                steps.append(steps_of(end) - steps_of(answer))
            if end.status is JobStatus.CANCELED:
                canceled.add(job_id)
        line.empty()
        ends = {job_id: line.record(job_id).status for job_id in canceled}
    broken = violations(home)
    broken += [f"{job_id} was canceled and is {end}" for job_id, end in ends.items() if end is not JobStatus.CANCELED]
    broken += [f"a running job made {made} steps more" for made in steps if made > 1]
    broken += [f"a waiting job took {seconds:.3f} s" for seconds in waited if seconds > QUEUED_S]
    figures = spread("waiting, ms", waited) | spread("running, ms", ran)
    return Tried(f"{number} cancels", figures | {"most steps after": max(steps, default=0)}, tuple(broken))


def try_leaving(home: Path, number: int, seed: int = 0) -> Tried:
    """Workers are asked to leave under load, one after the other: nothing fails, and no attempt is charged."""
    with trial(home, seed, size=3, step_s=0.003) as line:
        for _ in range(number):
            wait_for(lambda: tended(line, 24) and len(line.crew.ready()) >= 2, "two ready workers")
            leaver = line.draw.choice(line.crew.ready())
            time.sleep(line.draw.uniform(0, 0.05))
            leaver.process.terminate()
            wait_for(lambda leaver=leaver: tended(line, 24) and leaver not in line.crew.members, "it to leave")
        line.empty()
    finals = [event for event in History(home / "history.jsonl").read() if event["event"] == "final"]
    ends, attempts = Counter(event["status"] for event in finals), Counter(event["attempt"] for event in finals)
    broken = violations(home)
    broken += [f"{number} jobs {status}" for status, number in ends.items() if status != "succeeded"]
    broken += [f"{number} jobs in attempt {attempt}" for attempt, number in attempts.items() if attempt != 1]
    codes = Counter(event["code"] for event in History(home / "history.jsonl").read() if event["event"] == "exit")
    broken += [f"{number} workers left with {code}" for code, number in codes.items() if code]
    return Tried(f"{number} SIGTERMs", {"jobs": len(finals), "failed": ends["failed"]}, tuple(broken))


def try_sharing(home: Path, number: int, seed: int = 0) -> Tried:
    """Two workers share a line; a third joins and leaves: all have their part, and the line never stands still."""
    with trial(home, seed, size=2, step_s=0.003) as line:
        wait_for(lambda: tended(line, 0) and len(line.crew.ready()) == 2, "two ready workers")
        pair = {member.pid for member in line.crew.members}
        _run_for(line, number)
        line.crew.size = 3
        line.crew.tend()
        (third,) = [member for member in line.crew.members if member.pid not in pair]
        wait_for(lambda: tended(line, 40) and third in line.crew.ready(), "the third to be ready")
        joined = time.monotonic()
        _run_for(line, number)
        line.crew.size = 2
        third.process.terminate()
        _run_for(line, number)
        line.empty()
    events = History(home / "history.jsonl").read()
    commits = [event for event in events if event["event"] == "commit" and event.get("taken")]
    both = Counter(event["pid"] for event in commits if event["at"] < joined)
    ready = commits[0]["at"]
    gaps = [after["at"] - before["at"] for before, after in pairwise(commits) if before["at"] >= ready]
    share = min(both[pid] for pid in pair) / sum(both.values())
    joined_jobs = sum(event["pid"] == third.pid for event in commits)
    finals = [event for event in events if event["event"] == "final"]
    broken = violations(home)
    broken += [f"the smaller share of two workers is {share:.2f}"] if share < 0.35 else []
    broken += ["the third did nothing"] if joined_jobs < number // 10 else []
    broken += [f"{event['job']} is {event['status']}" for event in finals if event["status"] != "succeeded"]
    broken += [f"{event['job']} needed {event['attempt']}" for event in finals if event["attempt"] != 1]
    figures = {"smaller share": round(share, 3), "of the third": joined_jobs, "longest gap, ms": 1e3 * max(gaps)}
    return Tried("sharing", figures, tuple(broken))


def try_flood(home: Path, number: int, seed: int = 0, window: int = WINDOW) -> Tried:
    """One tenant sends very many jobs, then another a single one, which waits for one window of them at most."""
    with trial(home, seed, size=1, step_s=0.001, window=window) as line:
        for _ in range(number):
            line.send("flood")
        wait_for(lambda: tended(line, 0) and count_ended(line.crew.ledger) >= number // 10, "the line to move")
        before = count_ended(line.crew.ledger)
        single = line.send("other")
        line.wait(single)
        between = count_ended(line.crew.ledger) - before - 1
        line.empty()
    broken = violations(home)
    broken += [f"{between} jobs of the flood went before it"] if between > WINDOW else []
    return Tried(f"a flood of {number}", {"went before": between, "window": window}, tuple(broken))


@contextmanager
def trial(home: Path, seed: int, *, size: int, step_s: float, window: int = WINDOW) -> Generator[Line]:
    """A crew with a line, and in the end the history of both."""
    history = History(home / "history.jsonl")
    history.note("begin", seed=seed)
    with Crew(home, history, size=size, lease_s=10.0, step_s=step_s, window=window) as crew:
        yield Line(crew, seed)
        conclude(crew)


def violations(home: Path) -> list[str]:
    """What the checker says of the history."""
    verdict = check(History(home / "history.jsonl").read())
    return [f"{one.promise} {one.job}: {one.says}" for one in verdict.violations]


def tended(line: Line, waiting: int) -> bool:
    """After a round: workers replaced, the line filled up."""
    line.crew.tend()
    if waiting:
        line.fill(waiting)
    return True


def steps_of(record: CustomizeRecord) -> int:
    """Made, as far as is told."""
    return record.progress.step if record.progress else 0


def spread(name: str, seconds: list[float]) -> dict[str, float | str]:
    """Number, median, 99 of 100, longest, in milliseconds."""
    if not seconds:
        return {name: "none"}
    ordered = [1e3 * one for one in sorted(seconds)]
    middle, high = ordered[len(ordered) // 2], ordered[int(0.99 * (len(ordered) - 1))]
    return {name: f"n {len(ordered)}, median {middle:.1f}, p99 {high:.1f}, longest {ordered[-1]:.1f}"}


def described(tried: Tried) -> str:
    """For a terminal."""
    lines = [tried.name, *(f"  {name:<20}{value}" for name, value in tried.figures.items())]
    return "\n".join(lines + [f"  BROKEN: {what}" for what in tried.broken[:20]])


def _run_for(line: Line, number: int) -> None:
    """Let so many jobs end, the line always full."""
    target = count_ended(line.crew.ledger) + number
    wait_for(lambda: tended(line, 40) and count_ended(line.crew.ledger) >= target, "jobs to end")
