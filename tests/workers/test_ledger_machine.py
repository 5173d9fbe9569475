"""Random histories of the ledger against real Redis, held against a model in Python."""

from __future__ import annotations

from dataclasses import dataclass, field

import redis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from tests.workers.conftest import MakeJob
from tests.workers.ledgers import ERROR, RESULT, STEP, lapse, record
from workers.jobs import CUSTOMIZE, JobStatus
from workers.ledger import Ledger


@dataclass
class Expected:
    """What the model machine knows of one job."""

    status: JobStatus = JobStatus.QUEUED
    attempt: int = 1
    token: int | None = None
    canceling: bool = False
    ends: list[str] = field(default_factory=list[str])


class LedgerMachine(RuleBasedStateMachine):
    """Any sequence of calls by gateways, workers and zombies, checked against fifty lines of Python."""

    client: redis.Redis
    make_job: MakeJob
    jobs: Bundle[str] = Bundle("jobs")

    def __init__(self) -> None:
        super().__init__()
        self.client.flushall()
        self.ledger = Ledger(self.client, CUSTOMIZE)
        self.model: dict[str, Expected] = {}
        self.tokens: list[int] = [0]

    def _token(self, choice: int) -> int:
        """Any token ever given out, and one that never was."""
        return self.tokens[choice % len(self.tokens)]

    def _ends(self, job_id: str, status: JobStatus, token: int) -> bool:
        """Whether a worker's end is taken; keeps the books if so."""
        job = self.model[job_id]
        if job.token != token:
            return False
        if job.status is status:
            return True
        if job.status is not JobStatus.RUNNING or (status is JobStatus.CANCELED and not job.canceling):
            return False
        job.status = status
        job.ends.append(status)
        return True

    @rule(target=jobs, number=st.integers(0, 3))
    def accept(self, number: int) -> str:
        job_id = f"job_{number}"
        assert self.ledger.accept(self.make_job(job_id)) == (job_id not in self.model)
        self.model.setdefault(job_id, Expected())
        return job_id

    @rule(job_id=jobs)
    def claim(self, job_id: str) -> None:
        job = self.model[job_id]
        token = self.ledger.claim(job_id, "w")
        assert (token is not None) == (job.status is JobStatus.QUEUED)
        if token is not None:
            assert token > max(self.tokens), "tokens grow"
            self.tokens.append(token)
            job.status, job.token = JobStatus.RUNNING, token

    @rule(job_id=jobs, choice=st.integers(0, 50))
    def beat(self, job_id: str, choice: int) -> None:
        job, token = self.model[job_id], self._token(choice)
        holds = job.status is JobStatus.RUNNING and job.token == token
        expected = "lost" if not holds else "canceled" if job.canceling else "ok"
        assert self.ledger.beat(job_id, token, STEP) == expected

    @rule(job_id=jobs, choice=st.integers(0, 50))
    def commit(self, job_id: str, choice: int) -> None:
        token = self._token(choice)
        assert self.ledger.commit(job_id, token, RESULT) == self._ends(job_id, JobStatus.SUCCEEDED, token)

    @rule(job_id=jobs, choice=st.integers(0, 50))
    def fail(self, job_id: str, choice: int) -> None:
        token = self._token(choice)
        assert self.ledger.fail(job_id, token, ERROR) == self._ends(job_id, JobStatus.FAILED, token)

    @rule(job_id=jobs, choice=st.integers(0, 50))
    def release(self, job_id: str, choice: int) -> None:
        token = self._token(choice)
        taken = self._ends(job_id, JobStatus.CANCELED, token)
        assert self.ledger.release_canceled(job_id, token) == taken

    @rule(job_id=jobs, choice=st.integers(0, 50))
    def hand_back(self, job_id: str, choice: int) -> None:
        job, token = self.model[job_id], self._token(choice)
        holds = job.status is JobStatus.RUNNING and job.token == token
        assert self.ledger.hand_back(job_id, token) == holds
        if holds:
            job.token = None
            job.status = JobStatus.CANCELED if job.canceling else JobStatus.QUEUED
            if job.canceling:
                job.ends.append(job.status)

    @rule(job_id=jobs)
    def cancel(self, job_id: str) -> None:
        job = self.model[job_id]
        if job.status is JobStatus.QUEUED:
            job.status = JobStatus.CANCELED
            job.canceling = True
            job.ends.append(job.status)
        elif job.status is JobStatus.RUNNING:
            job.canceling = True
        answer = self.ledger.cancel(job_id)
        assert answer is not None and answer.status is job.status

    @rule(job_id=jobs)
    def lose_worker(self, job_id: str) -> None:
        job = self.model[job_id]
        if job.status is not JobStatus.RUNNING or job.token is None:
            return
        lapse(self.ledger, job_id, job.token)
        job.token = None
        if job.canceling:
            job.status = JobStatus.CANCELED
        elif job.attempt == 3:
            job.status = JobStatus.FAILED
        else:
            job.status = JobStatus.QUEUED
            job.attempt += 1
        if job.status.terminal:
            job.ends.append(job.status)
        assert self.ledger.reap() == ([job_id] if job.status is JobStatus.QUEUED else [])

    @invariant()
    def tells_the_same_story(self) -> None:
        """Records, line, leases and filters agree with the model; no job has ended twice."""
        for job_id, job in self.model.items():
            found = record(self.ledger, job_id)
            assert (found.status, found.attempt) == (job.status, job.attempt)
            assert (found.finished_at is not None) == job.status.terminal
            assert (found.result is not None) == (job.status is JobStatus.SUCCEEDED)
            assert len(job.ends) == int(job.status.terminal)
        for status in JobStatus:
            listed = {found.job.id for found in self.ledger.list(None, 10, status)[0]}
            assert listed == {job_id for job_id, job in self.model.items() if job.status is status}
        leases = self.client.zrange(f"{CUSTOMIZE.root}leases", 0, -1)
        held = {member.decode() for member in leases}  # pyright: ignore[reportGeneralTypeIssues]  # sync client
        assert held == {job_id for job_id, job in self.model.items() if job.status is JobStatus.RUNNING}


def test_any_sequence_of_calls(client: redis.Redis, make_job: MakeJob) -> None:
    """Terminal states never change, at most one end per job, stale tokens are refused, tokens grow."""
    machine = type("Machine", (LedgerMachine,), {"client": client, "make_job": staticmethod(make_job)})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=60,
            stateful_step_count=25,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
