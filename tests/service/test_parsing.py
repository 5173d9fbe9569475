"""What is read as a request is read by h11 in the same way, and it does not matter how it arrives."""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass
from typing import Any, Final, cast

import h11
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from uvicorn.config import Config
from uvicorn.server import ServerState

from service.callers.connections import Deadlines, connections

_HOST: Final = b" HTTP/1.1\r\nHost: x\r\n"
_WHOLE: Final = (
    b"GET /v1/jobs?limit=3&a=%20" + _HOST + b"Authorization: Bearer k\r\nEmpty:\r\nLast: a \t\r\n\r\n",
    b"POST /v1/customize" + _HOST + b"Content-Type: application/json\r\nContent-Length: 4\r\n\r\n{}\r\n",
    b"POST /v1/customize"
    + _HOST
    + b"Transfer-Encoding: chunked\r\n\r\n2;a=b\r\n{}\r\n3\r\nabc\r\n0\r\nTrailer: x\r\n\r\n",
    b"PUT /a" + _HOST + b"Connection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: 2\r\n\r\nab",
    b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
    b"POST /v1/references" + _HOST + b"Expect: 100-continue\r\nContent-Length: 1\r\n\r\na",
)
_PIECES: Final = (
    *(bytes([code]) for code in b"\r\n \t:;,%?#/\\0a+-\0\x0b\x7f\x80\xff"),
    *(
        b"\r\n",
        b"\r\n\r\n",
        b"\r\n ",
        b" HTTP/1.1",
        b"chunked",
        b"HTTP/2.0",
        b"0\r\n\r\n",
        b"0x",
        b"http://y",
        b"CONNECT ",
    ),
    *(b"Host: y\r\n", b"Content-Length: 2\r\n", b"Content-Length: 3\r\n", b"Transfer-Encoding: chunked\r\n"),
    *(b"Transfer-Encoding: gzip\r\n", b"Upgrade: websocket\r\n", b"Connection: close\r\n", b"Expect: 100-continue\r\n"),
)


@dataclass(frozen=True, slots=True)
class Read:
    """A request as the application gets it."""

    method: str
    target: bytes
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes


class Wire(asyncio.Transport):
    """Keeps what is written to it."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.closed = self.ended = False

    def write(self, data: Any) -> None:
        assert not self.closed and not self.ended, "nothing is said after the end"
        self.written += data

    def write_eof(self) -> None:
        self.ended = True

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def get_write_buffer_size(self) -> int:
        return 0

    def pause_reading(self) -> None:
        """Nobody goes on sending."""

    def resume_reading(self) -> None:
        """As above."""


async def _converse(parts: list[bytes]) -> tuple[bytes, list[Read]]:
    """What is answered to bytes that come in parts, and the requests that the application has read whole."""
    heard: list[Read] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        """Says 200 to what is read whole, 401 to /unread unread, and of /late after a while that it is over."""
        body, more = b"", scope["path"] != "/unread"
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message["body"]
            more = message["more_body"]
        target = scope["raw_path"] + b"?" + scope["query_string"]
        heard.append(Read(scope["method"], target, tuple(scope["headers"]), body))
        status = 401 if scope["path"] == "/unread" else 200
        await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok", "more_body": True})
        for _ in range(8 if scope["path"] == "/late" else 0):
            await asyncio.sleep(0)
        await send({"type": "http.response.body", "body": b""})

    config = Config(app, http=connections(Deadlines(), lambda _: None), access_log=False, log_level="critical")
    config.load()
    made = cast(Any, config.http_protocol_class)(config=config, server_state=ServerState(), app_state={})
    wire = Wire()
    made.connection_made(wire)
    for part in parts:
        if not wire.closed:
            made.data_received(part)
        for _ in range(4):
            await asyncio.sleep(0)
    for _ in range(10):
        await asyncio.sleep(0)
    written = wire.written
    made.connection_lost(None)
    await asyncio.sleep(0)
    return written, heard


def by_h11(sent: bytes) -> Read | None:
    """The first request as h11 reads it; None: it refuses, or it is not whole."""
    reader = h11.Connection(h11.SERVER, max_incomplete_event_size=2**20)
    head: h11.Request | None = None
    body = b""
    try:
        reader.receive_data(sent)
        while True:
            event = reader.next_event()
            if isinstance(event, h11.Request):
                head = event
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage) and head is not None:
                return Read(
                    head.method.decode(), head.target, tuple((bytes(k), bytes(v)) for k, v in head.headers), body
                )
            else:
                return None
    except h11.RemoteProtocolError:
        return None


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    """A request, mostly a little wrong."""
    sent = draw(st.sampled_from(_WHOLE))
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.integers(0, len(sent)))
        gone = draw(st.sampled_from((0, 0, 1, 2)))
        sent = sent[:place] + draw(st.sampled_from((b"", *_PIECES))) + sent[place + gone :]
    return sent


@settings(max_examples=400)
@given(sent=requests(), cut=st.integers(1, 40))
@example(sent=_WHOLE[2], cut=1)
@example(sent=_WHOLE[3], cut=1)
def test_what_is_read_is_what_h11_reads(sent: bytes, cut: int) -> None:
    """The first request of any bytes, or none: the same if they come in pieces, and no other than an older reader's."""

    async def both() -> tuple[tuple[bytes, list[Read]], tuple[bytes, list[Read]]]:
        return await _converse([sent]), await _converse([sent[at : at + cut] for at in range(0, len(sent), cut)])

    (answer, heard), (answer_to_pieces, heard_in_pieces) = asyncio.run(both())
    assert heard[:1] == heard_in_pieces[:1]
    assert _status(answer) == _status(answer_to_pieces)
    assert len(heard) <= 1, "what is sent ahead is not read"
    if heard:
        other = by_h11(sent.removeprefix(b"\r\n"))
        assert other is not None, "read here alone"
        plain = tuple((name, value) for name, value in other.headers if name != b"upgrade")
        assert (heard[0].method, heard[0].headers, heard[0].body) == (other.method, plain, other.body)
        path, _, query = other.target.partition(b"#")[0].partition(b"?")
        assert (path + b"?" + query).endswith(heard[0].target)


@pytest.mark.parametrize("sent", _WHOLE)
def test_whole_requests_are_read(sent: bytes) -> None:
    """The control: none of those that are bent here is refused as it is."""
    answer, heard = asyncio.run(_converse([sent]))
    assert _status(answer) == 200 and len(heard) == 1


@pytest.mark.parametrize("length", [b"Content-Length: 2\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n"])
def test_a_request_may_follow_a_body_that_was_answered_unread(length: bytes) -> None:
    """Its end and the next head come in one packet when a caller has had the answer before the body was read."""
    body = b"ab" if b"Length" in length else b"2\r\nab\r\n0\r\n\r\n"
    head = b"POST /unread" + _HOST + length
    apart, _ = asyncio.run(_converse([head, body, _WHOLE[0]]))
    together, _ = asyncio.run(_converse([head, body + _WHOLE[0]]))
    assert _statuses(apart) == [401, 200]
    # Where chunks end only llhttp knows, and it goes on to the next head; that one is not checked, so it is not read.
    assert _statuses(together) == ([401, 200] if b"Length" in length else [401])


def test_who_has_the_whole_answer_may_ask_again() -> None:
    """The last byte is there, that it was the last the application says later; a caller counts and does not wait."""
    asked = b"GET /late" + _HOST + b"\r\n"
    assert _statuses(asyncio.run(_converse([asked, asked]))[0]) == [200, 200]


def test_a_body_that_was_not_asked_for_is_not_guessed_at() -> None:
    """Who waits for 100 and gets a 401 may never send the body; what he sends next must not be taken for it."""
    asked = b"POST /unread" + _HOST + b"Expect: 100-continue\r\nContent-Length: 20\r\n\r\n"
    answer, heard = asyncio.run(_converse([asked, b"GET /v1/a" + _HOST + b"X: GET /smuggled" + _HOST + b"\r\n"]))
    assert _statuses(answer) == [401] and len(heard) == 1
    assert b"connection: close" in answer


def test_who_has_no_answer_yet_may_not() -> None:
    """The control: a second request before the first answer is not read, and the connection ends with that."""
    asked = b"POST /v1" + _HOST + b"Content-Length: 2\r\n\r\nab"
    answer, heard = asyncio.run(_converse([asked + asked]))
    assert _statuses(answer) == [200] and len(heard) == 1
    assert b"connection: close" in answer


def _statuses(answer: bytes) -> list[int]:
    """But interim ones."""
    return [int(code) for code in re.findall(rb"HTTP/1\.1 (\d+)", answer) if code != b"100"]


def _status(answer: bytes) -> int | None:
    """The first."""
    return next(iter(_statuses(answer)), None)
