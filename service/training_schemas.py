"""What crosses HTTP about trainings and adapters; `schemas` has the rest."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from service.schemas import InputBody, JobErrorView, OutputBody, QueueView, RecordUrls, WebhookBody
from workers.jobs import JobStatus


class TrainingRequest(InputBody):
    """Body of `POST /v1/trainings`."""

    recipe: str = Field(description="A recipe of this server, by name.", examples=["sticker-adapter"])
    adapter: str | None = Field(None, description="Name to publish the result under; default: the recipe's.")
    dataset: str | None = Field(None, description="A dataset of this server, by name; default: the recipe's records.")
    overrides: dict[str, Any] = Field(
        default_factory=dict[str, Any],
        description="Changes to the recipe: seed, lora, precision, gradient_checkpointing, save_every, and stages by "
        "name.",
        examples=[{"seed": 1, "stages": {"warm-up": {"steps": 100}}}],
    )
    webhook: WebhookBody | None = Field(None, description="Told of the training, as of a job.")
    metadata: dict[str, str] = Field(
        default_factory=dict[str, str], description="Returned with the training; at most 16 entries, 2048 bytes."
    )


class TrainingProgressView(OutputBody):
    stage: str
    step: int = Field(description="Steps done, of all stages.")
    total: int
    losses: dict[str, float] = Field(description="Of the last step.")
    samples_per_second: float
    seconds_left: float | None = Field(description="At the present speed; unknown at first.")


class EffectiveTraining(OutputBody):
    """What the training runs with, overrides applied."""

    adapter: str
    dataset: str | None
    recipe: dict[str, Any] = Field(description="The whole recipe, without where the server keeps models and data.")


class AdapterView(OutputBody):
    """A published adapter: one version of a name."""

    name: str
    version: str = Field(description="sha256 of its file.")
    kind: Literal["dreamo", "lora"] = Field(
        description="A whole DreamO adapter, with embeddings of its own, or a plain FLUX LoRA."
    )
    published_at: str
    recipe: str | None
    steps: int | None
    base: str | None = Field(description="Fingerprint of the base model that it is made for; null: nobody knows.")
    files: list[str]


class TrainingBody(OutputBody):
    """A training at one moment. Times are ISO 8601 in UTC."""

    id: str
    status: JobStatus
    progress: TrainingProgressView | None
    queue: QueueView | None = Field(description="Only while queued.")
    attempt: int
    cancel_requested: bool
    created_at: str
    started_at: str | None
    finished_at: str | None
    expires_at: str | None = Field(description="When the record is dropped; the adapter stays.")
    request: EffectiveTraining
    result: dict[str, Any] | None = Field(description="adapter, version, steps, losses of the last step.")
    error: JobErrorView | None
    urls: RecordUrls
    metadata: dict[str, str]


class TrainingList(OutputBody):
    """Newest first."""

    trainings: list[TrainingBody]
    next_cursor: str | None


class AdapterList(OutputBody):
    """Newest first."""

    adapters: list[AdapterView]


class RecipeView(OutputBody):
    """A recipe that can be asked for."""

    name: str
    steps: int
    stages: list[str]
    needs_dataset: bool


class RecipeList(OutputBody):
    recipes: list[RecipeView]
    datasets: list[str]
    workers: list[dict[str, Any]] = Field(description="Cards of the live training workers.")
