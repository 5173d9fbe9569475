"""Uploads over real sockets: what has not ended, or never would, costs neither memory nor the disk."""

from __future__ import annotations

import select
import socket
import tracemalloc
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

import pytest

from service.app import create_app
from service.callers.connections import Deadlines
from tests.service.conftest import settings
from tests.service.gates import Gate, serve
from tests.waiting import wait_for
from workers.redis_process import RedisProcess


@pytest.fixture
def gate(redis_server: RedisProcess, model_dir: Path, tmp_path: Path) -> Iterator[Gate]:
    """A gateway that lets go of a refused caller late."""
    yield from serve(create_app(settings(redis_server.url, tmp_path, model_dir)), Deadlines(linger=20.0))


@pytest.fixture
def hasty(redis_server: RedisProcess, model_dir: Path, tmp_path: Path) -> Iterator[Gate]:
    """One that waits half a second for a body."""
    yield from serve(create_app(settings(redis_server.url, tmp_path, model_dir, body_timeout_s=0.5)), None)


def exchange(gate: Gate, head: str, more: Callable[[socket.socket], object]) -> bytes:
    """Send a head, then whatever `more` sends, and read the answer."""
    with socket.create_connection(gate.address, timeout=240) as peer:
        peer.sendall(f"POST /v1/references HTTP/1.1\r\nHost: x\r\n{head}\r\n\r\n".encode())
        more(peer)
        return read_answer(peer)


def read_answer(peer: socket.socket) -> bytes:
    """A problem, whole."""
    answer = b""
    while not answer.endswith(b"}") and (chunk := peer.recv(65536)):
        answer += chunk
    return answer


def unfinished(home: Path) -> list[Path]:
    return [path for path in home.rglob("*.part") if path.is_file()]


def size(path: Path) -> int:
    """In bytes; none where it has just been removed."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def test_upload_that_stalls_is_cut_off(hasty: Gate, tmp_path: Path) -> None:
    """A body that never ends costs its sender the upload, and the disk nothing."""
    head = "Content-Type: image/png\r\nContent-Length: 100"
    assert b'"request_timeout"' in exchange(hasty, head, lambda peer: peer.sendall(b"\x89PNG"))
    assert unfinished(tmp_path) == []


def test_sender_that_goes_away_leaves_nothing(gate: Gate, tmp_path: Path) -> None:
    """A connection that breaks in the middle leaves no file behind."""
    with socket.create_connection(gate.address, timeout=240) as peer:
        peer.sendall(
            b"POST /v1/references HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 9999\r\n\r\n"
        )
        peer.sendall(b"\x89PNG")
        wait_for(lambda: unfinished(tmp_path), "the upload to begin")
    wait_for(lambda: not unfinished(tmp_path), "the unfinished file to go")


@contextmanager
def traced() -> Generator[Callable[[], int]]:
    """What Python has allocated since, at most, in bytes. The size of the process would not tell: what other tests gave
    back to its heap is taken again without growing it."""
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        yield lambda: tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


def test_a_gigabyte_is_refused_at_the_cap(gate: Gate, tmp_path: Path) -> None:
    """A body of unknown length is refused when it has reached the cap of 20 MiB; what is sent in spite of that is
    gathered neither in memory nor on the disk. The control for memory is the next test."""
    head = b"POST /v1/references HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nTransfer-Encoding: chunked\r\n\r\n"
    piece = b"%x\r\n%b\r\n" % (2**16, bytes(2**16))
    after = on_disk = sent = 0
    answer = b""
    with traced() as peak, socket.create_connection(gate.address, timeout=240) as peer:
        peer.sendall(head)
        while sent < (after or 2**30) + 64 * 2**20:
            try:
                peer.sendall(piece)
            except ConnectionError:  # it hung up in the end
                break
            sent += 2**16
            on_disk = max(on_disk, *map(size, unfinished(tmp_path)), 0)
            if not answer and select.select([peer], [], [], 0)[0]:
                after, answer = sent, read_answer(peer)
        assert peak() < 10 * 2**20
    assert b'"payload_too_large"' in answer
    assert 20 * 2**20 < after < 64 * 2**20
    assert 2**20 < on_disk <= 20 * 2**20


def test_memory_is_really_measured() -> None:
    """The control: a body that is gathered in memory, in the thread of a gateway, would be seen."""
    gathered: list[bytes] = []
    with traced() as peak:
        thread = Thread(target=lambda: gathered.extend(b"\1" * 2**16 for _ in range(320)))
        thread.start()
        thread.join()
        assert peak() >= 20 * 2**20


def test_a_declared_gigabyte_is_refused_before_it_is_sent(gate: Gate) -> None:
    """Not a byte has to arrive."""
    answer = exchange(gate, f"Content-Type: image/png\r\nContent-Length: {2**30}", lambda _: None)
    assert b'"payload_too_large"' in answer
