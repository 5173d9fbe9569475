"""What the gateway is told from outside: each field is an environment variable prefixed DREAMSERVE_."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from service.callers.limits import StepCost
from workers.settings import QueueSettings


class GatewaySettings(QueueSettings):
    """Built once per process and passed down.

    Attributes:
        auth: who may call; see `auth`.
        port: 0 lets the system choose.
        max_body_bytes: of one request; nine references of the largest size do not fit, and need not.
        body_timeout_s: time for a body to arrive.
        bodies_mib: what the bodies of jobs and trainings that are not accepted yet may take together, one of unknown
            length as much as it may have; a tenant has at most half, `default` all. At least two of the longest.
        admissions: requests whose pictures are decoded at the same time; each may take a few hundred MiB.
        share_s: estimated GPU-seconds that a tenant without a share of its own may have waiting and running; the
            operator's own tenant, `default`, has no such limit.
        bound_s: what all may have together.
        training_sample_s: seconds of the device that a training's sample is estimated to take (README: FLUX.1-dev at
            1024² on an H200). A tenant's trainings count against its share by themselves, apart from its jobs.
        tenant_submissions, tenant_waits, tenant_streams: requests with a body (jobs, trainings, pictures), answers that
            wait for a job, and event streams that a tenant may have in hand here at a time; `default` has no limit.
        tenant_acceptances: jobs, and trainings, of a tenant that are accepted within an hour, however they end: each is
            kept in Redis for job_ttl_s; 0: any number; `default` has no limit.
        step_token_s, step_square_s: seconds of a denoise step per token and per token²; see `limits`.
        redis_timeout_s: for each answer of Redis; then 503.
        drain_s: after SIGTERM, how long it goes on answering while /readyz says no: as long as whoever sends requests
            here takes to notice.
        metrics_tenants: whether metrics name tenants.
    """

    auth: Literal["auto", "keys", "off"] = "auto"
    host: str = "127.0.0.1"
    port: int = Field(default=8080, ge=0, le=65535)
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    max_body_bytes: int = Field(default=64 * 2**20, gt=0)
    body_timeout_s: float = Field(default=30.0, gt=0)
    bodies_mib: int = Field(default=512, gt=0)
    admissions: int = Field(default=2, gt=0)
    share_s: float = Field(default=3600.0, gt=0)
    bound_s: float = Field(default=14_400.0, gt=0)
    training_sample_s: float = Field(default=0.65, gt=0)
    tenant_submissions: int = Field(default=32, ge=1)
    tenant_waits: int = Field(default=256, ge=1)
    tenant_streams: int = Field(default=256, ge=1)
    tenant_acceptances: int = Field(default=5_000, ge=0)
    step_token_s: float = Field(default=StepCost.token, ge=0)
    step_square_s: float = Field(default=StepCost.square, ge=0)
    redis_timeout_s: float = Field(default=2.0, gt=0)
    drain_s: float = Field(default=0.0, ge=0)
    metrics_tenants: bool = False

    @field_validator("bodies_mib")
    @classmethod
    def _holds_two(cls, mib: int, info: ValidationInfo) -> int:
        """In less, a body that is not too long would be refused for ever."""
        if (mib << 20) < 2 * info.data.get("max_body_bytes", 0):
            raise ValueError("less than two bodies of DREAMSERVE_MAX_BODY_BYTES")
        return mib
