"""No bytes whatever make the gateway answer 5xx, and no JSON trick gets past the door."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.problems import TABLE
from service.schemas import CustomizeRequest
from tests.service.conftest import Bench

JSON = {"Content-Type": "application/json"}

MALFORMED = [
    b"",
    b"{",
    b"nul",
    b'{"prompt": "a",}',
    b'{"prompt": NaN}',
    b'{"prompt": "a", "guidance": Infinity}',
    b'{"prompt": "a", "guidance": 1e999}',
    b'{"prompt": "\\ud800"}',
    b'{"prompt": "\xed\xa0\x80"}',
    b'{"prompt": "\xff"}',
    b'\xef\xbb\xbf{"prompt": "a"}',
    b'{"prompt": "a"} {}',
    b'{"prompt": "a\x01"}',
    '{"prompt": "a"}'.encode("utf-16"),
]


@pytest.mark.parametrize("raw", MALFORMED)
def test_malformed(bench: Bench, raw: bytes) -> None:
    """What RFC 8259 does not allow, infinities and lone surrogates included, is a 400."""
    answer = bench.client.post("/v1/customize", content=raw, headers=JSON)
    assert (answer.status_code, answer.json()["code"]) == (400, "malformed_json")


@pytest.mark.parametrize(
    "raw",
    [
        b'{"metadata": ' + b"[" * 32 + b"]" * 32 + b"}",
        b"[" * 500 + b"]" * 500,
        b"[" * 5000,
        b'{"references": [' + b"{}," * 120_000 + b"{}]}",
    ],
    ids=["33 deep", "500 deep", "5000 deep", "120,000 objects"],
)
def test_too_complex(bench: Bench, raw: bytes) -> None:
    """Depth and number of values are bounded before they cost anything."""
    answer = bench.client.post("/v1/customize", content=raw, headers=JSON)
    assert (answer.status_code, answer.json()["code"]) == (400, "json_too_complex")


def test_depth_of_32_is_read(bench: Bench) -> None:
    """The bound is 32 and no less: such a body gets as far as its fields."""
    raw = b'{"prompt": "a", "metadata": ' + b"[" * 31 + b"]" * 31 + b"}"
    answer = bench.client.post("/v1/customize", content=raw, headers=JSON)
    assert answer.json()["errors"][0]["pointer"] == "/metadata"


@pytest.mark.parametrize("raw", [b"[]", b"null", b'"prompt"', b"3"])
def test_top_must_be_an_object(bench: Bench, raw: bytes) -> None:
    """Valid JSON of another shape is a type error of the whole body."""
    answer = bench.client.post("/v1/customize", content=raw, headers=JSON)
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_type")
    assert answer.json()["errors"][0]["detail"] == "Send an object: fields in { }."
    assert answer.json()["errors"][0]["pointer"] == ""


def test_numbers_beyond_64_bits_are_refused(bench: Bench) -> None:
    """An integer that JSON readers turn into a float must not become a rounded seed."""
    raw = b'{"prompt": "a", "seed": 18446744073709551616}'
    answer = bench.client.post("/v1/customize", content=raw, headers=JSON)
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["pointer"] == "/seed"


_anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
_fields = st.sampled_from([*CustomizeRequest.model_fields, "webhook", "adapter", "x"])
_values = _anything | st.sampled_from(
    [64, 72, 4, 4.5, 7, "a [ref#1]", [{"image": "data:image/png;base64,AAAA", "role": "subject"}], [None], {}]
)


@settings(max_examples=150)
@given(st.dictionaries(_fields, _values, max_size=6))
def test_no_json_value_makes_a_5xx(bench: Bench, body: dict[str, Any]) -> None:
    """Any value in any field is accepted or refused with documented codes, never a server error."""
    raw = json.dumps(body)  # NaN, infinities and lone surrogates stay in
    answer = bench.client.post("/v1/customize", content=raw.encode(), headers=JSON)
    assert answer.status_code in (202, 400, 422), answer.text
    if answer.status_code != 202:
        problem = answer.json()
        assert problem["code"] in TABLE
        assert {fault["code"] for fault in problem["errors"]} <= TABLE.keys()


@settings(max_examples=100)
@given(st.binary(max_size=200))
def test_no_bytes_make_a_5xx(bench: Bench, raw: bytes) -> None:
    """Nor do arbitrary bytes."""
    answer = bench.client.post("/v1/customize", content=raw, headers=JSON)
    assert answer.status_code in (400, 422)
