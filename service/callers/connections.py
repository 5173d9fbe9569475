"""One HTTP connection with deadlines: who sends or reads too slowly is cut off, whatever the application does.

uvicorn waits for ever on a socket that says nothing, half a head or half a body. h11 reads line ends, folds and
doubly framed bodies that a proxy in front may understand otherwise; those requests are refused. And it answers requests
sent ahead of answers (pipelines) as fast as it can: a thousand of them by fifty sockets held up everybody else for
0.2 s. No client of today sends them; the first is answered and the connection ends, as RFC 9112 §9.3.2 lets it.
"""

from __future__ import annotations

import asyncio
import json
import re
import resource
import secrets
import sys
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Final

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from service.problems import MEDIA_TYPE, TABLE, ProblemDetails, problem_body

MAX_HEAD_BYTES: Final = 16 * 1024
_LEAST_READ: Final = 64 * 1024
_HEAD = re.compile(rb".*?\n\r?\n", re.DOTALL)
_ODD = re.compile(rb"(?<!\r)\n|\r(?!\n)|\n[ \t]")
"""Bare line ends (RFC 9112 §2.2) and folded fields (§5.2)."""
_LENGTH = re.compile(rb"\ncontent-length[ \t]*:", re.IGNORECASE)
_ENCODING = re.compile(rb"\ntransfer-encoding[ \t]*:", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Seconds.

    Attributes:
        head: from the connection or a request's first byte to the end of its head.
        body: from there to its last byte; longer than what the routes allow, so that the answer is theirs.
        linger: for the rest of a body that was answered without it; hanging up at once would lose the answer.
        reader: for each 64 KiB of an answer to be taken.
    """

    head: float = 10.0
    body: float = 60.0
    linger: float = 5.0
    reader: float = 60.0


class Connection(H11Protocol):
    """uvicorn's connection with a clock for what it waits for."""

    deadlines = Deadlines()
    rejected: Callable[[str], None] = staticmethod(lambda _: None)
    """Told the code of each problem that is answered here."""

    _clock: asyncio.TimerHandle | None = None
    _awaited: object = None
    _between = True
    """Whether no request is being read or answered."""
    _reader_clock: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as in uvicorn
        super().connection_made(transport)
        self._wind()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_clock()
        self._stop_reader_clock()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._stop_reader_clock()
        if self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]:
            self._awaited = None  # the first byte of a request: its time begins
        super().data_received(data)
        self._wind()

    def handle_events(self) -> None:
        self._between = self.conn.their_state is h11.IDLE
        code = _refused(self.conn.trailing_data[0]) if self._between else None
        if code:
            self._refuse(code)
            return
        super().handle_events()
        if self.conn.their_state is h11.DONE and self.conn.trailing_data[0] and not self.cycle.response_complete:
            self.cycle.keep_alive = False  # more came with it: it is answered, and the rest is not read
        self._wind()

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - uvicorn's own text is less
        """What uvicorn calls while it handles h11's error; that error says which status fits."""
        error = sys.exception()
        long = isinstance(error, h11.RemoteProtocolError) and error.error_status_hint == 431
        self._refuse("head_too_large" if long else "malformed_request")

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.get_write_buffer_size():
            self._start_reader_clock()
        self._wind()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._start_reader_clock()

    def resume_writing(self) -> None:
        self._stop_reader_clock()
        super().resume_writing()

    def _wind(self) -> None:
        """Start the clock anew when something else is awaited of the caller than before."""
        state = self.conn.their_state
        self._between = state is h11.IDLE
        if self._between:
            seconds = self.deadlines.head
        elif state is h11.SEND_BODY:
            seconds = self.deadlines.linger if self.cycle.response_complete else self.deadlines.body
        else:
            seconds = None
        if (state, seconds) == self._awaited:
            return
        self._awaited = (state, seconds)
        self._stop_clock()
        if seconds is not None and not self.transport.is_closing():
            self._clock = self.loop.call_later(seconds, self._too_slow)

    def _too_slow(self) -> None:
        self._clock = None
        self._refuse("request_timeout")

    def _refuse(self, code: str) -> None:
        """Say why, if no answer has begun, and hang up."""
        if (self._between or not self.cycle.response_started) and not self.transport.is_closing():
            self.rejected(code)
            self.transport.write(_answer(code))
        self._start_reader_clock()
        self.transport.close()

    def _start_reader_clock(self) -> None:
        if self._reader_clock is None:
            left = self.transport.get_write_buffer_size()
            self._reader_clock = self.loop.call_later(self.deadlines.reader, self._look_at_reader, left)

    def _look_at_reader(self, before: int) -> None:
        self._reader_clock = None
        left = self.transport.get_write_buffer_size()
        if left and left > before - _LEAST_READ:
            self.transport.abort()
        elif left:
            self._start_reader_clock()

    def _stop_reader_clock(self) -> None:
        if self._reader_clock is not None:
            self._reader_clock.cancel()
            self._reader_clock = None

    def _stop_clock(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None


def connections(deadlines: Deadlines, rejected: Callable[[str], None]) -> type[Connection]:
    """`Connection` with these deadlines, for uvicorn's `http`. `rejected`: see there."""
    return type("Connection", (Connection,), {"deadlines": deadlines, "rejected": staticmethod(rejected)})


def allow_open_files() -> None:
    """Let this process have as many sockets as the system lets it; the usual soft limit is 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65_536 if hard == resource.RLIM_INFINITY else min(hard, 65_536)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _refused(received: bytes) -> str | None:
    """Code of what is wrong with a head, once it is there."""
    match = _HEAD.match(received)
    if match is None:
        return "head_too_large" if len(received) > MAX_HEAD_BYTES else None
    head = match[0]
    if len(head) > MAX_HEAD_BYTES:
        return "head_too_large"
    framed_twice = _LENGTH.search(head) and _ENCODING.search(head)
    return "malformed_request" if framed_twice or _ODD.search(head) else None


def _answer(code: str) -> bytes:
    """A whole response that ends the connection."""
    details = ProblemDetails(code, TABLE[code].meaning)
    request_id = f"req_{secrets.token_hex(12)}"
    body = json.dumps(problem_body(details, request_id)).encode()
    status = TABLE[code].status
    head = (
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nContent-Type: {MEDIA_TYPE}\r\n"
        f"Content-Length: {len(body)}\r\nX-Request-ID: {request_id}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body
