"""What both clients share: how they connect, how they wait for what takes long, what a source of bytes is."""

from __future__ import annotations

import secrets
import time
from dataclasses import fields
from pathlib import Path
from typing import Any, Final, TypedDict

import httpx2

from service.client.calls import REQUEST_ID, WORD, Call
from service.client.errors import JobFailedError, JobTimeoutError
from service.client.following import SILENCE_S
from service.client.references import Source
from service.client.retries import Deadline
from service.client.values import RecordState

DEFAULT_URL: Final = "http://127.0.0.1:8080"
LONG_POLL_S: Final = 20
"""A wait is made of questions that wait so long for their answer: nothing between ends them for being silent."""
SOONEST_S: Final = 0.2
"""Between two questions of a wait, whatever cut the first one short."""
TRAINING_POLL_S: Final = 2.0
_HERE: Final = ("127.0.0.1", "localhost", "::1")


class Options(TypedDict):
    """What httpx2's two clients are made with."""

    base_url: httpx2.URL
    headers: dict[str, str]
    timeout: float
    trust_env: bool
    limits: httpx2.Limits


class Send(TypedDict):
    """What their requests are made with."""

    params: dict[str, str | int]
    headers: dict[str, str]
    content: bytes | None
    timeout: httpx2.Timeout


def options(url: str, api_key: str | None, timeout: float) -> Options:
    """
    Raises:
        ValueError: not an http or https URL, or a key that no header can hold.
    """
    if api_key and not WORD.fullmatch(api_key):
        raise ValueError("an API key is one word of ASCII: send it as it was made, without a line's end")
    try:
        base = httpx2.URL(url)
    except httpx2.InvalidURL as error:
        raise ValueError(f"not a URL: {error}") from None
    if base.scheme not in ("http", "https") or not base.host:
        raise ValueError("a service's URL is http:// or https:// and a host")
    return Options(
        base_url=base,
        headers={"User-Agent": "dreamserve-python"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {}),
        timeout=timeout,
        # A proxy from the environment is for the world outside, not for a service on this machine.
        trust_env=base.host not in _HERE,
        # The service hangs up on what is idle for 5 s; who waits for jobs takes a connection for each.
        limits=httpx2.Limits(max_connections=None, max_keepalive_connections=20, keepalive_expiry=4.0),
    )


def fresh_id() -> str:
    """One for each call: also what was never answered can be found in the service's log."""
    return f"req_{secrets.token_hex(12)}"


def outgoing(call: Call[Any], timeout: float, request_id: str, at_most_s: float) -> Send:
    """How one try of a call is sent, which may take so long at most."""
    longest = min(timeout + call.wait_s, at_most_s)
    return Send(
        params=dict(call.params),
        headers={**call.headers, REQUEST_ID: request_id},
        content=call.content,
        timeout=httpx2.Timeout(min(timeout, longest), read=longest),
    )


def streaming(timeout: float) -> httpx2.Timeout:
    """Of a stream of events."""
    return httpx2.Timeout(timeout, read=SILENCE_S)


class Waiting:
    """A wait for the end of something, at most `timeout_s` long (None: as long as it takes).

    `every_s`: between two questions that wait for nothing themselves.
    """

    def __init__(self, timeout_s: float | None, every_s: float = SOONEST_S) -> None:
        self._until = float("inf") if timeout_s is None else time.monotonic() + timeout_s
        self._every_s = every_s
        self._asked_at = time.monotonic()

    def ask(self, record: RecordState) -> int:
        """Seconds that the next question may wait for its answer.

        Raises:
            JobTimeoutError: the time is over.
        """
        self._asked_at = time.monotonic()
        left = self._until - self._asked_at
        if left <= 0:
            raise JobTimeoutError(record)
        return int(min(LONG_POLL_S, left))

    def deadline(self, record: RecordState) -> Deadline | None:
        """Of the question that is asked next; `record`: what is known before it."""
        return None if self._until == float("inf") else Deadline(self._until, JobTimeoutError(record))

    def pause_s(self) -> float:
        """Seconds until the question after this answer."""
        now = time.monotonic()
        return max(0.0, min(self._every_s - (now - self._asked_at), self._until - now))


def judged(record: RecordState) -> None:
    """
    Raises:
        JobFailedError: it ended otherwise than by succeeding.
    """
    if record.ended and not record.succeeded:
        raise JobFailedError(record)


def shallow(value: Any, **changes: Any) -> dict[str, Any]:
    """A dataclass' fields as they are, but for the changes."""
    return {field.name: getattr(value, field.name) for field in fields(value)} | changes


def picture_of(source: bytes | Source) -> bytes:
    """A picture's file.

    Raises:
        OSError: it cannot be read.
    """
    return source if isinstance(source, bytes) else Path(source).read_bytes()
