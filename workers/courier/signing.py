"""Signatures of webhooks, as Standard Webhooks 1.0 has them (https://www.standardwebhooks.com).

    v1,base64(HMAC-SHA256(secret, "{id}.{timestamp}.{body}"))

While a secret is being replaced there are several; a receiver takes a message that any of them signs.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections.abc import Sequence
from typing import Final

from workers.tenants import SOLE_TENANT

_PREFIX: Final = "whsec_"


class SecretError(ValueError):
    """Not a webhook secret; the message holds nothing of it."""


def read_secret(text: str) -> bytes:
    """The key in a secret: `whsec_` and 24 to 64 bytes in base64.

    Raises:
        SecretError: it is none.
    """
    try:
        key = base64.b64decode(text.removeprefix(_PREFIX).encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError):
        key = b""
    if not text.startswith(_PREFIX) or not 24 <= len(key) <= 64:
        raise SecretError(f"a webhook secret is {_PREFIX} and 24 to 64 random bytes in base64")
    return key


def sign(secrets: Sequence[str], message_id: str, timestamp: int, body: bytes) -> dict[str, str]:
    """The three headers of a message, signed with every secret, in their order.

    Args:
        timestamp: Unix second of this attempt.

    Raises:
        SecretError: one of them is none, or there is none.
    """
    if not secrets:
        raise SecretError("no webhook secret")
    content = f"{message_id}.{timestamp}.".encode() + body
    digests = [hmac.digest(read_secret(secret), content, hashlib.sha256) for secret in secrets]
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": " ".join(f"v1,{base64.b64encode(digest).decode()}" for digest in digests),
    }


def secrets_of(secrets: Sequence[str], tenant: str) -> tuple[str, ...]:
    """A tenant's own secrets: the configured ones for the sole tenant, for others one derived from each.

    So no tenant can sign for another, and nothing has to be stored.

    Raises:
        SecretError: a configured one is none.
    """
    if tenant == SOLE_TENANT:
        return tuple(secrets)
    name = f"dreamserve webhooks of {tenant}".encode()
    keys = (hmac.digest(read_secret(secret), name, hashlib.sha256) for secret in secrets)
    return tuple(_PREFIX + base64.b64encode(key).decode() for key in keys)
