"""From a job and its artifacts to what the pipeline takes: pictures decoded, masks found, defaults filled. No torch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from model.requests import ImageRequest, Reference
from model.spec import ModelSpec
from workers import pictures
from workers.artifacts import ArtifactStore
from workers.jobs import CustomizeJob, ReferenceInput
from workers.pictures import PictureLimits

Pixels = NDArray[np.uint8]


def request_of(job: CustomizeJob, references: tuple[Reference, ...] = ()) -> ImageRequest:
    """What a job asks for, with these references; without any, what it asks for besides them."""
    sampling = job.sampling
    return ImageRequest(
        prompt=job.prompt,
        negative_prompt=job.negative_prompt,
        references=references,
        height=sampling.height,
        width=sampling.width,
        num_inference_steps=sampling.num_inference_steps,
        guidance=sampling.guidance,
        first_step_guidance=sampling.first_step_guidance,
        true_cfg_scale=sampling.true_cfg_scale,
        true_cfg_start=sampling.true_cfg_start,
        true_cfg_end=sampling.true_cfg_end,
        negative_guidance=sampling.negative_guidance,
    )


def decoded_reference(
    wanted: ReferenceInput, tenant: str, store: ArtifactStore, spec: ModelSpec, limits: PictureLimits
) -> Reference:
    """Read and decode one reference of a tenant.

    Raises:
        ArtifactError: it is missing, corrupt or cannot be read.
        PictureError: it does not decode.
    """
    pixels, mask = read_reference(wanted, tenant, store, limits)
    return Reference(
        slot=wanted.slot,
        role=wanted.role,
        pixels=pixels,
        mask=mask,
        resolution=resolution_of(wanted, spec),
        on_no_face=wanted.on_no_face,
    )


def resolution_of(wanted: ReferenceInput, spec: ModelSpec) -> int:
    """The resolution a reference is prepared at: its own, or the model's default."""
    return wanted.resolution or int(spec.reference_resolution.default)


def read_reference(
    wanted: ReferenceInput, tenant: str, store: ArtifactStore, limits: PictureLimits
) -> tuple[Pixels, Pixels | None]:
    """Pixels uint8 [h, w, 3] as stored, and the mask uint8 [h, w], 255 = keep.

    A mask given by the caller goes before the picture's alpha, which counts only if something is transparent.
    """
    pixels = pictures.decode(store.read(tenant, wanted.image), limits)
    alpha = pixels[..., 3] if pixels.shape[2] == 4 else None
    rgb = np.ascontiguousarray(pixels[..., :3])
    if wanted.mask is not None:
        return rgb, pictures.decode_mask(store.read(tenant, wanted.mask), limits)
    if alpha is not None and alpha.min() < 255:
        return rgb, np.ascontiguousarray(alpha)
    return rgb, None
