"""The gateway keeps to its OpenAPI document, and where it would not, that is seen."""

from __future__ import annotations

import json
from pathlib import Path

from tests.fuzz.contract import DOCUMENT, run_contract


def test_the_gateway_keeps_to_its_document() -> None:
    """A few examples of each operation and some sequences: nothing undocumented, no server error."""
    fuzzed = run_contract(examples=3, seed=1)
    assert fuzzed.failures == 0, fuzzed.said[-4000:]
    assert fuzzed.cases > 300


def test_a_broken_promise_is_seen(tmp_path: Path) -> None:
    """The control: a document that promises another status for a list of jobs."""
    document = json.loads(DOCUMENT.read_text())
    answers = document["paths"]["/v1/jobs"]["get"]["responses"]
    answers["218"] = answers.pop("200")
    (tmp_path / "openapi.json").write_text(json.dumps(document))
    fuzzed = run_contract(examples=1, seed=1, document=tmp_path / "openapi.json")
    assert fuzzed.failures == 1 and " GET /v1/jobs " in fuzzed.said, fuzzed.said[-2000:]
