"""What the gateway says about itself, and what it must never import."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from fastapi.openapi.models import OpenAPI

from service.problems import TABLE
from service.schemas import CustomizeRequest, ReferenceBody
from tests.conftest import ROOT
from tests.service.conftest import Bench

HEAVY = ("torch", "triton", "diffusers", "transformers", "peft", "accelerate", "cv2")


def test_service_imports_no_model_library() -> None:
    """The gateway must start in a second and fit in a small image: none of its modules may pull in torch."""
    program = (
        "import importlib, pkgutil, sys, service\n"
        "found = [module.name for module in pkgutil.walk_packages(service.__path__, 'service.')]\n"
        "assert {'service.app', 'service.routes.jobs', 'service.commands.serving'} <= set(found)\n"
        "for name in found: importlib.import_module(name)\n"
        f"print(sorted(set({HEAVY!r}) & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def _references(node: Any) -> list[str]:
    if isinstance(node, dict):
        here = [node["$ref"]] if isinstance(node.get("$ref"), str) else []
        return here + [found for value in node.values() for found in _references(value)]
    return [found for value in node for found in _references(value)] if isinstance(node, list) else []


def test_openapi_is_valid_and_closed(bench: Bench) -> None:
    """The document is OpenAPI 3.1, and every schema that it refers to is in it."""
    document = bench.client.get("/openapi.json").json()
    OpenAPI.model_validate(document)
    assert document["openapi"].startswith("3.1")
    for pointer in set(_references(document)):
        node: Any = document
        for part in pointer.removeprefix("#/").split("/"):
            node = node[part]


def test_openapi_declares_bodies_that_are_read_by_hand(bench: Bench) -> None:
    """The request body is parsed by us; a generated client must see it all the same, field for field."""
    document = bench.client.get("/openapi.json").json()
    operation = document["paths"]["/v1/customize"]["post"]
    assert operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith("/CustomizeRequest")
    schemas = document["components"]["schemas"]
    assert schemas["CustomizeRequest"]["properties"].keys() == CustomizeRequest.model_fields.keys()
    assert schemas["CustomizeRequest"]["additionalProperties"] is False
    assert schemas["ReferenceBody"]["properties"].keys() == ReferenceBody.model_fields.keys()
    assert "subject" in schemas["ReferenceBody"]["properties"]["role"]["enum"]
    assert operation["responses"]["202"]["content"]["application/json"]["schema"]["$ref"].endswith("/JobBody")
    assert {"Location", "Retry-After"} <= operation["responses"]["202"]["headers"].keys()


def test_openapi_declares_every_problem(bench: Bench) -> None:
    """Each operation declares its problems as problem+json; what no operation can say, the connection says."""
    document = bench.client.get("/openapi.json").json()
    said = ""
    for path in document["paths"].values():
        for operation in path.values():
            for status, answer in operation["responses"].items():
                if status.startswith(("4", "5", "d")):
                    assert list(answer["content"]) == ["application/problem+json"]
                    said += answer["description"] + ", "
    assert {code for code in TABLE if f"{code}," not in said} == {"method_not_allowed", "head_too_large"}


def test_the_document_in_the_repository_is_this_one(bench: Bench) -> None:
    """Who reads docs/openapi.json on the web sees what the service does; a change of the contract is seen in a diff."""
    written = json.loads((ROOT / "docs" / "openapi.json").read_text())
    assert written == bench.client.get("/openapi.json").json(), "the contract has changed: run `make openapi`"
