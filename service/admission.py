"""From a typed request to an accepted job: limits of the model, pictures, defaults, seed, record, delivery.

    CustomizeRequest ─check─▶ read pictures ─▶ store them ─▶ CustomizeJob ─accept─▶ ledger ─ring─▶ RQ

Everything runs in a worker thread. Nothing is stored before the whole request is known to be good.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from model.roles import Role
from model.spec import ModelSpec, Range
from service.adapters import Bases, adapter_use
from service.callers.limits import StepCost, cost_s
from service.images import Picture, PictureGate
from service.problems import Fault, Problem
from service.prompts import check_prompt, clean_text, with_trigger
from service.schemas import CustomizeRequest, ReferenceBody
from service.submissions import Submitted, Terms, submit, webhook_of
from workers.artifacts import ArtifactStore
from workers.courier.addresses import Rules, UrlForbiddenError, check_url
from workers.jobs import CustomizeJob, JobResult, Progress, ReferenceInput, Sampling
from workers.ledger import CustomizeLedger
from workers.picture_process import PictureProver
from workers.references import References
from workers.registry import Registry

SEEDS = 2**64
DRAWN_SEEDS = 2**53
"""A drawn seed stays exact in JavaScript, whose callers read it from the job and send it again."""
MAX_METADATA_ENTRIES = 16
MAX_METADATA_BYTES = 2048
DEFAULT_NEGATIVE_GUIDANCE = 3.5  # dreamo app.py


@dataclass(frozen=True, slots=True)
class Admission:
    """What admitting needs; one per process. `webhooks`: the rules for theirs; None where none is signed."""

    spec: ModelSpec
    prover: PictureProver
    store: ArtifactStore
    ledger: CustomizeLedger
    references: References
    registry: Registry
    bases: Bases
    rules: Rules
    webhooks: Rules | None
    step: StepCost

    def customize(self, request: CustomizeRequest, terms: Terms) -> Submitted[CustomizeJob, Progress, JobResult]:
        """Accept one job and ring for it.

        Raises:
            Problem: 422 with every fault found; what `submit` raises.
            ArtifactError: `storage_unavailable`.
            redis.exceptions.RedisError: Redis is away.
        """
        faults: list[Fault] = []
        prompt, negative = self._texts(request, faults)
        faults += check_references(request, self.spec)
        faults += check_sampling(request, self.spec)
        faults += check_metadata(request.metadata)
        webhook = webhook_of(request.webhook, self.webhooks, faults)
        tenant = terms.tenant
        adapter = adapter_use(request.adapter, self.registry.of(tenant), self.bases, faults)
        if faults:
            raise Problem.of_faults(faults)
        references = self._references(request, tenant)
        if any(reference.role is Role.STYLE for reference in references):
            prompt = with_trigger(prompt, self.spec.style_trigger)
        job = CustomizeJob(
            id=f"job_{secrets.token_hex(16)}",
            model=self.spec.name,
            prompt=prompt,
            negative_prompt=negative,
            references=references,
            sampling=resolve_sampling(request, self.spec),
            num_images=request.num_images,
            output_format=request.output.format,
            metadata=request.metadata,
            tenant=tenant,
            priority=request.priority,
            webhook=webhook,
            adapter=adapter,
            previews=request.previews,
            request_id=terms.request_id,
            traceparent=terms.traceparent,
        )
        return submit(self.ledger, job, terms, cost_s(job, self.spec, self.step))

    def _texts(self, request: CustomizeRequest, faults: list[Fault]) -> tuple[str, str]:
        longest = self.spec.max_prompt_characters
        prompt = clean_text(request.prompt, "/prompt", max_characters=longest, faults=faults)
        negative = clean_text(request.negative_prompt or "", "/negative_prompt", max_characters=longest, faults=faults)
        if not faults:
            slots = [slot for slot, body in enumerate(request.references, start=1) if body is not None]
            faults += check_prompt(prompt, slots)
        return prompt, negative

    def _references(self, request: CustomizeRequest, tenant: str) -> tuple[ReferenceInput, ...]:
        """The occupied slots; nothing is stored before all of their pictures are read."""
        occupied = [(slot, body) for slot, body in enumerate(request.references, start=1) if body is not None]
        read = self._read(occupied, tenant)
        return tuple(
            self._store(tenant, slot, body, *pictures) for (slot, body), pictures in zip(occupied, read, strict=True)
        )

    def _read(
        self, occupied: list[tuple[int, ReferenceBody]], tenant: str
    ) -> list[tuple[Picture | None, Picture | None]]:
        """Image and mask of each reference, all decoded once as proof; no image for a URL, which is fetched later."""
        gate = PictureGate(self.prover, lambda ref_id: self.references.find(tenant, ref_id, renew=True))
        read: list[tuple[Picture | None, Picture | None]] = []
        for slot, body in occupied:
            pointer = f"/references/{slot - 1}"
            if _is_url(body.image):
                gate.faults += self._check_fetched(body, pointer)
                read.append((None, None))
                continue
            image = gate.read(body.image, f"{pointer}/image")
            mask = gate.read(body.mask, f"{pointer}/mask") if body.mask is not None else None
            if image and mask and image.size != mask.size:
                detail = "The mask must have exactly the picture's width and height."
                gate.faults.append(Fault(f"{pointer}/mask", "mask_size_mismatch", detail))
            if image:
                read.append((image, mask))
        if gate.faults:
            raise Problem.of_faults(gate.faults)
        return read

    def _check_fetched(self, body: ReferenceBody, pointer: str) -> list[Fault]:
        try:
            check_url(body.image, self.rules)
        except UrlForbiddenError as error:
            return [Fault(f"{pointer}/image", error.code, error.message)]
        if body.mask is None:
            return []
        detail = "A mask goes with a picture that is sent or uploaded, since their sizes are compared."
        return [Fault(f"{pointer}/mask", "not_enabled", detail)]

    def _store(
        self, tenant: str, slot: int, body: ReferenceBody, image: Picture | None, mask: Picture | None
    ) -> ReferenceInput:
        return ReferenceInput(
            slot=slot,
            role=Role(body.role),
            image=self._keep(tenant, image) if image else "",
            url=None if image else body.image,
            mask=self._keep(tenant, mask) if mask else None,
            resolution=body.resolution or _default_resolution(body.role, self.spec),
            on_no_face=body.on_no_face,
        )

    def _keep(self, tenant: str, picture: Picture) -> str:
        content = picture.content
        return content if isinstance(content, str) else self.store.put(tenant, content)


def _is_url(image: str) -> bool:
    return image[:8].lower() == "https://"


def check_references(request: CustomizeRequest, spec: ModelSpec) -> list[Fault]:
    """Faults of number, role, mixture and resolution; pictures are looked at later."""
    if len(request.references) > spec.max_references:
        detail = f"At most {spec.max_references} slots, empty ones counted."
        return [Fault("/references", "too_many_references", detail)]
    faults: list[Fault] = []
    used = {body.role for body in request.references if body is not None}
    for index, body in enumerate(request.references):
        if body is None:
            continue
        pointer = f"/references/{index}"
        if body.role not in spec.roles:
            detail = "The model's roles: " + ", ".join(spec.roles) + "."
            faults.append(Fault(f"{pointer}/role", "role_not_supported", detail))
        elif body.role in spec.exclusive_roles and len(used) > 1:
            detail = f"{Role(body.role)} cannot be mixed with other roles: use it alone or leave it out."
            faults.append(Fault(f"{pointer}/role", "role_exclusive", detail))
        if body.resolution is not None:
            faults += _check_resolution(body, body.resolution, f"{pointer}/resolution", spec)
    return faults


def check_sampling(request: CustomizeRequest, spec: ModelSpec) -> list[Fault]:
    """Faults of size, steps, guidance, true CFG, seed and number of images."""
    faults: list[Fault] = []
    for name, side, bounds in (("width", request.width, spec.width), ("height", request.height, spec.height)):
        if side is not None and not bounds.minimum <= side <= bounds.maximum:
            faults.append(Fault(f"/{name}", "size_out_of_range", _between(bounds)))
        elif side is not None and side % spec.cell:
            faults.append(Fault(f"/{name}", "size_off_grid", f"Use a multiple of {spec.cell}."))
    for name, value, bounds in (
        ("guidance", request.guidance, spec.guidance),
        ("first_step_guidance", request.first_step_guidance, spec.guidance),
        ("negative_guidance", request.negative_guidance, spec.guidance),
        ("true_cfg_scale", request.true_cfg_scale, spec.true_cfg_scale),
    ):
        if value is not None and not bounds.admits(value):
            faults.append(Fault(f"/{name}", "guidance_out_of_range", _between(bounds)))
    if request.num_inference_steps is not None and not spec.num_inference_steps.admits(request.num_inference_steps):
        detail = _between(spec.num_inference_steps)
        faults.append(Fault("/num_inference_steps", "steps_out_of_range", detail))
    faults += _check_window(request, spec)
    if request.seed is not None and not 0 <= request.seed < SEEDS:
        faults.append(Fault("/seed", "seed_out_of_range", "Use an integer from 0 to 2**64 - 1, or leave it out."))
    if not 0 <= request.previews <= spec.num_inference_steps.maximum:
        faults.append(Fault("/previews", "invalid_value", "Every so many steps, or 0 for none."))
    if not 1 <= request.num_images <= spec.max_images:
        faults.append(Fault("/num_images", "num_images_out_of_range", f"Use 1 to {spec.max_images}."))
    return faults


def check_metadata(metadata: dict[str, str]) -> list[Fault]:
    """Fault when the entries are more than a job's record should carry."""
    size = sum(len(key.encode()) + len(value.encode()) for key, value in metadata.items())
    if len(metadata) <= MAX_METADATA_ENTRIES and size <= MAX_METADATA_BYTES:
        return []
    detail = f"At most {MAX_METADATA_ENTRIES} entries and {MAX_METADATA_BYTES} bytes of keys and values together."
    return [Fault("/metadata", "metadata_too_large", detail)]


def resolve_sampling(request: CustomizeRequest, spec: ModelSpec) -> Sampling:
    """Every sampling parameter, the model's defaults filled in and the seed fixed."""
    steps = request.num_inference_steps or int(spec.num_inference_steps.default)
    guidance = _or(request.guidance, spec.guidance.default)
    start, end = _window(request, spec)
    return Sampling(
        width=request.width or int(spec.width.default),
        height=request.height or int(spec.height.default),
        num_inference_steps=steps,
        guidance=guidance,
        first_step_guidance=_or(request.first_step_guidance, guidance),
        seed=secrets.randbelow(DRAWN_SEEDS) if request.seed is None else request.seed,
        true_cfg_scale=_or(request.true_cfg_scale, spec.true_cfg_scale.default),
        true_cfg_start=start,
        true_cfg_end=end,
        negative_guidance=_or(request.negative_guidance, DEFAULT_NEGATIVE_GUIDANCE),
    )


def _window(request: CustomizeRequest, spec: ModelSpec) -> tuple[int, int]:
    """The steps with true CFG: all of them when only a scale is given, so that it has an effect."""
    steps = request.num_inference_steps or int(spec.num_inference_steps.default)
    scale = _or(request.true_cfg_scale, spec.true_cfg_scale.default)
    start = request.true_cfg_start or 0
    end = request.true_cfg_end if request.true_cfg_end is not None else (steps if scale > 1 else start)
    return start, end


def _check_window(request: CustomizeRequest, spec: ModelSpec) -> list[Fault]:
    steps = request.num_inference_steps or int(spec.num_inference_steps.default)
    start, end = _window(request, spec)
    if 0 <= start <= end <= steps:
        return []
    pointer = "/true_cfg_start" if request.true_cfg_end is None else "/true_cfg_end"
    detail = "Needs 0 <= true_cfg_start <= true_cfg_end <= num_inference_steps."
    return [Fault(pointer, "true_cfg_window", detail)]


def _check_resolution(body: ReferenceBody, resolution: int, pointer: str, spec: ModelSpec) -> list[Fault]:
    if body.role == Role.IDENTITY:
        if resolution == spec.identity_resolution:
            return []
        detail = f"An identity reference always becomes {spec.identity_resolution} pixels wide: leave it out."
    elif spec.reference_resolution.admits(resolution):
        return []
    else:
        detail = _between(spec.reference_resolution)
    return [Fault(pointer, "resolution_out_of_range", detail)]


def _default_resolution(role: str, spec: ModelSpec) -> int:
    return spec.identity_resolution if role == Role.IDENTITY else int(spec.reference_resolution.default)


def _between(bounds: Range) -> str:
    grid = f", in steps of {bounds.step:g}" if bounds.step >= 1 else ""
    return f"Use {bounds.minimum:g} to {bounds.maximum:g}{grid}."


def _or(value: float | None, default: float) -> float:
    return default if value is None else float(value)
