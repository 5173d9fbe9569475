"""The guard against hostile URLs: what connects is counted by real listeners, with the guard and without."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Callable, Iterator, Sequence
from ipaddress import ip_network
from urllib.parse import urlsplit

import pytest

from tests.fuzz.urls import PUBLIC_ADDRESS, Hostile, corpus
from tests.workers.courier.hosts import (
    AUTHORITY,
    NEAR,
    PATIENT,
    Counter,
    Host,
    Seen,
    World,
    always,
    fresh_name,
    get,
    has_loopback_6,
    refused,
    said,
)
from workers.courier.addresses import Rules
from workers.courier.egress import Egress, EgressError, SystemResolver, trust

NO_GUARD = Rules(NEAR.ports, (ip_network("0.0.0.0/0"), ip_network("::/0")))
CORPUS = corpus()
PICTURE = os.urandom(100_000)
Way = Callable[[World, str, Hostile], str]


@pytest.fixture
def inside() -> Iterator[Counter]:
    with Counter() as counter:
        yield counter


def direct(world: World, _host: str, hostile: Hostile) -> str:
    return hostile.url


def redirected(world: World, host: str, hostile: Hostile) -> str:
    """A public host that sends on to the hostile URL."""
    return f"https://{host}/to/{CORPUS.index(hostile)}"


def rebound(world: World, host: str, hostile: Hostile) -> str:
    """A public host that sends on to itself, but resolves inside from the second time on."""
    world.name(host, (PUBLIC_ADDRESS,), (hostile.inside,))
    return f"https://{host}/again"


async def send_on(seen: Seen, writer: asyncio.StreamWriter) -> None:
    """The redirecting host; some of the corpus is a path on it when it is read as a relative reference."""
    found = re.fullmatch(r"/to/([0-9]+)", seen.target)
    if found is None and seen.target != "/again":
        writer.write(said(404))
        return
    place = CORPUS[int(found[1])].url if found else "/again"
    printable = "".join(sign for sign in place if sign not in "\r\n\0")  # what a header cannot carry is left out
    writer.write(b"HTTP/1.1 302 Found\r\nLocation: " + printable.encode() + b"\r\nContent-Length: 0\r\n\r\n")


def travel(world: World, rules: Rules, way: Way, urls: Sequence[Hostile]) -> list[BaseException | None]:
    """Every one of these by this way, at once."""
    for hostile in urls:
        if hostile.answers:
            world.name(urlsplit(hostile.url).netloc.partition(":")[0].lower(), hostile.answers)
    starts = [way(world, fresh_name(), hostile) for hostile in urls]

    async def all_of_them() -> list[BaseException | None]:
        egress = world.egress(rules)
        calls = [egress.get("a", url, "image/png", PATIENT, len) for url in starts]
        return await asyncio.gather(*calls, return_exceptions=True)

    return asyncio.run(all_of_them())


@pytest.mark.parametrize("way", [direct, redirected, rebound])
def test_no_hostile_url_connects_inside(way: Way, inside: Counter) -> None:
    """More than 300 URLs by each way, with any port allowed: not one connection to an address that is not public, and
    the same refusal for all. Those sent on did reach the host that sent them.
    """
    with Host(send_on) as public:
        world = World(public.port, inside.port)
        outcomes = travel(world, NEAR, way, CORPUS)
        assert len(outcomes) > 300
        assert {type(outcome) for outcome in outcomes} == {EgressError}
        assert set(world.dialed) <= {PUBLIC_ADDRESS}
        sent_on = {seen.headers["host"] for seen in public.seen}
        assert len(sent_on) == (0 if way is direct else len(CORPUS))
    assert inside.count() == 0


@pytest.mark.parametrize("way", [direct, redirected, rebound])
def test_without_the_guard_they_do(way: Way, inside: Counter) -> None:
    """The control: where every address is allowed, the listener counts, also behind redirects and rebound names."""
    with Host(send_on) as public:
        world = World(public.port, inside.port)
        some = CORPUS[::4]
        travel(world, NO_GUARD, way, some)
    assert inside.count() >= (len(some) if way is rebound else 30)


@pytest.mark.parametrize(
    "spelling", ["127.0.0.1", "127.1", "2130706433", "0x7f.1", "0177.0.0.1", "①②⑦.0.0.1", "localhost", "[::1]"]
)
def test_nothing_reaches_this_machine_by_the_systems_own_resolver(spelling: str) -> None:
    """The same with nothing replaced: real resolver, real connections, a listener that is really there."""
    if spelling == "[::1]" and not has_loopback_6():
        pytest.skip("no IPv6 here")
    with Counter("::1" if spelling == "[::1]" else "127.0.0.1") as counter:
        egress = Egress(NEAR, trust(), resolve=SystemResolver())
        refused(egress, f"https://{spelling}:{counter.port}/", open_s=0.05)
        assert counter.count() == 0


@pytest.mark.parametrize("spelling", ["127.0.0.1", "localhost"])
def test_what_is_allowed_is_reached_by_the_systems_own_resolver(spelling: str) -> None:
    """The control: with loopback allowed the picture comes, over TLS for the name."""
    with Host(always(said(200, PICTURE))) as host:
        rules = Rules(frozenset({host.port}), (ip_network("127.0.0.0/8"), ip_network("::1/128")))
        egress = Egress(rules, trust(AUTHORITY), resolve=SystemResolver())
        assert get(egress, f"https://{spelling}:{host.port}/") == PICTURE
        assert host.seen[0].headers["host"] == f"{spelling}:{host.port}"


def test_a_name_is_resolved_once_and_the_answer_dialed(inside: Counter) -> None:
    """Rebinding between check and connection finds no second look-up to answer."""
    with Host(always(said(200, PICTURE))) as public:
        world = World(public.port, inside.port)
        host = fresh_name()
        world.name(host, (PUBLIC_ADDRESS,), ("127.0.0.1",))
        assert get(world.egress(), f"https://{host}/") == PICTURE
        assert world.asked == [host]
        assert world.dialed == [PUBLIC_ADDRESS]
