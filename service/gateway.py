"""What every route works with: one frozen value, built once when the application is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import redis
from fastapi import Depends, Request

from model.spec import ModelSpec, load_spec
from service.adapters import Bases
from service.admission import Admission
from service.callers.auth import Door
from service.callers.limits import StepCost
from service.callers.places import Places, Room
from service.callers.turns import Turns
from service.events import Watcher
from service.metrics import GatewayMetrics
from service.readiness import Readiness
from service.reading import JobReader, Reader, TrainingReader
from service.records import DrainGauge
from service.settings import GatewaySettings
from service.trainings import TrainingAdmission
from workers import queues
from workers.artifacts import ArtifactStore
from workers.courier.addresses import Rules
from workers.jobs import CUSTOMIZE, TRAINING
from workers.ledger import CustomizeLedger, open_ledger
from workers.picture_process import PictureProver
from workers.pictures import PictureLimits
from workers.references import References
from workers.registry import Registry
from workers.telemetry.tracing import Tracing
from workers.tenants import SOLE_TENANT, TenantBook


@dataclass(frozen=True, slots=True)
class Gateway:
    """Connections, limits and the model's spec.

    `decoding` bounds how many bodies are unfolded at once, `bodies` what they take until then; `submissions`, `waits`
    and `streams` what one tenant has in hand.
    """

    settings: GatewaySettings
    spec: ModelSpec
    redis: redis.Redis
    door: Door
    ledger: CustomizeLedger
    store: ArtifactStore
    references: References
    admission: Admission
    trainings: TrainingAdmission
    registry: Registry
    decoding: Turns
    bodies: Room
    submissions: Places
    waits: Places
    streams: Places
    watcher: Watcher
    training_watcher: Watcher
    reader: JobReader
    training_reader: TrainingReader
    gauge: DrainGauge
    training_gauge: DrainGauge
    metrics: GatewayMetrics
    tracing: Tracing
    readiness: Readiness

    def pace(self, tenant: str) -> int | None:
        """How many of a tenant's jobs, or trainings, are accepted within an hour; None: any number."""
        return None if tenant == SOLE_TENANT else self.settings.tenant_acceptances or None

    def let_go(self) -> None:
        """The process is about to end: who waits or listens goes, to come back to another. From any thread."""
        self.watcher.leave_soon()
        self.training_watcher.leave_soon()


def open_gateway(settings: GatewaySettings, tracing: Tracing) -> Gateway:
    """Everything but the network: Redis and the store are first touched by a request.

    Raises:
        ValueError: no Redis is configured.
        WeightsError: the model's configuration is missing or wrong.
    """
    if settings.redis_url is None:
        raise ValueError("set DREAMSERVE_REDIS_URL, or start everything with `dreamserve serve`")
    spec = load_spec(settings.base_model, version=settings.version, turbo=settings.turbo)
    client = queues.connect(settings.redis_url, timeout_s=settings.redis_timeout_s)
    ledger = open_ledger(client, CUSTOMIZE, settings)
    admission = _admission(settings, spec, client, ledger)
    trainings = TrainingAdmission(
        settings, open_ledger(client, TRAINING, settings), admission.webhooks, settings.training_sample_s
    )
    gauge, training_gauge = DrainGauge(ledger), DrainGauge(trainings.ledger)
    metrics = GatewayMetrics.fresh()
    metrics.watch({CUSTOMIZE.queue: ledger, TRAINING.queue: trainings.ledger}, tenants=settings.metrics_tenants)
    return Gateway(
        settings=settings,
        spec=spec,
        redis=client,
        door=Door(TenantBook(client), settings.auth, settings.host),
        ledger=ledger,
        store=admission.store,
        references=admission.references,
        admission=admission,
        trainings=trainings,
        registry=admission.registry,
        decoding=Turns(settings.admissions),
        bodies=Room(settings.bodies_mib << 20),
        submissions=Places(settings.tenant_submissions),
        waits=Places(settings.tenant_waits),
        streams=Places(settings.tenant_streams),
        watcher=Watcher(ledger),
        training_watcher=Watcher(trainings.ledger),
        reader=Reader(ledger, gauge),
        training_reader=Reader(trainings.ledger, training_gauge),
        gauge=gauge,
        training_gauge=training_gauge,
        metrics=metrics,
        tracing=tracing,
        readiness=Readiness(client, admission.store, settings.store_reserve_mib << 20),
    )


def _admission(settings: GatewaySettings, spec: ModelSpec, client: redis.Redis, ledger: CustomizeLedger) -> Admission:
    store = ArtifactStore(settings.artifact_root, settings.store_reserve_mib << 20)
    rules = Rules.of(settings)
    return Admission(
        spec,
        PictureProver(PictureLimits()),
        store,
        ledger,
        References(client, store, settings.reference_ttl_s),
        Registry(settings.adapter_root),
        Bases(client),
        rules=rules,
        webhooks=rules if settings.webhook_secrets else None,
        step=StepCost(settings.step_token_s, settings.step_square_s),
    )


async def _gateway(request: Request) -> Gateway:  # a plain function would take a thread
    return request.app.state.gateway


GatewayDependency = Annotated[Gateway, Depends(_gateway)]
