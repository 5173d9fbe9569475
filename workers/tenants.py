"""Tenants and their API keys, in Redis: of a key only its SHA-256 is kept. No torch.

    dreamserve_<id>_<secret>    id: 12 hex digits, public; secret: 32 random bytes, base64url

Keys under one root: hash `keys` (id → entry as JSON, revoked ones too), hash `shares` (tenant → GPU-seconds).
A plain SHA-256 is enough for a secret of 256 random bits: there is nothing to guess.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from pydantic import TypeAdapter, ValidationError

if TYPE_CHECKING:
    import redis  # who only calls the service verifies its webhooks without one

ROOT: Final = "dreamserve:"
SOLE_TENANT: Final = "default"
"""Whose everything is where no keys are asked for."""
NAME: Final = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?")

_KEY = re.compile(r"dreamserve_([0-9a-f]{12})_([A-Za-z0-9_-]{43})")


@dataclass(frozen=True, slots=True)
class KeyEntry:
    """What is kept of a key. `sha256`: of the whole key, hex. Times are Unix seconds by Redis' clock."""

    id: str
    tenant: str
    sha256: str
    created_at: float
    revoked_at: float | None = None

    def fits(self, key: str) -> bool:
        """Whether this is the entry of `key` and it still opens; takes the same time for any wrong key."""
        return hmac.compare_digest(_digest(key), self.sha256) and self.revoked_at is None


_ENTRY = TypeAdapter(KeyEntry)


class TenantBook:
    """Who may call, and how much of the service may be theirs."""

    def __init__(self, redis: redis.Redis) -> None:
        self.redis = redis

    def create_key(self, tenant: str) -> str:
        """A new key of a tenant, who need not be known before. It is shown once: nobody can read it back.

        Raises:
            ValueError: the tenant's name is not one.
        """
        _check(tenant)
        key = f"dreamserve_{secrets.token_hex(6)}_{secrets.token_urlsafe(32)}"
        self._write(KeyEntry(key.split("_")[1], tenant, _digest(key), self._now()))
        return key

    def revoke(self, key_id: str) -> bool:
        """Close a key for good; False if there is none of this id. Its entry stays, as a memory of it."""
        entry = self.entry(key_id)
        if entry is None:
            return False
        if entry.revoked_at is None:
            self._write(replace(entry, revoked_at=self._now()))
        return True

    def entries(self) -> list[KeyEntry]:
        """All entries, oldest first."""
        raw: dict[Any, Any] = self.redis.hgetall(f"{ROOT}keys")  # pyright: ignore[reportAssignmentType]  # sync client
        entries = [entry for entry in map(_read, raw.values()) if entry is not None]
        return sorted(entries, key=lambda entry: entry.created_at)

    def entry(self, key_id: str) -> KeyEntry | None:
        """What is kept of one key, revoked or not."""
        raw: Any = self.redis.hget(f"{ROOT}keys", key_id)
        return None if raw is None else _read(raw)

    def any_keys(self) -> bool:
        """Whether a key was ever made: who once asked for keys does not fall back to none by revoking them."""
        return bool(self.redis.hlen(f"{ROOT}keys"))

    def set_share(self, tenant: str, seconds: float) -> None:
        """Let a tenant have so many estimated GPU-seconds waiting and running.

        Raises:
            ValueError: the tenant's name is not one.
        """
        _check(tenant)
        self.redis.hset(f"{ROOT}shares", tenant, repr(float(seconds)))

    def shares(self) -> dict[str, float]:
        """GPU-seconds of each tenant that has a share of its own."""
        raw: dict[Any, Any] = self.redis.hgetall(f"{ROOT}shares")  # pyright: ignore[reportAssignmentType]  # sync client
        return {_text(tenant): float(_text(seconds)) for tenant, seconds in raw.items()}

    def _write(self, entry: KeyEntry) -> None:
        self.redis.hset(f"{ROOT}keys", entry.id, _ENTRY.dump_json(entry).decode())

    def _now(self) -> float:
        seconds, microseconds = self.redis.time()  # pyright: ignore[reportGeneralTypeIssues]  # sync client
        return float(seconds) + float(microseconds) / 1e6


def id_of(key: str) -> str | None:
    """The public part of a key; None for what cannot be one, so that nobody need be asked."""
    match = _KEY.fullmatch(key)
    return match[1] if match else None


def _check(tenant: str) -> None:
    if not NAME.fullmatch(tenant):
        raise ValueError("a tenant's name has lowercase letters, digits, `.`, `_` and `-`, at most 64")


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def _read(raw: Any) -> KeyEntry | None:
    """A damaged entry opens nothing and hides no other."""
    try:
        return _ENTRY.validate_json(raw)
    except ValidationError:
        return None


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
