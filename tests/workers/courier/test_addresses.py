"""Which URLs and addresses are allowed, beside other readings of the same bytes."""

from __future__ import annotations

import asyncio
import socket
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from urllib.parse import urlsplit

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.urls import INSIDE_4, INSIDE_6, corpus
from workers.courier.addresses import PUBLIC, Rules, UrlForbiddenError, check_url, is_public
from workers.courier.egress import SystemResolver

ADDRESSES = st.ip_addresses()


@given(ADDRESSES)
def test_what_is_public_is_global_unicast_by_the_standard_library_too(address: IPv4Address | IPv6Address) -> None:
    """Our rule is never laxer than `ipaddress`, which is an oracle for one side only."""
    if is_public(address):
        assert address.is_global
        assert not address.is_multicast
        assert not (address.is_private or address.is_reserved or address.is_loopback or address.is_link_local)


@given(st.ip_addresses(v=4))
def test_an_address_inside_another_is_never_public(address: IPv4Address) -> None:
    """Mapped, compatible, NAT64, 6to4 and Teredo addresses lead wherever the IPv4 address in them does."""
    inside = int(address)
    for prefix in ("::", "::ffff:0:0", "::ffff:0:0:0", "64:ff9b::", "64:ff9b:1::"):
        assert not is_public(IPv6Address(int(IPv6Address(prefix)) + inside))
    assert not is_public(IPv6Address((0x2002 << 112) + (inside << 80)))
    assert not is_public(IPv6Address((0x2001_0000 << 96) + (inside ^ 0xFFFFFFFF)))


@pytest.mark.parametrize("text", [*INSIDE_4, *INSIDE_6, "2606:4700::1%eth0", "64:ff9b::7f00:1"])
def test_inside_addresses(text: str) -> None:
    """Those that the corpus is after are not public."""
    assert not is_public(ip_address(text))


@pytest.mark.parametrize(
    "text", ["93.184.216.34", "1.1.1.1", "192.0.1.1", "2606:4700:4700::1111", "2a00:1450:4001::200e"]
)
def test_public_addresses(text: str) -> None:
    """The rule lets the internet through."""
    assert is_public(ip_address(text))


@pytest.mark.parametrize(
    "url",
    [
        "https://example.org",
        "https://Example.org:443/a/b.png?X-Signature=a%2Fb~c&d=[1]|{2}#part",
        "https://bucket_1.s3.eu-central-1.amazonaws.com/k'ey",
        "https://xn--bcher-kva.example/",
        "https://93.184.216.34/picture.png",
        "https://[2606:4700:4700::1111]/",
        "HTTPS://7.example/",
    ],
)
def test_usual_urls_pass(url: str) -> None:
    """Refusing everything would be safe too; host, port and target are the standard library's."""
    parts = urlsplit(url)
    place = check_url(url)
    assert (place.host, place.port) == (parts.hostname, parts.port or 443)
    assert place.target == (parts.path or "/") + (f"?{parts.query}" if parts.query else "")


def test_every_hostile_spelling_is_refused() -> None:
    """All but the plain names, of which only DNS can tell more."""
    passed = {hostile.kind for hostile in corpus() if _passes(hostile.url)}
    assert passed == {"named"}


PIECES = (
    "a",
    "b.example",
    "127.0.0.1",
    "1",
    "0x7f",
    "[",
    "]",
    "::1",
    ":",
    "443",
    "@",
    "/",
    "\\",
    "?",
    "#",
    "%",
    "%40",
    ".",
)
TEXTS = st.lists(st.sampled_from(PIECES) | st.characters(codec="utf-8"), max_size=8).map("".join)


@given(TEXTS.map(lambda text: f"https://{text}"))
def test_whatever_passes_has_one_reading(url: str) -> None:
    """No parser differential: the standard library and the HTTP library see the same host and port in it."""
    if _passes(url):
        place = check_url(url)
        assert urlsplit(url).hostname == place.host
        assert httpx2.URL(url).host == place.host
        assert (urlsplit(url).port or 443) == place.port


def test_other_ports_and_networks_are_the_operators_choice() -> None:
    """A receiver inside one's own network is allowed by name of the network, not by switching the guard off."""
    rules = Rules(frozenset({443, 8443}), (ip_network("10.1.0.0/16"),))
    assert check_url("https://10.1.2.3:8443/", rules).address == ip_address("10.1.2.3")
    for url in ("https://10.2.0.1/", "https://127.0.0.1:8443/", "https://10.1.2.3:8080/", "https://[::ffff:10.1.2.3]/"):
        with pytest.raises(UrlForbiddenError):
            check_url(url, rules)


def test_refusals_hold_nothing_of_the_url() -> None:
    """A signed URL is a secret: not even its refusal repeats it."""
    for hostile in corpus():
        try:
            check_url(hostile.url)
        except UrlForbiddenError as error:
            assert error.code == "url_forbidden"
            assert hostile.inside not in error.message


def test_what_the_system_reads_as_an_address_is_refused_as_one() -> None:
    """The second line of defence: spellings that slip through a parser are caught by what they resolve to."""
    spelled = ["127.1", "0", "2130706433", "0x7f.1", "0177.0.0.1", "①②⑦.0.0.1", "localhost", "0x0a000001"]

    async def resolve() -> list[bool]:
        resolver = SystemResolver()
        try:
            return [all(map(PUBLIC.allow, await resolver("a", host))) for host in spelled if _resolves(host)]
        finally:
            resolver.close()

    verdicts = asyncio.run(resolve())
    assert len(verdicts) >= 5
    assert not any(verdicts)


def _passes(url: str) -> bool:
    try:
        check_url(url)
    except UrlForbiddenError:
        return False
    return True


def _resolves(host: str) -> bool:
    try:
        return bool(socket.getaddrinfo(host, None))
    except (OSError, UnicodeError):
        return False
