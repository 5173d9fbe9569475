"""The courier process: the only one of the service that speaks to the outside.

    python -m workers.courier [--secret-of TENANT]

It fetches the references that jobs name by URL, and tells webhooks. Several may run; each entry of an outbox is one's.
Exit codes: 0 stopped by SIGTERM or SIGINT; 2 the configuration does not fit.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import redis
import structlog
from pydantic import ValidationError
from redis.exceptions import RedisError

from workers import queues
from workers.artifacts import ArtifactStore
from workers.books.values import DamagedRecordError, Delivery, Fetch
from workers.courier.addresses import Rules
from workers.courier.egress import Egress, EgressError, Reply, SystemResolver, trust
from workers.courier.fetching import FetchError, ReferenceFetcher, digest
from workers.courier.metrics import CourierMetrics
from workers.courier.outbox import Outbox
from workers.courier.signing import SecretError, read_secret, secrets_of
from workers.courier.webhooks import RETRIES_S, SecretsOf, Settlement, WebhookSender, message, settle
from workers.jobs import CUSTOMIZE, TRAINING, JobRecord
from workers.ledger import CustomizeLedger, Ledger, open_ledger
from workers.process import ConfigurationError, find_url, refuse
from workers.settings import CourierSettings, describe_bad_settings
from workers.telemetry.exposition import PortTakenError, open_exposition
from workers.telemetry.logs import configure_logging
from workers.telemetry.tracing import Tracing, open_tracing

COURIERS: Final = replace(CUSTOMIZE, cards="dreamserve:couriers")
"""Where couriers announce themselves."""
_GRACE_S: Final = 5.0
_CARD_S: Final = 5.0
_LOG = structlog.stdlib.get_logger("workers.courier")


@dataclass(frozen=True, slots=True)
class Fetches:
    """The outbox of jobs whose references are at URLs."""

    ledger: CustomizeLedger
    fetcher: ReferenceFetcher
    metrics: CourierMetrics = field(default_factory=CourierMetrics.fresh)
    tracing: Tracing = field(default_factory=Tracing.off)

    async def handle(self, fetch: Fetch) -> None:
        """Fetch for one job and let it into the line, or fail it."""
        record = await asyncio.to_thread(self.ledger.get, fetch.job_id)
        if record is None:
            return
        began = time.monotonic()
        try:
            with self.tracing.span("fetch", record.job.traceparent):
                job = await self.fetcher.fetch(record.job)
        except FetchError as error:
            self.metrics.fetched(error.error.code, time.monotonic() - began)
            await asyncio.to_thread(self.ledger.fail_fetch, fetch.job_id, fetch.token, error.error)
            return
        self.metrics.fetched("resolved", time.monotonic() - began)
        if await asyncio.to_thread(self.ledger.resolve, fetch.job_id, fetch.token, job):
            await asyncio.to_thread(queues.ring_due, self.ledger)


@dataclass(frozen=True, slots=True)
class Webhooks:
    """The outbox of one ledger's messages."""

    ledger: Ledger[Any, Any, Any]
    sender: WebhookSender
    draw: Callable[[], float] = random.random
    metrics: CourierMetrics = field(default_factory=CourierMetrics.fresh)
    tracing: Tracing = field(default_factory=Tracing.off)

    async def handle(self, delivery: Delivery) -> None:
        """One attempt at one message, and what follows from it."""
        log = _LOG.bind(job_id=delivery.job_id, message=delivery.id, attempt=delivery.attempt, url=digest(delivery.url))
        settlement, answer, began = Settlement("dead"), "not sent", time.monotonic()
        if delivery.attempt <= len(RETRIES_S) + 1:  # more only if attempts end without being settled
            record = await asyncio.to_thread(self._record, delivery)
            if record is not None:
                with self.tracing.span("webhook", record.job.traceparent, attempt=delivery.attempt) as span:
                    reply, answer = await self._send(delivery, message(delivery, record))
                    settlement = settle(delivery.attempt, reply, self.draw())
                    span.set_attribute("settlement", settlement.kind)
        self.metrics.told(settlement.kind, delivery.attempt, time.monotonic() - began)
        await asyncio.to_thread(self._settle, delivery.id, settlement)
        level = logging.WARNING if settlement.kind == "dead" else logging.INFO
        log.log(level, "webhook", answer=answer, settlement=settlement.kind, after_s=round(settlement.after_s, 1))

    async def _send(self, delivery: Delivery, body: bytes) -> tuple[Reply | None, str]:
        """The reply, if there is one, and what to log of it."""
        try:
            reply = await self.sender.send(delivery, body)
        except EgressError as error:
            return None, error.reason
        except SecretError as error:
            return None, str(error)
        return reply, f"status {reply.status}"

    def _record(self, delivery: Delivery) -> JobRecord[Any, Any, Any] | None:
        """What it is about; None if that is not there any more, or damaged."""
        try:
            return self.ledger.get(delivery.job_id)
        except DamagedRecordError:
            return None

    def _settle(self, delivery_id: str, settlement: Settlement) -> None:
        match settlement.kind:
            case "done":
                self.ledger.webhook_done(delivery_id)
            case "retry":
                self.ledger.webhook_retry(delivery_id, settlement.after_s)
            case "dead":
                self.ledger.webhook_dead(delivery_id)


class Courier:
    """The outboxes of both ledgers, and the card that says that somebody works them off."""

    def __init__(
        self,
        client: redis.Redis,
        settings: CourierSettings,
        egress: Egress,
        secrets: SecretsOf,
        metrics: CourierMetrics,
        tracing: Tracing,
    ) -> None:
        jobs = open_ledger(client, CUSTOMIZE, settings)
        trainings = open_ledger(client, TRAINING, settings)
        store = ArtifactStore(settings.artifact_root, settings.store_reserve_mib << 20)
        fetches = Fetches(jobs, ReferenceFetcher(egress, store), metrics, tracing)
        sender = WebhookSender(egress, secrets)
        places = settings.webhooks_in_hand
        self._client = client
        self._name = f"{socket.gethostname()}.{os.getpid()}"
        self._outboxes: tuple[Outbox[Any], ...] = (
            Outbox("fetches", settings.fetches_in_hand, jobs.due_fetches, fetches.handle),
            Outbox(
                "webhooks", places, jobs.due_webhooks, Webhooks(jobs, sender, random.random, metrics, tracing).handle
            ),
            Outbox(
                "training webhooks",
                places,
                trainings.due_webhooks,
                Webhooks(trainings, sender, random.random, metrics, tracing).handle,
            ),
        )
        metrics.watch(lambda: {outbox.name: len(outbox.busy) for outbox in self._outboxes})

    def unready(self) -> dict[str, str]:
        """What keeps it from working: Redis, if the last look into any outbox was in vain."""
        return {"redis": "not heard of"} if any(outbox.away for outbox in self._outboxes) else {}

    async def run(self, stop: asyncio.Event) -> None:
        """Until `stop`, and up to the grace longer."""
        async with asyncio.TaskGroup() as group:
            for outbox in self._outboxes:
                group.create_task(outbox.work_off(stop, _GRACE_S))
            group.create_task(self._announce(stop))

    async def _announce(self, stop: asyncio.Event) -> None:
        while not stop.is_set():
            card = {"pid": os.getpid(), **{outbox.name: len(outbox.busy) for outbox in self._outboxes}}
            await self._tell(lambda card=card: queues.announce(self._client, COURIERS, self._name, card, 3 * _CARD_S))
            try:
                await asyncio.wait_for(stop.wait(), _CARD_S)
            except TimeoutError:
                continue
        await self._tell(lambda: queues.withdraw(self._client, COURIERS, self._name))

    async def _tell(self, tell: Callable[[], None]) -> None:
        try:
            await asyncio.to_thread(tell)
        except RedisError:
            return  # the card lapses; the outboxes say that Redis is away


def run_courier(settings: CourierSettings) -> int:
    """Run a courier until it is stopped.

    Returns:
        The exit code.
    """
    configure_logging(settings.log_level)
    for library in ("httpcore2", "asyncio"):  # at debug they tell headers, where redirects lead among them
        logging.getLogger(library).setLevel(logging.WARNING)
    resolver = SystemResolver()
    try:
        configured = checked_secrets(settings)
        egress = Egress(Rules.of(settings), trust(settings.egress_authorities), resolve=resolver)
        client = queues.connect(find_url(settings), timeout_s=3.0)
    except (ConfigurationError, SecretError) as error:
        return refuse(str(error), "courier")
    except OSError as error:  # ssl.SSLError among them
        return refuse(f"DREAMSERVE_EGRESS_AUTHORITIES: {error.strerror or 'no certificates in it'}", "courier")
    metrics, tracing = CourierMetrics.fresh(), open_tracing("courier")
    courier = Courier(client, settings, egress, lambda tenant: secrets_of(configured, tenant), metrics, tracing)
    try:
        exposition = open_exposition(settings, metrics.registry, alive=dict[str, str], ready=courier.unready)
    except PortTakenError as error:
        return refuse(str(error), "courier")
    try:
        asyncio.run(_until_signal(courier))
    finally:
        if exposition is not None:
            exposition.close()
        tracing.flush()
        resolver.close()
        client.close()
    return 0


def checked_secrets(settings: CourierSettings) -> tuple[str, ...]:
    """The configured webhook secrets.

    Raises:
        SecretError: one of them is none.
    """
    configured = tuple(secret.get_secret_value() for secret in settings.webhook_secrets)
    for number, secret in enumerate(configured, 1):
        try:
            read_secret(secret)
        except SecretError as error:
            raise SecretError(f"DREAMSERVE_WEBHOOK_SECRETS, entry {number}: {error}") from None
    return configured


async def _until_signal(courier: Courier) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    _LOG.info("ready", pid=os.getpid())
    await courier.run(stop)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m workers.courier", description="Fetch references, tell webhooks.")
    parser.add_argument(
        "--secret-of", metavar="TENANT", help="print the tenant's webhook secrets, newest first, and end"
    )
    tenant: str | None = parser.parse_args(arguments).secret_of
    try:
        settings = CourierSettings()
        if tenant is not None:
            secrets = secrets_of(checked_secrets(settings), tenant)
            if not secrets:
                return refuse("no webhook secret to derive one from: set DREAMSERVE_WEBHOOK_SECRETS", "courier")
            sys.stdout.writelines(f"{secret}\n" for secret in secrets)
            return 0
    except ValidationError as error:
        return refuse(describe_bad_settings(error), "courier")
    except SecretError as error:
        return refuse(str(error), "courier")
    return run_courier(settings)
