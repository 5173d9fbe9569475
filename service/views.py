"""A job record as its caller sees it."""

from __future__ import annotations

from dataclasses import asdict

from model.roles import PLACEHOLDERS
from model.spec import ModelSpec
from service.records import common_fields
from service.schemas import (
    EffectiveRequest,
    ImageView,
    JobBody,
    ModelBody,
    OutputView,
    ProgressView,
    ReferenceView,
)
from workers.jobs import CustomizeJob, CustomizeRecord


def job_body(record: CustomizeRecord, *, position: int | None, ttl_s: float) -> JobBody:
    """The job's body. `position`: jobs ahead of it, if it is queued; `ttl_s`: life of a terminal record."""
    job = record.job
    url = f"/v1/jobs/{job.id}"
    return JobBody(
        **common_fields(record, url, position=position, ttl_s=ttl_s),
        progress=ProgressView(**asdict(record.progress)) if record.progress else None,
        request=_effective(job),
        images=_images(record, url),
        timings=_timings(record),
        cache=record.result.cache if record.result else {},
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
        priority=job.priority,
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
