"""Hostile URLs of our own making: every way we know to name, embed, disguise or redirect to an address that is not
public. `python -m tests.fuzz.urls` prints them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address

PUBLIC_HOST = "guard.example"
PUBLIC_ADDRESS = "93.184.216.34"
INSIDE_4 = (
    "127.0.0.1",
    "127.255.255.254",
    "0.0.0.0",
    "10.0.0.1",
    "172.16.0.1",
    "172.31.255.255",
    "192.168.1.1",
    "169.254.169.254",  # metadata of most clouds
    "169.254.170.2",  # credentials of containers
    "100.100.100.200",  # metadata behind carrier-grade NAT
    "192.0.0.192",  # metadata in a range that `ipaddress` calls global
    "168.63.129.16",  # metadata at an address that is public elsewhere
    "198.18.0.1",
    "203.0.113.7",
    "224.0.0.1",
    "240.0.0.1",
    "255.255.255.255",
)
SPELLED = ("127.0.0.1", "169.254.169.254", "10.0.0.1", "192.168.1.1", "0.0.0.0", "100.100.100.200")
INSIDE_6 = (
    *("::1", "::", "fe80::1", "fec0::1", "fc00::1", "fd00:ec2::254", "fd20:ce::254", "ff02::1", "ff0e::1"),
    *("100::1", "2001:db8::1", "3fff::1", "5f00::1", "2001:2::1", "2001:10::1", "2001:20::1", "2620:4f:8000::1"),
)
EMBEDDED = ("127.0.0.1", "169.254.169.254", "10.0.0.1", "192.168.1.1")


@dataclass(frozen=True, slots=True)
class Hostile:
    """One of them. `inside`: the address that it is after; `answers`: what its host resolves to, if it is a name."""

    kind: str
    url: str
    inside: str
    answers: tuple[str, ...] = ()


def corpus(port: int = 443) -> list[Hostile]:
    """All of them, on a port; each once."""
    suffix = "" if port == 443 else f":{port}"
    found = [
        *_spelled(suffix),
        *_embedded(suffix),
        *_named(suffix),
        *_disguised(suffix),
        *_ports(),
        *_schemes(suffix),
        *_characters(suffix),
    ]
    return list({hostile.url: hostile for hostile in found}.values())


def _spelled(suffix: str) -> Iterator[Hostile]:
    """IPv4 as one number, as two or three, in octal, hexadecimal, and digits that look like others."""
    for address in INSIDE_4:
        yield Hostile("plain", f"https://{address}{suffix}/", address)
    for address in SPELLED:
        a, b, c, d = IPv4Address(address).packed
        whole = int(IPv4Address(address))
        hosts = [
            *(f"{whole}", f"{whole:#x}", f"{whole:#X}", f"0{whole:o}", f"{whole + 2**32}"),
            *(f"{a}.{whole & 0xFFFFFF}", f"{a}.{b}.{whole & 0xFFFF}", f"{a:#x}.{whole & 0xFFFFFF:#x}"),
            *(f"0{a:o}.0{b:o}.0{c:o}.0{d:o}", f"000{a:o}.{b}.{c}.{d}", f"{a:#x}.{b:#x}.{c:#x}.{d:#x}"),
            *(f"{a:03}.{b:03}.{c:03}.{d:03}", f"{a + 256}.{b}.{c}.{d}", f"{a:#x}.0{b:o}.{c}.{d}", f"{address}."),
            *(_shifted(address, 0xFF10), address.replace(".", "。"), address.replace(".", "．")),
            *(_circled(address), "".join(f"%{ord(sign):02x}" for sign in address), f".{address}", f"{a}.{b}.{c}.{d}.."),
        ]
        for host in hosts:
            yield Hostile("spelled", f"https://{host}{suffix}/", address)


def _embedded(suffix: str) -> Iterator[Hostile]:
    """IPv6 that is not public, and IPv6 in which an IPv4 address travels."""
    for address in INSIDE_6:
        yield Hostile("plain6", f"https://[{address}]{suffix}/", address)
        yield Hostile("plain6", f"https://[{IPv6Address(address).exploded.upper()}]{suffix}/", address)
    for scoped in ("fe80::1%eth0", "fe80::1%25eth0", "::1%1", "2606:4700::1%25lo"):
        yield Hostile("scoped", f"https://[{scoped}]{suffix}/", "fe80::1")
    for address in EMBEDDED:
        high, low = f"{int(IPv4Address(address)) >> 16:x}", f"{int(IPv4Address(address)) & 0xFFFF:x}"
        flipped = int(IPv4Address(address)) ^ 0xFFFFFFFF
        for host in (
            *(f"::ffff:{address}", f"::ffff:{high}:{low}", f"::ffff:0:{high}:{low}", f"::{address}", f"::{high}:{low}"),
            *(f"64:ff9b::{address}", f"64:ff9b::{high}:{low}", f"64:ff9b:1::{high}:{low}", f"2002:{high}:{low}::"),
            *(f"2002:{high}:{low}::1", f"2001:0:4136:e378:8000:63bf:{flipped >> 16:x}:{flipped & 0xFFFF:x}"),
            *(f"fe80::5efe:{high}:{low}", f"0:0:0:0:0:ffff:{high}:{low}"),
        ):
            yield Hostile("embedded", f"https://[{host}]{suffix}/", str(IPv6Address(host)))


def _named(suffix: str) -> Iterator[Hostile]:
    """Names that resolve inside, alone or among public addresses."""
    inside = (*INSIDE_4, *INSIDE_6, "::ffff:127.0.0.1", "::127.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::")
    for number, address in enumerate(inside):
        host = f"n{number}.{PUBLIC_HOST}"
        yield Hostile("named", f"https://{host}{suffix}/", address, (address,))
        yield Hostile("named", f"https://a{host}{suffix}/", address, (PUBLIC_ADDRESS, address))
        yield Hostile("named", f"https://z{host}{suffix}/", address, (address, PUBLIC_ADDRESS))
    for host in ("localhost", "ip6-localhost", "metadata.google.internal", "127.0.0.1.nip.io", "LOCALHOST", "x_y"):
        yield Hostile("named", f"https://{host}{suffix}/", "127.0.0.1", ("127.0.0.1",))


def _disguised(suffix: str) -> Iterator[Hostile]:
    """Authorities that parsers read differently."""
    for inside in ("127.0.0.1", "[::1]", "169.254.169.254"):
        for authority in (
            *(f"{PUBLIC_HOST}@{inside}{suffix}", f"{PUBLIC_HOST}:443@{inside}{suffix}", f"{PUBLIC_HOST}%40{inside}"),
            *(f"@{inside}{suffix}", f":@{inside}{suffix}", f"a:b@{inside}{suffix}", f"a@b@{inside}{suffix}"),
            *(f"{inside}{suffix}\\@{PUBLIC_HOST}", f"{PUBLIC_HOST}\\@{inside}{suffix}", f"{inside}\\.{PUBLIC_HOST}"),
            *(
                f"{inside}{suffix} {PUBLIC_HOST}",
                f"{inside}{suffix}\t.{PUBLIC_HOST}",
                f"{inside}{suffix}&@{PUBLIC_HOST}",
            ),
            *(f"{inside}{suffix};{PUBLIC_HOST}", f"{inside}%00.{PUBLIC_HOST}", f"{inside}%2f.{PUBLIC_HOST}"),
            *(f"{inside},{PUBLIC_HOST}", f"{inside}:443:80", f"[{PUBLIC_HOST}]@{inside}", f"{inside}%09{suffix}"),
        ):
            yield Hostile("disguised", f"https://{authority}/", inside.strip("[]"))


def _ports() -> Iterator[Hostile]:
    """Other services than https, and ports that are none."""
    for port in ("0", "22", "25", "53", "80", "2375", "5432", "6379", "8080", "9200", "11211", "65535", "65536"):
        yield Hostile("port", f"https://p.{PUBLIC_HOST}:{port}/", "127.0.0.1", ("127.0.0.1",))
    for port in ("99999999999", "-1", "+443", "443 ", " 443", "4 43", "0x1bb", "44３", "443a", "443:443", "%34%34%33"):
        yield Hostile("port", f"https://127.0.0.1:{port}/", "127.0.0.1")


def _schemes(suffix: str) -> Iterator[Hostile]:
    """Other schemes, and https that is not quite spelled out."""
    schemes = ("http", "ftp", "file", "gopher", "dict", "ldap", "tftp", "ws", "wss", "jar", "netdoc", "unix", "httpss")
    for scheme in (*schemes, "https+http", "view-source:https", "url:https", "HTTP", "h\nttps", "\u017fhttps"):
        yield Hostile("scheme", f"{scheme}://127.0.0.1{suffix}/", "127.0.0.1")
    for start in (
        "",
        "//",
        "///",
        "https:",
        "https:/",
        "https:///",
        "https:////",
        "https:\\\\",
        "https:/\\",
        "https//",
    ):
        yield Hostile("scheme", f"{start}127.0.0.1{suffix}/", "127.0.0.1")
    for text in (
        "data:image/png;base64,AAAA",
        "file:///etc/passwd",
        "javascript:0",
        "about:blank",
        "https://",
        "https://:443/",
    ):
        yield Hostile("scheme", text, "127.0.0.1")


def _characters(suffix: str) -> Iterator[Hostile]:
    """White space, control characters and letters that normalize to others."""
    for sign in (
        "\0",
        "\t",
        "\n",
        "\r\n",
        "\x0b",
        "\x7f",
        "\x85",
        "\u00a0",
        "\u2028",
        "\u200b",
        "\u00ad",
        "\ufeff",
        "\u202e",
    ):
        yield Hostile("character", f"https://127.0.0.1{sign}{suffix}/", "127.0.0.1")
        yield Hostile("character", f"{sign}https://127.0.0.1{suffix}/", "127.0.0.1")
        yield Hostile("character", f"https://local{sign}host{suffix}/", "127.0.0.1")
    for host in (
        "ⓛⓞⓒⓐⓛⓗⓞⓢⓣ",
        "ｌｏｃａｌｈｏｓｔ",
        "localho\u017ft",
        "LOCALHO\u1e9e",
        "xn--localhost.",
        "loc\u0430lhost",
    ):
        yield Hostile("character", f"https://{host}{suffix}/", "127.0.0.1", ("127.0.0.1",))
    yield Hostile("character", f"https://127.0.0.1{suffix}/\r\nHost: {PUBLIC_HOST}", "127.0.0.1")
    yield Hostile("character", f"https://127.0.0.1{suffix}/{'a' * 5000}", "127.0.0.1")


def _shifted(text: str, zero: int) -> str:
    return "".join(chr(zero + int(sign)) if sign.isdecimal() else sign for sign in text)


def _circled(text: str) -> str:
    return "".join("⓪①②③④⑤⑥⑦⑧⑨"[int(sign)] if sign.isdecimal() else sign for sign in text)


if __name__ == "__main__":
    for entry in corpus():
        print(f"{entry.kind:10} {ip_address(entry.inside)!s:40} {entry.url!a}")
