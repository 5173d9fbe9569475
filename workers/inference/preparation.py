"""From a claimed job to what its pictures are drawn from: everything between claim and denoising.

    load: is every picture still there? ─▶ preprocess: read, decode, prepare ─▶ encode: prompts, references

What the caches hold is not made again, and the result is the same to the byte. A picture that has gone from the
store fails its job even if a cache still holds what was made of it: whoever deleted it was told that it is gone, and
a job must not end differently by what its worker did before. So the store is asked first, which costs one `stat`.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar

from model.errors import UnusableReferenceError
from model.requests import ImageRequest, Reference
from model.roles import Role
from model.spec import ModelSpec
from workers.artifacts import ArtifactError, ArtifactStore
from workers.inference.caches import Caches
from workers.inference.requests import decoded_reference, request_of, resolution_of
from workers.jobs import CustomizeJob, Outcome, ReferenceInput
from workers.pictures import PictureLimits

if TYPE_CHECKING:
    from model.pipeline import EncodedReference, EncodedRequest, PreparedReference
    from model.text import PromptEmbeds

Phase = Literal["load", "preprocess", "encode"]
T = TypeVar("T")


class Encoder(Protocol):
    """As much of `model.pipeline.Pipeline` as a preparation needs."""

    @property
    def spec(self) -> ModelSpec: ...
    @property
    def key(self) -> str: ...
    @property
    def preparation(self) -> str: ...
    def needs_negative(self, request: ImageRequest) -> bool: ...
    def encode_prompt(self, prompt: str) -> PromptEmbeds: ...
    def prepare_reference(self, reference: Reference) -> PreparedReference: ...
    def encode_reference(self, reference: PreparedReference) -> EncodedReference: ...
    def assemble(
        self,
        request: ImageRequest,
        prompt: PromptEmbeds,
        negative: PromptEmbeds | None,
        references: Sequence[EncodedReference],
    ) -> EncodedRequest: ...


@dataclass(frozen=True, slots=True)
class Prepared:
    """A job that can be denoised.

    Attributes:
        encoded: its `request` carries no references: their pixels are not needed any more.
        used: `prompt`, `negative` (if it is read) and `reference_<slot>`; a reference is a hit if its latents were
            kept, so that nothing of it was computed.
        timings: seconds, `preprocess_s` (reading included) and `encode_s`.
    """

    encoded: EncodedRequest
    used: Mapping[str, Outcome]
    timings: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class ReferenceKey:
    """All that the pixels of a prepared reference follow from. Its slot is not among it."""

    image: str
    mask: str | None
    role: Role
    resolution: int
    on_no_face: Literal["fail", "subject"]
    preparation: str


def reference_key(wanted: ReferenceInput, pipeline: Encoder) -> ReferenceKey:
    """Where a prepared reference is kept."""
    resolution = resolution_of(wanted, pipeline.spec)
    return ReferenceKey(wanted.image, wanted.mask, wanted.role, resolution, wanted.on_no_face, pipeline.preparation)


def prepare(
    job: CustomizeJob,
    pipeline: Encoder,
    store: ArtifactStore,
    caches: Caches,
    limits: PictureLimits,
    progress: Callable[[Phase], None] = lambda _: None,
) -> Prepared:
    """Read, prepare and encode what a job names.

    Args:
        progress: called as each phase begins, in this thread and never while another job waits for this one; what
            it raises ends the preparation.

    Raises:
        ArtifactError: a reference is missing, corrupt or cannot be read.
        PictureError: a reference does not decode.
        UnusableReferenceError: naming the slot.
    """
    work = _Preparation(job, pipeline, store, caches, limits)
    progress("load")
    kept = work.timed("preprocess_s", work.find)
    progress("preprocess")
    prepared = work.timed("preprocess_s", lambda: work.prepare_missing(kept))
    progress("encode")
    encoded = work.timed("encode_s", lambda: work.encode(kept, prepared))
    return Prepared(encoded, work.used, work.timings)


@dataclass(frozen=True, slots=True)
class _Preparation:
    """One job on its way. References go by slot."""

    job: CustomizeJob
    pipeline: Encoder
    store: ArtifactStore
    caches: Caches
    limits: PictureLimits
    used: dict[str, Outcome] = field(default_factory=dict[str, Outcome])
    timings: dict[str, float] = field(default_factory=dict[str, float])

    def timed(self, phase: str, work: Callable[[], T]) -> T:
        started = time.perf_counter()
        result = work()
        self.timings[phase] = self.timings.get(phase, 0.0) + time.perf_counter() - started
        return result

    def find(self) -> dict[int, EncodedReference]:
        """The references whose latents are kept, after making sure that all of the job's pictures still exist."""
        for wanted in self.job.references:
            self._require(wanted)
        found = {w.slot: self.caches.latents.find(self.job.tenant, self._latents_key(w)) for w in self.job.references}
        return {slot: value for slot, value in found.items() if value is not None}

    def prepare_missing(self, kept: Mapping[int, EncodedReference]) -> dict[int, PreparedReference]:
        """The other references, as the VAE takes them."""
        return {wanted.slot: self._prepared(wanted) for wanted in self.job.references if wanted.slot not in kept}

    def encode(self, kept: Mapping[int, EncodedReference], prepared: Mapping[int, PreparedReference]) -> EncodedRequest:
        """Prompts and latents."""
        request = request_of(self.job)
        prompt = self._prompt("prompt", request.prompt)
        negative = None
        if self.pipeline.needs_negative(request):
            negative = self._prompt("negative", request.negative_prompt)
        references: list[EncodedReference] = []
        for wanted in self.job.references:
            encoded, outcome = kept.get(wanted.slot), "hit"
            if encoded is None:
                encoded, outcome = self._encoded(wanted, prepared[wanted.slot])
            self.used[f"reference_{wanted.slot}"] = outcome
            references.append(replace(encoded, slot=wanted.slot))
        self._forget_deleted()
        return self.pipeline.assemble(request, prompt, negative, references)

    def _require(self, wanted: ReferenceInput) -> None:
        for artifact in _sources(wanted):
            try:
                self.store.require(artifact)
            except ArtifactError as error:
                if error.code == "artifact_missing":
                    self.caches.purge(self.job.tenant, artifact)
                raise

    def _forget_deleted(self) -> None:
        """Keep nothing of a picture that was deleted, and purged, before what is made of it was kept.

        The job itself goes on: it had read the picture in time. (Deleting removes the file, then purges.)
        """
        for wanted in self.job.references:
            with suppress(ArtifactError):
                self._require(wanted)

    def _prepared(self, wanted: ReferenceInput) -> PreparedReference:
        def make() -> PreparedReference:
            reference = decoded_reference(wanted, self.store, self.pipeline.spec, self.limits)
            return self.pipeline.prepare_reference(reference)

        key = reference_key(wanted, self.pipeline)
        try:
            value, _ = self.caches.prepared.fetch(self.job.tenant, key, make, _sources(wanted))
        except UnusableReferenceError as error:
            if error.slot == wanted.slot:
                raise
            value = make()  # Another job failed at it for both, and named the slot that the picture has there.
        return replace(value, slot=wanted.slot)

    def _encoded(self, wanted: ReferenceInput, prepared: PreparedReference) -> tuple[EncodedReference, Outcome]:
        return self.caches.latents.fetch(
            self.job.tenant,
            self._latents_key(wanted),
            lambda: self.pipeline.encode_reference(prepared),
            _sources(wanted),
        )

    def _latents_key(self, wanted: ReferenceInput) -> tuple[str, ReferenceKey]:
        return self.pipeline.key, reference_key(wanted, self.pipeline)

    def _prompt(self, name: str, prompt: str) -> PromptEmbeds:
        key = (self.pipeline.key, hashlib.sha256(prompt.encode()).digest())  # long prompts make no long keys
        value, self.used[name] = self.caches.prompts.fetch(
            self.job.tenant, key, lambda: self.pipeline.encode_prompt(prompt)
        )
        return value


def _sources(wanted: ReferenceInput) -> frozenset[str]:
    return frozenset(key for key in (wanted.image, wanted.mask) if key is not None)
