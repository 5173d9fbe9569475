"""Whose request it is: an API key's tenant, or the only tenant where no keys are asked for.

DREAMSERVE_AUTH   auto   keys, unless none was ever made and only this machine can connect
                  keys   always
                  off    never: something in front of the gateway lets only the right ones through
"""

from __future__ import annotations

import ipaddress
import time
from typing import Annotated, Literal

from anyio import to_thread
from fastapi import Depends, Request

from service.problems import Problem
from workers.tenants import SOLE_TENANT, KeyEntry, TenantBook, id_of

Auth = Literal["auto", "keys", "off"]

REMEMBER_S = 3.0
"""How long an answer of Redis counts; a revoked key must be refused within 5 s."""

OPEN_TO_OTHERS = (
    "there are no API keys, and others can reach this address: make one with `dreamserve keys create TENANT`, "
    "or set DREAMSERVE_AUTH=off if something in front of it authenticates callers"
)


def exposed(host: str) -> bool:
    """Whether an address can be reached from other machines; a name other than localhost counts as if it can."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host != "localhost"
    return not (getattr(address, "ipv4_mapped", None) or address).is_loopback


def refuses_to_open(auth: Auth, host: str, book: TenantBook) -> bool:
    """Whether serving on `host` would be of no use or open to strangers; say `OPEN_TO_OTHERS` then.

    Raises:
        redis.exceptions.RedisError: Redis is away.
    """
    return auth == "auto" and exposed(host) and not book.any_keys()


class Door:
    """Tells tenants by their keys; remembers what Redis said for a moment. One per process.

    Args:
        host: the address that the gateway listens on.
        remember_s: how long an answer of Redis counts.
    """

    def __init__(self, book: TenantBook, auth: Auth, host: str, remember_s: float = REMEMBER_S) -> None:
        self.book = book
        self.auth = auth
        self.remember_s = remember_s
        self._always = auth == "keys" or exposed(host)
        self._asked: tuple[float, bool] = (float("-inf"), True)
        self._entries: dict[str, tuple[float, KeyEntry]] = {}
        self._shares: tuple[float, dict[str, float]] = (float("-inf"), {})

    def remembers(self, authorization: str | None) -> bool:
        """Whether `tenant` can tell without asking Redis, which takes a thread."""
        now = time.monotonic()
        if self.auth == "off":
            return True
        if not self._always:
            until, asks = self._asked
            if now >= until or not asks:
                return now < until
        key_id = id_of(_key_of(authorization))
        return key_id is None or now < self._entries.get(key_id, (float("-inf"), None))[0]

    def tenant(self, authorization: str | None, peer: str | None) -> str:
        """Whose request it is.

        Args:
            authorization: that header. peer: address of the other end, if it has one.

        Raises:
            Problem: `unauthenticated`.
            redis.exceptions.RedisError: Redis is away.
        """
        if self.auth == "off":
            return SOLE_TENANT
        if not self._asks_for_keys():
            if peer is not None and _elsewhere(peer):  # bound otherwise than the settings say
                raise _unauthenticated("")
            return SOLE_TENANT
        if not authorization:
            raise _unauthenticated("")
        key = _key_of(authorization)
        entry = self._entry(key)
        if entry is None or not entry.fits(key):
            raise _unauthenticated(', error="invalid_token"')
        return entry.tenant

    def share(self, tenant: str, default: float) -> float | None:
        """GPU-seconds that a tenant may have open: what it was given, else the default; none for the operator's own."""
        until, shares = self._shares
        if time.monotonic() >= until:
            asked_at, shares = time.monotonic(), self.book.shares()
            self._shares = (asked_at + self.remember_s, shares)
        return shares.get(tenant, None if tenant == SOLE_TENANT else default)

    def _asks_for_keys(self) -> bool:
        if self._always:
            return True
        until, asks = self._asked
        if time.monotonic() >= until:
            asked_at, asks = time.monotonic(), self.book.any_keys()
            self._asked = (asked_at + self.remember_s, asks)
        return asks

    def _entry(self, key: str) -> KeyEntry | None:
        """What is kept of a key. Only what exists is remembered: strangers cannot fill the memory."""
        key_id = id_of(key)
        if key_id is None:
            return None
        until, entry = self._entries.get(key_id, (float("-inf"), None))
        if time.monotonic() >= until:
            asked_at = time.monotonic()
            entry = self.book.entry(key_id)
            if entry is None:
                self._entries.pop(key_id, None)
            else:
                self._entries[key_id] = (asked_at + self.remember_s, entry)
        return entry


async def tenant_of(request: Request) -> str:
    """The tenant of a request; a dependency of every route under /v1.

    Raises:
        Problem: `unauthenticated`.
        redis.exceptions.RedisError: Redis is away.
    """
    door: Door = request.app.state.gateway.door
    peer = request.client.host if request.client else None
    authorization = request.headers.get("authorization")
    if door.remembers(authorization):
        return door.tenant(authorization, peer)
    return await to_thread.run_sync(door.tenant, authorization, peer)


TenantDependency = Annotated[str, Depends(tenant_of)]


def _key_of(authorization: str | None) -> str:
    """The key in that header; empty if it holds none."""
    scheme, _, key = (authorization or "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


def _elsewhere(peer: str) -> bool:
    """Whether the other end has an address, and not one of this machine; a unix socket has none."""
    try:
        ipaddress.ip_address(peer)
    except ValueError:
        return False
    return exposed(peer)


def _unauthenticated(error: str) -> Problem:
    return Problem("unauthenticated", headers={"WWW-Authenticate": f'Bearer realm="dreamserve"{error}'})
