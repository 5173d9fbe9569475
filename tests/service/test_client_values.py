"""What the client knows of the contract, beside the gateway's own bodies, and what it makes of strange answers."""

from __future__ import annotations

import json
import re
import time
from dataclasses import fields
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from itertools import pairwise
from typing import Any

import httpx2
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import BaseModel

from service import schemas, training_schemas
from service.client import InvalidRequestError, Reference, UnexpectedAnswerError, calls, values
from service.client.errors import retry_after_s
from service.client.references import AdapterUse, Webhook
from service.client.retries import LONGEST_PAUSE_S, Tries
from service.problems import TABLE, ProblemDetails, problem_response
from tests.conftest import ROOT
from tests.service.conftest import Bench, picture

ALL: dict[str, Any] = {"idempotency_key": None, "wait": None, "start_within": None}


@pytest.mark.parametrize(
    ("known", "said", "apart"),
    [
        (values.JobState, schemas.JobBody, {"urls"}),
        (values.ImageState, schemas.ImageView, {"url"}),
        (values.TrainingState, training_schemas.TrainingBody, {"urls"}),
        (values.TrainingProgress, training_schemas.TrainingProgressView, set[str]()),
        (values.Progress, schemas.ProgressView, set[str]()),
        (values.Place, schemas.QueueView, set[str]()),
        (values.Failure, schemas.JobErrorView, set[str]()),
        (values.UploadedReference, schemas.UploadedReferenceBody, set[str]()),
        (values.Model, schemas.ModelBody, set[str]()),
        (values.Range, schemas.RangeView, set[str]()),
        (values.Adapter, training_schemas.AdapterView, set[str]()),
        (values.JobPage, schemas.JobList, set[str]()),
        (values.TrainingPage, training_schemas.TrainingList, set[str]()),
    ],
)
def test_the_client_knows_every_field(known: type[Any], said: type[BaseModel], apart: set[str]) -> None:
    """What the service says of a thing, the client's value has; URLs it makes itself, from ids."""
    assert {field.name for field in fields(known)} == said.model_fields.keys() - apart


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (calls.CustomizeOptions.__annotations__.keys() | {"prompt", "references"}, schemas.CustomizeRequest),
        (calls.TrainingOptions.__annotations__.keys() | {"recipe"}, training_schemas.TrainingRequest),
        ({field.name for field in fields(Reference)}, schemas.ReferenceBody),
        ({field.name for field in fields(AdapterUse)}, schemas.AdapterBody),
        ({field.name for field in fields(Webhook)}, schemas.WebhookBody),
    ],
)
def test_the_client_can_say_everything(names: set[str], said: type[BaseModel]) -> None:
    """No field of a request is out of its reach; `output` has but a format, which stands by itself."""
    assert {"output" if name == "format" else name for name in names} == said.model_fields.keys()


def _answer(body: object, status: int = 200, headers: dict[str, str] | None = None) -> httpx2.Response:
    request = httpx2.Request("GET", "http://127.0.0.1/")
    return httpx2.Response(status, headers=headers, content=json.dumps(body), request=request)


def _spread(body: Any, extra: dict[str, Any]) -> Any:
    """The body with more fields in every object of the contract's own."""
    if isinstance(body, dict):
        grown = {
            name: value if name in ("metadata", "timings", "cache", "request") else _spread(value, extra)
            for name, value in body.items()
        }
        return extra | grown
    return [_spread(entry, extra) for entry in body] if isinstance(body, list) else body


JSON = st.recursive(
    st.none() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
SECONDS = st.integers(0, 10**6).map(str)
PRINTABLE = st.text(st.characters(min_codepoint=32, max_codepoint=126))
NEW = st.dictionaries(st.text(min_size=1).map(lambda name: f"new_{name}"), JSON, max_size=3)


@given(NEW)
def test_fields_of_a_later_version_are_left_out(extra: dict[str, Any]) -> None:
    """An older client reads a newer service: whatever is added anywhere changes nothing of what it knows."""
    body = {
        "id": "job_1",
        "status": "succeeded",
        "queue": {"position": 1, "eta_s": None},
        "created_at": "2026-11-21T17:43:27.512Z",
        "images": [{"sha256": "0", "width": 1, "height": 2, "media_type": "image/png", "seed": 2**64 - 1, "url": "x"}],
        "error": {"code": "c", "message": "m", "retryable": True},
        "metadata": {"a": "b"},
    }
    plain = calls.job("job_1").read(_answer(body))
    assert calls.job("job_1").read(_answer(_spread(body, extra))) == plain
    assert plain.created_at == datetime(2026, 11, 21, 17, 43, 27, 512000, UTC)
    assert plain.images[0].seed == 2**64 - 1


def test_a_later_state_is_not_an_end() -> None:
    """A state that this version has not heard of is shown as it is, and waited through."""
    assert not calls.job("x").read(_answer({"id": "x", "status": "paused", "created_at": "2026-01-01T00:00:00Z"})).ended


@given(JSON)
def test_what_is_no_job_is_never_read_as_one(body: Any) -> None:
    """Whatever JSON a stranger answers, it is said to be unexpected."""
    with pytest.raises(UnexpectedAnswerError):
        calls.job("job_1").read(_answer(body))


def test_a_job_of_the_gateway_is_read_whole(bench: Bench) -> None:
    """Nothing of a real body falls to its default on the way."""
    job_id = bench.submit(metadata={"a": "b"}, previews=1)["id"]
    bench.finish(job_id, picture())
    body = bench.client.get(f"/v1/jobs/{job_id}").json()
    state = calls.job(job_id).read(_answer(body))
    for name in ("id", "status", "attempt", "cancel_requested", "request", "timings", "cache", "metadata"):
        assert getattr(state, name) == body[name]
    for name in ("created_at", "started_at", "finished_at", "expires_at"):
        assert getattr(state, name) == datetime.fromisoformat(body[name])
    assert [image.sha256 for image in state.images] == [image["sha256"] for image in body["images"]]


@pytest.mark.parametrize("code", TABLE)
def test_every_problem_becomes_an_error(code: str) -> None:
    """Each code of the service keeps its meaning: tried again if it says so, else said at once with all it carries."""
    problem = problem_response(ProblemDetails(code, "detail"), "req_1")
    answer = httpx2.Response(
        problem.status_code, content=bytes(problem.body), request=httpx2.Request("GET", "http://x")
    )
    if TABLE[code].retryable:
        assert Tries(60.0).answered(answer, "req_0") is not None
    with pytest.raises(Exception) as caught:
        Tries(0.0).answered(answer, "req_0")
    said = caught.value
    assert (said.code, said.detail, said.retryable) == (code, "detail", TABLE[code].retryable)
    assert (said.status, said.request_id) == (TABLE[code].status, "req_1")


@given(SECONDS | PRINTABLE | st.just("Wed, 21 Oct 2015 07:28:00 GMT"))
@example("0000000001")
@example("9" * 500)
def test_retry_after_is_a_time_or_nothing(said: str) -> None:
    """Seconds, or a date, or something that proxies made up."""
    advice = retry_after_s(_answer({}, 503, {"Retry-After": said}))
    assert advice is None or advice >= 0
    if said.isascii() and said.isdecimal():
        assert advice == min(int(said), 1e9)


def test_retry_after_may_be_a_date() -> None:
    """As RFC 9110 has it."""
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=100), usegmt=True)
    advice = retry_after_s(_answer({}, 503, {"Retry-After": date}))
    assert advice is not None and 90 < advice <= 100


def test_pauses_grow_and_end() -> None:
    """Each is longer than the one before it may be, up to a bound; together they stay within the time that is given."""
    tries = Tries(1000.0)
    pauses = [tries.failed(httpx2.ConnectError("x"), "") for _ in range(12)]
    assert all(soon <= 2 * late for soon, late in pairwise(pauses))
    assert pauses[0] <= 0.1 and 0.5 * LONGEST_PAUSE_S <= pauses[-1] <= LONGEST_PAUSE_S
    began = time.monotonic()
    short = Tries(0.5)
    with pytest.raises(Exception, match="no_answer"):
        while True:
            time.sleep(short.failed(httpx2.ReadError("x"), ""))
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("said", [float("nan"), float("inf")])
def test_no_number_that_is_none_is_sent(said: float) -> None:
    """JSON has no such number: the service would refuse a body that the caller never sees."""
    with pytest.raises(InvalidRequestError, match="JSON"):
        calls.customize("a", [], {"guidance": said}, **ALL)


def test_what_is_not_said_is_not_sent() -> None:
    """The defaults stay the model's own, also after a version that changes them."""
    call = calls.customize("a", [None, Reference.bytes(picture(), role="subject")], {"seed": None}, **ALL)
    body = json.loads(call.content or b"")
    assert body.keys() == {"prompt", "references"}
    assert body["references"][0] is None
    assert body["references"][1].keys() == {"image", "role"}


@pytest.mark.parametrize("data", [b"", b"GIF89a", b"%PDF", b"<svg>"])
def test_a_file_that_is_no_picture(data: bytes) -> None:
    """Said before it is sent."""
    with pytest.raises(ValueError, match="not a PNG"):
        Reference.bytes(data, role="subject")
    with pytest.raises(ValueError, match="not a PNG"):
        calls.upload(data)


def test_every_code_of_the_client_is_documented() -> None:
    """What it raises of its own accord is in docs/errors.md."""
    raised: set[str] = set()
    for path in (ROOT / "service" / "client").glob("*.py"):
        raised |= set(re.findall(r'(?:Error|__init__)\(\s*"([a-z_]+)"', path.read_text()))
    assert len(raised) > 6
    text = (ROOT / "docs" / "errors.md").read_text().split("| code of the client |")[1]
    assert {code for code in raised if f"`{code}`" not in text} == set()
