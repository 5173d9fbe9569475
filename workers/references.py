"""Uploaded references: what is known of each, by tenant and id, and the news of those that were deleted.

The bytes lie in the artifact store by tenant and sha256; here is what the gateway shows of them, in Redis, until it
expires. An id follows from tenant and bytes through a secret that never leaves Redis and the gateways: the same upload
has the same id, and nobody can compute another tenant's, even of a picture that he has. No torch.

    deleting: the file ─▶ a purge for all workers' caches ─▶ the entry; one that breaks off can be done again
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

import redis
from pydantic import TypeAdapter, ValidationError

from workers.artifacts import ArtifactError, ArtifactStore
from workers.picture_headers import Format

ID: Final = re.compile(r"ref_[0-9a-f]{32}")

_ID_KEY: Final = "dreamserve:references:key"
_PURGES: Final = "dreamserve:references:purges"
_KEPT_PURGES: Final = 10_000
_READ_AT_ONCE: Final = 1000


@dataclass(frozen=True, slots=True)
class UploadedReference:
    """A picture that can be named by its id. Width and height are pixels, upright; times Unix seconds by Redis' clock.

    `expires_at` is later after each use.
    """

    id: str
    sha256: str
    format: Format
    width: int
    height: int
    size: int
    created_at: float
    expires_at: float


_ENTRY = TypeAdapter(UploadedReference)


class References:
    """All tenants' uploaded references.

    Args:
        ttl_s: how long one stays after its last use.
    """

    def __init__(self, redis: redis.Redis, store: ArtifactStore, ttl_s: int) -> None:
        self.redis = redis
        self.store = store
        self.ttl_s = ttl_s

    def add(
        self, tenant: str, sha256: str, format: Format, size: tuple[int, int], nbytes: int
    ) -> tuple[UploadedReference, bool]:
        """Make a stored picture known.

        Args:
            size: height and width, upright.

        Returns:
            What is known of it from now on, and whether it was not before.

        Raises:
            redis.exceptions.RedisError: Redis is away.
        """
        ref_id = self._id(tenant, sha256)
        before = self._entry(tenant, ref_id)
        now = self._now()
        height, width = size
        created_at = before.created_at if before else now
        entry = UploadedReference(
            ref_id, sha256, format, width, height, nbytes, created_at=created_at, expires_at=now + self.ttl_s
        )
        self._write(tenant, entry)
        return entry, before is None

    def find(self, tenant: str, ref_id: str, *, renew: bool = False) -> UploadedReference | None:
        """What is known of a tenant's reference; None if there is none, or none any more.

        Args:
            renew: it is used: it, and its file, stay as long again from now.

        Raises:
            ArtifactError: `storage_unavailable`.
            redis.exceptions.RedisError: Redis is away.
        """
        entry = self._entry(tenant, ref_id)
        if entry is None:
            return None
        try:
            if not renew:
                self.store.require(tenant, entry.sha256)
                return entry
            self.store.renew(tenant, entry.sha256)
        except ArtifactError as error:
            if error.code != "artifact_missing":
                raise
            return None
        renewed = replace(entry, expires_at=self._now() + self.ttl_s)
        # Only if it is still there: one that was deleted meanwhile stays deleted.
        return renewed if self._write(tenant, renewed, only_known=True) else None

    def delete(self, tenant: str, ref_id: str) -> bool:
        """Remove a tenant's reference, its file and what workers keep of it; False if there is none.

        It is the bytes that go, however a job of this tenant came to name them: who asks for a picture to be deleted
        does not mean one of its names. Jobs that have read them go on; those that come to them later fail with
        `artifact_missing`, and can be submitted again with the picture.

        Raises:
            ArtifactError: `storage_unavailable`: it is still there.
            redis.exceptions.RedisError: Redis is away; it may be half gone, and can be deleted again.
        """
        entry = self._entry(tenant, ref_id)
        if entry is None:
            return False
        self.store.delete(tenant, entry.sha256)
        self.redis.xadd(_PURGES, {"tenant": tenant, "sha256": entry.sha256}, maxlen=_KEPT_PURGES)
        self.redis.delete(_key(tenant, ref_id))
        return True

    def _entry(self, tenant: str, ref_id: str) -> UploadedReference | None:
        if not ID.fullmatch(ref_id):
            return None
        raw: Any = self.redis.get(_key(tenant, ref_id))
        try:
            return None if raw is None else _ENTRY.validate_json(raw)
        except ValidationError:
            return None  # damaged: to be uploaded again

    def _write(self, tenant: str, entry: UploadedReference, *, only_known: bool = False) -> bool:
        ttl_ms = self.ttl_s * 1000
        return bool(self.redis.set(_key(tenant, entry.id), _ENTRY.dump_json(entry), px=ttl_ms, xx=only_known))

    def _id(self, tenant: str, sha256: str) -> str:
        self.redis.set(_ID_KEY, secrets.token_bytes(32), nx=True)
        secret: Any = self.redis.get(_ID_KEY)
        return f"ref_{hmac.new(secret, f'{sha256} {tenant}'.encode(), hashlib.sha256).hexdigest()[:32]}"

    def _now(self) -> float:
        seconds, microseconds = self.redis.time()  # pyright: ignore[reportGeneralTypeIssues]  # sync client
        return float(seconds) + float(microseconds) / 1e6


class Purges:
    """The deletions that a worker has not heard of yet. One that is lost is caught when the picture is asked for."""

    def __init__(self, redis: redis.Redis) -> None:
        self.redis = redis
        self._heard = b"0"  # what was deleted before this worker began is not in its caches: hearing it does no harm

    def pass_on(self, purge: Callable[[str, str], object]) -> None:
        """Call `purge(tenant, sha256)` for each deletion since the last time.

        Raises:
            redis.exceptions.RedisError: Redis is away; the next call catches up.
        """
        streams: Any = self.redis.xread({_PURGES: self._heard}, count=_READ_AT_ONCE)
        for entry_id, fields in streams[0][1] if streams else ():
            purge(fields[b"tenant"].decode(), fields[b"sha256"].decode())
            self._heard = entry_id


def _key(tenant: str, ref_id: str) -> str:
    return f"dreamserve:reference:{ref_id}:{tenant}"
