"""Every text of the JSON corpus as a whole body and inside one, against the real parser behind the real route."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from service.problems import TABLE
from tests.fuzz.json_corpus import Case, cases
from tests.service.conftest import Bench

CASES = list(cases())
PLACES = (
    b"%s",
    b'{"prompt": "a", "metadata": {"k": %s}}',
    b'{"prompt": %s}',
    b'{"prompt": "a", "guidance": %s}',
    b'{"prompt": "a", "references": [%s]}',
)
"""Whole, as a text, as a number, as an object; where a case has its own brackets the sense changes with it."""


def _ask(bench: Bench, raw: bytes) -> tuple[int, str]:
    answer = bench.client.post("/v1/customize", content=raw, headers={"Content-Type": "application/json"})
    if answer.status_code == 202:
        return 202, ""
    body = answer.json()
    assert {fault["code"] for fault in body["errors"]} <= TABLE.keys()
    return answer.status_code, body["code"]


def test_the_corpus_is_large_and_names_its_cases() -> None:
    """Hundreds of different texts of each kind, none without a verdict."""
    kinds = Counter(case.verdict for case in CASES)
    assert kinds["y"] > 60 and kinds["n"] > 350 and kinds["i"] > 100
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("verdict", ["y", "n", "i"])
def test_the_verdicts_are_those_of_a_second_parser(verdict: str) -> None:
    """The control of the corpus itself: Python's own parser, made strict, agrees wherever it can tell."""

    def refuse(_: str) -> None:
        raise ValueError("no such number")

    for case in (case for case in CASES if case.verdict == verdict and len(case.raw) < 5_000):
        try:
            value = json.loads(case.raw.decode(), parse_constant=refuse)
            json.dumps(value, ensure_ascii=False).encode()  # lone surrogates fail here
        except (ValueError, RecursionError):
            assert verdict != "y", case
        else:
            assert verdict != "n" or case.raw.startswith(b"\xef\xbb\xbf"), case


def test_whole_bodies(bench: Bench) -> None:
    """No text is a server error; what is no JSON is called so, what is JSON is not."""
    for case in CASES:
        status, code = _ask(bench, case.raw)
        assert status < 500, case
        malformed = code in ("malformed_json", "json_too_complex")
        assert case.verdict == "i" or malformed == (case.verdict == "n"), (case, code)


@pytest.mark.parametrize("place", PLACES[1:])
def test_inside_a_body(bench: Bench, place: bytes) -> None:
    """Nor inside one, at a field of any type."""
    wrong: list[tuple[Case, int]] = []
    for case in CASES:
        if case.name.startswith(("cut", "without", "byte")):
            continue
        status, _ = _ask(bench, place.replace(b"%s", case.raw))
        if status not in (202, 400, 422):
            wrong.append((case, status))
    assert wrong == []
    assert bench.client.get("/v1/jobs").status_code == 200
