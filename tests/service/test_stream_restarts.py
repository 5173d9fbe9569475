"""A hundred event streams while the gateway is ended, killed and started again: nobody misses or repeats anything."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import redis

from tests.conftest import ROOT
from tests.waiting import wait_for
from workers.jobs import CUSTOMIZE, CustomizeJob, Progress, Sampling
from workers.ledger import CustomizeLedger, Ledger
from workers.redis_process import RedisProcess

JOBS, FOLLOWERS = 20, 5


@dataclass(eq=False)
class Follower:
    """A caller that comes back with the last id it has, as browsers do; a forgetful one comes back without."""

    job: str
    forgetful: bool = False
    seen: list[str] = field(default_factory=list[str])
    cuts: int = 0

    async def follow(self, client: httpx2.AsyncClient, url: str) -> None:
        """Until the job has ended."""
        while True:
            headers = {"Last-Event-ID": self.seen[-1]} if self.seen and not self.forgetful else {}
            try:
                async with client.stream("GET", f"{url}/v1/jobs/{self.job}/events", headers=headers) as answer:
                    if await self._read(answer):
                        return
            except httpx2.HTTPError:
                pass  # cut off; the listening socket stays, so the next call waits for the next gateway
            self.cuts += 1
            await asyncio.sleep(0.01)

    async def _read(self, answer: httpx2.Response) -> bool:
        """Whether the end was told."""
        assert answer.status_code == 200, answer.status_code
        number = ""
        async for line in answer.aiter_lines():
            name, _, value = line.partition(": ")
            if name == "id":
                number = value
            elif name == "data":
                self.seen.append(number)
                if '"canceled"' in value:
                    return True
        return False


@contextmanager
def gateway(listener: socket.socket, redis_url: str, state: Path, model: Path) -> Generator[subprocess.Popen[bytes]]:
    """`dreamserve gateway` on a socket that outlives it."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("DREAMSERVE_")}
    environment = {
        **kept,
        "DREAMSERVE_REDIS_URL": redis_url,
        "DREAMSERVE_STATE_DIR": str(state),
        "DREAMSERVE_BASE_MODEL": str(model),
    }
    command = [sys.executable, "-m", "service.cli", "gateway", "--fd", str(listener.fileno())]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, pass_fds=(listener.fileno(),))
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@dataclass(frozen=True)
class Drill:
    """The worker's side, and the gateways one after the other."""

    ledger: CustomizeLedger
    claims: dict[str, int]
    followers: list[Follower]

    async def run(self, listener: socket.socket, redis_url: str, state: Path, model: Path) -> None:
        """A step with each gateway; the first is ended, the second killed, the third sees the end of the jobs."""
        for step, how in ((1, signal.SIGTERM), (2, signal.SIGKILL), (3, None)):
            with gateway(listener, redis_url, state, model) as process:
                await asyncio.to_thread(self._beat, step)
                await self._all_know(2 + step)
                if how is None:
                    await asyncio.to_thread(self._end)
                    await self._all_know(3 + step)
                    return
                process.send_signal(how)
                await asyncio.to_thread(process.wait, 20)

    def _beat(self, step: int) -> None:
        for job, token in self.claims.items():
            self.ledger.beat(job, token, Progress("denoise", step, 3))

    def _end(self) -> None:
        for job, token in self.claims.items():
            self.ledger.cancel(job)
            assert self.ledger.release_canceled(job, token)

    async def _all_know(self, count: int) -> None:
        def know() -> bool:
            return all(len(follower.seen) >= count for follower in self.followers)

        await asyncio.to_thread(wait_for, know, f"{count} events everywhere")


async def together(followers: list[Follower], url: str, drill: Drill, *place: Any) -> None:
    limits = httpx2.Limits(max_connections=None)
    async with httpx2.AsyncClient(limits=limits, timeout=240, trust_env=False) as client:
        await asyncio.gather(drill.run(*place), *(follower.follow(client, url) for follower in followers))


def test_streams_survive_gateways(redis_server: RedisProcess, model_dir: Path, tmp_path: Path) -> None:
    """After SIGTERM and after SIGKILL every stream goes on where it was; the control, which forgets, sees repeats."""
    client = redis.Redis.from_url(redis_server.url)
    client.flushdb()
    ledger = Ledger(client, CUSTOMIZE)
    claims: dict[str, int] = {}
    for number in range(JOBS):
        job = CustomizeJob(f"job_{number}", "unit", "a", "", (), Sampling(72, 64, 3, 4.5, 4.5, 7))
        ledger.accept(job)
        claims[job.id] = ledger.claim(job.id, "w") or 0
    followers = [Follower(job) for job in claims for _ in range(FOLLOWERS)]
    forgetful = Follower("job_0", forgetful=True)
    with socket.create_server(("127.0.0.1", 0), backlog=512) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        place = (Drill(ledger, claims, followers), listener, redis_server.url, tmp_path, model_dir)
        asyncio.run(asyncio.wait_for(together([*followers, forgetful], url, *place), 150))
    client.close()
    expected = ["1", "2", "3", "4", "5", "6"]  # queued, running, three steps, canceled
    assert [follower.seen for follower in followers] == [expected] * (JOBS * FOLLOWERS)
    assert all(follower.cuts >= 2 for follower in followers)
    assert len(forgetful.seen) > len(expected)
