"""What a request says beside its body: idempotency, patience, a deadline, a trace; once each, numbers in digits."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Header, Request
from pydantic import BeforeValidator
from pydantic_core import PydanticCustomError
from starlette.datastructures import Headers

from service.problems import Fault, Problem
from workers.ledger import Once

MAX_WAIT_S = 60
_WAIT = re.compile(r"(?:^|[,;\s])wait\s*=\s*\"?([0-9]{1,9})\"?(?:$|[,;\s])", re.IGNORECASE)
_DURATION = re.compile(r"([0-9]{1,6})([smh]?)")
_TRACE = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
_DIGITS = re.compile(r"-?[0-9]+")
_NAME = re.compile(r"[a-z_]{1,64}")
_SINGLE = ("Idempotency-Key", "Cancel-After")
REMEDIES = {
    "Idempotency-Key:": "Use 1 to 255 visible ASCII characters.",
    "Cancel-After:": "Write a time from now on, as 30s, 5m or 1h.",
}
"""By the pointer of a header, what to do where it does not have its pattern."""
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600}


@dataclass(frozen=True, slots=True)
class SubmitHeaders:
    """Headers of a request that submits something."""

    idempotency_key: Annotated[
        str | None,
        Header(
            pattern=r"^[!-~]{1,255}$",
            description="The same key and body within 24 hours are the same job; see `Idempotent-Replayed`.",
        ),
    ] = None

    def once(self, tenant: str, raw: bytes) -> Once | None:
        """The idempotency key with what it stands for."""
        if self.idempotency_key is None:
            return None
        return Once(tenant, self.idempotency_key, hashlib.sha256(raw).hexdigest())


@dataclass(frozen=True, slots=True)
class JobHeaders(SubmitHeaders):
    """Those of a job."""

    prefer: Annotated[
        list[str] | None,
        Header(description="`wait=20` (RFC 7240): up to so many seconds, 60 at most, for the finished job as a 200."),
    ] = None
    cancel_after: Annotated[
        str | None,
        Header(
            pattern=r"^[1-9][0-9]{0,5}[smh]?$",
            description="`30s`, `5m`, `1h`: a job of which no step is made by then expires.",
        ),
    ] = None

    @property
    def wait_s(self) -> int:
        """How long the caller likes to wait; 0: not at all. A preference that is none is ignored, as RFC 7240 wants."""
        match = _WAIT.search(", ".join(self.prefer or ()))
        return min(MAX_WAIT_S, int(match[1])) if match else 0

    @property
    def start_within_s(self) -> float | None:
        """Seconds that the job may wait."""
        match = _DURATION.fullmatch(self.cancel_after or "")
        return float(int(match[1]) * _SECONDS[match[2]]) if match else None


SubmitHeadersDependency = Annotated[SubmitHeaders, Depends()]
JobHeadersDependency = Annotated[JobHeaders, Depends()]


def checked_traceparent(headers: Headers) -> str | None:
    """The caller's W3C trace context, if it is one; anything else is ignored, as the standard wants."""
    given = headers.get("traceparent", "")
    return given if _TRACE.fullmatch(given) else None


def known_tags(headers: Headers) -> list[str]:
    """What `If-None-Match` says, in one line or several; nothing if there is none."""
    return [tag.strip() for line in headers.getlist("if-none-match") for tag in line.split(",")]


def names(tags: Sequence[str], etag: str) -> bool:
    """Whether they name this one (RFC 9110 §13.1.2, weak comparison)."""
    return "*" in tags or etag.removeprefix("W/") in [tag.removeprefix("W/") for tag in tags]


async def _each_once(request: Request) -> None:
    query, headers = request.query_params, request.headers
    faults = [
        Fault(f"?{name}", "invalid_value", "Give this parameter once.")
        for name in sorted(query)
        if len(query.getlist(name)) > 1 and _NAME.fullmatch(name)
    ]
    faults += [
        Fault(f"{name}:", "invalid_value", "Give this header once.")
        for name in _SINGLE
        if len(headers.getlist(name)) > 1
    ]
    if faults:
        raise Problem.of_faults(faults)


EACH_ONCE = Depends(_each_once)
"""Of a route with parameters: 422 for what is given twice, of which others may read the first and we the last."""


def _in_digits(value: object) -> object:
    if isinstance(value, str) and not _DIGITS.fullmatch(value):
        raise PydanticCustomError("int_parsing", "Write a whole number in digits")
    return value


IN_DIGITS = BeforeValidator(_in_digits)
"""Of a number in a path or a query. pydantic alone also reads `1.0`, `1_0`, `+1` and ` 1`, as others may not."""
