"""The adapter that a request names: which version of it, and how much."""

from __future__ import annotations

import time

import redis

from service.problems import TABLE, Fault
from service.schemas import AdapterBody
from workers import queues
from workers.jobs import CUSTOMIZE, AdapterUse
from workers.registry import Registry, RegistryError

LARGEST_SCALE = 2.0
REMEMBER_S = 2.0
"""How long the workers' answer counts."""


class Bases:
    """The base models that workers serve, asked for every few seconds at most."""

    def __init__(self, client: redis.Redis, remember_s: float = REMEMBER_S) -> None:
        self.client = client
        self.remember_s = remember_s
        self._known: tuple[float, frozenset[str]] = (float("-inf"), frozenset())

    def served(self) -> frozenset[str]:
        """Their fingerprints; none where nobody can tell: no worker was heard of lately, or one does not say.

        One that loads does not say yet, and one that stops takes no more jobs.

        Raises:
            redis.exceptions.RedisError: Redis is away.
        """
        until, bases = self._known
        if time.monotonic() >= until:
            cards = [card for card in queues.workers(self.client, CUSTOMIZE) if card.get("state") != "stopping"]
            said: list[str] = [base for card in cards if (base := card.get("base"))]
            bases = frozenset(said) if len(said) == len(cards) else frozenset[str]()
            self._known = (time.monotonic() + self.remember_s, bases)
        return bases


def adapter_use(body: AdapterBody | None, registry: Registry, bases: Bases, faults: list[Fault]) -> AdapterUse | None:
    """The version that a job will use; None if there is none, or with a fault.

    Unless the request names one, it is the newest that is made for a base that is served. What nobody knows now, the
    worker decides.

    Args:
        registry: as the job's tenant sees it.

    Raises:
        redis.exceptions.RedisError: Redis is away.
    """
    if body is None:
        return None
    if abs(body.scale) > LARGEST_SCALE:
        detail = f"Use {-LARGEST_SCALE:g} to {LARGEST_SCALE:g}."
        faults.append(Fault("/adapter/scale", "adapter_scale_out_of_range", detail))
    served = bases.served()
    try:
        adapter = registry.locate(body.name, body.version, served)
    except RegistryError as error:
        known = body.version is not None and registry.versions(body.name)
        faults.append(Fault("/adapter/version" if known else "/adapter/name", error.code, error.message))
        return None
    if not adapter.fits(served):
        pointer = "/adapter/name" if body.version is None else "/adapter/version"
        faults.append(Fault(pointer, "adapter_mismatch", TABLE["adapter_mismatch"].meaning))
        return None
    return AdapterUse(adapter.name, adapter.version, body.scale)
