"""What can go wrong between a caller and the service: one tree, every branch with a stable code.

DreamserveError ─┬─ RefusedError ─┬─ InvalidRequestError   400, 413, 415, 422: the request itself
                 │                ├─ UnauthenticatedError  401, 403
                 │                ├─ NotFoundError         404
                 │                ├─ GoneError             410
                 │                └─ BusyError             429, 503: there is no room now
                 ├─ NoAnswerError          nobody answered
                 ├─ UnexpectedAnswerError  somebody did, but not as this service does
                 ├─ JobFailedError         the job ended without pictures, or the training without an adapter
                 ├─ JobTimeoutError        it has not ended yet
                 ├─ DamagedImageError      a picture's bytes are not those that its job names
                 └─ WebhookError           a message that is not from the service, or is old
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Any, Final, cast

import httpx2

from service.client.values import RecordState

PASSING: Final = frozenset({429, 502, 503, 504})
"""What proxies too say of a service that is away for a moment."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One slip in a request. `pointer`: JSON pointer into its body, `?name` for a query, `Name:` for a header."""

    pointer: str
    code: str
    detail: str


_AGES_S = 1e9
"""Nobody waits longer."""


class DreamserveError(Exception):
    """Attributes:
    code: stable; docs/errors.md lists them.
    detail: a sentence for people.
    retryable: whether the same call may succeed later.
    request_id: what to quote to the service's operator; empty if there was no call.
    faults: where the request is at fault.
    """

    def __init__(
        self,
        code: str,
        detail: str,
        *,
        retryable: bool = False,
        request_id: str = "",
        faults: Sequence[Fault] = (),
    ) -> None:
        super().__init__(code, detail)
        self.code = code
        self.detail = detail
        self.retryable = retryable
        self.request_id = request_id
        self.faults = tuple(faults)

    def __str__(self) -> str:
        return f"{self.detail} ({self.code})"

    @property
    def pointers(self) -> tuple[str, ...]:
        """Where the request is at fault."""
        return tuple(fault.pointer for fault in self.faults)


class RefusedError(DreamserveError):
    """The service said no, for a reason of its own. `status`: of HTTP; `retry_after_s`: its advice, if it gave one.

    A request that cannot even be sent is refused here, with `status` 0.
    """

    status: int = 0
    retry_after_s: float | None = None


class InvalidRequestError(RefusedError):
    """The request asks for what cannot be; `faults` say where."""


class UnauthenticatedError(RefusedError):
    """No key, or one that does not open."""


class NotFoundError(RefusedError):
    """There is no such thing, or it is another tenant's."""


class GoneError(RefusedError):
    """It was there, and has been deleted or has expired."""


class BusyError(RefusedError):
    """There is no room now: a tenant's share is used up, all of the service's is, or what it builds on is away."""


class NoAnswerError(DreamserveError):
    """No connection, or none that lasted; what was asked for may have happened all the same."""


class UnexpectedAnswerError(DreamserveError):
    """An answer that this service does not give: of something between, or of another service. `status`: of HTTP."""

    status: int = 0


class JobFailedError(DreamserveError):
    """A job or training that failed, was canceled or expired; `job` is its last state."""

    def __init__(self, job: RecordState) -> None:
        error = job.error
        code = error.code if error else job.status
        detail = error.message if error else f"the job ended as {job.status}"
        super().__init__(code, detail, retryable=bool(error and error.retryable))
        self.job = job


class JobTimeoutError(DreamserveError, TimeoutError):
    """Waited as long as was asked for; the job goes on. `job` is its last known state."""

    def __init__(self, job: RecordState) -> None:
        super().__init__("job_timeout", f"the job is still {job.status}", retryable=True)
        self.job = job


class DamagedImageError(DreamserveError):
    """A picture whose bytes do not have the sha256 that its job names; nothing is written."""


class WebhookError(DreamserveError):
    """A message to be answered with 400 and not to be believed."""


_BY_STATUS: Final[dict[int, type[RefusedError]]] = {
    400: InvalidRequestError,
    401: UnauthenticatedError,
    403: UnauthenticatedError,
    404: NotFoundError,
    410: GoneError,
    413: InvalidRequestError,
    415: InvalidRequestError,
    422: InvalidRequestError,
    429: BusyError,
    503: BusyError,
}


def refusal(response: httpx2.Response, request_id: str) -> RefusedError | UnexpectedAnswerError:
    """The error that an answer without success stands for."""
    problem = _problem(response)
    status = response.status_code
    if problem is None:
        return unexpected(response, request_id)
    error = _BY_STATUS.get(status, RefusedError)(
        str(problem["code"]),
        str(problem.get("detail", "")),
        retryable=problem.get("retryable") is True,
        request_id=str(problem.get("request_id", request_id)),
        faults=_faults(problem.get("errors")),
    )
    error.status = status
    error.retry_after_s = retry_after_s(response)
    return error


def unexpected(response: httpx2.Response, request_id: str) -> UnexpectedAnswerError:
    """The error that an answer stands for which is none of the service's."""
    status = response.status_code
    name = f" {HTTPStatus(status).phrase}" if status in set(HTTPStatus) else ""
    detail = f"the answer was {status}{name}, and not as the service writes it: is this the right address?"
    error = UnexpectedAnswerError("unexpected_answer", detail, retryable=status in PASSING, request_id=request_id)
    error.status = status
    return error


def retry_after_s(response: httpx2.Response) -> float | None:
    """Seconds from now that a Retry-After asks for (RFC 9110 §10.2.3), at least 0; None without one."""
    said = response.headers.get("retry-after", "").strip()
    if said.isascii() and said.isdecimal():
        return min(float(said), _AGES_S)
    try:
        moment = parsedate_to_datetime(said)
    except ValueError:
        return None
    aware = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return max(0.0, (aware - datetime.now(UTC)).total_seconds())


def _problem(response: httpx2.Response) -> dict[str, Any] | None:
    try:
        body = json.loads(response.content)
    except ValueError:
        return None
    return cast("dict[str, Any]", body) if isinstance(body, dict) and "code" in body else None


def _faults(entries: object) -> list[Fault]:
    if not isinstance(entries, list):
        return []
    found = [cast("dict[str, Any]", entry) for entry in cast("list[object]", entries) if isinstance(entry, dict)]
    return [Fault(*(str(entry.get(name, "")) for name in ("pointer", "code", "detail"))) for entry in found]
