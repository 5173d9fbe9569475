"""Configuration from the environment, read once by each entry point and passed down frozen. No torch.

Every variable starts with `DREAMSERVE_`; an empty one counts as absent. The gateway's settings extend
`QueueSettings`, so that it and the workers agree on Redis, state directory and model.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

SHIPPED_MODEL = str(files("model") / "tiny")
"""The small model that comes with the package."""


class QueueSettings(BaseSettings):
    """What gateway and workers share.

    Attributes:
        redis_url: `redis://`, `rediss://` or `unix://`; None means the server that `redis_process` starts.
        state_dir: artifacts and, without an external Redis, its data.
        base_model: directory in diffusers layout, or a hub id.
        version: which released stack; `main` is the main file alone, as training writes it. None: the base's own.
        turbo: whether the Turbo adapter is in the stack.
        job_ttl_s: how long a record stays after its job has ended.
        lease_s: a worker that is silent for so long has lost its job.
    """

    model_config = SettingsConfigDict(env_prefix="DREAMSERVE_", env_ignore_empty=True, extra="ignore", frozen=True)

    redis_url: str | None = None
    state_dir: Path = Path(".state")
    base_model: str = SHIPPED_MODEL
    version: Literal["v1.1", "v1", "main"] | None = None
    turbo: bool = True
    job_ttl_s: int = Field(default=86_400, ge=1)
    lease_s: float = Field(default=10.0, gt=0)

    @property
    def artifact_root(self) -> Path:
        """Where references and finished pictures lie."""
        return self.state_dir / "artifacts"


class WorkerSettings(QueueSettings):
    """What an inference worker needs besides.

    Attributes:
        dreamo: directory of the released DreamO files; None takes `<base_model>/dreamo`.
        fused: output directory of `dreamserve fuse`; replaces transformer and adapters.
        cutout, faces: which tools prepare subject and identity references.
        commit_patience_s: how long a finished picture waits for a Redis that is away.
        stall_s: a job without any progress for so long gives up its lease.
    """

    dreamo: Path | None = None
    fused: Path | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    cutout: str = Field(default="auto", pattern=r"^(auto|grabcut|ben2:.+)$")
    faces: str = Field(default="auto", pattern=r"^(auto|opencv|facexlib:.+)$")
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    commit_patience_s: float = Field(default=60.0, ge=0)
    stall_s: float = Field(default=600.0, gt=0)
