"""Sockets that are slow, silent, too long-winded or ambiguous, beside callers who must not notice."""

from __future__ import annotations

import contextlib
import json
import re
import select
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.responses import PlainTextResponse

from service.app import create_app
from service.callers.connections import Deadlines
from tests.service.conftest import settings
from tests.service.gates import Gate, serve
from tests.waiting import wait_for
from workers.redis_process import RedisProcess

HEAD = b"GET /livez HTTP/1.1\r\nHost: x\r\n"
POST = b"POST /v1/customize HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
LONG = 2**23


@pytest.fixture
def app(redis_server: RedisProcess, model_dir: Path, tmp_path: Path) -> FastAPI:
    made = create_app(settings(redis_server.url, tmp_path, model_dir, max_body_bytes=2**20))

    @made.get("/long")
    def long() -> PlainTextResponse:
        return PlainTextResponse("x" * LONG)

    return made


@pytest.fixture
def hasty(app: FastAPI) -> Iterator[Gate]:
    """A gateway of little patience."""
    yield from serve(app, Deadlines(head=0.4, body=0.6, linger=0.4, reader=0.5))


@pytest.fixture
def patient(app: FastAPI) -> Iterator[Gate]:
    """A gateway with the deadlines that are served with."""
    yield from serve(app, None)


def connect(gate: Gate) -> socket.socket:
    return socket.create_connection(gate.address, timeout=240)


def rest(peer: socket.socket) -> bytes:
    """Everything until the other side hangs up."""
    received = b""
    try:
        while chunk := peer.recv(65536):
            received += chunk
    except ConnectionResetError:
        pass
    return received


def status(answer: bytes) -> int:
    return int(answer.split()[1])


def problem(answer: bytes) -> Any:
    return json.loads(answer.split(b"\r\n\r\n", 1)[1])


@pytest.mark.parametrize(
    "sent", [b"", b"GET", HEAD, HEAD + b"A: b\r\n"], ids=["nothing", "a word", "half", "a line short"]
)
def test_a_head_that_does_not_end_is_a_408(hasty: Gate, sent: bytes) -> None:
    """A socket that says nothing, or half a head, is closed; it is told why."""
    with connect(hasty) as peer:
        peer.sendall(sent)
        answer = rest(peer)
    assert (status(answer), problem(answer)["code"]) == (408, "request_timeout")
    assert b"Connection: close" in answer


def test_dribbling_a_head_does_not_help(hasty: Gate) -> None:
    """The deadline is for the whole head: a byte now and then does not renew it."""
    with connect(hasty) as peer:
        begun = time.monotonic()
        peer.sendall(HEAD)
        while not select.select([peer], [], [], 0.05)[0]:
            peer.sendall(b"A")
            assert time.monotonic() - begun < 20
        assert status(rest(peer)) == 408


def test_the_second_request_has_a_deadline_too(hasty: Gate) -> None:
    """uvicorn stops its own clock at the first byte after an answer; half a second request must still end."""
    with connect(hasty) as peer:
        peer.sendall(HEAD + b"\r\n")
        first = b""
        while b'{"status":"live"}' not in first:
            first += peer.recv(4096)
        peer.sendall(HEAD)
        assert status(rest(peer)) == 408


def test_a_body_that_does_not_end_is_hung_up_on(hasty: Gate) -> None:
    """Also where the route never reads it, and also when its bytes keep dribbling."""
    for head in (POST, b"GET /livez HTTP/1.1\r\nHost: x\r\n"):
        with connect(hasty) as peer:
            peer.sendall(head + b"Content-Length: 100000\r\n\r\n")
            begun = time.monotonic()
            received = b""
            while time.monotonic() - begun < 20:
                try:
                    peer.sendall(b" ")
                    if select.select([peer], [], [], 0.05)[0]:
                        received += (chunk := peer.recv(65536))
                        if not chunk:
                            break
                except OSError:
                    break
            else:
                pytest.fail("still connected")
        assert status(received) == (408 if head is POST else 200)


@pytest.mark.parametrize("more", [b"", b"\r", b"GET /long HTTP/1.1\r\nHost: x\r\n\r\n"])
def test_who_does_not_read_is_hung_up_on(hasty: Gate, more: bytes) -> None:
    """An answer that nobody takes does not stay in memory, whatever its caller still says."""
    peer = socket.socket()
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    peer.connect(hasty.address)
    with peer:
        peer.settimeout(240)
        peer.sendall(b"GET /long HTTP/1.1\r\nHost: x\r\n\r\n")
        select.select([peer], [], [])
        peer.sendall(more)
        wait_for(lambda: not hasty.server.server_state.connections, "the end of the connection")
        assert len(rest(peer)) < LONG


def test_a_slow_reader_gets_everything(hasty: Gate) -> None:
    """The control: who keeps reading is served to the end, however long it takes."""
    with connect(hasty) as peer:
        peer.sendall(b"GET /long HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        received = 0
        begun = time.monotonic()
        while chunk := peer.recv(2**17):
            received += len(chunk)
            if time.monotonic() - begun < 1.0:
                select.select([], [], [], 0.02)
    assert received > LONG


@pytest.mark.parametrize(
    "head",
    [
        b"GET /livez HTTP/1.1\r\nHost: x\r\nA: " + b"a" * 20_000 + b"\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: x\r\nA: " + b"a" * 200_000,
        b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 5_000 + b"\r\n",
    ],
    ids=["long field", "endless field", "long path", "many fields"],
)
def test_long_heads_are_a_431(patient: Gate, head: bytes) -> None:
    """Refused as soon as they are known to be too long."""
    with connect(patient) as peer:
        with contextlib.suppress(OSError):  # hung up on while sending
            peer.sendall(head)
        answer = rest(peer)
    assert (status(answer), problem(answer)["code"]) == (431, "head_too_large")


@pytest.mark.parametrize(
    "request_",
    [
        POST + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        POST + b"Transfer-Encoding: chunked\r\nContent-Length : 2\r\n\r\n{}",
        b"GET /livez HTTP/1.1\nHost: x\n\n",
        b"GET /livez HTTP/1.1\r\nHost: x\nA: b\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: x\r\nA: b\r\n c\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: x\r\nA: b\rc\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: x\r\nA : b\r\n\r\n",
        b"GET /livez HTTP/1.1\r\n\r\n",
        POST + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
        POST + b"Content-Length: +2\r\n\r\n{}",
        POST + b"Transfer-Encoding: gzip\r\n\r\n{}",
        POST + b"Transfer-Encoding: chunked\r\n\r\nxx\r\n{}",
        b"CONNECT / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"CONNECT http://x/ HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    ],
)
def test_ambiguous_requests_are_a_400(patient: Gate, request_: bytes) -> None:
    """What two servers in a row could read in two ways is read in none (RFC 9112 §11.2)."""
    with connect(patient) as peer:
        peer.sendall(request_ + b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
        answer = rest(peer)
    assert (status(answer), problem(answer)["code"]) == (400, "malformed_request")
    assert len(re.findall(rb"HTTP/1\.1 \d", answer)) == 1


def test_of_requests_sent_ahead_the_first_is_answered(patient: Gate) -> None:
    """A thousand in one packet would be answered before everybody else's; one after the other, the control, all are."""
    with connect(patient) as peer:
        peer.sendall((HEAD + b"\r\n") * 1000)
        assert rest(peer).count(b'{"status":"live"}') == 1
    with connect(patient) as peer:
        for _ in range(5):
            peer.sendall(HEAD + b"\r\n")
            answer = b""
            while b'{"status":"live"}' not in answer:
                answer += peer.recv(65536)


def test_a_huge_body_gets_its_answer_while_it_is_sent(patient: Gate) -> None:
    """Declared or not: 413 comes without the body being kept, and is not lost though the caller still sends."""
    for head, chunk in (
        (b"Content-Length: 1000000000\r\n\r\n", b" " * 2**16),
        (b"Transfer-Encoding: chunked\r\n\r\n", b"10000\r\n" + b" " * 2**16 + b"\r\n"),
    ):
        with connect(patient) as peer:
            peer.sendall(POST + head)
            for _ in range(64):  # 4 MiB, four times the limit
                peer.sendall(chunk)
            answer = b""
            while not re.search(rb"\r\n\r\n{.*}$", answer, re.DOTALL):
                answer += peer.recv(65536)
        assert (status(answer), problem(answer)["code"]) == (413, "payload_too_large")


@pytest.mark.parametrize("version", [b"HTTP/1.1\r\nHost: x\r\nConnection: close", b"HTTP/1.0"])
def test_an_answer_before_the_body_arrives_though_the_connection_ends(patient: Gate, version: bytes) -> None:
    """A socket closed over unread bytes is reset, and the answer with it; urllib and proxies ask like this."""
    with connect(patient) as peer:
        peer.sendall(b"POST /nowhere " + version + b"\r\nContent-Length: 8000000\r\n\r\n")
        for _ in range(8):
            peer.sendall(b" " * 1_000_000)
        assert status(rest(peer)) == 404


def test_who_goes_on_sending_after_the_end_is_hung_up_on(hasty: Gate) -> None:
    """The last answer is waited for, but not for ever."""
    with connect(hasty) as peer:
        peer.sendall(b"POST /nowhere HTTP/1.0\r\nContent-Length: 100000000\r\n\r\n")
        begun = time.monotonic()
        with contextlib.suppress(OSError):
            while time.monotonic() - begun < 20:
                peer.sendall(b" ")
                select.select([], [], [], 0.02)
            pytest.fail("still connected")


def test_slow_sockets_do_not_delay_others(patient: Gate) -> None:
    """Two hundred callers with half a head or half a body: a quick one is answered as if they were not there."""
    slow = [connect(patient) for _ in range(200)]
    try:
        for number, peer in enumerate(slow):
            peer.sendall(HEAD if number % 2 else POST + b"Content-Length: 100\r\n\r\n{")
        with connect(patient) as peer:
            for _ in range(20):
                peer.settimeout(60)
                peer.sendall(HEAD + b"\r\n")
                answer = b""
                while b'{"status":"live"}' not in answer:
                    answer += peer.recv(65536)
    finally:
        for peer in slow:
            peer.close()
