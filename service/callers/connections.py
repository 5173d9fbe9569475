"""One HTTP connection with deadlines: who sends or reads too slowly is cut off, whatever the application does.

uvicorn waits for ever on a socket that says nothing, half a head or half a body. A head is gathered here until it is
whole, and what a proxy in front may understand otherwise is refused before llhttp reads it. Of requests sent ahead of
answers (pipelines) the first is answered and the connection ends, as RFC 9112 §9.3.2 lets it: answered as fast as they
come, a thousand of them by fifty sockets held up everybody else for 0.2 s. No client of today sends them.
"""

from __future__ import annotations

import asyncio
import json
import re
import resource
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from http import HTTPStatus
from typing import Final

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.problems import MEDIA_TYPE, TABLE, ProblemDetails, problem_body

MAX_HEAD_BYTES: Final = 16 * 1024
_LEAST_READ: Final = 64 * 1024
_END = re.compile(rb"\n\r?\n")
_ODD = re.compile(rb"(?<!\r)\n|\r(?!\n)|\n[ \t]")
"""Bare line ends (RFC 9112 §2.2) and folded fields (§5.2)."""
_LINE = re.compile(rb"(?:\r\n)?(?!CONNECT )[!-~]+ [!-~]+ HTTP/1\.[01]\r\n")
"""A method, a target and a version with one space between each (RFC 9112 §3); nobody gets a tunnel."""
_UPGRADE = re.compile(rb"\nupgrade:[\t -~\x80-\xff]*\r(?=\n)", re.IGNORECASE)
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


class _Stage(Enum):
    """What is awaited of the caller."""

    GATHERING = auto()
    """A head, or the rest of it."""
    PARSING = auto()
    """Nothing: a whole head is with the parser."""
    BODY = auto()
    ANSWERING = auto()
    """Nothing: the request is whole and its answer is not."""


class Connection(HttpToolsProtocol):
    """uvicorn's connection with a clock for what it waits for."""

    deadlines = Deadlines()
    rejected: Callable[[str], None] = staticmethod(lambda _: None)
    """Told the code of each problem that is answered here."""

    parser: httptools.HttpRequestParser
    _stage = _Stage.GATHERING
    _head = b""
    _left: int | None = 0
    """Bytes of the body to come; None: it is chunked."""
    _early = b""
    _parting = False
    """Whether everything is said, and what still comes is only taken so that the last answer is not lost."""
    _clock: asyncio.TimerHandle | None = None
    _reader_clock: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as in uvicorn
        super().connection_made(transport)
        self._wind(self.deadlines.head)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_clock()
        self._stop_reader_clock()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._over:
            return
        if not self.transport.get_write_buffer_size():  # who has not taken his answer has no more time by asking again
            self._stop_reader_clock()
        self._unset_keepalive_if_required()
        self._take(data)

    @property
    def _over(self) -> bool:
        return self._parting or self.transport.is_closing()

    def _take(self, data: bytes) -> None:
        if self._stage is _Stage.ANSWERING:
            self._take_early(data)
        elif self._stage is _Stage.BODY:
            self._take_body(data)
        else:
            self._gather(data)

    def _gather(self, data: bytes) -> None:
        """A head is parsed when it is whole."""
        known = len(self._head)
        self._head += data
        end = _END.search(self._head, max(0, known - 2))
        code = _refused(self._head, end.end() if end else None)
        if code:
            self._refuse(code)
        elif end:
            # No protocol is switched, so the wish is not heard; llhttp would take a body for the other protocol.
            head, rest = _UPGRADE.sub(b"", self._head[: end.end()]), self._head[end.end() :]
            self._head = b""
            self._stage = _Stage.PARSING
            self._parse(head)
            if rest and not self._over:
                self._take(rest)
        elif not known:
            self._wind(self.deadlines.head)

    def _take_body(self, data: bytes) -> None:
        if self._left is None:
            self._parse(data)
            return
        own, rest = data[: self._left], data[self._left :]
        self._left -= len(own)
        self._parse(own)
        if rest and not self._over:
            self._take(rest)

    def _take_early(self, data: bytes) -> None:
        """Bytes of another request: in time if the caller has the whole answer, and only the application has yet to
        say that there is no more. Otherwise the connection ends with the answer.
        """
        cycle = self.cycle
        left = 0 if cycle.scope["method"] == "HEAD" else cycle.expected_content_length
        if cycle.response_started and not cycle.chunked_encoding and left == 0:
            self._early += data
            self.flow.pause_reading()
        else:
            self._end_after_answer()

    def _end_after_answer(self) -> None:
        self.cycle.keep_alive = False
        self.flow.pause_reading()

    def _parse(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            if self._stage is _Stage.ANSWERING:
                self._end_after_answer()
            elif self._stage is _Stage.GATHERING:
                self.part()  # with the end of a chunked body that was answered without it
            else:
                self._refuse("malformed_request")

    # What the parser tells. An exception ends its work; `_parse` sees an `HttpParserError`.

    def on_message_begin(self) -> None:
        if self._stage is not _Stage.PARSING:
            raise ValueError("more than one request")
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._stage is _Stage.PARSING:  # and is no trailer of a body
            super().on_header(name, value.strip(b" \t"))

    def on_headers_complete(self) -> None:
        self._left = _body_length(self.parser.get_http_version(), self.headers)
        super().on_headers_complete()
        self.cycle.transport = _Parting(self)  # pyright: ignore[reportAttributeAccessIssue] - all of it that a cycle uses
        self._stage = _Stage.BODY
        if self._left != 0:
            self._wind(self.deadlines.body)
            # Answered unread, nobody knows whether its body will come (RFC 9110 §10.1.1).
            self.cycle.keep_alive &= not self.expect_100_continue

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._stop_clock()
        if self.cycle.response_complete:
            self._stage = _Stage.GATHERING
            self._wind(self.deadlines.head)
        else:
            self._stage = _Stage.ANSWERING

    def on_response_complete(self) -> None:
        if self.transport.get_write_buffer_size():
            self._start_reader_clock()
        if self._parting:
            self.server_state.total_requests += 1
            self.flow.resume_reading()
            return
        super().on_response_complete()  # it winds uvicorn's own clock for the next request
        if self._stage is _Stage.BODY:
            self._wind(self.deadlines.linger)
            return
        self._stage = _Stage.GATHERING
        if self._early:
            data, self._early = self._early, b""
            self.data_received(data)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._start_reader_clock()

    def resume_writing(self) -> None:
        self._stop_reader_clock()
        super().resume_writing()

    def _wind(self, seconds: float) -> None:
        """Start the clock anew."""
        self._stop_clock()
        if not self.transport.is_closing():
            self._clock = self.loop.call_later(seconds, self._too_slow)

    def part(self) -> None:
        """Hang up once what was written is taken; with bytes unread, a socket that is closed takes the answer along."""
        if self._over:
            return
        if self._stage is _Stage.ANSWERING:
            self.transport.close()
            return
        self._parting = True
        self.transport.write_eof()
        self._wind(self.deadlines.linger)

    def _too_slow(self) -> None:
        self._clock = None
        if self._parting or (self._stage is _Stage.BODY and self.cycle.response_complete):
            self.transport.close()
        else:
            self._refuse("request_timeout")

    def _refuse(self, code: str) -> None:
        """Say why, if no answer has begun, and hang up."""
        reading = self._stage in (_Stage.GATHERING, _Stage.PARSING)
        if (reading or not self.cycle.response_started) and not self._over:
            self.rejected(code)
            self.transport.write(_answer(code))
        if not reading:
            self.cycle.disconnected = True  # what the application still says is not for this answer
            self.cycle.message_event.set()
        self._start_reader_clock()
        self.part()

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


class _Parting:
    """A cycle's transport: at its end the connection parts."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.write = connection.transport.write
        self.is_closing = connection.transport.is_closing

    def close(self) -> None:
        self._connection.part()


def connections(deadlines: Deadlines, rejected: Callable[[str], None]) -> type[Connection]:
    """`Connection` with these deadlines, for uvicorn's `http`. `rejected`: see there."""
    return type("Connection", (Connection,), {"deadlines": deadlines, "rejected": staticmethod(rejected)})


def allow_open_files() -> None:
    """Let this process have as many sockets as the system lets it; the usual soft limit is 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65_536 if hard == resource.RLIM_INFINITY else min(hard, 65_536)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _refused(received: bytes, end: int | None) -> str | None:
    """Code of what is wrong with the bytes of a head. `end`: where it ends, if it is whole."""
    if (end or len(received)) > MAX_HEAD_BYTES:
        return "head_too_large"
    if end is None:
        return None
    head = received[:end]
    framed_twice = _LENGTH.search(head) and _ENCODING.search(head)
    return "malformed_request" if framed_twice or _ODD.search(head) or not _LINE.match(head) else None


def _body_length(version: str, headers: list[tuple[bytes, bytes]]) -> int | None:
    """Bytes of the body; None: it is chunked.

    Raises:
        ValueError: a head that llhttp takes has no one meaning: not one host, or codings beside chunked.
    """
    hosts = 0
    codings: list[bytes] = []
    length = 0
    for name, value in headers:
        if name == b"host":
            hosts += 1
        elif name == b"transfer-encoding":
            codings.append(value.lower())
        elif name == b"content-length":
            length = int(value)
    old = version == "1.0"
    if hosts > 1 or (hosts == 0 and not old) or (codings and (old or codings != [b"chunked"])):
        raise ValueError("a head that may be read in two ways")
    return None if codings else length


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
