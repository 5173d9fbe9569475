"""Webhooks: when they are sent, when again, and what receivers get over TLS."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from dataclasses import replace
from typing import Any

import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.urls import PUBLIC_HOST
from tests.workers.conftest import MakeJob
from tests.workers.courier.hosts import Answer, Host, Seen, World, always, said
from tests.workers.courier.receiver import verified
from tests.workers.ledgers import RESULT
from workers.books.values import Delivery
from workers.courier.egress import Caps, Reply
from workers.courier.signing import secrets_of
from workers.courier.webhooks import RETRIES_S, Settlement, WebhookSender, message, settle
from workers.courier.worker import Webhooks
from workers.jobs import CUSTOMIZE, Webhook
from workers.ledger import CustomizeLedger, Ledger

URL = f"https://{PUBLIC_HOST}/hook?token=canary"
SECRETS = ["whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "whsec_" + "A" * 43 + "="]
DAY_S = 86_400


@pytest.fixture
def ledger(client: redis.Redis) -> CustomizeLedger:
    return Ledger(client, CUSTOMIZE)


# The schedule


@given(st.lists(st.floats(0, 1, exclude_max=True), min_size=len(RETRIES_S), max_size=len(RETRIES_S)))
def test_attempts_end_while_the_record_lives(draws: list[float]) -> None:
    """Pauses grow, and all of them with the longest jitter, and every attempt timing out, fit into a day."""
    pauses = [settle(attempt, None, draw) for attempt, draw in enumerate(draws, 1)]
    assert {pause.kind for pause in pauses} == {"retry"}
    total = sum(pause.after_s for pause in pauses) + 15 * (len(pauses) + 1)
    assert 0.8 * DAY_S < total < DAY_S
    assert [pause.after_s for pause in pauses] == sorted(pause.after_s for pause in pauses)
    assert settle(len(RETRIES_S) + 1, None, 0.5) == Settlement("dead")


@given(st.integers(100, 599), st.integers(1, 11), st.floats(0, 1, exclude_max=True))
def test_only_success_and_gone_end_it_early(status: int, attempt: int, draw: float) -> None:
    """2xx is delivered, 410 says never again; redirects and everything else are failures."""
    kind = settle(attempt, Reply(status), draw).kind
    if 200 <= status < 300:
        assert kind == "done"
    elif status == 410:
        assert kind == "dead"
    else:
        assert kind == ("retry" if attempt < 11 else "dead")


def test_jitter_spreads_and_a_wish_is_granted_within_reason() -> None:
    """Retries of many do not come at once; Retry-After lengthens a pause, up to an hour, and never shortens it."""
    assert settle(5, None, 0.0).after_s < 0.95 * RETRIES_S[4] < 1.05 * RETRIES_S[4] < settle(5, None, 0.99).after_s
    assert settle(1, Reply(503, 120.0), 0.5).after_s == 120.0
    assert settle(1, Reply(503, 1e7), 0.5).after_s == 3600.0
    assert settle(8, Reply(429, 1.0), 0.5).after_s == RETRIES_S[7]


# The message


def ended(ledger: Ledger[Any, Any, Any], job_id: str, result: object) -> None:
    token = ledger.claim(job_id, "w")
    assert token
    assert ledger.commit(job_id, token, result)


def test_every_change_is_told_if_asked(ledger: CustomizeLedger, make_job: MakeJob) -> None:
    """`status` tells of each state once, in order, each with its own time; late ones do not claim the end."""
    ledger.accept(make_job("job_1", webhook=Webhook(URL, ("status", "terminal"))))
    ended(ledger, "job_1", RESULT)
    record = ledger.get("job_1")
    assert record
    due = ledger.due_webhooks()
    bodies = [json.loads(message(delivery, record)) for delivery in due]
    assert [body["type"] for body in bodies] == ["job.queued", "job.running", "job.succeeded"]
    assert len({delivery.id for delivery in due}) == 3
    assert [body["timestamp"] for body in bodies] == sorted(body["timestamp"] for body in bodies)
    assert bodies[1]["data"] == {
        "id": "job_1",
        "status": "running",
        "attempt": 1,
        "urls": {"self": "/v1/jobs/job_1"},
        "metadata": {},
    }


# Over the wire


def attempt(
    ledger: Ledger[Any, Any, Any], world: World, *, secrets: list[str] | None = None, total_s: float = 30.0
) -> Delivery:
    """Take the one message that is due, and settle it."""
    (delivery,) = ledger.due_webhooks()
    chosen = SECRETS if secrets is None else secrets
    caps = Caps(open_s=min(10.0, total_s), total_s=total_s, max_bytes=0, redirects=0)
    sender = WebhookSender(world.egress(), lambda tenant: secrets_of(chosen, tenant), caps)
    asyncio.run(Webhooks(ledger, sender, lambda: 0.5).handle(delivery))
    return delivery


def pause(client: redis.Redis, delivery: Delivery) -> float | None:
    """Seconds until the message is due again; None if it is settled."""
    due: Any = client.zscore(f"dreamserve:webhooks:{delivery.tenant}", delivery.id)
    seconds, micro = client.time()  # pyright: ignore[reportGeneralTypeIssues]  # sync client
    return None if due is None else due - (seconds + micro / 1e6)


def finished(ledger: CustomizeLedger, make_job: MakeJob, **changes: object) -> None:
    ledger.accept(make_job("job_1", webhook=Webhook(URL), **changes))
    ended(ledger, "job_1", RESULT)


def authentic(seen: Seen, *secrets: str) -> bool:
    return all(verified(secret, seen.headers, seen.body, now=time.time()) for secret in secrets)


async def hang(_seen: Seen, writer: asyncio.StreamWriter) -> None:
    await asyncio.Event().wait()


async def trickle(_seen: Seen, writer: asyncio.StreamWriter) -> None:
    while True:
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        await writer.drain()
        await asyncio.sleep(0.01)


BAD: dict[str, tuple[Answer, float]] = {
    "erring": (always(said(500)), 5.0),
    "refusing": (always(said(401)), 5.0),
    "redirecting": (always(said(308, b"", f"location: https://{PUBLIC_HOST}/elsewhere")), 5.0),
    "busy": (always(said(429, b"", "retry-after: 77")), 77.0),
    "silent": (hang, 5.0),
    "slow": (trickle, 5.0),
    "hanging up": (always(b""), 5.0),
    "not speaking HTTP": (always(b"220 mail.example ESMTP\r\n"), 5.0),
}


@pytest.mark.parametrize("receiver", BAD)
def test_a_bad_receiver_gets_it_again(
    client: redis.Redis, ledger: CustomizeLedger, make_job: MakeJob, receiver: str
) -> None:
    """Whatever it did: after the promised pause the same message comes with the same id, the same body, and a
    signature of its own; one that is taken comes no more.
    """
    answer, after_s = BAD[receiver]
    finished(ledger, make_job)
    with Host(answer) as bad:
        first = attempt(ledger, World(bad.port, 1), total_s=3.0 if answer in (hang, trickle) else 30.0)
        (before,) = bad.seen
    left = pause(client, first)
    assert left is not None
    assert after_s - 30 < left <= after_s
    ledger.webhook_retry(first.id, 0.0)  # time passes
    with Host(always(said(204))) as good:
        second = attempt(ledger, World(good.port, 1))
        (after,) = good.seen
    assert pause(client, second) is None
    assert ledger.due_webhooks() == []
    assert before.headers["webhook-id"] == after.headers["webhook-id"] == first.id
    assert (before.body, before.target) == (after.body, after.target)
    assert (first.attempt, second.attempt) == (1, 2)
    assert authentic(before, *SECRETS)
    assert authentic(after, *SECRETS)
    assert after.headers["content-type"] == "application/json"


def test_a_receiver_that_is_down_gets_it_later(client: redis.Redis, ledger: CustomizeLedger, make_job: MakeJob) -> None:
    """Nobody listens at first; later somebody does."""
    finished(ledger, make_job)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    first = attempt(ledger, World(port, 1))
    assert pause(client, first) is not None
    ledger.webhook_retry(first.id, 0.0)
    with Host(always(said())) as host:
        assert attempt(ledger, World(host.port, 1)).id == first.id
        assert [seen.headers["webhook-id"] for seen in host.seen] == [first.id]


def test_a_receiver_that_is_gone_is_left_alone(client: redis.Redis, ledger: CustomizeLedger, make_job: MakeJob) -> None:
    """410: never again."""
    finished(ledger, make_job)
    with Host(always(said(410))) as host:
        delivery = attempt(ledger, World(host.port, 1))
    assert pause(client, delivery) is None


def test_a_receiver_that_never_answers_is_given_up(
    client: redis.Redis, ledger: CustomizeLedger, make_job: MakeJob
) -> None:
    """After the last of the promised attempts, and not one earlier."""
    finished(ledger, make_job)
    pauses: list[float] = []
    with Host(always(said(500))) as host:
        while True:
            delivery = attempt(ledger, World(host.port, 1))
            left = pause(client, delivery)
            if left is None:
                break
            pauses.append(left)
            ledger.webhook_retry(delivery.id, 0.0)
        assert len(host.seen) == len(RETRIES_S) + 1
        assert len({seen.headers["webhook-id"] for seen in host.seen}) == 1
    assert all(promised - 20 < left <= promised for promised, left in zip(RETRIES_S, pauses, strict=True))


def test_an_inside_receiver_is_never_asked(client: redis.Redis, ledger: CustomizeLedger, make_job: MakeJob) -> None:
    """The guard stands before webhooks too, each time anew; to the ledger it looks like any receiver that is down."""
    finished(ledger, make_job)
    with Host(always(said())) as inside:
        world = World(1, inside.port)
        world.name(PUBLIC_HOST, ("10.0.0.1",))
        delivery = attempt(ledger, world)
        assert not inside.seen
        assert world.dialed == []
    assert pause(client, delivery) is not None


def test_tenants_verify_their_own(ledger: CustomizeLedger, make_job: MakeJob) -> None:
    """A tenant's messages are signed with its secrets, not with the operator's."""
    finished(ledger, make_job, tenant="a")
    with Host(always(said())) as host:
        attempt(ledger, World(host.port, 1))
        (seen,) = host.seen
    assert authentic(seen, *secrets_of(SECRETS, "a"))
    assert not authentic(seen, SECRETS[0])
    assert not authentic(seen, secrets_of(SECRETS, "b")[0])


def test_without_a_secret_nothing_is_sent(client: redis.Redis, ledger: CustomizeLedger, make_job: MakeJob) -> None:
    """An operator's slip is no reason to send what nobody can verify; the message waits for the slip to be mended."""
    finished(ledger, make_job)
    with Host(always(said())) as host:
        delivery = attempt(ledger, World(host.port, 1), secrets=[])
        assert not host.seen
    assert pause(client, delivery) is not None


def test_a_message_that_never_settles_ends(client: redis.Redis, ledger: CustomizeLedger, make_job: MakeJob) -> None:
    """A courier that dies each time it sends this one does not do so for ever."""
    finished(ledger, make_job)
    for _ in range(len(RETRIES_S) + 1):  # taken, and never heard of again
        (delivery,) = ledger.due_webhooks()
        ledger.webhook_retry(delivery.id, 0.0)
    with Host(always(said())) as host:
        delivery = attempt(ledger, World(host.port, 1))
        assert not host.seen
    assert pause(client, delivery) is None


def test_a_damaged_record_is_not_told_of(client: redis.Redis, ledger: CustomizeLedger, make_job: MakeJob) -> None:
    """What cannot be read is not told, and not tried for ever."""
    finished(ledger, make_job)
    client.hset("dreamserve:job:job_1", "job", "{}")
    with Host(always(said())) as host:
        delivery = attempt(ledger, World(host.port, 1))
        assert not host.seen
    assert pause(client, delivery) is None


def test_replays_can_be_told(ledger: CustomizeLedger, make_job: MakeJob) -> None:
    """The control of the receiver: a message kept for later, or changed on the way, does not verify."""
    finished(ledger, make_job)
    with Host(always(said())) as host:
        attempt(ledger, World(host.port, 1))
        (seen,) = host.seen
    assert authentic(seen, SECRETS[0])
    assert not verified(SECRETS[0], seen.headers, seen.body, now=time.time() + 301)
    assert not authentic(replace(seen, body=seen.body.replace(b"succeeded", b"canceled")), SECRETS[0])
