"""A job record as its caller sees it."""

from __future__ import annotations

import hashlib
from dataclasses import asdict

from model.roles import PLACEHOLDERS
from model.spec import ModelSpec
from service.records import common_fields, time_text
from service.schemas import (
    AdapterUseView,
    EffectiveRequest,
    ImageView,
    JobBody,
    ModelBody,
    OutputView,
    ProgressView,
    QueueView,
    RecordUrls,
    ReferenceView,
    WebhookView,
)
from workers.jobs import CustomizeJob, CustomizeRecord


def job_body(record: CustomizeRecord, *, queue: QueueView | None, ttl_s: float) -> JobBody:
    """The job's body. `queue`: its place, if it is queued; `ttl_s`: life of a terminal record."""
    job = record.job
    url = f"/v1/jobs/{job.id}"
    return JobBody(
        **common_fields(record, queue=queue, ttl_s=ttl_s),
        urls=RecordUrls(self=url, cancel=f"{url}/cancel", events=f"{url}/events"),
        start_by=None if record.start_by is None else time_text(record.start_by),
        progress=_progress(record),
        request=_effective(job),
        images=_images(record, url),
        timings=_timings(record),
        cache=record.result.cache if record.result else {},
    )


def job_etag(record: CustomizeRecord) -> str:
    """Changes with all that happens to the job, not with its place in line."""
    said = repr((record.status, record.attempt, record.progress, record.cancel_requested))
    return f'W/"{hashlib.sha256(said.encode()).hexdigest()[:16]}"'


def model_body(spec: ModelSpec) -> ModelBody:
    """Limits and defaults as `/v1/models` publishes them."""
    return ModelBody.model_validate(
        {**asdict(spec), "placeholders": PLACEHOLDERS, "output_formats": ["png", "jpeg", "webp"]}
    )


def _effective(job: CustomizeJob) -> EffectiveRequest:
    sampling = job.sampling  # field by field: `asdict` copies, and takes as long as all of the validation
    return EffectiveRequest(
        model=job.model,
        prompt=job.prompt,
        negative_prompt=job.negative_prompt,
        references=[
            ReferenceView(
                slot=reference.slot,
                role=reference.role,
                sha256=reference.image or None,
                url=reference.url,
                mask_sha256=reference.mask,
                resolution=reference.resolution,
                on_no_face=reference.on_no_face,
            )
            for reference in job.references
        ],
        num_images=job.num_images,
        output=OutputView(format=job.output_format),
        priority=job.priority,
        adapter=AdapterUseView(**asdict(job.adapter)) if job.adapter else None,
        previews=job.previews,
        webhook=WebhookView(url=job.webhook.url, events=list(job.webhook.events)) if job.webhook else None,
        width=sampling.width,
        height=sampling.height,
        num_inference_steps=sampling.num_inference_steps,
        guidance=sampling.guidance,
        first_step_guidance=sampling.first_step_guidance,
        true_cfg_scale=sampling.true_cfg_scale,
        true_cfg_start=sampling.true_cfg_start,
        true_cfg_end=sampling.true_cfg_end,
        negative_guidance=sampling.negative_guidance,
        seed=sampling.seed,
    )


def _progress(record: CustomizeRecord) -> ProgressView | None:
    now = record.progress
    return ProgressView(phase=now.phase, step=now.step, total=now.total) if now else None


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
