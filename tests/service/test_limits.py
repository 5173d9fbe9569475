"""Bodies that are too long, too slow or of another type, over real sockets where that matters."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.app import create_app
from service.problems import MEDIA_TYPE
from tests.service.conftest import Bench, settings
from tests.service.gates import Gate, serve
from workers.redis_process import RedisProcess


@pytest.fixture
def gate(redis_server: RedisProcess, model_dir: Path, tmp_path: Path) -> Iterator[Gate]:
    """A gateway that waits half a second for a body of at most 64 KiB."""
    chosen = settings(redis_server.url, tmp_path, model_dir, max_body_bytes=2**16, body_timeout_s=0.5)
    yield from serve(create_app(chosen), None)


def _exchange(gate: Gate, head: str, body: bytes) -> tuple[int, dict[str, object]]:
    """Send what is given, nothing more, and read the whole answer."""
    with socket.create_connection(gate.address, timeout=240) as peer:
        peer.sendall(f"POST /v1/customize HTTP/1.1\r\nHost: x\r\n{head}\r\n\r\n".encode() + body)
        answer = b""
        while b"\r\n\r\n" not in answer or len(answer.split(b"\r\n\r\n", 1)[1]) < _length(answer):
            chunk = peer.recv(65536)
            if not chunk:
                break
            answer += chunk
    headers, payload = answer.split(b"\r\n\r\n", 1)
    return int(headers.split()[1]), json.loads(payload)


def _length(answer: bytes) -> int:
    headers = answer.split(b"\r\n\r\n", 1)[0].lower()
    return int(headers.split(b"content-length:")[1].split(b"\r\n")[0])


def test_half_sent_body_times_out(gate: Gate) -> None:
    """A body that never ends costs its sender the connection, not the server a slot."""
    head = "Content-Type: application/json\r\nContent-Length: 100"
    status, body = _exchange(gate, head, b'{"prompt": ')
    assert (status, body["code"]) == (408, "request_timeout")


def test_declared_length_is_refused_before_the_body(gate: Gate) -> None:
    """Not a byte of an oversized body has to arrive for the answer."""
    head = "Content-Type: application/json\r\nContent-Length: 99999999"
    status, body = _exchange(gate, head, b"")
    assert (status, body["code"]) == (413, "payload_too_large")


def test_undeclared_length_is_refused_while_streaming(gate: Gate) -> None:
    """Chunked bodies have no declared length: the cap holds while they arrive, before they end."""
    head = "Content-Type: application/json\r\nTransfer-Encoding: chunked"
    status, body = _exchange(gate, head, b"11000\r\n" + b" " * 0x11000 + b"\r\n")
    assert (status, body["code"]) == (413, "payload_too_large")


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Content-Type": "text/plain"},
        {"Content-Type": "multipart/form-data; boundary=x"},
        {"Content-Type": "application/json", "Content-Encoding": "gzip"},
    ],
)
def test_other_types_are_refused(bench: Bench, headers: dict[str, str]) -> None:
    """Only plain application/json is read: a browser form cannot submit a job across sites."""
    answer = bench.client.post("/v1/customize", content=b'{"prompt": "a"}', headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (415, "unsupported_media_type")
    assert answer.headers["content-type"] == MEDIA_TYPE


def test_parameters_of_the_type_are_fine(bench: Bench) -> None:
    """A charset, which many clients add, changes nothing."""
    headers = {"Content-Type": "Application/JSON; charset=utf-8"}
    assert bench.client.post("/v1/customize", content=b'{"prompt": "a"}', headers=headers).status_code == 202
