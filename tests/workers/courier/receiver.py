"""A receiver of webhooks, written from the specification and not from our code."""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import Mapping

TOLERANCE_S = 300


def verified(secret: str, headers: Mapping[str, str], body: bytes, *, now: float) -> bool:
    """Whether a message is from who holds the secret, and young."""
    second = headers["webhook-timestamp"]
    content = headers["webhook-id"].encode() + b"." + second.encode() + b"." + body
    mac = hmac.new(base64.b64decode(secret.split("_", 1)[1]), content, hashlib.sha256)
    expected = base64.b64encode(mac.digest()).decode()
    given = [entry.split(",", 1) for entry in headers["webhook-signature"].split(" ")]
    signed = any(version == "v1" and hmac.compare_digest(value, expected) for version, value in given)
    return signed and abs(now - int(second)) <= TOLERANCE_S
