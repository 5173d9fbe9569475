"""Load on an HTTP server that costs the one who makes it little: raw sockets, requests ready to be sent."""

from __future__ import annotations

import os
import re
import selectors
import socket
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import psutil

Requests = Iterator[bytes]


@dataclass(frozen=True, slots=True)
class Server:
    """Something that answers HTTP. `pid`: the process whose time counts."""

    port: int
    pid: int

    def seconds(self) -> float:
        """That the process and its threads have computed so far."""
        spent = psutil.Process(self.pid).cpu_times()
        return spent.user + spent.system


@dataclass(frozen=True, slots=True)
class Answer:
    """Of a server. `head`: status line and fields."""

    status: int
    head: str
    body: bytes

    def header(self, name: str) -> str:
        """A field's value; empty if it is not there."""
        found = re.search(rf"^{name}:[ \t]*([^\r]*)", self.head, re.IGNORECASE | re.MULTILINE)
        return found[1] if found else ""


@dataclass(frozen=True, slots=True)
class Burst:
    """So many requests over connections that stay open; each sends its next one as soon as it has its answer."""

    server: Server
    requests: Requests
    status: int
    count: int
    connections: int

    def __call__(self) -> None:
        """Run it.

        Raises:
            RuntimeError: an answer has another status.
        """
        with (
            _in_no_hurry(),
            selectors.DefaultSelector() as ready,
            _connected(self.server.port, self.connections) as peers,
        ):
            for peer in peers:
                ready.register(peer, selectors.EVENT_READ)
                peer.sendall(next(self.requests))
            sent, answered = len(peers), 0
            while answered < self.count:
                for key, _ in ready.select():
                    answer = receive(key.fileobj)  # pyright: ignore[reportArgumentType]  # what was registered
                    if answer.status != self.status:
                        raise RuntimeError(f"{answer.status} instead of {self.status}: {answer.body[:500]!r}")
                    answered += 1
                    if sent < self.count:
                        sent += 1
                        key.fileobj.sendall(next(self.requests))  # pyright: ignore[reportAttributeAccessIssue]  # as above

    def seconds_each(self) -> float:
        """Seconds of the server's process for each request."""
        before = self.server.seconds()
        self()
        return (self.server.seconds() - before) / self.count


def paced(
    server: Server, requests: Iterator[tuple[str, bytes]], rate: float, seconds: float
) -> list[tuple[str, float]]:
    """Requests at a fixed rate, whatever the answers take: what each is, and seconds from its being due to its answer.

    Who was to come while another waited is not forgiven: that it came later counts as its own waiting.
    """
    found: list[tuple[str, float]] = []
    idle: list[socket.socket] = []
    busy: dict[socket.socket, tuple[str, float]] = {}
    with selectors.DefaultSelector() as ready:
        due = begun = time.perf_counter()
        while due < begun + seconds or busy:
            left = due - time.perf_counter() if due < begun + seconds else 1.0
            for key, _ in ready.select(max(0.0, left)):
                peer: socket.socket = key.fileobj  # pyright: ignore[reportAssignmentType]  # what was registered
                if peer not in busy:  # it was idle for so long that the server hung up
                    ready.unregister(peer)
                    idle.remove(peer)
                    peer.close()
                    continue
                what, since = busy.pop(peer)
                answer = receive(peer)
                if answer.status >= 300:
                    raise RuntimeError(f"{what}: {answer.status}, {answer.body[:500]!r}")
                found.append((what, time.perf_counter() - since))
                idle.append(peer)
            if due < begun + seconds and time.perf_counter() >= due:
                what, request = next(requests)
                if not idle:
                    idle.append(_connect(server.port))
                    ready.register(idle[-1], selectors.EVENT_READ)
                peer = idle.pop()
                busy[peer] = (what, due)
                peer.sendall(request)
                due += 1 / rate
        for peer in idle:
            peer.close()
    return found


def request(method: str, path: str, headers: dict[str, str], body: bytes = b"") -> bytes:
    """A request as clients write it."""
    lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", "Accept: */*", "Accept-Encoding: gzip, deflate"]
    lines += ["Connection: keep-alive", "User-Agent: benchmark/1.0"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    if body:
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, "", ""]).encode() + body


def receive(peer: socket.socket) -> Answer:
    """The next answer."""
    received = bytearray()
    while (end := received.find(b"\r\n\r\n")) < 0:
        received += _more(peer)
    head, body = bytes(received[:end]), received[end + 4 :]
    answer = Answer(int(head[9:12]), head.decode("latin-1"), b"")
    length = int(answer.header("content-length") or 0) if answer.status != 304 else 0
    while len(body) < length:
        body += _more(peer)
    return replace(answer, body=bytes(body))


def asked(server: Server, message: bytes) -> Answer:
    """One request on a connection of its own."""
    with _connect(server.port) as peer:
        peer.sendall(message)
        return receive(peer)


def repeated(messages: list[bytes]) -> Requests:
    """These, over and over."""
    while True:
        yield from messages


def until_it_answers(server: Server, message: bytes, alive: Callable[[], bool]) -> None:
    """Wait for a server that is starting.

    Raises:
        RuntimeError: it has ended.
    """
    while alive():
        try:
            asked(server, message)
            return
        except OSError:  # nobody listens yet
            time.sleep(0.05)
    raise RuntimeError("the server has ended")


@contextmanager
def _in_no_hurry() -> Generator[None]:
    """On a core that both share, the server goes on after an answer, as it would on one of its own."""
    if not hasattr(os, "SCHED_BATCH"):
        yield
        return
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    try:
        yield
    finally:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


@contextmanager
def _connected(port: int, count: int) -> Generator[list[socket.socket]]:
    peers = [_connect(port) for _ in range(count)]
    try:
        yield peers
    finally:
        for peer in peers:
            peer.close()


def _connect(port: int) -> socket.socket:
    peer = socket.create_connection(("127.0.0.1", port), timeout=60)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return peer


def _more(peer: socket.socket) -> bytes:
    data = peer.recv(2**18)
    if not data:
        raise RuntimeError("hung up on")
    return data
