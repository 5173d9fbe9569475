"""One exchange: what is sent, what hostile servers are not able to do, and that failures look the same."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import time
from dataclasses import replace
from ipaddress import ip_address
from typing import Any

import httpcore2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.urls import PUBLIC_ADDRESS, PUBLIC_HOST
from tests.workers.courier.hosts import (
    AUTHORITY,
    NEAR,
    PATIENT,
    Answer,
    Counter,
    Host,
    Seen,
    World,
    always,
    fresh_name,
    get,
    refused,
    said,
)
from workers.courier.egress import (
    Budget,
    Egress,
    EgressError,
    Reply,
    TooLargeError,
    dial,
    trust,
)

PICTURE = os.urandom(100_000)


# What is sent


def test_the_request_names_the_host_and_nothing_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Host and SNI are the URL's, no proxy, netrc, cookie or compression comes from anywhere."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "https_proxy", "NETRC"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")

    async def answer(seen: Seen, writer: asyncio.StreamWriter) -> None:
        if seen.target == "/first?a=b%2Fc":
            writer.write(said(307, b"", "location: /second", "set-cookie: a=b"))
        else:
            writer.write(said(200, PICTURE))

    with Host(answer) as public:
        world = World(public.port, 1)
        assert get(world.egress(), f"https://{PUBLIC_HOST}/first?a=b%2Fc#part") == PICTURE
        assert [seen.target for seen in public.seen] == ["/first?a=b%2Fc", "/second"]
        for seen in public.seen:
            assert seen.headers == {
                "host": PUBLIC_HOST,
                "user-agent": "dreamserve-courier",
                "accept": "image/png",
                "accept-encoding": "identity",
            }


def test_a_certificate_for_another_name_ends_it() -> None:
    """The pinned address is not enough: who answers must prove to be the name."""
    with Host(always(said(200, PICTURE))) as public:
        world = World(public.port, 1)
        world.name("other.example", (PUBLIC_ADDRESS,))
        assert refused(world.egress(), "https://other.example/") == "ConnectError"
        assert not public.seen


def test_an_unknown_authority_ends_it() -> None:
    """Certificates are checked by the system's authorities unless one was added."""
    with Host(always(said(200, PICTURE))) as public:
        world = World(public.port, 1)
        egress = Egress(NEAR, trust(), resolve=world.resolve, dial=world.dial)
        assert refused(egress, f"https://{PUBLIC_HOST}/", open_s=1.0) in ("ConnectError", "TimeoutError")
        assert not public.seen


# Hostile servers


def test_redirects_are_followed_three_times() -> None:
    """Three hops are followed, a fourth is not."""

    async def count_down(seen: Seen, writer: asyncio.StreamWriter) -> None:
        left = int(seen.target[1:])
        writer.write(said(302, b"", f"location: /{left - 1}") if left else said(200, PICTURE))

    with Host(count_down) as public:
        world = World(public.port, 1)
        assert get(world.egress(), f"https://{PUBLIC_HOST}/3") == PICTURE
        assert refused(world.egress(), f"https://{PUBLIC_HOST}/4") == "too many redirects"


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (said(404), "status 404"),
        (said(204), "status 204"),
        (said(206, PICTURE), "status 206"),
        (said(200, PICTURE, "content-encoding: gzip"), "encoded content"),
        (said(302), "UrlForbiddenError"),
        (said(302, b"", "location: http://guard.example/"), "UrlForbiddenError"),
        (said(302, b"", "location: //[oops"), "UrlForbiddenError"),
        (said(101, b"", "upgrade: websocket", "connection: upgrade"), "RemoteProtocolError"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nabc", "RemoteProtocolError"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nabcdef", "RemoteProtocolError"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n", "RemoteProtocolError"),
        (b"SSH-2.0-OpenSSH_9.9\r\n", "RemoteProtocolError"),
        (b"", "RemoteProtocolError"),
        (
            b"HTTP/1.1 200 OK\r\n" + b"".join(b"x-%d: %s\r\n" % (n, b"a" * 999) for n in range(300)),
            "RemoteProtocolError",
        ),
        (b"HTTP/1.1 100 Continue\r\n\r\n" * 50, "RemoteProtocolError"),
    ],
)
def test_other_answers_are_failures(answer: bytes, reason: str) -> None:
    """Only a whole, plain 200 is a picture; floods of headers end at a bound."""
    with Host(always(answer)) as public:
        assert refused(World(public.port, 1).egress(), f"https://{PUBLIC_HOST}/") == reason


def test_bodies_end_at_the_cap() -> None:
    """Endless bodies, announced or not, are cut at the cap; one of exactly that size passes."""
    size = len(PICTURE)
    endless = b"HTTP/1.1 200 OK\r\n\r\n" + PICTURE * 3
    chunked = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + (b"%x\r\n%s\r\n" % (size, PICTURE)) * 3
    for answer in (said(200, PICTURE * 2), endless, chunked):
        with Host(always(answer)) as public, pytest.raises(TooLargeError):
            get(World(public.port, 1).egress(), f"https://{PUBLIC_HOST}/", max_bytes=size)
    with Host(always(said(200, PICTURE))) as public:
        assert get(World(public.port, 1).egress(), f"https://{PUBLIC_HOST}/", max_bytes=size) == PICTURE


def test_a_budget_is_shared() -> None:
    """Many pictures, each within its cap, do not add up to more than a job may have."""
    with Host(always(said(200, PICTURE))) as public:
        egress, budget = World(public.port, 1).egress(), Budget(len(PICTURE) * 3 // 2)
        assert get(egress, f"https://{PUBLIC_HOST}/", budget=budget) == PICTURE
        with pytest.raises(TooLargeError):
            get(egress, f"https://{PUBLIC_HOST}/", budget=budget)


def drip(before: bytes, piece: bytes) -> Answer:
    """Bytes that come one by one for as long as somebody listens."""

    async def write(_seen: Seen, writer: asyncio.StreamWriter) -> None:
        writer.write(before)
        while True:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.01)

    return write


@pytest.mark.parametrize(
    "answer",
    [
        drip(b"HTTP/1.1 200 OK\r\n\r\n", b"a"),
        drip(b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n", b"a"),
        drip(b"HTTP/1.1 200 OK\r\n", b"a: b\r\n"),
        drip(b"", b"HTTP/1.1 103 Early Hints\r\n\r\n"),
    ],
    ids=["endless", "announced", "headers", "hints"],
)
def test_a_slow_drip_ends_in_time(answer: Answer) -> None:
    """Bytes that keep coming do not keep the courier: there is one deadline over everything."""
    with Host(answer) as public:
        began = time.monotonic()
        assert refused(World(public.port, 1).egress(), f"https://{PUBLIC_HOST}/", total_s=0.5) == "too slow"
        assert time.monotonic() - began < 20


def test_a_slow_handshake_ends_in_time() -> None:
    """TLS that never comes to its end is cut too; it is part of opening."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        world = World(silent.getsockname()[1], 1)
        assert refused(world.egress(), f"https://{PUBLIC_HOST}/", open_s=0.3) == "TimeoutError"


@given(st.binary(max_size=300) | st.binary(max_size=200).map(lambda noise: b"HTTP/1.1 200 OK\r\n" + noise))
@settings(max_examples=30)
def test_whatever_a_server_says_only_an_egress_error_leaves(noise: bytes) -> None:
    """No answer makes the courier raise anything else, or take it for a picture it is not."""
    with Host(always(noise)) as public:
        try:
            body = get(World(public.port, 1).egress(), f"https://{PUBLIC_HOST}/")
        except EgressError:
            return
        assert body in noise or b"chunked" in noise.lower()


# Sameness of failures


def test_blocked_and_unreachable_look_and_last_the_same() -> None:
    """Blocked, unknown, refusing, silent and untrusted hosts: one error, told when the time for opening is over."""
    with socket.create_server(("127.0.0.1", 0)) as silent, Host(always(said())) as untrusted, Counter() as inside:
        closed = socket.create_server(("127.0.0.1", 0))
        refusing = closed.getsockname()[1]
        closed.close()
        for port in (refusing, silent.getsockname()[1], untrusted.port):
            world = World(port, inside.port)
            for host, answers in (("a.example", ("127.0.0.1",)), ("b.example", (PUBLIC_ADDRESS,)), ("c.example", ())):
                world.name(host, answers)
                egress = Egress(NEAR, trust(), resolve=world.resolve, dial=world.dial)
                began = time.monotonic()
                refused(egress, f"https://{host}/", open_s=0.2)
                assert time.monotonic() - began >= 0.2
        assert inside.count() == 0


def test_without_the_pause_a_block_is_told_at_once() -> None:
    """The control: what the pause hides is there to be seen."""
    world = World(1, 1)
    world.name("a.example", ("127.0.0.1",))
    paused: list[float] = []
    began = time.monotonic()
    refused(world.egress(paused=paused), "https://a.example/", open_s=30.0)
    assert time.monotonic() - began < 15
    assert 15 < paused[0] <= 30


def test_a_stuck_resolver_ends_in_time() -> None:
    """A look-up that does not come back counts as none."""

    async def never(_tenant: str, _host: str) -> list[object]:
        await asyncio.Event().wait()
        return []

    egress = Egress(NEAR, trust(), resolve=never)
    assert refused(egress, f"https://{PUBLIC_HOST}/", open_s=0.2) == "TimeoutError"


def test_the_next_address_is_tried() -> None:
    """One dead address among several does not make a host unreachable; all of them were checked first."""
    with Host(always(said(200, PICTURE))) as public:
        world = World(public.port, 1)
        host = fresh_name()
        world.name(host, ("93.184.216.35", "2606:4700::1", PUBLIC_ADDRESS))
        dialed: list[str] = []

        async def flaky(address: object, port: int) -> httpcore2.AsyncNetworkStream:
            dialed.append(str(address))
            if str(address) == PUBLIC_ADDRESS:
                return await dial(ip_address("127.0.0.1"), public.port)
            raise httpcore2.ConnectError

        egress = Egress(NEAR, trust(AUTHORITY), resolve=world.resolve, dial=flaky)
        assert get(egress, f"https://{host}/") == PICTURE
        assert dialed == ["93.184.216.35", "2606:4700::1", PUBLIC_ADDRESS]


# Messages


@pytest.mark.parametrize(
    ("answer", "reply"),
    [
        (said(204), Reply(204)),
        (said(302, b"", "location: https://guard.example/"), Reply(302)),
        (said(503, b"later", "retry-after: 120"), Reply(503, 120.0)),
        (said(429, b"", "retry-after: Fri, 31 Dec 2027 23:59:59 GMT"), Reply(429)),
        (said(429, b"", "retry-after: -1"), Reply(429)),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 1000000\r\n\r\n", Reply(200)),
    ],
)
def test_a_message_is_answered_by_its_status(answer: bytes, reply: Reply) -> None:
    """A redirect is an answer, not an instruction; a body is not waited for."""
    with Host(always(answer)) as public:
        egress = World(public.port, 1).egress()
        headers = {"content-type": "application/json", "webhook-id": "msg_1"}
        assert asyncio.run(egress.post("a", f"https://{PUBLIC_HOST}/hook", headers, b'{"a":1}', PATIENT)) == reply
        (seen,) = public.seen
        assert (seen.method, seen.target, seen.body) == ("POST", "/hook", b'{"a":1}')
        assert seen.headers["webhook-id"] == "msg_1"


def test_connections_are_closed() -> None:
    """Good or bad, an exchange leaves no socket behind, however long the server would hold it."""

    async def hold(seen: Seen, writer: asyncio.StreamWriter) -> None:
        writer.write(said(302, b"", "location: /good") if seen.target == "/" else said(200, PICTURE))
        await writer.drain()
        await asyncio.Event().wait()

    async def make(port: int) -> int:
        sockets: list[Any] = []

        async def noting(_address: object, _port: int) -> httpcore2.AsyncNetworkStream:
            stream = await dial(ip_address("127.0.0.1"), port)
            sockets.append(stream.get_extra_info("socket"))
            return stream

        world = World(port, 1)
        world.name("other.example", (PUBLIC_ADDRESS,))
        egress = Egress(NEAR, trust(AUTHORITY), resolve=world.resolve, dial=noting, pause=asyncio.sleep)
        good, caps = f"https://{PUBLIC_HOST}/", replace(PATIENT, open_s=2.0, max_bytes=len(PICTURE))
        await egress.get("a", good, "image/png", caps, len)
        await egress.post("a", good, {}, b"{}", caps)
        for url, most in ((good, 10), ("https://other.example/", 10**6)):
            with pytest.raises(EgressError):
                await egress.get("a", url, "image/png", replace(caps, max_bytes=most), len)
        for _ in range(1000):
            if all(connection.fileno() == -1 for connection in sockets):
                break
            await asyncio.sleep(0.01)
        assert [connection.fileno() for connection in sockets] == [-1] * len(sockets)
        return len(sockets)

    with Host(hold) as public:
        assert asyncio.run(make(public.port)) == 6


def test_authorities_that_cannot_be_read_are_said() -> None:
    """A wrong setting ends the start, not every delivery."""
    for path in (AUTHORITY.parent / "nothing.pem", AUTHORITY.parent / "hosts.py"):
        with pytest.raises((OSError, ssl.SSLError)):
            trust(path)
