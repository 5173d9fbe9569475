"""Every slip gets its own code, a pointer to it and a remedy; nothing of the input comes back."""

from __future__ import annotations

import inspect
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
from fastapi.exceptions import RequestValidationError
from redis.exceptions import RedisError
from starlette.exceptions import HTTPException

from service.problems import MEDIA_TYPE, TABLE, Problem
from tests.service.conftest import Bench, data_url, picture, reference
from workers.artifacts import ArtifactError


def _huge_header() -> bytes:
    """A few bytes that promise 30,000 x 30,000 pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))


def _gif() -> bytes:
    return picture("GIF")


def _image(image: str, **changes: Any) -> dict[str, Any]:
    return {"references": [{"image": image, "role": "subject", **changes}]}


SLIPS: list[tuple[str, dict[str, Any], str]] = [
    ("missing_field", {"references": [{"role": "subject"}]}, "/references/0/image"),
    ("unknown_field", {"promt": "x"}, "/promt"),
    ("unknown_field", {"references": [reference(scale=1)]}, "/references/0/scale"),
    ("invalid_type", {"width": "64"}, "/width"),
    ("invalid_type", {"width": True}, "/width"),
    ("invalid_type", {"seed": 1.0}, "/seed"),
    ("invalid_type", {"metadata": {"order": 42}}, "/metadata/order"),
    ("invalid_value", {"output": {"format": "gif"}}, "/output/format"),
    ("missing_field", {"adapter": {"scale": 0.5}}, "/adapter/name"),
    ("invalid_type", {"adapter": {"name": "x", "scale": "0.5"}}, "/adapter/scale"),
    ("unknown_field", {"adapter": {"name": "x", "weight": 1.0}}, "/adapter/weight"),
    ("adapter_unknown", {"adapter": {"name": "x"}}, "/adapter/name"),
    ("adapter_unknown", {"adapter": {"name": "../adapters"}}, "/adapter/name"),
    ("adapter_unknown", {"adapter": {"name": "x", "version": "0" * 64}}, "/adapter/name"),
    ("not_enabled", {"webhook": {"url": "https://example.com/"}}, "/webhook"),
    ("missing_field", {"webhook": {}}, "/webhook/url"),
    ("invalid_value", {"webhook": {"url": "https://example.com/", "events": ["started"]}}, "/webhook/events/0"),
    ("invalid_value", {"previews": -1}, "/previews"),
    ("invalid_value", {"previews": 21}, "/previews"),
    ("invalid_value", {"priority": "urgent"}, "/priority"),
    ("not_enabled", {"include": []}, "/include"),
    ("not_enabled", _image("https://example.com/a.jpg", mask=data_url(picture())), "/references/0/mask"),
    ("url_forbidden", _image("https://127.0.0.1/a.jpg"), "/references/0/image"),
    ("url_forbidden", _image("HTTPS://example.com:22/a.jpg"), "/references/0/image"),
    ("reference_unknown", _image("ref_3f9c"), "/references/0/image"),
    ("reference_unknown", _image("ref_" + "0" * 32), "/references/0/image"),
    ("reference_unknown", _image(data_url(picture()), mask="ref_" + "0" * 32), "/references/0/mask"),
    ("prompt_empty", {"prompt": " \n"}, "/prompt"),
    ("prompt_too_long", {"prompt": "x" * 401}, "/prompt"),
    ("prompt_too_long", {"negative_prompt": "x" * 401}, "/negative_prompt"),
    ("prompt_characters", {"prompt": "a\x00b"}, "/prompt"),
    ("prompt_characters", {"prompt": "a \u202egnp.exe"}, "/prompt"),
    ("prompt_characters", {"negative_prompt": "\x9b31m"}, "/negative_prompt"),
    ("placeholder_without_reference", {"prompt": "a [ref#1]"}, "/prompt"),
    ("placeholder_without_reference", {"prompt": "[ref#2]", "references": [reference(), None]}, "/prompt"),
    ("placeholder_without_reference", {"prompt": "[ref#0]"}, "/prompt"),
    ("placeholder_without_reference", {"prompt": "[ref#99999999999999999999]"}, "/prompt"),
    ("too_many_references", {"references": [None] * 5}, "/references"),
    ("role_not_supported", {"references": [reference("hat")]}, "/references/0/role"),
    ("role_not_supported", {"references": [reference("garment")]}, "/references/0/role"),
    ("role_exclusive", {"references": [reference(), reference("style")]}, "/references/1/role"),
    ("resolution_out_of_range", {"references": [reference(resolution=72)]}, "/references/0/resolution"),
    ("resolution_out_of_range", {"references": [reference(resolution=20)]}, "/references/0/resolution"),
    (
        "resolution_out_of_range",
        {"references": [reference("identity", resolution=32)]},
        "/references/0/resolution",
    ),
    ("size_out_of_range", {"width": 136}, "/width"),
    ("size_out_of_range", {"height": 0}, "/height"),
    ("size_off_grid", {"height": 60}, "/height"),
    ("steps_out_of_range", {"num_inference_steps": 21}, "/num_inference_steps"),
    ("steps_out_of_range", {"num_inference_steps": 0}, "/num_inference_steps"),
    ("guidance_out_of_range", {"guidance": 0.5}, "/guidance"),
    ("guidance_out_of_range", {"first_step_guidance": 11}, "/first_step_guidance"),
    ("guidance_out_of_range", {"negative_guidance": -1.0}, "/negative_guidance"),
    ("guidance_out_of_range", {"true_cfg_scale": 5.5}, "/true_cfg_scale"),
    ("true_cfg_window", {"true_cfg_start": 3, "true_cfg_end": 2}, "/true_cfg_end"),
    ("true_cfg_window", {"true_cfg_start": -1}, "/true_cfg_start"),
    ("true_cfg_window", {"true_cfg_end": 5}, "/true_cfg_end"),
    ("seed_out_of_range", {"seed": -1}, "/seed"),
    ("seed_out_of_range", {"seed": 2**64}, "/seed"),
    ("seed_out_of_range", {"seed": -(2**70)}, "/seed"),
    ("invalid_type", {"seed": 1.0}, "/seed"),
    ("num_images_out_of_range", {"num_images": 5}, "/num_images"),
    ("num_images_out_of_range", {"num_images": 0}, "/num_images"),
    ("metadata_too_large", {"metadata": {"a": "x" * 2048}}, "/metadata"),
    ("metadata_too_large", {"metadata": {str(index): "" for index in range(17)}}, "/metadata"),
    ("image_url_invalid", _image("mug.png"), "/references/0/image"),
    ("image_url_invalid", _image("data:image/png;base64,QUJ"), "/references/0/image"),
    ("image_url_invalid", _image("data:image/png;base64,QUJD\n"), "/references/0/image"),
    ("image_url_invalid", _image("data:image/png;base64,QU-_"), "/references/0/image"),
    ("image_url_invalid", _image("http://example.com/a.png"), "/references/0/image"),
    ("image_type_mismatch", _image(data_url(picture("JPEG"))), "/references/0/image"),
    ("image_undecodable", _image(data_url(picture()[:-30])), "/references/0/image"),
    ("image_unsupported", _image("data:image/png;base64,"), "/references/0/image"),
    ("image_unsupported", _image(data_url(b"not a picture")), "/references/0/image"),
    ("image_too_large", _image(data_url(_huge_header())), "/references/0/image"),
    ("image_unsupported", _image(data_url(_gif(), "image/gif")), "/references/0/image"),
    ("image_unsupported", _image(data_url(_gif())), "/references/0/image"),
    ("image_undecodable", _image(data_url(picture()), mask=data_url(picture()[:-30])), "/references/0/mask"),
    (
        "mask_size_mismatch",
        _image(data_url(picture()), mask=data_url(picture(size=(5, 5)))),
        "/references/0/mask",
    ),
]

ELSEWHERE = {
    "adapter_mismatch": "test_adapters",
    "adapter_scale_out_of_range": "test_adapters",
    "recipe_unknown": "test_trainings",
    "recipe_unusable": "test_trainings",
    "override_invalid": "test_trainings",
    "dataset_missing": "test_trainings",
    "dataset_unknown": "test_trainings",
    "malformed_json": "test_json",
    "json_too_complex": "test_json",
    "not_found": "test_jobs",
    "method_not_allowed": "test_jobs",
    "malformed_request": "test_connections",
    "head_too_large": "test_connections",
    "unauthenticated": "test_tenants",
    "job_gone": "test_jobs",
    "job_not_finished": "test_jobs",
    "idempotency_conflict": "test_submitting",
    "tenant_over_share": "test_shares",
    "too_many_requests": "test_places",
    "over_capacity": "test_shares",
    "request_timeout": "test_limits",
    "artifact_missing": "test_pictures",
    "payload_too_large": "test_limits",
    "malformed_form": "test_references",
    "range_not_satisfiable": "test_pictures",
    "unsupported_media_type": "test_limits",
    "invalid_request": "test_refusals",
    "cursor_invalid": "test_jobs",
    "internal": "test_outages",
    "artifact_corrupt": "test_pictures",
    "queue_unavailable": "test_outages",
    "storage_unavailable": "test_outages",
    "draining": "test_readiness",
}
"""Codes that a good-looking body cannot provoke, and the file that does."""


@pytest.mark.parametrize(("code", "changes", "pointer"), SLIPS)
def test_slip(bench: Bench, code: str, changes: dict[str, Any], pointer: str) -> None:
    """One slip: 422, its code, its place, a remedy; and no job is left behind."""
    answer = bench.client.post("/v1/customize", json={"prompt": "a toy", **changes})
    body = answer.json()
    assert (answer.status_code, body["code"]) == (422, code), body
    assert answer.headers["content-type"] == MEDIA_TYPE
    assert [fault["pointer"] for fault in body["errors"]] == [pointer]
    assert body["errors"][0]["code"] == code
    assert len(body["errors"][0]["detail"]) > 10
    assert body["request_id"] == answer.headers["x-request-id"]
    assert body["instance"].endswith(body["request_id"])
    assert bench.ledger.list(None, None, 10)[0] == []


def test_all_faults_are_listed_at_once(bench: Bench) -> None:
    """Several slips of different kinds come back together, so that one round mends them all."""
    answer = bench.client.post(
        "/v1/customize", json={"prompt": "[ref#1]", "width": 60, "height": 1, "num_inference_steps": 99}
    )
    body = answer.json()
    assert body["code"] == "invalid_request"
    assert {(fault["pointer"], fault["code"]) for fault in body["errors"]} == {
        ("/prompt", "placeholder_without_reference"),
        ("/width", "size_off_grid"),
        ("/height", "size_out_of_range"),
        ("/num_inference_steps", "steps_out_of_range"),
    }


def test_a_thousand_slips_make_a_short_answer(bench: Bench) -> None:
    """An answer does not grow with the number of faults in a request."""
    unknown = {f"field{index}": index for index in range(1000)}
    answer = bench.client.post("/v1/customize", json={"prompt": "a", **unknown})
    assert answer.status_code == 422
    assert len(answer.json()["errors"]) == 20


@pytest.mark.parametrize("place", ["prompt", "key", "image", "role", "metadata", "format"])
def test_input_is_never_echoed(bench: Bench, place: str) -> None:
    """A canary put anywhere in a refused body is not in the answer: answers end up in logs and pages."""
    canary = "c4nary <script>"
    body: dict[str, Any] = {"prompt": "a toy", "width": 1}
    body |= {
        "prompt": {"prompt": canary + "\x00"},
        "key": {canary: 1},
        "image": _image(f"data:image/{canary};base64,AA"),
        "role": {"references": [reference(canary)]},
        "metadata": {"metadata": {canary: 1}},
        "format": {"output": {"format": canary}},
    }[place]
    answer = bench.client.post("/v1/customize", json=body)
    assert answer.status_code == 422
    assert "c4nary" not in answer.text


def test_no_picture_is_stored_for_a_refused_request(bench: Bench, tmp_path: Path) -> None:
    """A request that is refused for its last reference leaves nothing of its first one on the disk."""
    references = [reference(), {"image": data_url(b"broken"), "role": "subject"}]
    assert bench.client.post("/v1/customize", json={"prompt": "a", "references": references}).status_code == 422
    assert [file for file in (tmp_path / "artifacts").rglob("*") if file.is_file()] == []


def test_refusing_takes_no_thread(bench: Bench) -> None:
    """A handler that is a plain function is given a thread: twice the time, and who is refused most would hold them."""
    handlers = bench.client.app.exception_handlers  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue,reportUnknownMemberType,reportUnknownVariableType]
    assert {Problem, HTTPException, RequestValidationError, RedisError, ArtifactError} <= set(handlers)  # pyright: ignore[reportUnknownArgumentType]
    assert all(inspect.iscoroutinefunction(handler) for handler in handlers.values())  # pyright: ignore[reportUnknownArgumentType,reportUnknownMemberType,reportUnknownVariableType]


def test_every_code_is_provoked_somewhere() -> None:
    """A code that nothing provokes is either dead or untested; the files named must mention theirs."""
    assert {code for code, _, _ in SLIPS} | ELSEWHERE.keys() == TABLE.keys()
    for code, file in ELSEWHERE.items():
        assert f'"{code}"' in (Path(__file__).parent / f"{file}.py").read_text()


def test_documentation_lists_the_same_codes() -> None:
    """docs/errors.md and the table agree in codes, status, retryability and meaning."""
    text = (Path(__file__).parents[2] / "docs" / "errors.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \| (yes|no) \| (.+) \|$", text, re.MULTILINE)
    assert rows == [
        (code, str(kind.status), "yes" if kind.retryable else "no", kind.meaning) for code, kind in TABLE.items()
    ]
