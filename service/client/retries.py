"""How a call goes on after something that may pass: when it is made again, and when it is given up. Sends nothing.

    no connection, a lost answer      again after a pause that doubles, drawn between half and all of it
    429, 503 and other passing ones   again after Retry-After, or as above without one
    anything else                     an error at once

Making a call again is safe: what is submitted carries an idempotency key, all else can be done twice.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from typing import Final

import httpx2

from service.client.errors import (
    DreamserveError,
    NoAnswerError,
    RefusedError,
    UnexpectedAnswerError,
    refusal,
    unexpected,
)

FIRST_PAUSE_S: Final = 0.1
LONGEST_PAUSE_S: Final = 5.0
_FINAL: Final = (httpx2.UnsupportedProtocol, httpx2.LocalProtocolError)
"""What no second try mends."""


@dataclass(frozen=True, slots=True)
class Deadline:
    """The moment, by the monotonic clock, up to which a caller waits, and the error when it has come."""

    at: float
    error: DreamserveError

    def left_s(self) -> float:
        """Seconds until then.

        Raises:
            DreamserveError: `error`.
        """
        left = self.at - time.monotonic()
        if left <= 0:
            raise self.error
        return left


class Tries:
    """The tries of one call. `lost`: an earlier one may have reached the service.

    Args:
        retry_for_s: in which they begin; what the first answers take of the `wait_s` that they were asked to wait does
            not count.
        deadline: of who waits for them; until then they go on.
    """

    def __init__(self, retry_for_s: float, wait_s: float = 0.0, deadline: Deadline | None = None) -> None:
        self.lost = False
        self._began_at = time.monotonic()
        self._until = self._began_at + retry_for_s
        self._wait_s = wait_s
        self._deadline = deadline
        self._pause_s = FIRST_PAUSE_S

    def begin(self) -> float:
        """Seconds that the try which begins now may take.

        Raises:
            DreamserveError: of the deadline.
        """
        self._began_at = time.monotonic()
        return float("inf") if self._deadline is None else self._deadline.left_s()

    def failed(self, error: httpx2.RequestError, request_id: str) -> float:
        """Seconds to wait before the next try, after no answer came.

        Raises:
            NoAnswerError, UnexpectedAnswerError: there is none. DreamserveError: of the deadline.
        """
        if isinstance(error, httpx2.SSEError):
            raise UnexpectedAnswerError("unexpected_answer", str(error), request_id=request_id) from error
        self.lost = self.lost or not isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout)
        pause = None if isinstance(error, _FINAL) else self._pause(0.0)
        if pause is None:
            detail = f"no answer: {type(error).__name__}"
            raise NoAnswerError("no_answer", detail, retryable=True, request_id=request_id) from error
        return pause

    def answered(self, response: httpx2.Response, request_id: str, undone: tuple[int, ...] = ()) -> float | None:
        """Seconds to wait before the next try; None if this answer is the one to be read.

        Args:
            undone: statuses that mean "done before" if an earlier answer was lost.

        Raises:
            RefusedError, UnexpectedAnswerError: the answer is one of them, and there is no next try.
            DreamserveError: of the deadline.
        """
        if response.is_success or (self.lost and response.status_code in undone):
            return None
        error = refusal(response, request_id) if response.is_error else unexpected(response, request_id)
        advice = error.retry_after_s if isinstance(error, RefusedError) else None
        pause = self._pause(advice or 0.0) if error.retryable else None
        if pause is None:
            raise error
        self.lost = self.lost or response.status_code >= 500
        return pause

    def _pause(self, at_least_s: float) -> float | None:
        """The next pause; None if it would last beyond the time that is left."""
        pause = at_least_s + self._pause_s * random.uniform(0.5, 1.0)  # noqa: S311 - only to keep callers apart
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
        if self._deadline is not None:
            pause = min(pause, self._deadline.left_s())
        now = time.monotonic()
        waited = min(now - self._began_at, self._wait_s)
        self._wait_s -= waited
        self._until += waited
        return pause if now + pause <= self._until else None
