"""Hosts on this machine that play the internet: a real TLS server, a listener that only counts, and their names."""

from __future__ import annotations

import asyncio
import itertools
import socket
import ssl
import threading
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from ipaddress import ip_address
from pathlib import Path
from types import TracebackType
from typing import Self

import httpcore2
import pytest

from tests.fuzz.urls import PUBLIC_ADDRESS, PUBLIC_HOST
from workers.courier import egress
from workers.courier.addresses import PUBLIC, Address, Rules
from workers.courier.egress import Budget, Caps, Egress, EgressError, trust

FOLDER = Path(__file__).parent
AUTHORITY = FOLDER / "authority.pem"
NEAR = Rules(frozenset(range(1, 65536)))
"""Any port, but no other addresses than public ones."""
PATIENT = Caps(open_s=30.0, total_s=60.0)


@dataclass(frozen=True, slots=True)
class Seen:
    """A request as it arrived."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes


Answer = Callable[[Seen, asyncio.StreamWriter], Awaitable[None]]


def said(status: int = 200, body: bytes = b"", *headers: str) -> bytes:
    """The bytes of an answer."""
    lines = [f"HTTP/1.1 {status} said", f"content-length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


def always(answer: bytes) -> Answer:
    """The same bytes for everybody."""

    async def write(_seen: Seen, writer: asyncio.StreamWriter) -> None:
        writer.write(answer)

    return write


@dataclass(slots=True)
class Host:
    """A TLS server on loopback whose certificate holds for localhost and *.guard.example, in a thread of its own."""

    answer: Answer
    seen: list[Seen] = field(default_factory=list[Seen])
    port: int = 0
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.new_event_loop)
    _thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self.port = asyncio.run_coroutine_threadsafe(self._start(), self._loop).result()
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        assert self._thread
        self._thread.join()
        self._loop.close()

    async def _start(self) -> int:
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(FOLDER / "server.pem")
        server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, ssl=tls, backlog=2048)
        return server.sockets[0].getsockname()[1]

    async def _stop(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            method, target, _ = head[0].split(" ")
            headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in head[1:] if line)}
            body = await reader.readexactly(int(headers.get("content-length", 0)))
            seen = Seen(method, target, headers, body)
            self.seen.append(seen)
            await self.answer(seen, writer)
            await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()


class Counter:
    """A listener on loopback that counts connections, before anything is said on them."""

    def __init__(self, host: str = "127.0.0.1") -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.create_server((host, 0), family=family, backlog=2048)
        self.port: int = self._socket.getsockname()[1]
        self._accepted = 0
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._socket.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            self._accepted += 1
            connection.close()

    def count(self) -> int:
        """Connections so far. One more is made from here and waited for: what came earlier has been counted then."""
        before = self._accepted
        with socket.create_connection(self._socket.getsockname()[:2], timeout=240) as own:
            own.settimeout(30)
            assert own.recv(1) == b""
        self._accepted -= 1
        assert self._accepted >= before
        return self._accepted


@dataclass(slots=True)
class World:
    """Names and addresses as far as the courier can see. Whatever is dialed ends on this machine: public addresses at
    `public`, all others at `inside`. An answer that is used up stays the last.
    """

    public: int
    inside: int
    names: dict[str, list[Sequence[str]]] = field(default_factory=dict[str, list[Sequence[str]]])
    asked: list[str] = field(default_factory=list[str])
    dialed: list[str] = field(default_factory=list[str])

    def name(self, host: str, *answers: Iterable[str]) -> None:
        """Let a host resolve to these addresses, one list after the other."""
        self.names[host] = [tuple(answer) for answer in answers]

    async def resolve(self, _tenant: str, host: str) -> Sequence[Address]:
        self.asked.append(host)
        answers = self.names.get(host) or ([(PUBLIC_ADDRESS,)] if host.endswith(PUBLIC_HOST) else [])
        if not answers:
            raise OSError("no such host")
        found = answers.pop(0) if len(answers) > 1 else answers[0]
        return [ip_address(address) for address in found]

    async def dial(self, address: Address, _port: int) -> httpcore2.AsyncNetworkStream:
        self.dialed.append(str(address))
        there = self.public if PUBLIC.allow(address) else self.inside
        return await egress.dial(ip_address("127.0.0.1"), there)

    def egress(self, rules: Rules = NEAR, *, paused: list[float] | None = None) -> Egress:
        """The courier's way into this world; pauses are noted instead of made."""
        notes: list[float] = [] if paused is None else paused

        async def pause(seconds: float) -> None:
            notes.append(seconds)

        return Egress(rules, trust(AUTHORITY), resolve=self.resolve, dial=self.dial, pause=pause)


def fresh_name() -> str:
    """A public host that nobody has used."""
    return f"h{next(_NUMBERS)}.{PUBLIC_HOST}"


def has_loopback_6() -> bool:
    """Whether this machine has IPv6 at all."""
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


_NUMBERS = itertools.count()


def get(egress: Egress, url: str, *, budget: Budget | None = None, **caps: float) -> bytes:
    """The body, by patient caps but for those given."""
    body = bytearray()
    asyncio.run(egress.get("a", url, "image/png", replace(PATIENT, **caps), body.extend, budget))
    return bytes(body)


def refused(egress: Egress, url: str, **caps: float) -> str:
    """The reason why there is no body."""
    with pytest.raises(EgressError) as caught:
        get(egress, url, **caps)
    return caught.value.reason
