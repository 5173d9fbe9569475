"""Which addresses this service may speak to when a caller names them: an allow rule for URLs and for IP addresses.

A URL is refused here by its spelling alone, without DNS, so the gateway can say so at once. What a name resolves to
is checked again, answer by answer, where the connection is made (`egress`). The rule is ours because the standard
library's is another one: `ipaddress` calls `::127.0.0.1`, NAT64 and 6to4 addresses and multicast global, and the
system's resolver reads `127.1`, `0x7f.1`, `0` and full-width digits as addresses. No torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_network
from typing import Final

from workers.settings import QueueSettings

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

MAX_URL: Final = 2048
_URL = re.compile(r"https://(\[[0-9a-f:.]{2,45}\]|[a-z0-9._-]{1,253})(?::([0-9]{1,5}))?([/?#][!-~]*)?", re.IGNORECASE)
_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
"""A last label that some resolver takes for a part of an address (the URL standard's "ends in a number")."""

_UNICAST_6: Final = IPv6Network("2000::/3")
_SPECIAL: Final[tuple[Network, ...]] = tuple(
    ip_network(text)
    for text in (
        # IANA's special-purpose registry of IPv4
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
        *("192.0.0.0/24", "192.0.2.0/24", "192.31.196.0/24", "192.52.193.0/24", "192.88.99.0/24", "192.168.0.0/16"),
        *("192.175.48.0/24", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4"),
        # Azure's metadata and DNS, from inside a virtual machine
        "168.63.129.16/32",
        # IANA's of IPv6, as far as it is global unicast: protocols with Teredo, documentation, 6to4, AS112
        *("2001::/23", "2001:db8::/32", "2002::/16", "2620:4f:8000::/48", "3fff::/20"),
    )
)


class UrlForbiddenError(ValueError):
    """A URL that is never asked. `message` names the remedy and holds nothing of the URL."""

    code: Final = "url_forbidden"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


@dataclass(frozen=True, slots=True)
class Rules:
    """What is allowed: https to public addresses.

    Attributes:
        ports: that may be named.
        networks: allowed although they are not public, for receivers inside one's own network.
    """

    ports: frozenset[int] = frozenset({443})
    networks: tuple[Network, ...] = ()

    @staticmethod
    def of(settings: QueueSettings) -> Rules:
        """As configured."""
        return Rules(frozenset(settings.egress_ports), settings.egress_networks)

    def allow(self, address: Address) -> bool:
        """Whether a connection may be made to this address."""
        return is_public(address) or any(address in network for network in self.networks)


PUBLIC: Final = Rules()


@dataclass(frozen=True, slots=True)
class Destination:
    """A URL in parts. `address` is set if the host is one; `target` is path and query, as they were written."""

    host: str
    port: int
    target: str
    address: Address | None


def is_public(address: Address) -> bool:
    """Global unicast and nothing else: no embedded, translated, reserved or documentation address."""
    if isinstance(address, IPv6Address) and (address.scope_id is not None or address not in _UNICAST_6):
        return False
    return not any(address in network for network in _SPECIAL)


def check_url(url: str, rules: Rules = PUBLIC) -> Destination:
    """The parts of a URL that may be asked, as far as its spelling tells. Makes no look-up.

    Raises:
        UrlForbiddenError: it may not.
    """
    match = _URL.fullmatch(url) if len(url) <= MAX_URL else None
    if match is None:
        raise UrlForbiddenError(
            f"Write an https URL of at most {MAX_URL} ASCII characters, without a user name, its host in Punycode and "
            "everything else percent-encoded."
        )
    host, port, rest = match[1].lower(), int(match[2] or 443), match[3] or ""
    if port not in rules.ports:
        raise UrlForbiddenError("The port is not one that this server asks: leave it out.")
    address = _address_of(host)
    if address is not None and not rules.allow(address):
        raise UrlForbiddenError("The host is not a public address.")
    target = rest.partition("#")[0]
    return Destination(host.strip("[]"), port, target if target.startswith("/") else f"/{target}", address)


def _address_of(host: str) -> Address | None:
    """The address that a host spells out; None for a name.

    Raises:
        UrlForbiddenError: neither.
    """
    labels = host.split(".")
    if not host.startswith("[") and not _NUMBER.fullmatch(labels[-1]) and all(map(_LABEL.fullmatch, labels)):
        return None
    try:
        return IPv6Address(host[1:-1]) if host.startswith("[") else IPv4Address(host)
    except ValueError:
        raise UrlForbiddenError("The host is neither a name nor an address in its usual spelling.") from None
