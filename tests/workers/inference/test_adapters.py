"""Adapters in a worker: read from the registry, kept within bounds, and never in another job's picture."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import redis
import torch
from safetensors.torch import load_file, save_file

from model.errors import AdapterError
from model.pipeline import EncodedRequest, Pipeline, load_pipeline
from model.sampling import Denoising
from model.weights.adapted import Adaptation
from model.weights.adapters import MAIN
from model.weights.checkpoints import SHIPPED, ModelSource
from tests.model.weights.adapters import another_dreamo, plain_lora
from tests.workers.conftest import MakeJob
from tests.workers.standin import StandinPipeline
from workers import pictures
from workers.artifacts import ArtifactStore
from workers.inference.caches import Caches
from workers.inference.preparation import Prepared, prepare
from workers.inference.requests import request_of
from workers.inference.runner import JobRunner
from workers.jobs import CUSTOMIZE, AdapterUse, CustomizeJob, JobStatus
from workers.ledger import Ledger
from workers.pictures import PictureLimits
from workers.registry import PublishedAdapter, Registry, RegistryError
from workers.settings import WorkerSettings


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    """The shipped model."""
    loaded = load_pipeline(ModelSource(device="cpu", dtype="float32"))
    return Pipeline(loaded.model, loaded.tools, lanes=1)


@dataclass(frozen=True)
class Shop:
    """A worker's preparation with two published adapters, and the job that asks for one."""

    pipeline: Pipeline
    store: ArtifactStore
    registry: Registry
    whole: PublishedAdapter
    plain: PublishedAdapter
    job: CustomizeJob

    def asking(self, adapter: PublishedAdapter | None, scale: float = 1.0, tenant: str = "default") -> CustomizeJob:
        use = adapter and AdapterUse(adapter.name, adapter.version, scale)
        return replace(self.job, adapter=use, tenant=tenant)

    def prepare(self, job: CustomizeJob, caches: Caches) -> Prepared:
        return prepare(job, self.pipeline, self.store, caches, PictureLimits(), registry=self.registry)

    def alone(self, job: CustomizeJob) -> bytes:
        """The job's picture as PNG, drawn from its adapter's file by the plain phases."""
        adaptation: Adaptation | None = None
        if job.adapter is not None:
            adapter = self.registry.of(job.tenant).find(job.adapter.name, job.adapter.version)
            adaptation = self.pipeline.load_adapter(adapter.file).at(job.adapter.scale)
        return self.drawn(self.pipeline.encode(request_of(job), (), adaptation), job.sampling.seed)

    def drawn(self, encoded: EncodedRequest, seed: int) -> bytes:
        run = self.pipeline.start(encoded, seed)
        while not run.done:
            (run,) = self.pipeline.step([run])
        return pictures.encode(self.pipeline.decode(run), "png")


@pytest.fixture
def shop(pipeline: Pipeline, store: ArtifactStore, make_job: MakeJob, tmp_path: Path) -> Shop:
    registry = Registry(tmp_path / "adapters")
    whole = another_dreamo(tmp_path / MAIN, SHIPPED / "dreamo" / MAIN, seed=1, amount=0.2)
    plain = plain_lora(tmp_path / "plain.safetensors", pipeline.model.transformer, seed=2)
    job = make_job("job_1", steps=2, prompt="a star [ref#1]")
    sampling = replace(job.sampling, width=48, height=56)
    return Shop(
        pipeline,
        store,
        registry,
        registry.add("whole", whole, whole=True, card={}),
        registry.add("plain", plain, whole=False, card={}),
        replace(job, sampling=sampling),
    )


def test_what_is_kept_draws_the_same(shop: Shop) -> None:
    """With and without room to keep anything, cold and warm, the picture is the adapter's; prompts that other rows
    encode are told apart, and a plain LoRA's are the served model's."""
    jobs = [shop.asking(None), *(shop.asking(a, s) for a in (shop.whole, shop.plain) for s in (1.0, 0.5))]
    pictures = [shop.alone(job) for job in jobs]
    assert len(set(pictures)) == 5
    caches = Caches()
    cold = [("miss", None), ("miss", "miss"), ("miss", "hit"), ("hit", "miss"), ("hit", "hit")]
    warm = [("hit", None), *[("hit", "hit")] * 4]
    nothing = [("miss", None), *[("miss", "miss")] * 4]
    for kept, outcomes in ((caches, cold), (caches, warm), (Caches(0, 0, 0, 0), nothing)):
        for job, picture, outcome in zip(jobs, pictures, outcomes, strict=True):
            prepared = shop.prepare(job, kept)
            assert (prepared.used["prompt"], prepared.used.get("adapter")) == outcome
            assert ("adapt_s" in prepared.timings) == (job.adapter is not None)
            assert shop.drawn(prepared.encoded, job.sampling.seed) == picture


def test_adapters_take_the_room_they_have(shop: Shop) -> None:
    """Room for one: the other makes way for it, and a run that still needs it draws on undisturbed."""
    jobs = [shop.asking(shop.whole), shop.asking(shop.plain)]
    wanted = [shop.alone(job) for job in jobs]
    sizes = [shop.pipeline.load_adapter(adapter.file).nbytes for adapter in (shop.whole, shop.plain)]
    caches = Caches(adapters=max(sizes))
    first = shop.prepare(jobs[0], caches).encoded
    second = shop.prepare(jobs[1], caches).encoded
    counts = caches.counts()["adapters"]
    assert (counts.entries, counts.evictions, counts.nbytes) == (1, 1, sizes[1])
    assert [shop.drawn(encoded, jobs[0].sampling.seed) for encoded in (first, second)] == wanted
    assert shop.prepare(jobs[0], caches).used["adapter"] == "miss"


def test_runs_of_one_adapter_and_scale_share_forwards(shop: Shop) -> None:
    """Also of jobs that were prepared apart; another scale is another group."""
    caches = Caches()
    jobs = [shop.asking(shop.whole), shop.asking(shop.whole), shop.asking(shop.whole, 0.5), shop.asking(None)]
    runs = [shop.pipeline.start(shop.prepare(job, caches).encoded, seed) for seed, job in enumerate(jobs)]
    groups = [shop.pipeline.group(run) for run in runs]
    assert groups[0] == groups[1] and len(set(groups)) == 3
    assert [run.step for run in shop.pipeline.step(runs[:2])] == [1, 1]


def failure(shop: Shop, job: CustomizeJob, caches: Caches) -> str:
    with pytest.raises((RegistryError, AdapterError)) as caught:
        shop.prepare(job, caches)
    assert str(shop.registry.root) not in str(caught.value)
    return caught.value.code


def test_an_adapter_that_is_gone_fails_its_job(shop: Shop) -> None:
    """Even if it is still kept: a job must not end differently by what its worker did before."""
    caches, job = Caches(), shop.asking(shop.whole)
    shop.prepare(job, caches)
    shutil.rmtree(shop.whole.directory)
    assert failure(shop, job, caches) == "adapter_unknown"


def test_a_changed_file_is_not_loaded(shop: Shop) -> None:
    """One byte of it is enough."""
    data = bytearray(shop.plain.file.read_bytes())
    data[-1] ^= 1
    shop.plain.file.write_bytes(bytes(data))
    assert failure(shop, shop.asking(shop.plain), Caches()) == "adapter_corrupt"


def test_a_tenants_adapter_is_kept_for_that_tenant(shop: Shop, tmp_path: Path) -> None:
    """Everybody's is loaded once for all; one of a tenant's own no other can name, nor learn that it is kept."""
    caches = Caches()
    for tenant, outcome in (("ann", "miss"), ("bob", "hit")):
        assert shop.prepare(shop.asking(shop.whole, tenant=tenant), caches).used["adapter"] == outcome
    own = another_dreamo(tmp_path / "own" / MAIN, SHIPPED / "dreamo" / MAIN, seed=9, amount=0.2)
    of_ann = shop.registry.of("ann").add("own", own, whole=True, card={})
    of_bob = shop.registry.of("bob").add("own", own, whole=True, card={})
    assert of_ann.version == of_bob.version
    assert shop.prepare(shop.asking(of_ann, tenant="ann"), caches).used["adapter"] == "miss"
    assert shop.prepare(shop.asking(of_bob, tenant="bob"), caches).used["adapter"] == "miss"
    assert failure(shop, shop.asking(of_ann, tenant="cy"), caches) == "adapter_unknown"


class Watched(Pipeline):
    """Notes what its forwards hold, and those that are refused."""

    def __init__(self, pipeline: Pipeline) -> None:
        super().__init__(pipeline.model, pipeline.tools, lanes=1)
        self.forwards: list[set[str]] = []
        self.refused = 0

    def step(self, runs: Sequence[Denoising]) -> tuple[Denoising, ...]:
        self.forwards.append({self.group(run) for run in runs})
        try:
            return super().step(runs)
        except ValueError:
            self.refused += 1
            raise


@pytest.fixture
def runner(shop: Shop, client: redis.Redis, tmp_path: Path) -> Iterator[JobRunner]:
    settings = WorkerSettings(adapters_dir=tmp_path / "adapters", commit_patience_s=5.0, grace_s=0.0)
    made = JobRunner(Watched(shop.pipeline), Ledger(client, CUSTOMIZE), shop.store, settings, "w")
    yield made
    made.close()


def test_jobs_of_all_kinds_at_once(runner: JobRunner, shop: Shop, tmp_path: Path) -> None:
    """Claimed side by side from a real ledger, each ends with the picture it has alone, no forward having been asked to
    mix them; one whose adapter is for another base fails by its code, and takes nobody with it."""
    tensors = load_file(shop.plain.file)
    save_file({key: torch.zeros(3, 3) for key in tensors}, tmp_path / "other.safetensors")
    misfit = shop.registry.add("misfit", tmp_path / "other.safetensors", whole=False, card={})
    kinds = [(None, 1.0), (shop.whole, 1.0), (shop.whole, 0.5), (shop.plain, 1.0), (misfit, 1.0)]
    jobs = [
        replace(shop.asking(*kind), id=f"job_{number}", sampling=replace(shop.job.sampling, seed=number))
        for number, kind in enumerate(kinds * 3)
    ]
    for job in jobs:
        runner.ledger.accept(job)
    for job in jobs:
        runner.run(job.id)
    assert runner.wait(60)
    assert isinstance(runner.pipeline, Watched)
    assert runner.pipeline.refused == 0 and {len(groups) for groups in runner.pipeline.forwards} == {1}
    for job in jobs:
        record = runner.ledger.get(job.id)
        assert record is not None
        if job.adapter is not None and job.adapter.name == "misfit":
            assert record.status is JobStatus.FAILED
            assert record.error is not None and record.error.code == "adapter_mismatch"
            continue
        assert record.status is JobStatus.SUCCEEDED and record.result is not None
        (image,) = record.result.images
        assert shop.store.read_picture(image.name, image.sha256) == shop.alone(job)


def test_a_card_says_which_base(pipeline: Pipeline) -> None:
    """Admission compares it with an adapter's; the stand-in of other tests says neither more nor less."""
    described = pipeline.describe()
    assert isinstance(described["base"], str) and described["base"] == pipeline.model.base
    assert described.keys() == StandinPipeline().describe().keys()


def test_a_job_with_an_adapter_of_another_base(runner: JobRunner, shop: Shop, tmp_path: Path) -> None:
    """It fails and says what helps, although the file would fit. Control: under a card of this base it draws."""
    there = {"theirs": "0" * 32, "ours": shop.pipeline.model.base, "unknown": None}
    file = tmp_path / MAIN
    for name, base in there.items():
        shop.registry.add(name, file, whole=True, card={"base": base})
    for name in there:
        runner.ledger.accept(replace(shop.asking(shop.registry.locate(name), 1.0), id=f"job_{name}"))
        runner.run(f"job_{name}")
    assert runner.wait(60)
    records = {name: runner.ledger.get(f"job_{name}") for name in there}
    assert {name: record.status for name, record in records.items() if record} == {
        "theirs": JobStatus.FAILED,
        "ours": JobStatus.SUCCEEDED,
        "unknown": JobStatus.SUCCEEDED,
    }
    assert records["theirs"] and records["theirs"].error
    assert records["theirs"].error.code == "adapter_mismatch"
    assert "name another adapter" in records["theirs"].error.message
