"""What the gateway is told from outside: each field is an environment variable prefixed DREAMSERVE_."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from workers.settings import QueueSettings


class GatewaySettings(QueueSettings):
    """Built once per process and passed down.

    Attributes:
        port: 0 lets the system choose.
        max_body_bytes: of one request; nine references of the largest size do not fit, and need not.
        body_timeout_s: time for a body to arrive.
        admissions: requests whose pictures are decoded at the same time; each may take a few hundred MiB.
        redis_timeout_s: for each answer of Redis; then 503.
    """

    host: str = "127.0.0.1"
    port: int = Field(default=8080, ge=0, le=65535)
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    max_body_bytes: int = Field(default=64 * 2**20, gt=0)
    body_timeout_s: float = Field(default=30.0, gt=0)
    admissions: int = Field(default=2, gt=0)
    redis_timeout_s: float = Field(default=2.0, gt=0)
