"""The courier as a process: what it does between start and SIGTERM, what it survives, what its log holds."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis

from model.roles import Role
from tests.waiting import wait_for
from tests.workers.conftest import MakeJob
from tests.workers.courier.hosts import AUTHORITY, Host, Seen, always, said
from tests.workers.courier.receiver import verified
from tests.workers.courier.test_fetching import PNG
from tests.workers.ledgers import RESULT, boxed
from workers import queues
from workers.courier.signing import secrets_of
from workers.courier.worker import COURIERS
from workers.jobs import CUSTOMIZE, JobStatus, ReferenceInput, Webhook
from workers.ledger import CustomizeLedger, Ledger
from workers.redis_process import RedisProcess, start_redis

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
CANARIES = (
    "Signature=canary-url",
    "canary-redirect",
    "token=canary-hook",
    "canary prompt",
    SECRET[6:],
    "v1,",
    "localhost:",
)


def environment(url: str, state: Path, port: int, **changes: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("DREAMSERVE_")}
    return kept | {
        "DREAMSERVE_REDIS_URL": url,
        "DREAMSERVE_STATE_DIR": str(state),
        "DREAMSERVE_EGRESS_PORTS": f"443,{port}",
        "DREAMSERVE_EGRESS_NETWORKS": "127.0.0.0/8,::1/128",
        "DREAMSERVE_EGRESS_AUTHORITIES": str(AUTHORITY),
        "DREAMSERVE_WEBHOOK_SECRETS": SECRET,
        "DREAMSERVE_LOG_LEVEL": "debug",
        **changes,
    }


class Courier:
    """One process, and what it says."""

    def __init__(self, settings: dict[str, str]) -> None:
        command = [sys.executable, "-m", "workers.courier"]
        self.process = subprocess.Popen(command, env=settings, stderr=subprocess.PIPE, text=True)
        self.log = ""
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr
        for line in self.process.stderr:
            self.log += line

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """The exit status after a signal."""
        self.process.send_signal(number)
        status = self.process.wait(240)
        self._reader.join()
        return status


@contextmanager
def courier(settings: dict[str, str]) -> Generator[Courier]:
    running = Courier(settings)
    try:
        yield running
    finally:
        if running.process.poll() is None:
            running.end(signal.SIGKILL)


@pytest.fixture
def ledger(client: redis.Redis) -> CustomizeLedger:
    return Ledger(client, CUSTOMIZE)


def finish(ledger: CustomizeLedger, job_id: str = "job_1") -> None:
    """What a worker does."""
    token = ledger.claim(job_id, "w")
    assert token
    assert ledger.commit(job_id, token, RESULT)


def with_hook(make_job: MakeJob, port: int, job_id: str = "job_1", **changes: object) -> Any:
    return make_job(job_id, webhook=Webhook(f"https://localhost:{port}/hook?token=canary-hook"), **changes)


def test_a_job_from_url_to_webhook(
    server: RedisProcess, ledger: CustomizeLedger, make_job: MakeJob, tmp_path: Path
) -> None:
    """The whole way with nothing replaced: fetched, rung for, told; its log, all of it, has no URL, secret or prompt;
    SIGTERM ends it in order.
    """

    async def answer(seen: Seen, writer: asyncio.StreamWriter) -> None:
        if seen.target.startswith("/mug"):
            writer.write(said(302, b"", "location: /there.png?Signature=canary-redirect"))
        else:
            writer.write(said(200, PNG if seen.method == "GET" else b""))

    with Host(answer) as host, courier(environment(server.url, tmp_path, host.port)) as running:
        url = f"https://localhost:{host.port}/mug.png?Signature=canary-url"
        reference = ReferenceInput(1, Role.SUBJECT, "", url=url)
        ledger.accept(with_hook(make_job, host.port, references=(reference,), tenant="a", prompt="canary prompt"))
        wait_for(lambda: queues.queue(ledger.redis, CUSTOMIZE).job_ids, "a delivery to the workers")
        record = ledger.get("job_1")
        assert record
        assert record.job.references[0].image == hashlib.sha256(PNG).hexdigest()
        finish(ledger)
        told = wait_for(lambda: [seen for seen in host.seen if seen.method == "POST"], "the webhook")[0]
        second = float(told.headers["webhook-timestamp"])
        assert verified(secrets_of([SECRET], "a")[0], told.headers, told.body, now=second)
        wait_for(lambda: not boxed(ledger, "webhooks"), "the settlement")
        (card,) = queues.workers(ledger.redis, COURIERS)
        assert card["pid"] == running.process.pid
        assert running.end() == 0
        assert queues.workers(ledger.redis, COURIERS) == []
    assert '"event": "reference fetched"' in running.log
    assert '"settlement": "done"' in running.log
    assert [canary for canary in CANARIES if canary in running.log] == []


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"DREAMSERVE_EGRESS_NETWORKS": ""}, "reference_unreachable"),
        ({"DREAMSERVE_STORE_RESERVE_MIB": str(2**42)}, "storage_unavailable"),
    ],
)
def test_a_reference_that_is_not_to_be_had_fails_its_job(
    server: RedisProcess,
    ledger: CustomizeLedger,
    make_job: MakeJob,
    tmp_path: Path,
    change: dict[str, str],
    code: str,
) -> None:
    """Loopback is inside by the settings as they are shipped, or the disk is kept for finished pictures: the job fails
    and nobody was connected to. The control is the whole way above.
    """
    with Host(always(said(200, PNG))) as host:
        settings = environment(server.url, tmp_path, host.port, **change)
        with courier(settings):
            reference = ReferenceInput(1, Role.SUBJECT, "", url=f"https://localhost:{host.port}/mug.png")
            ledger.accept(make_job("job_1", references=(reference,)))

            def failed() -> bool:
                record = ledger.get("job_1")
                return record is not None and record.status is JobStatus.FAILED

            wait_for(failed, "the failure")
        assert host.seen == []
    record = ledger.get("job_1")
    assert record
    assert record.error
    assert record.error.code == code


def test_a_killed_courier_loses_nothing(
    server: RedisProcess, ledger: CustomizeLedger, make_job: MakeJob, tmp_path: Path
) -> None:
    """Killed while the receiver thinks: the next one sends the same message, by the same id."""
    hanging = threading.Event()

    async def think(_seen: Seen, writer: asyncio.StreamWriter) -> None:
        if not hanging.is_set():
            hanging.set()
            await asyncio.Event().wait()
        writer.write(said(204))

    with Host(think) as host:
        settings = environment(server.url, tmp_path, host.port)
        with courier(settings) as running:
            ledger.accept(with_hook(make_job, host.port))
            queues.ring_due(ledger)
            finish(ledger)
            assert hanging.wait(60)
            running.end(signal.SIGKILL)
        ledger.webhook_retry(host.seen[0].headers["webhook-id"], 0.0)  # the lease lapses
        with courier(settings):
            wait_for(lambda: not boxed(ledger, "webhooks"), "the settlement")
        first, second = host.seen
        assert first.headers["webhook-id"] == second.headers["webhook-id"]
        assert first.body == second.body


@pytest.mark.parametrize("other", ["b", "a"], ids=["another tenant", "control: the same tenant"])
def test_receivers_that_hang_hold_up_their_own_tenant(
    server: RedisProcess, ledger: CustomizeLedger, make_job: MakeJob, tmp_path: Path, other: str
) -> None:
    """While one tenant's receivers hang, and hundreds of its messages wait, another's is told at once. Within one
    tenant it waits until they let go, which shows that they do hang.
    """
    let_go = threading.Event()

    async def hang(seen: Seen, writer: asyncio.StreamWriter) -> None:
        if b"job_other" not in seen.body:
            await asyncio.to_thread(let_go.wait, 60)
        writer.write(said(204))

    with Host(hang) as host:
        try:
            for number in range(300):
                ledger.accept(with_hook(make_job, host.port, f"job_{number}", tenant="a"))
                ledger.cancel(f"job_{number}")
            with courier(environment(server.url, tmp_path, host.port, DREAMSERVE_WEBHOOKS_IN_HAND="8")):
                wait_for(lambda: len(host.seen) == 4, "half of the places to hang")
                ledger.accept(with_hook(make_job, host.port, "job_other", tenant=other))
                ledger.cancel("job_other")
                if other == "a":
                    time.sleep(1)
                    assert len(host.seen) == 4, "nothing is told while they hang"
                    let_go.set()
                wait_for(lambda: any(b"job_other" in seen.body for seen in host.seen), "the other message")
                assert len(host.seen) == 5 or other == "a"
        finally:
            let_go.set()


def test_a_receiver_that_errs_gets_it_after_the_pause(
    server: RedisProcess, ledger: CustomizeLedger, make_job: MakeJob, tmp_path: Path
) -> None:
    """The schedule by the real clock, its first pause: five seconds, give or take a tenth."""
    times: list[float] = []

    async def err_once(_seen: Seen, writer: asyncio.StreamWriter) -> None:
        times.append(asyncio.get_running_loop().time())
        writer.write(said(500 if len(times) == 1 else 204))

    with Host(err_once) as host, courier(environment(server.url, tmp_path, host.port)):
        ledger.accept(with_hook(make_job, host.port))
        finish(ledger)
        wait_for(lambda: len(times) == 2 and not boxed(ledger, "webhooks"), "the second attempt")
    assert times[1] - times[0] >= 4.5


def test_it_outlives_redis(make_job: MakeJob, tmp_path: Path) -> None:
    """While Redis is away it waits; what was due then is done when Redis is back."""
    state = tmp_path / "redis"
    own = start_redis(state)
    with Host(always(said())) as host:
        try:
            with queues.connect(own.url) as client, courier(environment(own.url, tmp_path, host.port)) as running:
                ledger = Ledger(client, CUSTOMIZE)
                wait_for(lambda: queues.workers(client, COURIERS), "the courier's card")
                own.process.kill()
                own.process.wait()
                wait_for(lambda: "redis is away" in running.log, "it to notice")
                own.stop()
                own = start_redis(state)
                ledger.accept(with_hook(make_job, host.port))
                finish(ledger)
                wait_for(lambda: host.seen, "the webhook")
                assert running.end() == 0
        finally:
            own.stop()


@pytest.mark.parametrize(
    ("changes", "said_why"),
    [
        ({"DREAMSERVE_WEBHOOK_SECRETS": f"{SECRET},canary"}, "DREAMSERVE_WEBHOOK_SECRETS, entry 2"),
        ({"DREAMSERVE_EGRESS_PORTS": "443,canary"}, "DREAMSERVE_EGRESS_PORTS"),
        ({"DREAMSERVE_EGRESS_NETWORKS": "10.0.0.1/8"}, "DREAMSERVE_EGRESS_NETWORKS"),
        ({"DREAMSERVE_EGRESS_AUTHORITIES": "canary.pem"}, "DREAMSERVE_EGRESS_AUTHORITIES"),
        ({"DREAMSERVE_EGRESS_AUTHORITIES": __file__}, "DREAMSERVE_EGRESS_AUTHORITIES"),
        ({"DREAMSERVE_REDIS_URL": ""}, "DREAMSERVE_REDIS_URL"),
    ],
)
def test_wrong_settings_end_it_at_once(tmp_path: Path, changes: dict[str, str], said_why: str) -> None:
    """Exit status 2, which ends `serve` too, and a line that names the variable without its value."""
    settings = environment("redis://127.0.0.1:1", tmp_path, 443) | changes
    command = [sys.executable, "-m", "workers.courier"]
    done = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 2
    assert said_why in done.stderr
    assert "canary" not in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_tenants_secret_can_be_read(tmp_path: Path) -> None:
    """What the operator hands out is what the courier signs with."""
    settings = environment("redis://127.0.0.1:1", tmp_path, 443)
    command = [sys.executable, "-m", "workers.courier", "--secret-of", "a"]
    done = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=240, check=True)
    assert done.stdout.split() == list(secrets_of([SECRET], "a"))


@pytest.mark.parametrize("tenant", ["a", "default"])
def test_without_a_secret_there_is_none_of_a_tenant(tmp_path: Path, tenant: str) -> None:
    """Nothing printed and no fault would read as an empty secret in an operator's script."""
    settings = environment("redis://127.0.0.1:1", tmp_path, 443) | {"DREAMSERVE_WEBHOOK_SECRETS": ""}
    command = [sys.executable, "-m", "workers.courier", "--secret-of", tenant]
    done = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=240, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "DREAMSERVE_WEBHOOK_SECRETS" in done.stderr


def test_it_needs_no_torch() -> None:
    """The courier starts in a second and runs where no model is."""
    code = "import sys, workers.courier.worker; print('torch' in sys.modules, 'fastapi' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=True)
    assert done.stdout.split() == ["False", "False"]
