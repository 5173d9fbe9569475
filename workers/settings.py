"""Configuration from the environment, read once by each entry point and passed down frozen. No torch.

Every variable starts with `DREAMSERVE_`; an empty one counts as absent. The gateway's settings extend
`QueueSettings`, so that it and the workers agree on Redis, state directory and model.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, IPvAnyNetwork, SecretStr, ValidationError
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from workers.planner import Budget

SHIPPED_MODEL = str(files("model") / "tiny")
"""The small model that comes with the package."""
_RUNS = 8
_RUNS_OF_A_LANE = 2
"""By default, where each lane has a core: a forward of more is no faster a picture, and who arrives waits for it."""


def _split(value: object) -> object:
    """A list as it is written in the environment: separated by commas."""
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


_Listed = (NoDecode, BeforeValidator(_split))


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
        tenant_window: jobs of a tenant that may be delivered or running at a time; its others wait in its line.
        reference_ttl_s: how long an uploaded reference stays after its last use.
        recipes_dir: training recipes beside the shipped ones.
        datasets_dir: each directory in it is a dataset that a training can name; None: `datasets` in `state_dir`.
        adapters_dir: where trained adapters are published; None: `adapters` in `state_dir`.
        egress_ports: that a caller's URLs may name, separated by commas.
        egress_networks: addresses beside the public ones that they may lead to, such as `10.1.0.0/16`.
        webhook_secrets: `whsec_…`, newest first; each signs, so that one can be replaced without a gap.
        store_reserve_mib: free space that is kept for finished pictures: with less, gateway and courier take no
            references, and /readyz calls the artifact store full.
        metrics_port: where this process answers /metrics, /livez and /readyz; None: nowhere. `dreamserve serve` gives
            its gateway this one and its other processes the next ones.
        metrics_host: the address that port is on; nothing asks for keys there.
    """

    model_config = SettingsConfigDict(env_prefix="DREAMSERVE_", env_ignore_empty=True, extra="ignore", frozen=True)

    redis_url: str | None = None
    state_dir: Path = Path(".state")
    base_model: str = SHIPPED_MODEL
    version: Literal["v1.1", "v1", "main"] | None = None
    turbo: bool = True
    job_ttl_s: int = Field(default=86_400, ge=1)
    lease_s: float = Field(default=10.0, gt=0)
    tenant_window: int = Field(default=64, ge=1)
    reference_ttl_s: int = Field(default=86_400, ge=1)
    recipes_dir: Path | None = None
    datasets_dir: Path | None = None
    adapters_dir: Path | None = None
    egress_ports: Annotated[tuple[Annotated[int, Field(ge=1, le=65535)], ...], *_Listed] = (443,)
    egress_networks: Annotated[tuple[IPvAnyNetwork, ...], *_Listed] = ()
    webhook_secrets: Annotated[tuple[SecretStr, ...], *_Listed] = ()
    store_reserve_mib: int = Field(default=256, ge=0)
    metrics_port: int | None = Field(default=None, ge=0, le=65535)
    metrics_host: str = "127.0.0.1"

    @property
    def artifact_root(self) -> Path:
        """Where references and finished pictures lie."""
        return self.state_dir / "artifacts"

    @property
    def artifact_ttl_s(self) -> int:
        """How long after its last use a stored file may still be wanted: by who may name it, and then by his job."""
        return max(self.reference_ttl_s, self.job_ttl_s) + self.job_ttl_s

    @property
    def dataset_root(self) -> Path:
        """Where the datasets lie."""
        return self.datasets_dir or self.state_dir / "datasets"

    @property
    def adapter_root(self) -> Path:
        """Where trained adapters lie."""
        return self.adapters_dir or self.state_dir / "adapters"


class WorkerSettings(QueueSettings):
    """What an inference worker needs besides.

    Attributes:
        dreamo: directory of the released DreamO files; None takes `<base_model>/dreamo`.
        fused: output directory of `dreamserve fuse`; replaces transformer and adapters.
        cutout, faces: which tools prepare subject and identity references.
        compile: whether `torch.compile` runs the network's blocks; `auto`: on CUDA, and without if it fails.
        precision: of the blocks' large products; `fp8` and `int8` change pictures a little.
        commit_patience_s: how long a finished picture waits for a Redis that is away.
        stall_s: a job without any progress for so long gives up its lease.
        jobs_in_hand: jobs that are prepared, denoised or finished here at a time; the rest waits in Redis. With
            FLUX.1-dev each takes 8 MB of the device and 2.1 MB for each step, and an image 1 MB and 6 MB a reference.
        forward_tokens: that a forward holds, text, target and references; beyond, a larger one is no faster a token.
        forward_runs: pictures in a forward; who arrives waits for the one at hand. By default 8, and on a CPU two for
            each core: there a larger one is no faster a picture.
        interactive_share: of the device, for interactive jobs while batch jobs wait too.
        grace_s: time to end what has begun when asked to leave; what is left is handed back.
        cache_mib: that prompts, prepared references and reference latents may each take; see `caches.Caches`.
        adapter_mib: that adapters may take on the device, those of running jobs aside: a whole DreamO adapter of rank
            128 on FLUX.1-dev 0.9 GiB in bfloat16, half of that a plain LoRA. 0: each job loads its own.
    """

    dreamo: Path | None = None
    fused: Path | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    cutout: str = Field(default="auto", pattern=r"^(auto|grabcut|ben2:.+)$")
    faces: str = Field(default="auto", pattern=r"^(auto|opencv|facexlib:.+)$")
    compile: Literal["auto", "on", "off"] = "auto"
    precision: Literal["full", "fp8", "int8"] = "full"
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    commit_patience_s: float = Field(default=60.0, ge=0)
    stall_s: float = Field(default=600.0, gt=0)
    jobs_in_hand: int = Field(default=64, ge=1)
    forward_tokens: int = Field(default=8192, ge=1)
    forward_runs: int | None = Field(default=None, ge=1)
    interactive_share: float = Field(default=0.8, gt=0, lt=1)
    grace_s: float = Field(default=60.0, ge=0)
    cache_mib: int = Field(default=256, ge=0)
    adapter_mib: int = Field(default=2048, ge=0)

    def budget(self, lanes: int) -> Budget:
        """What a forward of a pipeline with so many lanes may hold."""
        runs = self.forward_runs or (_RUNS if lanes == 1 else _RUNS_OF_A_LANE * lanes)
        return Budget(self.forward_tokens, runs, self.interactive_share)

    @property
    def graph_root(self) -> Path:
        """Where compiled graphs are kept."""
        return self.state_dir / "compiled"


class TrainingSettings(QueueSettings):
    """What a training worker needs besides; it trains on `base_model`.

    Attributes:
        commit_patience_s: how long a finished training waits for a Redis that is away.
        stall_s: a training without any progress for so long gives up its lease.
        max_attempts: workers that a training may lose before it fails.
    """

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    commit_patience_s: float = Field(default=600.0, ge=0)
    stall_s: float = Field(default=3600.0, gt=0)
    max_attempts: int = Field(default=10, ge=1)

    @property
    def run_root(self) -> Path:
        """Where running trainings keep their checkpoints."""
        return self.state_dir / "trainings"


class CourierSettings(QueueSettings):
    """What the courier needs besides.

    Attributes:
        egress_authorities: a PEM file of certificate authorities to trust beside the system's.
        fetches_in_hand: jobs whose references are fetched at a time, at most half of them of one tenant.
        webhooks_in_hand: messages on their way at a time, at most half of them of one tenant.
    """

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    egress_authorities: Path | None = None
    fetches_in_hand: int = Field(default=64, ge=1)
    webhooks_in_hand: int = Field(default=256, ge=1)


def describe_bad_settings(error: ValidationError) -> str:
    """One line that names each wrong variable, without its value: it may be a URL with a password."""
    return "; ".join(
        f"DREAMSERVE_{'_'.join(str(part) for part in item['loc']).upper()}: {item['msg']}"
        for item in error.errors(include_input=False, include_url=False, include_context=False)
    )
