"""From job to encoded request: the same with and without caches, and what is kept is nobody else's and not outlived."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, fields, replace
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from model.errors import UnusableReferenceError
from model.pipeline import Pipeline, PreparedReference, load_pipeline
from model.preprocessors.prepare import Tools
from model.requests import Reference
from model.roles import Role
from model.weights.checkpoints import ModelSource
from tests.model.portrait import draw_portrait
from tests.waiting import wait_for
from tests.workers.conftest import MakeJob
from tests.workers.standin import StandinPipeline
from workers import jobs, pictures
from workers.artifacts import ArtifactError, ArtifactStore
from workers.inference.caches import Cache, Caches
from workers.inference.preparation import Prepared, ReferenceKey, prepare, reference_key
from workers.inference.requests import decoded_reference, request_of
from workers.jobs import CustomizeJob, JobResult, ReferenceInput, Sampling
from workers.pictures import PictureLimits

LIMITS = PictureLimits()
WAIT_S = 20.0


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    """The shipped model."""
    return load_pipeline(ModelSource(device="cpu", dtype="float32"))


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@dataclass(frozen=True)
class Pictures:
    """Keys of stored pictures: a face, two without one, a mask."""

    portrait: str
    toy: str
    other: str
    mask: str


@pytest.fixture
def stored(store: ArtifactStore) -> Pictures:
    toy = np.full((40, 48, 3), (200, 200, 190), np.uint8)
    cv2.circle(toy, (22, 20), 12, (200, 30, 30), -1)
    noise = np.random.default_rng(1).integers(0, 256, (40, 48, 4), dtype=np.uint8)  # with alpha
    mask = np.zeros((40, 48), np.uint8)
    mask[10:30, 12:40] = 255
    keys = [store.put("default", png(pixels)) for pixels in (draw_portrait().pixels, toy, noise, mask)]
    return Pictures(*keys)


@pytest.fixture
def job(stored: Pictures) -> CustomizeJob:
    """Three references of different roles, a gap between their slots, true CFG at the first of two steps."""
    references = (
        ReferenceInput(1, Role.IDENTITY, stored.portrait),
        ReferenceInput(2, Role.SUBJECT, stored.toy, mask=stored.mask, resolution=32),
        ReferenceInput(4, Role.CONTENT, stored.other),
    )
    sampling = Sampling(48, 56, 2, 3.5, 3.5, seed=5, true_cfg_scale=2.0, true_cfg_end=1)
    return CustomizeJob("job_1", "dreamo-tiny", "a toy and [ref#1]", "blurry", references, sampling)


def drawn(pipeline: Pipeline, encoded: Any, seed: int) -> bytes:
    """The job's first picture as PNG."""
    run = pipeline.start(encoded, seed)
    while not run.done:
        (run,) = pipeline.step([run])
    return pictures.encode(pipeline.decode(run), "png")


def test_the_same_picture_with_and_without_caches(pipeline: Pipeline, store: ArtifactStore, job: CustomizeJob) -> None:
    """Latents, embeddings and PNG are those of the plain phases, whether nothing, everything or part of it was kept."""
    decoded = tuple(decoded_reference(wanted, "default", store, pipeline.spec, LIMITS) for wanted in job.references)
    request = request_of(job, decoded)
    plain = pipeline.encode(request, pipeline.preprocess(request))
    picture = drawn(pipeline, plain, job.sampling.seed)
    caches = Caches()
    names = ["prompt", "negative", "reference_1", "reference_2", "reference_4"]

    def check(prepared: Prepared, hits: set[str]) -> None:
        assert prepared.used == {name: "hit" if name in hits else "miss" for name in names}
        assert set(prepared.timings) == {"preprocess_s", "encode_s"}
        got = prepared.encoded
        assert [r.slot for r in got.references] == [1, 2, 4]
        assert [r.role for r in got.references] == [r.role for r in plain.references]
        for ours, theirs in zip(got.references, plain.references, strict=True):
            assert torch.equal(ours.moments, theirs.moments) and ours.grid == theirs.grid
        assert got.negative is not None and plain.negative is not None
        for ours, theirs in ((got.prompt, plain.prompt), (got.negative, plain.negative)):
            assert torch.equal(ours.text, theirs.text) and torch.equal(ours.pooled, theirs.pooled)
        assert drawn(pipeline, got, job.sampling.seed) == picture

    check(prepare(job, pipeline, store, Caches(0, 0, 0), LIMITS), set())
    check(prepare(job, pipeline, store, caches, LIMITS), set())
    check(prepare(job, pipeline, store, caches, LIMITS), set(names))
    caches.prompts.clear()
    caches.latents.clear()
    check(prepare(job, pipeline, store, caches, LIMITS), set())
    assert caches.prepared.counts().hits == 3
    caches.purge(job.tenant, job.references[1].mask or "")
    check(prepare(job, pipeline, store, caches, LIMITS), set(names) - {"reference_2"})


def test_the_negative_prompt_is_encoded_only_if_it_is_read(
    pipeline: Pipeline, store: ArtifactStore, job: CustomizeJob
) -> None:
    """Without true CFG there is no negative branch, and nothing is said of its cache."""
    for sampling in (replace(job.sampling, true_cfg_scale=1.0), replace(job.sampling, true_cfg_end=0)):
        prepared = prepare(replace(job, references=(), sampling=sampling), pipeline, store, Caches(), LIMITS)
        assert prepared.encoded.negative is None
        assert set(prepared.used) == {"prompt"}


def test_bytes_are_counted_as_they_lie_in_memory(pipeline: Pipeline, store: ArtifactStore, job: CustomizeJob) -> None:
    """No kept tensor or array is a view that holds on to more than is counted, and none can be written into."""
    caches = Caches()
    prepare(job, pipeline, store, caches, LIMITS)
    embeds = [entry.value for entry in caches.prompts._kept.values()]
    tensors = [t for e in embeds for t in (e.text, e.pooled)]
    assert caches.counts()["prompts"].nbytes == sum(t.untyped_storage().nbytes() for t in tensors)
    moments = [entry.value.moments for entry in caches.latents._kept.values()]
    assert caches.counts()["latents"].nbytes == sum(t.untyped_storage().nbytes() for t in moments)
    arrays = [entry.value.pixels for entry in caches.prepared._kept.values()]
    assert caches.counts()["prepared"].nbytes == sum(a.nbytes for a in arrays) and len(arrays) == 3
    assert not any(a.flags.writeable or (a.base is not None and a.base.nbytes > a.nbytes) for a in arrays)


def test_references_are_read_only_when_nothing_is_kept(
    pipeline: Pipeline, store: ArtifactStore, job: CustomizeJob, stored: Pictures
) -> None:
    """A hit reads no file: damage on the disk goes unseen by whoever has the right bytes already."""
    caches = Caches()
    prepare(job, pipeline, store, caches, LIMITS)
    path_of(store, stored.toy).write_bytes(b"damage")
    assert prepare(job, pipeline, store, caches, LIMITS).used["reference_2"] == "hit"
    with pytest.raises(ArtifactError) as caught:
        prepare(job, pipeline, store, Caches(), LIMITS)
    assert caught.value.code == "artifact_corrupt"


@pytest.mark.parametrize("which", ["portrait", "mask"])
def test_a_deleted_picture_is_not_served_from_a_cache(
    pipeline: Pipeline, store: ArtifactStore, job: CustomizeJob, stored: Pictures, which: str
) -> None:
    """The job fails as it would without caches, and what was made of the picture is dropped."""
    caches, key = Caches(), getattr(stored, which)
    prepare(job, pipeline, store, caches, LIMITS)
    data = store.read("default", key)
    path_of(store, key).unlink()
    for kept in (caches, Caches(0, 0, 0)):
        with pytest.raises(ArtifactError) as caught:
            prepare(job, pipeline, store, kept, LIMITS)
        assert caught.value.code == "artifact_missing"
    assert caches.counts()["latents"].entries == caches.counts()["prepared"].entries == 2
    store.put("default", data)
    used = prepare(job, pipeline, store, caches, LIMITS).used
    assert [name for name, outcome in used.items() if outcome == "miss"] == [
        "reference_1" if which == "portrait" else "reference_2"
    ]


@pytest.mark.parametrize("moment", ["encode_prompt", "encode_reference"])
def test_a_picture_deleted_meanwhile_is_not_kept(
    store: ArtifactStore, stored: Pictures, make_job: MakeJob, moment: str
) -> None:
    """A purge between preparing and keeping misses nothing, also of latents made after it; the job itself goes on."""
    caches = Caches()

    class Deleting(StandinPipeline):
        def encode_prompt(self, prompt: str, adaptation: Any = None) -> Any:
            self.delete("encode_prompt")
            return super().encode_prompt(prompt, adaptation)

        def encode_reference(self, reference: Any) -> Any:
            self.delete("encode_reference")
            return reference

        def delete(self, now: str) -> None:
            if now == moment:
                path_of(store, stored.toy).unlink()
                assert caches.purge("default", stored.toy) == 1

    references = (ReferenceInput(1, Role.SUBJECT, stored.toy),)
    prepare(make_job("job_1", references=references), Deleting(), store, caches, LIMITS)
    assert caches.counts()["prepared"].entries == caches.counts()["latents"].entries == 0


def test_tenants_share_nothing(pipeline: Pipeline, store: ArtifactStore, job: CustomizeJob) -> None:
    """The same job of another tenant finds nothing kept, and the first tenant's purge leaves the second's values."""
    caches = Caches()
    prepare(job, pipeline, store, caches, LIMITS)
    foreign = replace(job, tenant="another")
    with pytest.raises(ArtifactError) as caught:
        prepare(foreign, pipeline, store, Caches(), LIMITS)
    assert caught.value.code == "artifact_missing", "nor is the first one's stored picture found"
    for path in list((store.root / "references").rglob("*")):
        if path.is_file():
            store.put("another", path.read_bytes())
    assert set(prepare(foreign, pipeline, store, caches, LIMITS).used.values()) == {"miss"}
    for wanted in job.references:
        caches.purge("default", wanted.image)
    assert set(prepare(foreign, pipeline, store, caches, LIMITS).used.values()) == {"hit"}
    assert prepare(job, pipeline, store, caches, LIMITS).used["reference_4"] == "miss"


def test_another_model_finds_only_prepared_references(
    pipeline: Pipeline, store: ArtifactStore, job: CustomizeJob
) -> None:
    """Prompts and latents belong to the pipeline that made them, even if nobody cleared the caches; with other tools
    references are prepared anew."""
    caches = Caches()
    prepare(job, pipeline, store, caches, LIMITS)
    again = Pipeline(pipeline.model, pipeline.tools)
    assert set(prepare(job, again, store, caches, LIMITS).used.values()) == {"miss"}
    assert caches.counts()["prepared"].hits == 3
    prepare(job, Pipeline(pipeline.model, Tools(Nothing(), pipeline.tools.faces)), store, caches, LIMITS)
    assert (caches.counts()["prepared"].hits, caches.counts()["prepared"].misses) == (3, 6)


class Nothing:
    """A cut-out that keeps one corner."""

    def mask(self, pixels: np.ndarray) -> np.ndarray:
        mask = np.zeros(pixels.shape[:2], np.uint8)
        mask[:8, :8] = 255
        return mask


def test_a_picture_is_kept_whatever_its_slot(pipeline: Pipeline, store: ArtifactStore, job: CustomizeJob) -> None:
    """Sent in another slot, or twice in one job, it is encoded once; each takes its own slot."""
    caches = Caches()
    once = prepare(job, pipeline, store, caches, LIMITS).encoded
    moved = tuple(replace(wanted, slot=wanted.slot + 4) for wanted in job.references)
    prepared = prepare(replace(job, references=(*job.references, *moved)), pipeline, store, caches, LIMITS)
    assert set(prepared.used.values()) == {"hit"}
    assert [r.slot for r in prepared.encoded.references] == [1, 2, 4, 5, 6, 8]
    for ours, theirs in zip(prepared.encoded.references, once.references * 2, strict=True):
        assert ours.moments is theirs.moments


VARIATIONS: dict[str, Callable[[Pictures], tuple[ReferenceInput, ReferenceInput]]] = {
    "image": lambda p: (ReferenceInput(1, Role.CONTENT, p.toy), ReferenceInput(1, Role.CONTENT, p.portrait)),
    "mask": lambda p: (ReferenceInput(1, Role.SUBJECT, p.toy), ReferenceInput(1, Role.SUBJECT, p.toy, mask=p.mask)),
    "role": lambda p: (ReferenceInput(1, Role.SUBJECT, p.toy), ReferenceInput(1, Role.STYLE, p.toy)),
    "resolution": lambda p: (ReferenceInput(1, Role.STYLE, p.toy), ReferenceInput(1, Role.STYLE, p.toy, resolution=48)),
    "on_no_face": lambda p: (
        ReferenceInput(1, Role.IDENTITY, p.toy, on_no_face="subject"),
        ReferenceInput(1, Role.IDENTITY, p.toy),
    ),
    "preparation": lambda p: (ReferenceInput(1, Role.SUBJECT, p.toy), ReferenceInput(1, Role.SUBJECT, p.toy)),
}
"""For each field of the key, two references that differ only there and must not be served each other's pixels."""

KeyOf = Callable[[ReferenceInput, Pipeline], Hashable]


def served_wrongly(pairs: list[tuple[ReferenceInput, Pipeline]], store: ArtifactStore, key_of: KeyOf) -> bool:
    """Whether references, prepared one after another through one cache, are not what they are without it."""
    cache = Cache[PreparedReference](2**20)

    def prepared(wanted: ReferenceInput, pipeline: Pipeline) -> PreparedReference:
        return pipeline.prepare_reference(decoded_reference(wanted, "default", store, pipeline.spec, LIMITS))

    def ends(make: Callable[[], PreparedReference]) -> object:
        try:
            value = make()
        except UnusableReferenceError as error:
            return error.code
        return value.role, value.pixels.shape, value.pixels.tobytes()

    def differs(wanted: ReferenceInput, pipeline: Pipeline) -> bool:
        def make() -> PreparedReference:
            return prepared(wanted, pipeline)

        return ends(lambda: cache.fetch("t", key_of(wanted, pipeline), make)[0]) != ends(make)

    return any(differs(*pair) for pair in pairs)


@pytest.mark.parametrize("name", [each.name for each in fields(ReferenceKey)])
def test_the_key_holds_all_that_pixels_follow_from(
    pipeline: Pipeline, store: ArtifactStore, stored: Pictures, name: str
) -> None:
    """References that differ in one field get their own pixels; a key without that field is caught."""
    tools = Tools(Nothing(), pipeline.tools.faces) if name == "preparation" else pipeline.tools
    first, second = VARIATIONS[name](stored)
    pairs = [(first, pipeline), (second, Pipeline(pipeline.model, tools))]

    def without(wanted: ReferenceInput, pipeline: Pipeline) -> Hashable:
        key = reference_key(wanted, pipeline)
        return tuple(value for each, value in zip(fields(key), astuple(key), strict=True) if each.name != name)

    assert not served_wrongly(pairs, store, reference_key)
    assert served_wrongly(pairs, store, without)


def test_a_default_resolution_is_the_one_it_stands_for(pipeline: Pipeline, stored: Pictures) -> None:
    """Saying the default and saying nothing is one key; the slot is not in it."""
    default = int(pipeline.spec.reference_resolution.default)
    said, unsaid = (
        ReferenceInput(1, Role.STYLE, stored.toy, resolution=default),
        ReferenceInput(3, Role.STYLE, stored.toy),
    )
    assert reference_key(said, pipeline) == reference_key(unsaid, pipeline)


class Faceless(StandinPipeline):
    """Finds no face in anything, the first time not before it is released."""

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.release = threading.Event(), threading.Event()

    def prepare_reference(self, reference: Reference) -> Any:
        if not self.begun.is_set():
            self.begun.set()
            assert self.release.wait(WAIT_S)
        raise UnusableReferenceError("no_face", f"references[{reference.slot - 1}]", slot=reference.slot)


def test_a_shared_failure_names_each_jobs_own_slot(store: ArtifactStore, stored: Pictures, make_job: MakeJob) -> None:
    """Two jobs wait for one preparation of a picture that they have in different slots: each learns its own."""
    pipeline, caches = Faceless(), Caches()

    def fail(slot: int) -> UnusableReferenceError:
        references = (ReferenceInput(slot, Role.IDENTITY, stored.toy),)
        with pytest.raises(UnusableReferenceError) as caught:
            prepare(make_job(f"job_{slot}", references=references), pipeline, store, caches, LIMITS)
        return caught.value

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(fail, 1)
        assert pipeline.begun.wait(WAIT_S)
        second = pool.submit(fail, 3)
        wait_for(lambda: caches.prepared.counts().hits == 1, "the second job to wait", WAIT_S)
        pipeline.release.set()
        errors = first.result(WAIT_S), second.result(WAIT_S)
    assert [(error.slot, error.message) for error in errors] == [(1, "references[0]"), (3, "references[2]")]


def test_phases_are_announced_and_can_be_stopped(store: ArtifactStore, stored: Pictures, make_job: MakeJob) -> None:
    """Each phase is announced as it begins; a cancellation there ends the job and leaves the caches usable."""
    job = make_job("job_1", references=(ReferenceInput(1, Role.SUBJECT, stored.toy),))
    caches, seen = Caches(), list[str]()

    def stop_at(last: str) -> Callable[[str], None]:
        def progress(phase: str) -> None:
            seen.append(phase)
            if phase == last:
                raise InterruptedError

        return progress

    for phase in ("load", "preprocess", "encode"):
        with pytest.raises(InterruptedError):
            prepare(job, StandinPipeline(), store, caches, LIMITS, stop_at(phase))
    assert seen == ["load", "load", "preprocess", "load", "preprocess", "encode"]
    prepared = prepare(job, StandinPipeline(), store, caches, LIMITS)
    assert prepared.used == {"prompt": "miss", "reference_1": "miss"}
    assert caches.counts()["prepared"].hits == 1


def test_records_from_before_are_read(make_job: MakeJob) -> None:
    """A job or a result that an older version wrote has the one tenant there was, and no word of caches."""
    job = json.loads(jobs.encode(make_job("job_1")))
    result = json.loads(jobs.encode(JobResult((), {"encode_s": 1.0}, {"prompt": "hit"})))
    assert (job.pop("tenant"), result.pop("cache")) == ("default", {"prompt": "hit"})
    assert jobs.decode(CustomizeJob, json.dumps(job)) == make_job("job_1")
    assert jobs.decode(JobResult, json.dumps(result)) == JobResult((), {"encode_s": 1.0})


def path_of(store: ArtifactStore, key: str) -> Any:
    return store._reference("default", key)
