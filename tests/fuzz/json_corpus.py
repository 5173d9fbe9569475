"""JSON texts that parsers disagree about, made by rule: what is JSON, what is not, and what RFC 8259 leaves open.

y   JSON: may be refused for its meaning, never as malformed
n   not JSON: always `malformed_json` or `json_too_complex`
i   left to the implementation (numbers out of range, depth): anything but a server error
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["y", "n", "i"]


@dataclass(frozen=True, slots=True)
class Case:
    verdict: Verdict
    name: str
    raw: bytes


def cases() -> Iterator[Case]:
    """All of them, each once."""
    seen: set[bytes] = set()
    for maker in (_numbers, _strings, _escapes, _bytes, _structures, _literals, _spaces, _depths, _mutations):
        for case in maker():
            if case.raw not in seen:
                seen.add(case.raw)
                yield case


def _numbers() -> Iterator[Case]:
    good = (
        "0 -0 1 -1 10 1.5 -1.5 0.1 1e1 1E1 1e+1 1e-1 0e0 0e+1 1.0e10 123.456e-7 9007199254740993 18446744073709551615"
    )
    bad = (
        "01 -01 00 -00 1. .1 -.1 -.5 - + +1 ++1 -+1 --1 1e 1e+ 1e- 1ee1 1e1.5 1.e1 0x1 0X1 1_000 1,000 1.2.3 0b1 0o7 "
        "Infinity -Infinity NaN -NaN nan inf 1f 1d 1L ١ １ 1\u00a00 2.e+3 0.e1 0e 0E+ 1eE2 1 000 -2. -1x 1/2 (1) 1%"
    )
    loose = "1e999 -1e999 1e-999 1e309 18446744073709551616 -9223372036854775809 1" + "0" * 400
    yield from (Case("y", f"number {text}", text.encode()) for text in good.split())
    yield from (Case("n", f"number {text}", text.encode()) for text in bad.split(" "))
    yield from (Case("i", f"number {text[:24]}", text.encode()) for text in loose.split())
    yield Case("i", "number of 10,000 digits", b"1" * 10_000)
    yield Case("i", "fraction of 10,000 digits", b"0." + b"1" * 10_000)
    yield Case("i", "exponent of 10,000 digits", b"1e" + b"1" * 10_000)


def _strings() -> Iterator[Case]:
    for text in (
        "",
        "a",
        "é",
        "日本",
        "😀",
        "\u200d",
        "\ufeff",
        "\u2028\u2029",
        "\x7f",
        "a" * 10_000,
        "/",
        "'",
        "\u0600",
    ):
        yield Case("y", f"string {text[:8]!a}", f'"{text}"'.encode())
    for code in range(0x20):
        yield Case("n", f"raw control {code:#04x}", b'"' + bytes([code]) + b'"')
    for text in ('"', '"a', "a", "a'", "'a'", "`a`", '"a" "b"', '"a"b', '"a\\"', '"\\', "“a”", '"a" + "b"', '"""a"""'):
        yield Case("n", f"no string {text!a}", text.encode())


def _escapes() -> Iterator[Case]:
    for letter in '"\\/bfnrt':
        yield Case("y", f"escape {letter}", f'"\\{letter}"'.encode())
    for letter in "acdeghijklmopqsvwxyz0123456789' \u00e9\n\t\0UN":
        yield Case("n", f"escape {letter!a}", f'"\\{letter}"'.encode())
    for text in ("0041", "00e9", "FFFF", "fdd0", "0000", "2028", "D83D\\uDE00", "dbff\\udfff", "200B"):
        yield Case("y", f"escape u{text}", f'"\\u{text}"'.encode())
    for text in ("", "1", "12", "123", "00g0", "+041", "-041", " 041", "０041", "{41}", "x041"):
        yield Case("n", f"escape u{text}", f'"\\u{text}"'.encode())
    # RFC 8259 allows lone surrogates in the grammar; no UTF-8 can hold them, so they are refused as malformed.
    for text in ("D800", "DFFF", "D800\\u0041", "DE00\\uD83D", "D800\\uD800", "d83dx", "DBFF\\uDBFF\\uDFFF"):
        yield Case("n", f"lone surrogate u{text}", f'"\\u{text}"'.encode())


def _bytes() -> Iterator[Case]:
    broken = (
        b"\x80 \xbf \xc0\x80 \xc1\xbf \xc3 \xe0\x80\x80 \xe2\x82 \xed\xa0\x80 \xed\xbf\xbf \xf0\x80\x80\x80 "
        b"\xf0\x9f\x98 \xf4\x90\x80\x80 \xf5\x80\x80\x80 \xf8\x88\x80\x80\x80 \xfe \xff \xc3\x28"
    )
    for raw in broken.split(b" "):
        yield Case("n", f"bytes {raw.hex()} in a string", b'"' + raw + b'"')
        yield Case("n", f"bytes {raw.hex()}", raw)
    for name in ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-8-sig", "cp037"):
        raw = '{"prompt": "é+"}'.encode(name)
        yield Case("n", f"in {name}", raw)
    yield Case("n", "nothing", b"")
    yield Case("n", "zero bytes", b"\0" * 8)
    yield Case("n", "zero at the end", b"{}\0")
    yield Case("n", "gzip", b"\x1f\x8b\x08\0\0\0\0\0\0\x03\xab\xae\x05\0")


def _structures() -> Iterator[Case]:
    good = (
        "{}",
        "[]",
        "[1,2]",
        '{"a":1}',
        '{"":0}',
        '{"a":1,"a":2}',
        "[[],{}]",
        '[{"a":[]}]',
        "[null]",
        '{"\\u0061":1}',
    )
    bad = (
        '{ } [ ] [1 {1} [,] [1,] [,1] [1,,2] [1;2] [1:2] {,} {} {} {a:1} {\'a\':1} {1:1} {null:1} {"a"} {"a":} {:1} '
        '{"a":1,} {,"a":1} {"a":1,,"b":2} {"a"::1} {"a"=1} {"a":1;"b":2} {"a":1]} [{"a":1] ["a":1] [1]] {}} ]{ }{ [)'
    )
    more = ('{"a" 1}', '{"a":1 "b":2}', "[1 2]", '["a" "b"]', "{} {}", "[] []", "{}x", "x{}", "[1]2", '{"a":1}#', "1 2")
    more += (
        "{}//",
        "/**/{}",
        "{}/**/",
        "// {}",
        "# {}",
        '{"a":/**/1}',
        "--\n{}",
        "<a/>",
        "a: 1",
        "{}\n{}",
        ")]}',\n{}",
    )
    yield from (Case("y", f"structure {text}", text.encode()) for text in good)
    for text in [word for word in bad.split(" ") if word != "{}"] + list(more):
        yield Case("n", f"structure {text!a}", text.encode())


def _literals() -> Iterator[Case]:
    yield from (Case("y", text, text.encode()) for text in ("true", "false", "null"))
    wrong = (
        "True FALSE Null tru fals nul truee nulll undefined None yes no on off nil void truefalse t f n ture "
        "#t @ $ & ? ! * . ..."
    )
    for text in wrong.split():
        yield Case("n", f"literal {text}", text.encode())
        yield Case("n", f"literal {text} in a list", f"[{text}]".encode())


def _spaces() -> Iterator[Case]:
    for space in (" ", "\t", "\n", "\r", "\r\n", " " * 5_000):
        yield Case("y", f"space {space[:4]!a}", f"{space}[{space}1{space},{space}2{space}]{space}".encode())
    for space in ("\f", "\v", "\u00a0", "\u2060", "\ufeff", "\u3000", "\u2028", "\x1f", "\x85", "\u200b"):
        yield Case("n", f"no space {space!a}", f"[1,{space}2]".encode())
        yield Case("n", f"no space {space!a} before", f"{space}[1]".encode())
        yield Case("n", f"no space {space!a} behind", f"[1]{space}".encode())


def _depths() -> Iterator[Case]:
    for depth in (31, 32, 33, 500, 1024, 5_000, 100_000):
        verdict: Verdict = "y" if depth <= 32 else "i"
        yield Case(verdict, f"{depth} lists", b"[" * depth + b"]" * depth)
        yield Case(verdict, f"{depth} objects", b'{"a":' * depth + b"1" + b"}" * depth)
        yield Case("n", f"{depth} open lists", b"[" * depth)
        yield Case("n", f"{depth} open objects", b'{"a":' * depth)


def _mutations() -> Iterator[Case]:
    """A good request with one byte taken out, or cut short, or doubled: JSON or not, never a server error."""
    good = b'{"prompt": "a \\u00e9", "width": 64, "guidance": 4.5, "metadata": {"k": "v"}, "references": [null]}'
    for place in range(len(good)):
        yield Case("n", f"cut at {place}", good[:place])
        yield Case("i", f"without byte {place}", good[:place] + good[place + 1 :])
        yield Case("i", f"byte {place} twice", good[:place] + good[place : place + 1] + good[place:])
        yield Case("i", f"byte {place} high", good[:place] + bytes([good[place] | 0x80]) + good[place + 1 :])
