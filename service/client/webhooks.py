"""Webhooks on their way in: whether a message is from the service, whole and new (Standard Webhooks 1.0)."""

from __future__ import annotations

import hmac
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

from service.client.errors import WebhookError
from workers.courier.signing import sign

TOLERANCE_S: Final = 300.0


@dataclass(frozen=True, slots=True)
class WebhookMessage:
    """A message of the service.

    Attributes:
        id: the same whenever this message is sent again; keep those you have acted on.
        type: `job.succeeded`, `job.failed`, `training.succeeded`, …
        timestamp: of the change, ISO 8601.
        data: the job or training as `GET` shows it, without prompt or recipe.
    """

    id: str
    type: str
    timestamp: str
    data: dict[str, Any]


def verify_webhook(
    headers: Mapping[str, str], body: bytes, secrets: str | Sequence[str], *, tolerance_s: float = TOLERANCE_S
) -> WebhookMessage:
    """The message that was received, if one of the secrets signs it and it was sent just now.

    Args:
        headers: of the request, in any case.
        body: its bytes as they came: JSON that was read and written again is not what was signed.
        secrets: `whsec_…`; several while one is replaced.
        tolerance_s: how far the clocks may be apart, either way.

    Raises:
        WebhookError: `webhook_headers`, `webhook_too_old`, `webhook_signature`, `webhook_body`.
        workers.courier.signing.SecretError: a secret is none.
    """
    given = {name.lower(): value for name, value in headers.items()}
    message_id, sent, signatures = (given.get(f"webhook-{name}", "") for name in ("id", "timestamp", "signature"))
    if not (message_id and signatures and sent.isascii() and sent.isdecimal() and len(sent) < 16):
        raise WebhookError("webhook_headers", "not a message of Standard Webhooks")
    if abs(time.time() - int(sent)) > tolerance_s:
        raise WebhookError("webhook_too_old", "sent too long ago, or by a clock that is wrong")
    keys = [secrets] if isinstance(secrets, str) else list(secrets)
    expected = sign(keys, message_id, int(sent), body)["webhook-signature"].split()
    if not any(_same(one, other) for one in signatures.split() for other in expected):
        raise WebhookError("webhook_signature", "signed with none of the secrets")
    return _read(message_id, body)


def _same(one: str, other: str) -> bool:
    return hmac.compare_digest(one.encode(), other.encode())


def _read(message_id: str, body: bytes) -> WebhookMessage:
    try:
        said: object = json.loads(body)
    except ValueError:
        said = None
    fields = cast("dict[str, Any]", said) if isinstance(said, dict) else {}
    kind, timestamp, data = (fields.get(name) for name in ("type", "timestamp", "data"))
    if not (isinstance(kind, str) and isinstance(timestamp, str) and isinstance(data, dict)):
        raise WebhookError("webhook_body", "signed, but not a message of this service")
    return WebhookMessage(message_id, kind, timestamp, cast("dict[str, Any]", data))
