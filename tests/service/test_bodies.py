"""Bodies in memory are bounded: for a tenant, for all, and until the job is accepted: over real sockets."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import threading
import tracemalloc
from contextlib import AbstractContextManager

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from service.callers.places import Room
from service.problems import Problem
from service.settings import GatewaySettings
from tests.service.conftest import Bench, picture
from tests.service.houses import House, OpenHouse
from tests.waiting import wait_for
from workers.tenants import SOLE_TENANT

MIB = 2**20
LONG = MIB // 2
"""Of a body: four fill a tenant's half of `ROOM`."""
ROOM = {"bodies_mib": 4, "max_body_bytes": MIB}
AMPLE = {"bodies_mib": 1024, "max_body_bytes": MIB}


def room_of(house: House) -> Room:
    return house.app.state.gateway.bodies


def long_heads(house: House, tenant: str, number: int) -> list[socket.socket]:
    """So many requests of which only the head has come; they have their room."""
    before = room_of(house).taken()
    peers = [house.half_sent(tenant, "/v1/customize", f"Content-Length: {LONG}") for _ in range(number)]
    wait_for(lambda: room_of(house).taken() == before + number * LONG, "the heads to be read")
    return peers


def refusal(peer: socket.socket) -> tuple[int, str, bool]:
    """Status, code and whether it says when to come again, of an answer to a head alone."""
    answer = b""
    while not answer.endswith(b"}"):
        answer += peer.recv(65536)
    head, body = answer.split(b"\r\n\r\n", 1)
    return int(head.split()[1]), json.loads(body)["code"], b"\r\nretry-after: " in head.lower()


@pytest.mark.parametrize("limits", [ROOM, AMPLE], ids=["full", "control: ample"])
def test_a_tenant_has_half(open_house: OpenHouse, limits: dict[str, int]) -> None:
    """Whose bodies fill its half is refused before it sends the next; another tenant is served, pictures that go to the
    disk are taken, and when one has gone there is room again.
    """
    house = open_house(**limits)
    peers = long_heads(house, "a", 4)
    if limits is AMPLE:
        long_heads(house, "a", 1)
        return
    more = house.half_sent("a", "/v1/customize", f"Content-Length: {LONG}")
    assert refusal(more) == (429, "too_many_requests", True)
    assert house.submit("b").status_code == 202
    uploaded = house.ask("a", "POST", "/v1/references", content=picture(), headers={"Content-Type": "image/png"})
    assert uploaded.status_code == 201
    peers[0].close()
    wait_for(lambda: house.submit("a").status_code == 202, "its room")
    assert room_of(house).taken() == 3 * LONG


def test_all_have_the_whole(open_house: OpenHouse) -> None:
    """Two tenants can fill it; a third is told to come again, and is served when one body has gone. Control: before,
    with half of it free, it is served.
    """
    house = open_house(**ROOM)
    long_heads(house, "a", 4)
    assert house.submit("c").status_code == 202
    peers = long_heads(house, "b", 4)
    refused = house.half_sent("c", "/v1/trainings", "Content-Length: 1")
    assert refusal(refused) == (503, "over_capacity", True)
    peers[0].close()
    wait_for(lambda: house.submit("c").status_code == 202, "room for the third")


@pytest.mark.parametrize(
    ("framing", "taken"),
    [
        ("Transfer-Encoding: chunked", MIB),
        ("Content-Length: 1000", 1000),
        (f"Content-Length: {'0' * 30}1000", 1000),
        (f"Content-Length: {'0' * 5000}", 0),
    ],
)
def test_what_a_head_announces(open_house: OpenHouse, framing: str, taken: int) -> None:
    """Unknown lengths count as the longest, and zeros in front do not make a body look shorter than it is."""
    house = open_house(**ROOM)
    peer = house.half_sent("a", "/v1/customize", framing)
    if taken:
        wait_for(lambda: room_of(house).taken() == taken, "the head to be read")
    else:
        assert refusal(peer)[0] == 400, "there is no body to wait for"


@pytest.mark.parametrize("length", [MIB + 1, 10**30, f"{'0' * 30}{MIB + 1}"], ids=["too long", "absurd", "zeros"])
def test_a_body_that_is_too_long_stays_so(open_house: OpenHouse, length: int | str) -> None:
    """To come again with it later would not help: it is never 429, however full the room is."""
    house = open_house(**ROOM)
    long_heads(house, "a", 4)
    status, _, again = refusal(house.half_sent("a", "/v1/customize", f"Content-Length: {length}"))
    assert (status, again) == (400 if length == 10**30 else 413, False)  # llhttp counts to 2**64


def test_room_is_held_until_the_job_is_accepted(open_house: OpenHouse) -> None:
    """A body that has come and waits for its turn still counts; its answer gives it back."""
    house = open_house(**ROOM, admissions=1)
    assert house.ask("b", "GET", "/livez").status_code == 200
    turns, gate, body = house.app.state.gateway.decoding, threading.Event(), b'{"prompt": "a toy"}' + b" " * LONG
    answers: list[httpx2.Response] = []

    def submit() -> None:
        headers = {"Content-Type": "application/json"}
        answers.append(house.ask("b", "POST", "/v1/customize", content=body, headers=headers))

    thread = threading.Thread(target=submit)
    try:
        loop = house.gate.server.servers[0].get_loop()
        asyncio.run_coroutine_threadsafe(turns.run("a", lambda: gate.wait(120)), loop)
        wait_for(lambda: turns.free == 0, "the place to be taken")
        thread.start()
        wait_for(lambda: turns.waiting("b") == 1, "the body to come")
        assert room_of(house).taken() == len(body) and not answers
    finally:
        gate.set()
    thread.join(60)
    assert answers[0].status_code == 202 and room_of(house).taken() == 0


def test_who_waits_for_a_job_keeps_no_body(open_house: OpenHouse, bench: Bench) -> None:
    """`Prefer: wait` holds an answer back for a minute, and not the body with it. Control: the body had been there."""
    house = open_house()
    body = b'{"prompt": "a toy"}' + b" " * (16 * MIB)
    peer = house.half_sent("a", "/v1/customize", f"Prefer: wait=60\r\nContent-Length: {len(body)}")
    wait_for(lambda: room_of(house).taken() == len(body), "the head to be read")
    tracemalloc.start(1)
    try:
        peer.sendall(body)
        wait_for(lambda: house.app.state.gateway.watcher.watching == 1, "the caller to wait")
        assert room_of(house).taken() == 0
        wait_for(lambda: tracemalloc.get_traced_memory()[0] < 4 * MIB, "the body to be let go of", 20)
        assert tracemalloc.get_traced_memory()[1] > len(body)
    finally:
        tracemalloc.stop()
    bench.ledger.cancel(house.ask("a", "GET", "/v1/jobs").json()["jobs"][0]["id"])
    assert b"canceled" in peer.recv(65536)


@given(st.lists(st.tuples(st.sampled_from(["a", "b", SOLE_TENANT]), st.integers(0, 60)), max_size=40), st.randoms())
def test_room_adds_up(wishes: list[tuple[str, int]], order: random.Random) -> None:
    """Never more than there is, never more than half for a tenant with a name; who fits is let in; in whatever order
    they go, nothing is left behind.
    """
    room, inside = Room(100), list[tuple[str, int, AbstractContextManager[None]]]()
    for tenant, size in wishes:
        if inside and order.random() < 0.4:
            inside.pop(order.randrange(len(inside)))[2].__exit__(None, None, None)
        own = sum(other for name, other, _ in inside if name == tenant)
        fits = room.taken() + size <= 100 and (tenant == SOLE_TENANT or own + size <= 50)
        holding = room.take(tenant, size)
        try:
            holding.__enter__()
        except Problem as problem:
            half = tenant != SOLE_TENANT and own + size > 50
            assert not fits and problem.details.code == ("too_many_requests" if half else "over_capacity")
        else:
            assert fits
            inside.append((tenant, size, holding))
        assert room.taken() == sum(size for _, size, _ in inside)
    for _, _, holding in inside:
        holding.__exit__(None, None, None)
    assert room.taken() == 0


def test_too_little_room_is_no_setting() -> None:
    """With less than two of the longest bodies, one that is not too long would never be let in."""
    with pytest.raises(ValidationError) as refused:
        GatewaySettings(max_body_bytes=3 * MIB, bodies_mib=5)
    assert [error["loc"] for error in refused.value.errors()] == [("bodies_mib",)]
    with pytest.raises(ValidationError):
        GatewaySettings(max_body_bytes=257 * MIB)
    assert GatewaySettings(max_body_bytes=3 * MIB, bodies_mib=6).bodies_mib == 6
