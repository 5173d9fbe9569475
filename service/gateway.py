"""What every route works with: one frozen value, built once when the application is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import anyio
import redis
from fastapi import Depends, Request

from model.spec import ModelSpec, load_spec
from service.admission import Admission
from service.settings import GatewaySettings
from service.trainings import TrainingAdmission
from workers import queues
from workers.artifacts import ArtifactStore
from workers.jobs import CUSTOMIZE, TRAINING
from workers.ledger import CustomizeLedger, Ledger
from workers.pictures import PictureLimits
from workers.registry import Registry


@dataclass(frozen=True, slots=True)
class Gateway:
    """Connections, limits and the model's spec. `decoding` bounds how many bodies are unfolded at once."""

    settings: GatewaySettings
    spec: ModelSpec
    redis: redis.Redis
    ledger: CustomizeLedger
    store: ArtifactStore
    admission: Admission
    trainings: TrainingAdmission
    registry: Registry
    decoding: anyio.CapacityLimiter


def open_gateway(settings: GatewaySettings) -> Gateway:
    """Everything but the network: Redis and the store are first touched by a request.

    Raises:
        ValueError: no Redis is configured.
        WeightsError: the model's configuration is missing or wrong.
    """
    if settings.redis_url is None:
        raise ValueError("set DREAMSERVE_REDIS_URL, or start everything with `dreamserve serve`")
    spec = load_spec(settings.base_model, version=settings.version, turbo=settings.turbo)
    client = queues.connect(settings.redis_url, timeout_s=settings.redis_timeout_s)
    ledger = Ledger(client, CUSTOMIZE, job_ttl_s=settings.job_ttl_s, lease_s=settings.lease_s)
    store = ArtifactStore(settings.artifact_root)
    admission = Admission(spec, PictureLimits(), store, ledger)
    trainings = TrainingAdmission(
        settings, Ledger(client, TRAINING, job_ttl_s=settings.job_ttl_s, lease_s=settings.lease_s)
    )
    registry = Registry(settings.adapter_root)
    limiter = anyio.CapacityLimiter(settings.admissions)
    return Gateway(settings, spec, client, ledger, store, admission, trainings, registry, limiter)


def _gateway(request: Request) -> Gateway:
    return request.app.state.gateway


GatewayDependency = Annotated[Gateway, Depends(_gateway)]
