"""A good request becomes exactly the job that its caller asked for."""

from __future__ import annotations

import hashlib
import unicodedata

from rq import Queue

from tests.service.conftest import TRIGGER, Bench, data_url, picture, reference


def test_accepted_job_is_recorded_rung_for_and_stored(bench: Bench) -> None:
    """202 is a promise: by then the record, the delivery and the pictures' bytes must all be there."""
    data = picture()
    answer = bench.client.post(
        "/v1/customize",
        json={"prompt": "the toy of [ref#1]", "references": [{"image": data_url(data), "role": "subject"}]},
    )
    body = answer.json()
    assert answer.status_code == 202
    assert answer.headers["location"] == body["urls"]["self"] == f"/v1/jobs/{body['id']}"
    assert int(answer.headers["retry-after"]) >= 1
    assert body["status"] == "queued"
    assert body["queue"] == {"position": 0, "eta_s": None}
    assert Queue("customize", connection=bench.redis).get_job_ids() == [body["id"]]
    record = bench.ledger.get(body["id"])
    assert record is not None
    digest = hashlib.sha256(data).hexdigest()
    assert record.job.references[0].image == digest
    assert bench.store.read("default", digest) == data
    assert body["request"]["references"] == [
        {
            "slot": 1,
            "role": "subject",
            "sha256": digest,
            "url": None,
            "mask_sha256": None,
            "resolution": 24,
            "on_no_face": "fail",
        }
    ]


def test_defaults_are_the_models(bench: Bench) -> None:
    """What is left out, or null, is the loaded model's default, and the job says so."""
    bare = bench.submit(seed=5)["request"]
    nulls = bench.submit(seed=5, width=None, height=None, guidance=None, negative_prompt=None)["request"]
    assert bare == nulls
    assert bare == {
        "model": "unit", "prompt": "a toy", "negative_prompt": "", "references": [], "width": 72, "height": 64,
        "num_inference_steps": 4, "guidance": 4.5, "first_step_guidance": 4.5, "true_cfg_scale": 1.0,
        "true_cfg_start": 0, "true_cfg_end": 0, "negative_guidance": 3.5, "seed": 5, "num_images": 1,
        "output": {"format": "png"}, "priority": "interactive", "previews": 0, "webhook": None,
        "adapter": None,
    }  # fmt: skip


def test_given_values_reach_the_worker(bench: Bench) -> None:
    """Every parameter arrives in the record that the worker reads, unchanged."""
    asked = {
        "width": 80, "height": 48, "num_inference_steps": 9, "guidance": 2.5, "first_step_guidance": 3.0,
        "true_cfg_scale": 2.0, "true_cfg_start": 1, "true_cfg_end": 5, "negative_guidance": 1.5,
        "negative_prompt": "blur", "num_images": 3, "output": {"format": "webp"}, "priority": "batch",
    }  # fmt: skip
    body = bench.submit(**asked, metadata={"order": "42"})
    assert {name: body["request"][name] for name in asked} == asked
    assert body["metadata"] == {"order": "42"}
    record = bench.ledger.get(body["id"])
    assert record is not None
    sampling = record.job.sampling
    assert (sampling.width, sampling.height, sampling.num_inference_steps) == (80, 48, 9)
    assert (sampling.true_cfg_scale, sampling.true_cfg_start, sampling.true_cfg_end) == (2.0, 1, 5)
    job = record.job
    assert (job.num_images, job.output_format, job.negative_prompt, job.priority) == (3, "webp", "blur", "batch")


def test_first_step_guidance_follows_guidance(bench: Bench) -> None:
    """A caller who sets guidance means the first step too."""
    assert bench.submit(guidance=2.0)["request"]["first_step_guidance"] == 2.0


def test_true_cfg_runs_on_all_steps_when_only_a_scale_is_given(bench: Bench) -> None:
    """A scale above 1 with the released defaults of the window would silently do nothing."""
    request = bench.submit(true_cfg_scale=2.0, num_inference_steps=6)["request"]
    assert (request["true_cfg_start"], request["true_cfg_end"]) == (0, 6)


def test_seed_covers_64_bits_and_is_drawn_when_left_out(bench: Bench) -> None:
    """Seeds survive exactly up to 2**64 - 1 (no float on the way), and two jobs without one differ."""
    for seed in (0, 2**53 + 1, 2**64 - 1):
        assert bench.submit(seed=seed)["request"]["seed"] == seed
    drawn = {bench.submit()["request"]["seed"] for _ in range(3)}
    assert len(drawn) == 3
    assert all(0 <= seed < 2**53 for seed in drawn)


def test_empty_slots_keep_their_number(bench: Bench) -> None:
    """`[ref#3]` means the third slot whatever lies before it."""
    body = bench.submit(prompt="[ref#3] beside [ref#1]", references=[reference(), None, reference("content")])
    assert [(item["slot"], item["role"]) for item in body["request"]["references"]] == [
        (1, "subject"),
        (3, "content"),
    ]


def test_style_prompt_gets_its_trigger_once(bench: Bench) -> None:
    """Style weights only work behind the sentence they were trained with; it is never doubled."""
    style = [reference("style")]
    effective = bench.submit(prompt="a cat", references=style)["request"]["prompt"]
    assert effective == f"{TRIGGER} a cat"
    assert bench.submit(prompt=effective, references=style)["request"]["prompt"] == effective
    assert bench.submit(prompt="a cat", references=[reference()])["request"]["prompt"] == "a cat"


def test_prompt_is_normalised_and_joiners_survive(bench: Bench) -> None:
    """The same word typed in two ways is one prompt; emoji built with a joiner stay whole."""
    decomposed = unicodedata.normalize("NFD", "café") + " \U0001f469\u200d\U0001f680"
    assert bench.submit(prompt=decomposed)["request"]["prompt"] == "café \U0001f469\u200d\U0001f680"


def test_formats_and_masks_are_stored(bench: Bench) -> None:
    """JPEG and WebP references and a mask of the same size pass, each kept byte for byte."""
    mask = picture(colour=(255, 255, 255))
    body = bench.submit(
        references=[
            {"image": data_url(picture("JPEG"), "image/jpeg"), "role": "subject", "mask": data_url(mask)},
            {"image": data_url(picture("WEBP"), "image/webp"), "role": "content", "resolution": 32},
        ]
    )
    first, second = body["request"]["references"]
    assert bench.store.read("default", first["mask_sha256"]) == mask
    assert bench.store.read("default", second["sha256"]) == picture("WEBP")
    assert second["resolution"] == 32


def test_request_id_is_kept_if_harmless(bench: Bench) -> None:
    """A caller's id can be followed through the logs, but cannot write into them."""
    kept = bench.client.get("/livez", headers={"X-Request-ID": "trace-1.a_b"})
    assert kept.headers["x-request-id"] == "trace-1.a_b"
    replaced = bench.client.get("/livez", headers={"X-Request-ID": "a b\tc"})
    assert replaced.headers["x-request-id"].startswith("req_")
