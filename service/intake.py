"""From the socket to a typed request: bytes under a cap, JSON under a depth, fields under their types."""

from __future__ import annotations

from typing import Any

import anyio
import orjson
from fastapi import Request
from pydantic import ValidationError
from starlette.requests import ClientDisconnect

from service.problems import Fault, Problem
from service.schemas import CustomizeRequest

MAX_DEPTH = 32
MAX_SEPARATORS = 100_000
"""Commas and brackets in a body. Base64 has none: only bodies that unfold into a host of objects reach it."""

NOT_ENABLED = {
    "include": "Extra outputs are not enabled on this server: leave the field out.",
}
"""Fields of the contract that this version refuses by name rather than as unknown."""

_FAULT_CODES = {
    "missing": "missing_field",
    "extra_forbidden": "unknown_field",
    "seed_out_of_range": "seed_out_of_range",
}
_DETAILS = {
    "missing": "This field is required.",
    "extra_forbidden": "There is no such field: check its spelling.",
    "model_type": "Send an object: fields in { }.",
}


def body_bytes(request: Request, *, max_bytes: int) -> int:
    """How long the body is, or at most may be where its head does not say.

    Raises:
        Problem: `unsupported_media_type`, `payload_too_large`.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json" or request.headers.get("content-encoding", "identity") != "identity":
        raise Problem("unsupported_media_type", headers={"Accept-Post": "application/json"})
    declared = request.headers.get("content-length", "")
    if not (declared.isascii() and declared.isdecimal()):
        return max_bytes
    length = int(declared.lstrip("0")[:20] or "0")  # 20 digits are too many already, and thousands make int() raise
    if length > max_bytes:
        raise _too_large(max_bytes)
    return length


async def read_body(request: Request, *, max_bytes: int, timeout_s: float) -> bytes:
    """The whole body, refused as soon as it is known to be too long.

    Raises:
        Problem: `payload_too_large`, `request_timeout`.
    """
    body = bytearray()
    try:
        with anyio.fail_after(timeout_s):
            async for chunk in request.stream():
                body += chunk
                if len(body) > max_bytes:
                    raise _too_large(max_bytes)
    except (TimeoutError, ClientDisconnect):
        raise Problem("request_timeout", headers={"Connection": "close"}) from None
    return bytes(body)


def parse_json(raw: bytes) -> Any:
    """The body's value: finite numbers, valid Unicode, bounded depth and number of values.

    Raises:
        Problem: `malformed_json`, `json_too_complex`.
    """
    if len(raw) - len(raw.translate(None, b",[{")) > MAX_SEPARATORS:
        raise Problem("json_too_complex")
    try:
        value: Any = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        # The message holds positions and names of tokens, never text of the body.
        if error.msg.startswith("depth limit"):
            raise Problem("json_too_complex") from None
        where = f" (line {error.lineno}, column {error.colno})"
        raise Problem("malformed_json", "The body is not JSON" + where + ".") from None
    if _deeper_than(value, MAX_DEPTH):
        raise Problem("json_too_complex")
    return value


def validate(value: Any) -> CustomizeRequest:
    """The typed request.

    Raises:
        Problem: 422, one fault for each field that is missing, unknown, mistyped or not enabled.
    """
    faults: list[Fault] = []
    if isinstance(value, dict):
        for name in NOT_ENABLED.keys() & value.keys():
            faults.append(Fault(f"/{name}", "not_enabled", NOT_ENABLED[name]))
        value = {key: item for key, item in value.items() if key not in NOT_ENABLED}
    try:
        request = CustomizeRequest.model_validate(value)
    except ValidationError as error:
        faults.extend(faults_of(error))
        raise Problem.of_faults(faults) from None
    if faults:
        raise Problem.of_faults(faults)
    return request


def faults_of(error: ValidationError) -> list[Fault]:
    """pydantic's findings without the values they were found in."""
    faults: list[Fault] = []
    for item in error.errors(include_url=False, include_context=False, include_input=False):
        kind = item["type"]
        code = _FAULT_CODES.get(kind, "invalid_type" if kind.endswith("_type") else "invalid_value")
        faults.append(Fault(_pointer(item["loc"]), code, _DETAILS.get(kind, item["msg"] + ".")))
    return faults


def _pointer(location: tuple[int | str, ...]) -> str:
    """JSON pointer of pydantic's location; it stops above a name of the caller's that we would not print."""
    parts: list[str] = []
    for part in location:
        text = str(part)
        if not ((text.isascii() and text.isidentifier() and len(text) <= 64) or isinstance(part, int)):
            break
        parts.append(text)
    return "".join(f"/{part}" for part in parts)


def _deeper_than(value: Any, limit: int) -> bool:
    """Whether containers are nested more than `limit` deep; level by level, without recursion."""
    depth = 0
    level = [value] if isinstance(value, dict | list) else []
    while level:
        depth += 1
        if depth > limit:
            return True
        children = (child for item in level for child in (item.values() if isinstance(item, dict) else item))
        level = [child for child in children if isinstance(child, dict | list)]
    return False


def _too_large(max_bytes: int) -> Problem:
    return Problem("payload_too_large", f"The body exceeds {max_bytes} bytes: send fewer or smaller references.")
