"""Messages of the courier, as who receives them believes them or not."""

from __future__ import annotations

import time
from typing import Any

import pytest

from service.client import WebhookError, verify_webhook
from tests.service.conftest import Bench, picture
from workers.courier.signing import SecretError, sign
from workers.courier.webhooks import message
from workers.jobs import CustomizeJob, Sampling, Webhook

OLD, NEW, OTHERS = ("whsec_" + letter * 32 for letter in "ABC")
ID = "msg_job_1_2"
BODY = b'{"type": "job.failed", "timestamp": "2026-11-21T17:43:27.512Z", "data": {"id": "job_1"}}'


def headers(body: bytes = BODY, secrets: tuple[str, ...] = (NEW,), age_s: int = 0) -> dict[str, str]:
    return sign(secrets, ID, int(time.time()) - age_s, body)


def test_the_published_vector() -> None:
    """The example that the libraries of Standard Webhooks are tested with; its body is not one of ours."""
    given = {
        "webhook-id": "msg_p5jXN8AQM9LWM0D4loKWxJek",
        "webhook-timestamp": "1614265330",
        "webhook-signature": "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
    }
    with pytest.raises(WebhookError) as caught:
        verify_webhook(given, b'{"test": 2432232314}', "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", tolerance_s=1e12)
    assert caught.value.code == "webhook_body", "the signature was taken"


def test_what_the_courier_sends_is_believed(bench: Bench) -> None:
    """A real message about a real job, with header names as a web framework may write them."""
    sampling = Sampling(16, 32, 2, 4.5, 4.5, 7)
    bench.ledger.accept(CustomizeJob("job_1", "unit", "a", "", (), sampling, webhook=Webhook("https://x.example")))
    bench.finish("job_1", picture())
    (delivery,) = bench.ledger.due_webhooks()
    record = bench.ledger.get("job_1")
    assert record is not None
    body = message(delivery, record)
    given = {name.title(): value for name, value in headers(body).items()}
    said = verify_webhook(given, body, NEW)
    assert (said.id, said.type, said.data["id"], said.data["status"]) == (ID, "job.succeeded", "job_1", "succeeded")


def test_while_a_secret_is_replaced() -> None:
    """The service signs with both, or the receiver knows both: either way no message is lost."""
    for signing, knowing in (((NEW, OLD), [OLD]), ((NEW, OLD), [NEW]), ((OLD,), [NEW, OLD]), ((NEW,), [NEW, OLD])):
        assert verify_webhook(headers(secrets=signing), BODY, knowing).id == ID


@pytest.mark.parametrize(
    ("changes", "body", "secrets", "code"),
    [
        ({}, BODY + b" ", NEW, "webhook_signature"),
        ({}, BODY, OTHERS, "webhook_signature"),
        ({"webhook-id": "msg_job_1_3"}, BODY, NEW, "webhook_signature"),
        ({"webhook-signature": "v1,AAAA v2,é"}, BODY, NEW, "webhook_signature"),
        ({"webhook-timestamp": "yesterday"}, BODY, NEW, "webhook_headers"),
        ({"webhook-timestamp": "9" * 5000}, BODY, NEW, "webhook_headers"),
        ({"webhook-timestamp": "²"}, BODY, NEW, "webhook_headers"),
        ({"webhook-signature": ""}, BODY, NEW, "webhook_headers"),
        ({"webhook-id": ""}, BODY, NEW, "webhook_headers"),
    ],
)
def test_what_is_not_believed(changes: dict[str, str], body: bytes, secrets: str, code: str) -> None:
    """Changed, of somebody else, or nothing of the kind; the control is the same, unchanged."""
    assert verify_webhook(headers(), BODY, NEW).type == "job.failed"
    with pytest.raises(WebhookError) as caught:
        verify_webhook(headers() | changes, body, secrets)
    assert caught.value.code == code


@pytest.mark.parametrize("by_s", [-1000, 1000])
def test_neither_old_nor_from_the_future(by_s: int) -> None:
    """A message that was kept is not believed later, whether signed for its time or told to be of another.

    Times are of the test, not of its collection: between the two a whole run may lie.
    """
    for given in (headers(age_s=-by_s), headers() | {"webhook-timestamp": str(int(time.time()) + by_s)}):
        with pytest.raises(WebhookError) as caught:
            verify_webhook(given, BODY, NEW)
        assert caught.value.code == "webhook_too_old"


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"type": 1, "timestamp": "x", "data": {}}', b"\xff"])
def test_signed_is_not_enough(body: bytes) -> None:
    """Signed with the right secret, and yet not a message of this service: an error, not a surprise further on."""
    with pytest.raises(WebhookError) as caught:
        verify_webhook(headers(body), body, NEW)
    assert caught.value.code == "webhook_body"


@pytest.mark.parametrize("secrets", ["", "secret", [], [NEW, "x"]])
def test_a_receiver_without_a_secret_believes_nothing(secrets: Any) -> None:
    """A setting that is missing must not let everything in."""
    with pytest.raises(SecretError):
        verify_webhook(headers(), BODY, secrets)
