"""schemathesis against a real gateway: whatever fits the OpenAPI document, or just does not.

    python -m tests.fuzz contract --examples 500 --seed 1 --processes 2

Cases are drawn from docs/openapi.json, valid and invalid, one by one and as sequences that use what earlier answers
gave (a job's id in the next request). Each answer is held against the document: no server error, status and media
type documented, a body that fits its schema, 405 for methods that are not there, refusals of what does not fit.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from tests.conftest import ROOT
from tests.fuzz.slow_sockets import gateway

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "unsupported_method",
    "negative_data_rejection",
)
PHASES = "examples,coverage,fuzzing,stateful"
DOCUMENT = ROOT / "docs" / "openapi.json"
ENDLESS = ("/v1/jobs/{id}/events", "/v1/trainings/{id}/events")
"""Answers that go on until a job ends, and here nobody works; tests/service/test_stream_restarts.py has them."""


@dataclass(frozen=True, slots=True)
class Fuzzed:
    """`cases` sent; `said`: what schemathesis reports, its failures by check among it."""

    cases: int
    failures: int
    said: str


def run_contract(examples: int, seed: int, document: Path = DOCUMENT) -> Fuzzed:
    """Cases against a gateway of their own.

    Args:
        examples: of each operation; also of sequences.
    """
    with gateway(DREAMSERVE_LOG_LEVEL="error") as (host, port, _), tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [
            *(sys.executable, "-m", "schemathesis.cli", "run", str(document)),
            *("--url", f"http://{host}:{port}", "--phases", PHASES, "--mode", "all", "--checks", ",".join(CHECKS)),
            *("--max-examples", str(examples), "--seed", str(seed), "--continue-on-failure", "--no-color"),
            *("--generation-database", ":memory:", "--report-json-path", str(report), "--warnings", "off"),
            *("--suppress-health-check", "all", "--request-timeout", "90", "--no-shrink"),
            *(word for path in ENDLESS for word in ("--exclude-path", path)),
        ]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        found = cast("dict[str, Any]", json.loads(report.read_text()) if report.exists() else {})
    return Fuzzed(_cases(found), 0 if done.returncode == 0 else 1, done.stdout + done.stderr)


def main(arguments: list[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz contract", description="Cases from the OpenAPI document."
    )
    parser.add_argument("--examples", type=int, default=100, help="of each operation, and sequences")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--processes", type=int, default=1, help="side by side, by seeds that follow, each so many")
    asked = parser.parse_args(arguments)
    seeds = range(asked.seed, asked.seed + asked.processes)
    with ThreadPoolExecutor(asked.processes) as pool:
        runs = list(pool.map(lambda seed: run_contract(asked.examples, seed), seeds))
    for fuzzed in runs:
        print(fuzzed.said)
    failed = sum(fuzzed.failures for fuzzed in runs)
    print(f"{sum(fuzzed.cases for fuzzed in runs)} cases, {'failures, see above' if failed else '0 failures'}")
    return 1 if failed else 0


def _cases(report: dict[str, Any]) -> int:
    return int(report.get("test_cases", {}).get("generated", 0))
