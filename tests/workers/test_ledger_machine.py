"""Random histories of the ledger against real Redis, held against a model in Python."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model.roles import Role
from tests.workers.conftest import MakeJob
from tests.workers.ledgers import ERROR, RESULT, STEP, boxed, make_due, record
from workers.jobs import CUSTOMIZE, CustomizeJob, JobStatus, ReferenceInput, Webhook
from workers.ledger import Ledger

WINDOW = 2
COST_S = 1.5
HOOKS = (None, Webhook("https://x.example"), Webhook("https://y.example", ("status",)))
ENDS = (*[JobStatus.SUCCEEDED] * 3, *[JobStatus.FAILED] * 2, JobStatus.CANCELED, JobStatus.EXPIRED, JobStatus.SUCCEEDED)
HURRIES = (None, None, None, None, 0.0, 3600.0, 3600.0, 3600.0)
URL = ReferenceInput(1, Role.SUBJECT, "", url="https://z.example/toy.png")


@dataclass
class Expected:
    """What the model knows of one job. `hurry`: its deadline; `late`: that has passed; `place`: where it waits."""

    job: CustomizeJob
    hurry: float | None
    late: bool
    place: str
    status: JobStatus = JobStatus.QUEUED
    attempt: int = 1
    token: int | None = None
    handed: int | None = None
    fetch_token: int | None = None
    fetched: bool = False
    fetches: int = 0
    canceling: bool = False
    waits: bool = False
    stepped: bool = False
    deleted: bool = False
    story: list[list[object]] = field(default_factory=list[list[object]])
    untold: list[tuple[int, str]] = field(default_factory=list[tuple[int, str]])

    def move(self, status: JobStatus) -> None:
        self.status = status
        self.story.append([status, self.attempt])
        hook = self.job.webhook
        if hook is not None and (status.terminal or "status" in hook.events):
            kind = "terminal" if status.terminal and "terminal" in hook.events else "status"
            self.untold.append((len(self.story), kind))


class Model:
    """The ledger in plain Python."""

    def __init__(self) -> None:
        self.jobs: dict[str, Expected] = {}
        self.line: dict[str, list[str]] = {}
        self.window: dict[str, set[str]] = {}
        self.unrung: set[str] = set()

    def open(self) -> list[Expected]:
        return [job for job in self.jobs.values() if not job.status.terminal]

    def enter(self, job: Expected) -> None:
        """Into the line, in the order of acceptance, and out of it as far as there is room."""
        order = list(self.jobs)
        line = self.line.setdefault(job.job.tenant, [])
        line.append(job.job.id)
        line.sort(key=order.index)
        self.let_in(job.job.tenant)

    def let_in(self, tenant: str) -> None:
        line, window = self.line.setdefault(tenant, []), self.window.setdefault(tenant, set())
        while line and len(window) < WINDOW:
            job_id = line.pop(0)
            window.add(job_id)
            self.unrung.add(job_id)
            self.jobs[job_id].place = "window"

    def end(self, job: Expected, status: JobStatus) -> None:
        job.move(status)
        job_id, tenant = job.job.id, job.job.tenant
        if job_id in self.line.get(tenant, []):
            self.line[tenant].remove(job_id)
        self.window.setdefault(tenant, set()).discard(job_id)
        self.unrung.discard(job_id)
        self.let_in(tenant)


class Machine:
    """Calls by gateways, couriers, workers and zombies, each checked against the model.

    Every call takes the id of a job that may never have been accepted, and two numbers to choose by.
    """

    def __init__(self, client: redis.Redis, make_job: MakeJob) -> None:
        client.flushall()
        self.client = client
        self.make_job = make_job
        self.ledger = Ledger(self.client, CUSTOMIZE, tenant_window=WINDOW)
        self.model = Model()
        self.tokens: list[int] = [0]

    def _token(self, job_id: str, choice: int) -> int:
        """Mostly the job's own; else any token ever given out, or one that never was."""
        job = self.model.jobs[job_id]
        own = job.token or (job.handed if choice % 2 else None) or job.fetch_token
        return own if own is not None and choice < 40 else self.tokens[choice % len(self.tokens)]

    def _holds(self, job: Expected, token: int) -> bool:
        return job.status is JobStatus.RUNNING and job.token == token

    def accept(self, job_id: str, choice: int, flavour: int) -> None:  # noqa: ARG002
        number, hurry = int(job_id[4:]), HURRIES[flavour % len(HURRIES)]
        job = self.make_job(job_id, tenant="ab"[number % 4 == 3], webhook=HOOKS[number % 3])
        if number in (2, 3):
            job = replace(job, references=(URL,))
        answer = self.ledger.accept(job, start_within_s=hurry, cost_s=COST_S)
        assert answer.outcome == ("known" if job_id in self.model.jobs else "new")
        if answer.outcome == "new":
            expected = Expected(job, hurry, hurry == 0.0, "fetching" if job.fetching else "line")
            expected.move(JobStatus.QUEUED)
            self.model.jobs[job_id] = expected
            if not job.fetching:
                self.model.enter(expected)
            assert answer.called == (job_id in self.model.unrung)
            self.model.unrung.discard(job_id)
            if answer.called:
                self.ledger.rung([job_id])

    def pass_deadline(self, job_id: str, choice: int, flavour: int) -> None:  # noqa: ARG002
        """Time passes for one job that has a deadline."""
        job = self.model.jobs[job_id]
        if job.hurry is not None and not job.status.terminal:
            job.late = True
            self.client.hset(f"{CUSTOMIZE.root}job:{job_id}", "start_by", "1")
            self.client.zadd(f"{CUSTOMIZE.root}deadlines", {job_id: 1}, xx=True)

    def ring(self, job_id: str, choice: int, flavour: int) -> None:  # noqa: ARG002
        due = self.ledger.to_ring()
        assert set(due) == self.model.unrung and len(due) == len(self.model.unrung)
        assert self.ledger.to_ring() == [], "another one is not told while the first rings"
        self.ledger.rung(due)
        self.model.unrung.clear()

    def fetch(self, job_id: str, choice: int, flavour: int) -> None:  # noqa: ARG002
        """All fetches become due, as if those who had taken them were lost."""
        fetching = [job for job in self.model.open() if job.place == "fetching"]
        entries = {entry for line in boxed(self.ledger, "fetches").values() for entry in line}
        assert entries == {job.job.id for job in fetching}
        make_due(self.ledger, "fetches")
        taken = {fetch.job_id: fetch.token for fetch in self.ledger.due_fetches()}
        for job in fetching:
            job.fetches += 1
            if job.fetches > 3:
                self.model.end(job, JobStatus.FAILED)
                continue
            job.fetch_token = taken.pop(job.job.id)
            self.tokens.append(job.fetch_token)
        assert taken == {}

    def resolve(self, job_id: str, choice: int, flavour: int) -> None:  # noqa: ARG002
        job, token = self.model.jobs[job_id], self._token(job_id, choice)
        done = replace(job.job, references=(replace(URL, image="0" * 64),))
        valid = job.fetch_token == token and job.status is JobStatus.QUEUED and job.place == "fetching"
        repeated = job.fetch_token == token and job.fetched and not job.deleted
        assert self.ledger.resolve(job_id, token, done) == (valid or repeated)
        if valid:
            job.job, job.fetched = done, True
            self.model.enter(job)
            if job.place == "fetching":
                job.place = "line"

    def fail_fetch(self, job_id: str, choice: int, flavour: int) -> None:  # noqa: ARG002
        job, token = self.model.jobs[job_id], self._token(job_id, choice)
        mine = job.fetch_token == token and not job.fetched and not job.deleted
        valid = mine and job.status is JobStatus.QUEUED
        repeated = mine and job.status is JobStatus.FAILED
        assert self.ledger.fail_fetch(job_id, token, ERROR) == (valid or repeated)
        if valid:
            self.model.end(job, JobStatus.FAILED)

    def claim(self, job_id: str, choice: int, flavour: int) -> None:  # noqa: ARG002
        waits = flavour % 2 == 1
        job = self.model.jobs[job_id]
        called = job.status is JobStatus.QUEUED and job.place == "window"
        late = job.late and not job.stepped
        token = self.ledger.claim(job_id, "w", waits=waits)
        assert (token is not None) == (called and not late)
        if token is not None:
            assert token > max(self.tokens), "tokens grow"
            self.tokens.append(token)
            job.token, job.waits = token, waits
            self.model.unrung.discard(job_id)
            job.move(JobStatus.RUNNING)
        elif called:
            self.model.end(job, JobStatus.EXPIRED)

    def begin(self, job_id: str, choice: int, flavour: int) -> None:  # noqa: ARG002
        job, token = self.model.jobs[job_id], self._token(job_id, choice)
        assert self.ledger.begin(job_id, token) == self._holds(job, token)
        job.waits = job.waits and not self._holds(job, token)

    def beat(self, job_id: str, choice: int, flavour: int) -> None:
        steps = flavour % 2
        job, token = self.model.jobs[job_id], self._token(job_id, choice)
        if self._holds(job, token):
            job.stepped = job.stepped or steps > 0
            expected = "canceled" if job.canceling else "expired" if job.late and not job.stepped else "ok"
        else:
            expected = "lost"
        assert self.ledger.beat(job_id, token, replace(STEP, step=steps)) == expected

    def end(self, job_id: str, choice: int, flavour: int) -> None:
        """A worker's end is taken if its token holds and the end is due, and again if its reply got lost."""
        job, token, how = self.model.jobs[job_id], self._token(job_id, choice), ENDS[flavour % len(ENDS)]
        due = {JobStatus.CANCELED: job.canceling, JobStatus.EXPIRED: job.late and not job.stepped}
        taken = self._holds(job, token) and due.get(how, True)
        write: dict[JobStatus, Callable[[], bool]] = {
            JobStatus.SUCCEEDED: lambda: self.ledger.commit(job_id, token, RESULT),
            JobStatus.FAILED: lambda: self.ledger.fail(job_id, token, ERROR),
            JobStatus.CANCELED: lambda: self.ledger.release_canceled(job_id, token),
            JobStatus.EXPIRED: lambda: self.ledger.release_expired(job_id, token),
        }
        assert write[how]() == (taken or (job.token == token and job.status is how and not job.deleted))
        if taken:
            self.model.end(job, how)

    def hand_back(self, job_id: str, choice: int, flavour: int) -> None:  # noqa: ARG002
        job, token = self.model.jobs[job_id], self._token(job_id, choice)
        holds = self._holds(job, token)
        assert self.ledger.hand_back(job_id, token) == (holds or (job.handed == token and not job.deleted))
        if holds:
            job.handed, job.token = token, None
            if job.canceling:
                self.model.end(job, JobStatus.CANCELED)
            else:
                job.move(JobStatus.QUEUED)

    def cancel(self, job_id: str, choice: int, flavour: int) -> None:  # noqa: ARG002
        job = self.model.jobs[job_id]
        if job.status is JobStatus.QUEUED or (job.status is JobStatus.RUNNING and job.waits):
            job.canceling, job.token = True, None
            self.model.end(job, JobStatus.CANCELED)
        elif job.status is JobStatus.RUNNING:
            job.canceling = True
        answer = self.ledger.cancel(job_id)
        assert (answer and answer.status) == (None if job.deleted else job.status)

    def lose_worker(self, job_id: str, choice: int, flavour: int) -> None:  # noqa: ARG002
        job = self.model.jobs[job_id]
        if job.status is not JobStatus.RUNNING or job.token is None:
            return
        self.client.zadd(f"{CUSTOMIZE.root}leases", {job_id: 0})
        job.token = None
        if job.canceling:
            self.model.end(job, JobStatus.CANCELED)
        elif job.attempt == 3 and not job.waits:
            self.model.end(job, JobStatus.FAILED)
        else:
            job.attempt += not job.waits
            job.move(JobStatus.QUEUED)
        assert self.ledger.reap() == ([job_id] if job.status is JobStatus.QUEUED else [])

    def expire(self, job_id: str, choice: int, flavour: int) -> None:  # noqa: ARG002
        due = {job.job.id for job in self.model.open() if job.late and not job.stepped}
        due = {job_id for job_id in due if self.model.jobs[job_id].status is JobStatus.QUEUED}
        ids = self.ledger.expire()
        assert set(ids) == due
        for one in ids:
            self.model.end(self.model.jobs[one], JobStatus.EXPIRED)

    def delete(self, job_id: str, choice: int, flavour: int) -> None:  # noqa: ARG002
        job = self.model.jobs[job_id]
        assert self.ledger.delete(job_id) == job.status.terminal
        job.deleted = job.status.terminal

    def tell_webhooks(self, job_id: str, choice: int, flavour: int) -> None:  # noqa: ARG002
        """Each job's changes are told once each, in order, and of deleted jobs nothing."""
        told: dict[str, list[tuple[int, str]]] = {}
        for message in self.ledger.due_webhooks(100):
            job = self.model.jobs[message.job_id]
            assert job.job.webhook is not None
            assert (message.tenant, message.url, message.attempt) == (job.job.tenant, job.job.webhook.url, 1)
            changes = [[JobStatus(status), attempt] for status, attempt in (json.loads(message.data).values(),)]
            place = job.story.index(changes[0]) + 1
            told.setdefault(message.job_id, []).append((place, message.event))
            self.ledger.webhook_done(message.id)
        for job in self.model.jobs.values():
            expected = [] if job.deleted else [(job.story.index(job.story[n - 1]) + 1, kind) for n, kind in job.untold]
            assert sorted(told.get(job.job.id, [])) == sorted(expected)
            job.untold.clear()
        assert boxed(self.ledger, "webhooks") == {}

    def tells_the_same_story(self) -> None:
        """Records, events and tombstones agree with the model; no job has ended twice."""
        for job_id, job in self.model.jobs.items():
            assert self.ledger.gone(job_id) == (job.job.tenant if job.deleted else None)
            events, gap = self.ledger.events(job_id, limit=1000)
            if job.deleted:
                assert self.ledger.get(job_id) is None and (events, gap) == ([], False)
                continue
            found = record(self.ledger, job_id)
            assert (found.job, found.status, found.attempt) == (job.job, job.status, job.attempt)
            assert (found.finished_at is not None) == job.status.terminal
            assert (found.result is not None) == (job.status is JobStatus.SUCCEEDED)
            story = [[*json.loads(event.data).values()] for event in events if event.kind == "status"]
            assert story == job.story and not gap
            assert sum(JobStatus(str(status)).terminal for status, _ in story) == int(job.status.terminal)

    def lists_and_lines_agree(self) -> None:
        """Every index holds just those whose state says so; windows are bounded; the load is that of open jobs."""
        root, jobs = CUSTOMIZE.root, self.model.jobs
        for tenant in (None, "a", "b"):
            whose = {
                job_id: job for job_id, job in jobs.items() if tenant in (None, job.job.tenant) and not job.deleted
            }
            assert [one.job.id for one in self.ledger.list(tenant, None, 20)[0]] == [*reversed(whose)]
            for status in JobStatus:
                expected = [job_id for job_id, job in whose.items() if job.status is status]
                assert [one.job.id for one in self.ledger.list(tenant, None, 20, status)[0]] == expected[::-1]
                index = f"{root}status:{status}" + (f":{tenant}" if tenant else "")
                assert texts(self.client.zrange(index, 0, -1)) == expected
            open_jobs = [job for job in whose.values() if not job.status.terminal]
            assert self.ledger.load(tenant) == COST_S * len(open_jobs)
            if tenant is not None:
                assert texts(self.client.zrange(f"{root}line:{tenant}", 0, -1)) == self.model.line.get(tenant, [])
                window = set(texts(self.client.smembers(f"{root}window:{tenant}")))
                assert window == self.model.window.get(tenant, set())
                assert len(window) <= WINDOW
        running = {job_id for job_id, job in jobs.items() if job.status is JobStatus.RUNNING}
        assert set(texts(self.client.zrange(f"{root}leases", 0, -1))) == running
        called = {job_id for window in self.model.window.values() for job_id in window} - running
        assert set(self.ledger.waiting(0.0)) == called
        assert {self.ledger.position(job_id) for job_id in called} == set(range(len(called)))
        assert set(texts(self.client.zrange(f"{root}to_ring", 0, -1))) == self.model.unrung


def texts(members: object) -> list[str]:
    """Members of a list or set of Redis."""
    return [member.decode() for member in members]  # pyright: ignore[reportGeneralTypeIssues, reportUnknownVariableType, reportUnknownMemberType]  # sync client


CALLS = (
    *(Machine.claim, Machine.claim, Machine.end) * 5,
    *(Machine.accept,) * 3,
    *(Machine.beat, Machine.hand_back, Machine.lose_worker) * 2,
    *(Machine.ring, Machine.fetch, Machine.fetch, Machine.resolve, Machine.resolve, Machine.resolve),
    *(Machine.fail_fetch, Machine.begin),
    *(
        Machine.pass_deadline,
        Machine.pass_deadline,
        Machine.cancel,
        Machine.expire,
        Machine.delete,
        Machine.tell_webhooks,
    ),
)
STEPS = st.tuples(st.sampled_from(CALLS), st.integers(0, 9), st.integers(0, 50), st.integers(0, 7))


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(first=st.permutations(range(10)), steps=st.lists(STEPS, min_size=40, max_size=80))
def test_any_sequence_of_calls(
    client: redis.Redis, make_job: MakeJob, first: list[int], steps: list[tuple[Callable[..., None], int, int, int]]
) -> None:
    """Terminal states never change, at most one end per job, stale tokens are refused, tokens grow; nothing waits for
    ever in a line, and events, webhooks, lists and records tell the same story.
    """
    client.config_set("appendfsync", "no")  # no crash is part of this story
    machine = Machine(client, make_job)
    for number in first[:6]:
        machine.accept(f"job_{number}", 0, number)
    for place, (call, number, choice, flavour) in enumerate(steps, start=1):
        job_id = f"job_{number}"
        if call is Machine.accept or job_id in machine.model.jobs:
            call(machine, job_id, choice, flavour)
        if place % 5 == 0 or place == len(steps):
            machine.tells_the_same_story()
            machine.lists_and_lines_agree()
    client.config_set("appendfsync", "always")
