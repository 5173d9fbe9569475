"""The one way out: a single HTTPS exchange with a host that a caller named, under the rules of `addresses`.

    check the URL ─▶ resolve once ─▶ check every answer ─▶ connect to what was checked ─▶ TLS for the name ─▶ HTTP/1.1

A redirect begins anew. Nothing of the environment takes part (no proxy, no netrc), nothing of an exchange is kept for
the next one (no cookies, no pool). All of it ends within a total time however slowly bytes drip, and reads no more
than its caps. Up to the TLS handshake every failure takes the same time and looks the same outside, so that nobody
learns from a refusal what a name resolves to in here. Only `EgressError` leaves; its reason holds nothing of the URL.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Final, cast
from urllib.parse import urljoin
from weakref import WeakValueDictionary

import httpcore2

from workers.courier.addresses import Address, Destination, Rules, UrlForbiddenError, check_url

Resolve = Callable[[str, str], Awaitable[Sequence[Address]]]
"""For a tenant, the addresses of a name; OSError if it has none."""
LookUp = Callable[[str], Sequence[Address]]
"""The same for anybody; blocks."""
Dial = Callable[[Address, int], Awaitable[httpcore2.AsyncNetworkStream]]
"""A connection to an address and port; `httpcore2.NetworkError` if there is none."""
Pause = Callable[[float], Awaitable[None]]
Write = Callable[[bytes], object]

USER_AGENT: Final = "dreamserve-courier"
_ADDRESSES_TRIED: Final = 4
_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_FAULTS: Final = (
    TimeoutError,
    OSError,  # ssl.SSLError among them
    UnicodeError,
    httpcore2.NetworkError,
    httpcore2.ProtocolError,
    httpcore2.TimeoutException,
)


class EgressError(Exception):
    """An exchange that did not come to a good end. `reason`: for the log."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class TooLargeError(EgressError):
    """An answer with more bytes than allowed."""


@dataclass(frozen=True, slots=True)
class Caps:
    """Bounds of one call.

    Attributes:
        open_s: for resolving, connecting and TLS of each exchange; a failure in it is told when it is over.
        total_s: for everything, redirects included.
        max_bytes: of an answer's body.
        redirects: followed, at most.
    """

    open_s: float = 5.0
    total_s: float = 20.0
    max_bytes: int = 20 * 2**20
    redirects: int = 3


@dataclass(slots=True)
class Budget:
    """Bytes that several answers may have together."""

    left: int


@dataclass(frozen=True, slots=True)
class Reply:
    """What a receiver says to a message. `retry_after_s`: its wish, 0 without one."""

    status: int
    retry_after_s: float = 0.0


def look_up(host: str) -> Sequence[Address]:
    """Every address, once, in the system's order. Blocks, for longer than anybody waits if a name server is silent.

    Raises:
        OSError: there is none. UnicodeError: no name can be so.
    """
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(ip_address(str(entry[4][0])) for entry in found))


class SystemResolver:
    """The system's resolver, in threads of its own; many, for a name server that never answers holds one for long.

    No look-up can be broken off. So that the silent name servers of one tenant do not take all threads, a tenant has at
    most its part of them: a thread is its own until the look-up has returned, whether or not somebody still waits, and
    its next look-ups wait for that.
    """

    def __init__(self, threads: int = 256, part: int = 64, look_up: LookUp = look_up) -> None:
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="resolver")
        self._look_up = look_up
        self._part = part
        self._places: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()
        """By tenant, for as long as it waits or looks up."""

    async def __call__(self, tenant: str, host: str) -> Sequence[Address]:
        """What `look_up` finds."""
        loop = asyncio.get_running_loop()
        places = self._places.setdefault(tenant, asyncio.Semaphore(self._part))
        await places.acquire()
        try:
            running = self._threads.submit(self._look_up, host)
        except RuntimeError:  # closed, or the system has no thread left
            places.release()
            raise OSError("no thread") from None

        def give_back(_: object) -> None:
            with suppress(RuntimeError):  # the loop has closed: nobody waits any more
                loop.call_soon_threadsafe(places.release)

        running.add_done_callback(give_back)
        return await asyncio.wrap_future(running)

    def close(self) -> None:
        """Let look-ups that nobody waits for end by themselves."""
        self._threads.shutdown(wait=False, cancel_futures=True)


async def dial(address: Address, port: int) -> httpcore2.AsyncNetworkStream:
    """A TCP connection; the address is numeric, so nothing is resolved again."""
    backend = cast("httpcore2.AsyncNetworkBackend", httpcore2.AnyIOBackend())  # typed as if anyio might be missing
    return await backend.connect_tcp(str(address), port)


def trust(authorities: Path | None = None) -> ssl.SSLContext:
    """TLS that checks certificates by the system's authorities, and by those in a PEM file besides.

    Raises:
        OSError: the file cannot be read or holds no certificates.
    """
    context = httpcore2.default_ssl_context()
    if authorities is not None:
        context.load_verify_locations(authorities)
    context.set_alpn_protocols(["http/1.1"])
    return context


class Egress:
    """Makes exchanges. `resolve`, `dial` and `pause` are the system's own but in tests."""

    def __init__(
        self, rules: Rules, tls: ssl.SSLContext, *, resolve: Resolve, dial: Dial = dial, pause: Pause = asyncio.sleep
    ) -> None:
        self._rules = rules
        self._tls = tls
        self._resolve = resolve
        self._dial = dial
        self._pause = pause

    async def get(
        self, tenant: str, url: str, accept: str, caps: Caps, write: Write, budget: Budget | None = None
    ) -> None:
        """Read the body behind a URL, whose answer must be a 200 without content encoding.

        Args:
            tenant: who named it; the look-ups are his.
            write: called with each piece, not from another thread: no write outlives its call.
            budget: shared with other calls; what is read is taken from it.

        Raises:
            EgressError: there is none; `TooLargeError` if it is larger than the caps or the budget.
        """
        headers = {"Accept": accept, "Accept-Encoding": "identity"}
        async with _within(caps.total_s):
            for _ in range(caps.redirects + 1):
                async with self._exchange(tenant, "GET", url, headers, b"", caps.open_s) as answer:
                    if answer.status not in _REDIRECTS:
                        await _read(answer, write, caps.max_bytes, budget or Budget(caps.max_bytes))
                        return
                    url = _next(url, answer)
        raise EgressError("too many redirects")

    async def post(self, tenant: str, url: str, headers: dict[str, str], body: bytes, caps: Caps) -> Reply:
        """Send a message; the answer's status counts, its body is not read, a redirect not followed.

        Raises:
            EgressError: no answer.
        """
        async with _within(caps.total_s), self._exchange(tenant, "POST", url, headers, body, caps.open_s) as answer:
            wish = _header(answer, b"retry-after")
            return Reply(answer.status, float(wish) if wish.isdecimal() and len(wish) < 9 else 0.0)

    @asynccontextmanager
    async def _exchange(
        self, tenant: str, method: str, url: str, headers: dict[str, str], body: bytes, open_s: float
    ) -> AsyncGenerator[httpcore2.Response]:
        place, stream = await self._open(tenant, url, open_s)
        host = f"[{place.host}]" if ":" in place.host else place.host
        there = httpcore2.URL(scheme="https", host=place.host, port=place.port, target=place.target)
        named = {"Host": host if place.port == 443 else f"{host}:{place.port}", "User-Agent": USER_AGENT}
        length = {"Content-Length": str(len(body))} if method == "POST" else {}
        try:
            fields = list((named | headers | length).items())
            request = httpcore2.Request(method, there, headers=fields, content=body)
            yield await httpcore2.AsyncHTTP11Connection(there.origin, stream).handle_async_request(request)
        except _FAULTS as error:
            raise EgressError(type(error).__name__) from None
        finally:
            await stream.aclose()

    async def _open(self, tenant: str, url: str, open_s: float) -> tuple[Destination, httpcore2.AsyncNetworkStream]:
        loop = asyncio.get_running_loop()
        until = loop.time() + open_s
        try:
            place = check_url(url, self._rules)
            async with asyncio.timeout_at(until):
                stream = await self._connect(tenant, place, open_s)
                try:
                    return place, await stream.start_tls(self._tls, place.host)
                except BaseException:
                    await stream.aclose()
                    raise
        except (UrlForbiddenError, EgressError, *_FAULTS) as error:
            reason = error.reason if isinstance(error, EgressError) else type(error).__name__
        await self._pause(until - loop.time())  # however it failed, it took this long
        raise EgressError(reason)

    async def _connect(self, tenant: str, place: Destination, open_s: float) -> httpcore2.AsyncNetworkStream:
        """A connection to one of the addresses, after all of them have been checked."""
        found = [place.address] if place.address else await self._resolve(tenant, place.host)
        if not all(map(self._rules.allow, found)):
            raise EgressError("forbidden address")
        tried = found[:_ADDRESSES_TRIED]
        for address in tried:
            try:
                async with asyncio.timeout(open_s / len(tried)):
                    return await self._dial(address, place.port)
            except _FAULTS:
                continue
        raise EgressError("no connection")


@asynccontextmanager
async def _within(seconds: float) -> AsyncGenerator[None]:
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise EgressError("too slow") from None


def _next(url: str, answer: httpcore2.Response) -> str:
    """Where a redirect leads; checked like any other URL before it is followed."""
    place = _header(answer, b"location")
    try:
        return urljoin(url, place) if place else ""
    except ValueError:
        return ""


async def _read(answer: httpcore2.Response, write: Write, max_bytes: int, budget: Budget) -> None:
    if answer.status != 200:
        raise EgressError(f"status {answer.status}")
    if _header(answer, b"content-encoding").lower() not in ("", "identity"):
        raise EgressError("encoded content")
    size = 0
    async for piece in answer.aiter_stream():
        size += len(piece)
        budget.left -= len(piece)
        if size > max_bytes or budget.left < 0:
            raise TooLargeError("too many bytes")
        write(piece)


def _header(answer: httpcore2.Response, name: bytes) -> str:
    """The first header of this name as text, empty without one; a byte that is not ASCII fails every later check."""
    return next((value.decode("latin-1") for key, value in answer.headers if key.lower() == name), "")
