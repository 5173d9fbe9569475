"""A job record as its caller sees it."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime

from model.roles import PLACEHOLDERS
from model.spec import ModelSpec
from service.schemas import (
    EffectiveRequest,
    ImageView,
    JobBody,
    JobErrorView,
    JobUrls,
    ModelBody,
    OutputView,
    ProgressView,
    QueueView,
    ReferenceView,
)
from workers.jobs import CustomizeJob, CustomizeRecord


def job_body(record: CustomizeRecord, *, position: int | None, ttl_s: float) -> JobBody:
    """The job's body. `position`: jobs ahead of it, if it is queued; `ttl_s`: life of a terminal record."""
    job = record.job
    url = f"/v1/jobs/{job.id}"
    finished = record.finished_at
    return JobBody(
        id=job.id,
        status=record.status,
        progress=ProgressView(**asdict(record.progress)) if record.progress else None,
        queue=None if position is None else QueueView(position=position),
        attempt=record.attempt,
        cancel_requested=record.cancel_requested,
        created_at=time_text(record.created_at),
        started_at=None if record.started_at is None else time_text(record.started_at),
        finished_at=None if finished is None else time_text(finished),
        expires_at=None if finished is None else time_text(finished + ttl_s),
        request=_effective(job),
        images=_images(record, url),
        error=JobErrorView(**asdict(record.error)) if record.error else None,
        timings=_timings(record),
        urls=JobUrls(self=url, cancel=f"{url}/cancel"),
        metadata=job.metadata,
    )


def model_body(spec: ModelSpec) -> ModelBody:
    """Limits and defaults as `/v1/models` publishes them."""
    return ModelBody.model_validate(
        {**asdict(spec), "placeholders": PLACEHOLDERS, "output_formats": ["png", "jpeg", "webp"]}
    )


def _effective(job: CustomizeJob) -> EffectiveRequest:
    return EffectiveRequest(
        model=job.model,
        prompt=job.prompt,
        negative_prompt=job.negative_prompt,
        references=[
            ReferenceView(
                slot=reference.slot,
                role=reference.role,
                sha256=reference.image,
                mask_sha256=reference.mask,
                resolution=reference.resolution,
                on_no_face=reference.on_no_face,
            )
            for reference in job.references
        ],
        num_images=job.num_images,
        output=OutputView(format=job.output_format),
        **asdict(job.sampling),
    )


def _images(record: CustomizeRecord, url: str) -> list[ImageView]:
    if record.result is None:
        return []
    return [
        ImageView(
            url=f"{url}/images/{index}",
            sha256=image.sha256,
            width=image.width,
            height=image.height,
            media_type=image.media_type,
            seed=image.seed,
        )
        for index, image in enumerate(record.result.images)
    ]


def _timings(record: CustomizeRecord) -> dict[str, float]:
    waited = {} if record.started_at is None else {"queued_s": round(record.started_at - record.created_at, 6)}
    return waited | (record.result.timings if record.result else {})


def time_text(seconds: float) -> str:
    """ISO 8601 in UTC, to the millisecond."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
