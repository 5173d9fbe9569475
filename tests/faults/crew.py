"""Worker processes that are started again whenever they end, and the Redis they share. For the main thread only:
a Redis ends with the thread that started it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from redis.exceptions import RedisError

from tests.faults.clients import WINDOW
from tests.faults.history import History
from workers import queues
from workers.artifacts import ArtifactStore
from workers.jobs import CUSTOMIZE
from workers.ledger import CustomizeLedger, Ledger
from workers.lifeline import die_with_parent
from workers.redis_process import RedisProcess, start_redis


@dataclass(slots=True)
class Member:
    """A worker. `armed`: the plan that waits in it, since `armed_at`; `resume_at`: it is stopped until then."""

    process: subprocess.Popen[bytes]
    armed: str | None = None
    armed_at: float = 0.0
    resume_at: float | None = None

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def stopped(self) -> bool:
        """Whether the kernel has it stopped."""
        found = os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WEXITED | os.WNOHANG | os.WNOWAIT)
        return found is not None and found.si_code == os.CLD_STOPPED


class Crew:
    """`size` workers of a variant (`tests.faults.worker.VARIANTS`), from `start` to the end of the `with`."""

    def __init__(
        self,
        home: Path,
        history: History,
        *,
        size: int,
        lease_s: float,
        variant: str = "product",
        step_s: float = 0.001,
        window: int = WINDOW,
    ) -> None:
        self.home = home
        self.history = history
        self.size = size
        self.lease_s = lease_s
        self.variant = variant
        self.step_s = step_s
        self.window = window
        self.store = ArtifactStore(home / "artifacts")
        self.redis: RedisProcess = start_redis(home)
        self.url = self.redis.url
        self.client = queues.connect(self.url)
        self.ledger: CustomizeLedger = Ledger(self.client, CUSTOMIZE, lease_s=lease_s, tenant_window=window)
        self.members: list[Member] = []
        self.kills = self.stops = self.redis_kills = 0

    def __enter__(self) -> Crew:
        self.tend()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.leave()
        self.redis.stop()

    def tend(self) -> None:
        """Go once round: notice who stopped or ended, wake who has slept long enough, replace who is gone."""
        for member in list(self.members):
            code = member.process.poll()
            if code is not None:
                self.history.note("exit", pid=member.pid, code=code)
                self._count(member, code)
                self.members.remove(member)
            elif member.resume_at is None and member.stopped:
                self._fall_asleep(member)
            elif member.resume_at is not None and time.monotonic() > member.resume_at:
                self.resume(member)
        while len(self.members) < self.size:
            self.members.append(self._spawn())

    def ready(self) -> list[Member]:
        """Those that serve and have no fault ahead of them."""
        try:
            pids = {
                card["pid"] for card in queues.workers(self.client, CUSTOMIZE) if card["state"] in ("ready", "busy")
            }
        except RedisError:
            return []
        return [one for one in self.members if one.pid in pids and one.armed is None and one.resume_at is None]

    def arm(self, member: Member, plan: str) -> None:
        """Have a worker fail at a point."""
        assert member.process.stdin is not None
        self.history.note("arm", pid=member.pid, plan=plan)
        member.armed, member.armed_at = plan, time.monotonic()
        try:
            member.process.stdin.write(f"{plan}\n".encode())
            member.process.stdin.flush()
        except BrokenPipeError:
            return  # it has just ended

    def kill(self, member: Member, how: str) -> None:
        """SIGKILL, wherever it is."""
        member.armed = how
        member.process.kill()

    def stop(self, member: Member) -> None:
        """SIGSTOP, wherever it is."""
        member.armed = "anywhere=stop"
        member.process.send_signal(signal.SIGSTOP)

    def resume(self, member: Member) -> None:
        """Let a stopped worker go on, its leases long lapsed."""
        self.history.note("resume", pid=member.pid)
        member.resume_at = member.armed = None
        member.process.send_signal(signal.SIGCONT)

    def kill_redis(self) -> None:
        """SIGKILL for Redis, and a new one on what it has left."""
        self.history.note("redis_kill")
        self.redis.process.kill()
        self.redis.process.wait()
        self.redis.stop()
        self.redis = start_redis(self.home)
        self.history.note("redis_up")
        self.redis_kills += 1

    def leave(self) -> None:
        """All workers end as a supervisor ends them."""
        for member in self.members:
            if member.resume_at is not None:
                self.resume(member)
            member.process.terminate()
        for member in self.members:
            try:
                member.process.wait(240)
            except subprocess.TimeoutExpired:
                member.process.kill()
                member.process.wait()
            self.history.note("exit", pid=member.pid, code=member.process.returncode)
        self.members = []

    def _spawn(self) -> Member:
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("DREAMSERVE_")},
            "DREAMSERVE_STATE_DIR": str(self.home),
            "DREAMSERVE_LEASE_S": str(self.lease_s),
            "DREAMSERVE_JOBS_IN_HAND": "8",
            "DREAMSERVE_TENANT_WINDOW": str(self.window),
            "FAULTS_STEP_S": str(self.step_s),
            "DREAMSERVE_LOG_LEVEL": "warning",
            "FAULTS_HISTORY": str(self.history.path),
            "FAULTS_VARIANT": self.variant,
        }
        with (self.home / "workers.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.faults.worker"],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                preexec_fn=die_with_parent(),  # noqa: PLW1509 - one system call
            )
        self.history.note("spawn", pid=process.pid)
        return Member(process)

    def _fall_asleep(self, member: Member) -> None:
        """A stopped worker sleeps until its leases have lapsed and others have had time to take its jobs."""
        self.stops += 1
        self.history.note("stop", pid=member.pid, plan=member.armed)
        member.resume_at = time.monotonic() + 1.6 * self.lease_s

    def _count(self, member: Member, code: int) -> None:
        if code == -signal.SIGKILL:
            self.kills += 1
            self.history.note("kill", pid=member.pid, plan=member.armed)
