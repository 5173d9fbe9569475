"""From a claimed job to what its pictures are drawn from: everything between claim and denoising.

    load: is every picture still there, and the adapter? ─▶ preprocess: read, decode, prepare ─▶ encode: prompts,
    references

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
from pathlib import Path
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
from workers.registry import Registry, RegistryError, check

if TYPE_CHECKING:
    from model.pipeline import EncodedReference, EncodedRequest, PreparedReference
    from model.text import PromptEmbeds
    from model.weights.adapted import Adaptation, LoadedAdapter

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
    def load_adapter(self, file: Path, made_for: str | None = None) -> LoadedAdapter: ...
    def encode_prompt(self, prompt: str, adaptation: Adaptation | None = None) -> PromptEmbeds: ...
    def prepare_reference(self, reference: Reference) -> PreparedReference: ...
    def encode_reference(self, reference: PreparedReference) -> EncodedReference: ...
    def assemble(
        self,
        request: ImageRequest,
        prompt: PromptEmbeds,
        negative: PromptEmbeds | None,
        references: Sequence[EncodedReference],
        adaptation: Adaptation | None = None,
    ) -> EncodedRequest: ...


@dataclass(frozen=True, slots=True)
class Prepared:
    """A job that can be denoised.

    Attributes:
        encoded: its `request` carries no references: their pixels are not needed any more.
        used: `prompt`, `negative` (if it is read) and `reference_<slot>`; a reference is a hit if its latents were
            kept, so that nothing of it was computed; `adapter` if the job names one.
        timings: seconds, `preprocess_s` (reading included) and `encode_s`; `adapt_s` for an adapter.
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
    registry: Registry | None = None,
) -> Prepared:
    """Read, prepare and encode what a job names.

    Args:
        progress: called as each phase begins, in this thread and never while another job waits for this one; what
            it raises ends the preparation.
        registry: of the adapters that jobs may name.

    Raises:
        RegistryError, AdapterError: the adapter is gone or damaged, or does not go with this model.
        ArtifactError: a reference is missing, corrupt or cannot be read.
        PictureError: a reference does not decode.
        UnusableReferenceError: naming the slot.
    """
    work = _Preparation(job, pipeline, store, caches, limits)
    progress("load")
    adaptation = work.timed("adapt_s", lambda: work.adapt(registry)) if job.adapter else None
    kept = work.timed("preprocess_s", work.find)
    progress("preprocess")
    prepared = work.timed("preprocess_s", lambda: work.prepare_missing(kept))
    progress("encode")
    encoded = work.timed("encode_s", lambda: work.encode(kept, prepared, adaptation))
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

    def adapt(self, registry: Registry | None) -> Adaptation | None:
        """The model as the job's adapter changes it; read from the registry unless it is kept."""
        use = self.job.adapter
        if use is None:
            return None
        if registry is None:
            raise RegistryError("adapter_unknown", "This worker has no adapters: set DREAMSERVE_ADAPTERS_DIR.")
        adapter = registry.of(self.job.tenant).locate(use.name, use.version)

        def load() -> LoadedAdapter:
            check(adapter)
            return self.pipeline.load_adapter(adapter.file, adapter.base)

        loaded, self.used["adapter"] = self.caches.adapters.fetch(
            adapter.owner, (self.pipeline.key, adapter.version), load
        )
        return loaded.at(use.scale)

    def find(self) -> dict[int, EncodedReference]:
        """The references whose latents are kept, after making sure that all of the job's pictures still exist."""
        for wanted in self.job.references:
            self._require(wanted)
        found = {w.slot: self.caches.latents.find(self.job.tenant, self._latents_key(w)) for w in self.job.references}
        return {slot: value for slot, value in found.items() if value is not None}

    def prepare_missing(self, kept: Mapping[int, EncodedReference]) -> dict[int, PreparedReference]:
        """The other references, as the VAE takes them."""
        return {wanted.slot: self._prepared(wanted) for wanted in self.job.references if wanted.slot not in kept}

    def encode(
        self,
        kept: Mapping[int, EncodedReference],
        prepared: Mapping[int, PreparedReference],
        adaptation: Adaptation | None,
    ) -> EncodedRequest:
        """Prompts and latents."""
        request = request_of(self.job)
        prompt = self._prompt("prompt", request.prompt, adaptation)
        negative = None
        if self.pipeline.needs_negative(request):
            negative = self._prompt("negative", request.negative_prompt, adaptation)
        references: list[EncodedReference] = []
        for wanted in self.job.references:
            encoded, outcome = kept.get(wanted.slot), "hit"
            if encoded is None:
                encoded, outcome = self._encoded(wanted, prepared[wanted.slot])
            self.used[f"reference_{wanted.slot}"] = outcome
            references.append(replace(encoded, slot=wanted.slot))
        self._forget_deleted()
        return self.pipeline.assemble(request, prompt, negative, references, adaptation)

    def _require(self, wanted: ReferenceInput) -> None:
        for artifact in _sources(wanted):
            try:
                self.store.require(self.job.tenant, artifact)
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
            reference = decoded_reference(wanted, self.job.tenant, self.store, self.pipeline.spec, self.limits)
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

    def _prompt(self, name: str, prompt: str, adaptation: Adaptation | None) -> PromptEmbeds:
        rows = adaptation.prompts if adaptation else ""
        key = (self.pipeline.key, rows, hashlib.sha256(prompt.encode()).digest())  # long prompts make no long keys
        value, self.used[name] = self.caches.prompts.fetch(
            self.job.tenant, key, lambda: self.pipeline.encode_prompt(prompt, adaptation)
        )
        return value


def _sources(wanted: ReferenceInput) -> frozenset[str]:
    return frozenset(key for key in (wanted.image, wanted.mask) if key is not None)
