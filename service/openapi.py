"""The parts of the OpenAPI document that FastAPI cannot see: bodies read by hand, and problems."""

from __future__ import annotations

from functools import cache
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse
from pydantic.json_schema import models_json_schema

from service.problems import MEDIA_TYPE, TABLE
from service.schemas import CustomizeRequest, ProblemBody
from service.training_schemas import TrainingRequest

_REFERENCE = "#/components/schemas/{model}"
_PROBLEM_CONTENT = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/ProblemBody"}}}

CUSTOMIZE_BODY: dict[str, Any] = {
    "required": True,
    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/CustomizeRequest"}}},
}

_PICTURE = {"schema": {"type": "string", "format": "binary"}}
_FORM = {"type": "object", "required": ["file"], "properties": {"file": {"type": "string", "format": "binary"}}}
REFERENCE_BODY: dict[str, Any] = {
    "required": True,
    "content": {
        **dict.fromkeys(("image/png", "image/jpeg", "image/webp"), _PICTURE),
        "multipart/form-data": {"schema": _FORM},
    },
}

TRAINING_BODY: dict[str, Any] = {
    "required": True,
    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/TrainingRequest"}}},
}


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route: each status with its codes, and `default` for what any route may say."""
    answers: dict[int | str, dict[str, Any]] = {
        number: {
            "description": "Codes: " + ", ".join(code for code, kind in TABLE.items() if kind.status == number),
            "content": _PROBLEM_CONTENT,
        }
        for number in statuses
    }
    answers["default"] = {"description": "Any other problem.", "content": _PROBLEM_CONTENT}
    return answers


def install_openapi(app: FastAPI) -> None:
    """Make `app.openapi()` complete, with the schemas that routes refer to by name, and serve it at /openapi.json.

    It is written once: writing it takes milliseconds of the event loop, and everyone may ask for it.
    """
    written = cache(lambda: JSONResponse(app.openapi()).body)

    async def serve_openapi(_: Request) -> Response:
        return Response(written(), media_type="application/json")

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
            _, extra = models_json_schema(
                [(CustomizeRequest, "validation"), (TrainingRequest, "validation"), (ProblemBody, "serialization")],
                ref_template=_REFERENCE,
            )
            document["components"]["schemas"].update(extra["$defs"])
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi
    app.add_route("/openapi.json", serve_openapi, include_in_schema=False)
