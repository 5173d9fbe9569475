"""A proxy that loses and spoils answers on purpose: between a caller and a gateway that knows nothing of it."""

from __future__ import annotations

import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field

from tests.service.gates import Address


@dataclass(frozen=True)
class Fault:
    """What happens to an answer: hung up on after so many bytes of it, by a reset if `abrupt`; or its last byte
    comes out different.
    """

    keep: int | None = None
    abrupt: bool = False
    spoil: bool = False


Plan = Callable[[int], Fault | None]
"""The fault of the n-th exchange over all connections, counted from 0."""


@dataclass
class Proxy:
    """When each exchange began, was answered (whole or in part) and was hung up on, by the monotonic clock."""

    address: Address
    began: list[float] = field(default_factory=list[float])
    answered: list[float] = field(default_factory=list[float])
    lost: list[float] = field(default_factory=list[float])
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def url(self) -> str:
        return f"http://{self.address[0]}:{self.address[1]}"

    def begin(self) -> int:
        with self._lock:
            self.began.append(time.monotonic())
            return len(self.began) - 1


@contextmanager
def proxied(upstream: Address, plan: Plan) -> Generator[Proxy]:
    """A proxy on a loopback port; its connections end with it."""
    with socket.create_server(("127.0.0.1", 0), backlog=512) as listener:
        proxy = Proxy(listener.getsockname())
        threading.Thread(target=_accept, args=(listener, upstream, proxy, plan), daemon=True).start()
        yield proxy
        listener.shutdown(socket.SHUT_RDWR)


def _accept(listener: socket.socket, upstream: Address, proxy: Proxy, plan: Plan) -> None:
    while True:
        try:
            caller, _ = listener.accept()
        except OSError:
            return
        threading.Thread(target=_relay, args=(caller, upstream, proxy, plan), daemon=True).start()


def _relay(caller: socket.socket, upstream: Address, proxy: Proxy, plan: Plan) -> None:
    """Pass bytes on, either way; whoever speaks again after an answer begins a new exchange."""
    answered, passed, fault = True, 0, None
    with caller, socket.create_connection(upstream) as gateway, selectors.DefaultSelector() as either:
        either.register(caller, selectors.EVENT_READ)
        either.register(gateway, selectors.EVENT_READ)
        try:
            while True:
                for key, _ in either.select():
                    source = key.fileobj
                    assert isinstance(source, socket.socket)
                    data = source.recv(65536)
                    if not data:
                        return
                    if source is caller:
                        if answered:
                            answered, passed, fault = False, 0, plan(proxy.begin())
                        gateway.sendall(data)
                        continue
                    if not answered:
                        answered = True
                        proxy.answered.append(time.monotonic())
                    if fault and fault.keep is not None and passed + len(data) > fault.keep:
                        proxy.lost.append(time.monotonic())
                        caller.sendall(data[: fault.keep - passed])
                        _hang_up(caller, fault.abrupt)
                        return
                    passed += len(data)
                    spoil = fault and fault.spoil and not data.endswith(b"\r\n\r\n")  # a head by itself stays whole
                    caller.sendall(data[:-1] + bytes([data[-1] ^ 1]) if spoil else data)
        except OSError:
            return


def _hang_up(caller: socket.socket, abrupt: bool) -> None:
    if abrupt:
        caller.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
