"""What takes a while at a gateway is done for one tenant after the other, and no place for it is ever lost."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, ExitStack
from dataclasses import dataclass, field
from functools import partial

import anyio
import httpx2
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from service.callers.turns import Turns
from tests.service.houses import OpenHouse
from tests.waiting import wait_for

FLOOD = 32
Take = Callable[[str], AbstractAsyncContextManager[object]]


@dataclass
class Crowd:
    """Those who take places and keep them until they are let go."""

    take: Take
    entered: list[str] = field(default_factory=list[str])
    inside: dict[asyncio.Event, str] = field(default_factory=dict[asyncio.Event, str])
    tasks: list[asyncio.Task[None]] = field(default_factory=list[asyncio.Task[None]])

    def come(self, tenant: str) -> None:
        self.tasks.append(asyncio.create_task(self._stay(tenant)))

    def let_go(self) -> None:
        """Who has been inside for longest ends."""
        done = next(iter(self.inside))
        self.inside.pop(done)
        done.set()

    async def _stay(self, tenant: str) -> None:
        async with self.take(tenant):
            self.entered.append(tenant)
            done = asyncio.Event()
            self.inside[done] = tenant
            try:
                await done.wait()
            finally:
                self.inside.pop(done, None)


async def settled() -> None:
    """Whatever can go on has gone on: each step here wakes the next one at most a few turns of the loop later."""
    for _ in range(12):
        await asyncio.sleep(0)


@pytest.mark.parametrize(("turns", "place"), [(True, 2), (False, FLOOD)], ids=["turns", "control: one line for all"])
def test_a_flood_is_two_ahead(turns: bool, place: int) -> None:
    """One who comes after 32 of another tenant gets the first place that comes free, not the last."""

    async def order() -> list[str]:
        limiter = anyio.CapacityLimiter(2)
        crowd = Crowd(Turns(2).take if turns else lambda _: limiter)
        for _ in range(FLOOD):
            crowd.come("a")
        await settled()
        assert crowd.entered == ["a", "a"], "who is alone has both"
        crowd.come("b")
        while len(crowd.entered) <= FLOOD:
            await settled()
            crowd.let_go()
            await settled()
        return crowd.entered

    assert asyncio.run(order()).index("b") == place


def test_tenants_go_round() -> None:
    """With one place, who was served longest ago is next, however many of the others came before."""

    async def order() -> str:
        crowd = Crowd(Turns(1).take)
        for tenant in "xaaabbbccc":
            crowd.come(tenant)
        await settled()
        while crowd.inside:
            crowd.let_go()
            await settled()
        return "".join(crowd.entered)

    assert asyncio.run(order()) == "xabcabcabc"


@given(st.integers(1, 5), st.lists(st.sampled_from("abcd"), min_size=1, max_size=40))
def test_places_are_shared_evenly(places: int, arrivals: list[str]) -> None:
    """Whatever came first: when the places have gone round, no tenant in line has less than another has in hand, by
    more than one; and none is free while somebody waits.
    """

    async def share() -> None:
        turns = Turns(places)
        crowd = Crowd(turns.take)
        for tenant in arrivals:
            crowd.come(tenant)
        await settled()
        for _ in range(places):
            if crowd.inside:
                crowd.let_go()
            await settled()
        waiting = {tenant for tenant in arrivals if arrivals.count(tenant) > crowd.entered.count(tenant)}
        inside = list(crowd.inside.values())
        assert turns.free == 0 or not waiting
        assert all(inside.count(other) - inside.count(tenant) <= 1 for tenant in waiting for other in inside)
        for task in crowd.tasks:
            task.cancel()
        await asyncio.gather(*crowd.tasks, return_exceptions=True)
        assert turns.free == places

    asyncio.run(share())


@st.composite
def _stories(draw: st.DrawFn) -> list[tuple[str, int | str]]:
    come = st.tuples(st.just("come"), st.sampled_from("abc"))
    cancel = st.tuples(st.just("cancel"), st.integers(0, 30))
    others = st.tuples(st.sampled_from(["end", "turn of the loop"]), st.just(0))
    return draw(st.lists(st.one_of(come, cancel, others), max_size=60))


@given(st.integers(1, 3), _stories())
@example(1, [("come", "a")] * 3 + [("turn of the loop", 0), ("cancel", 1), ("end", 0)])
@example(1, [("come", "a"), ("come", "b"), ("turn of the loop", 0), ("end", 0), ("turn of the loop", 0), ("cancel", 1)])
def test_nobody_is_forgotten(places: int, story: list[tuple[str, int | str]]) -> None:
    """Callers come, end and are cancelled anywhere, also between being let in and hearing of it. Whoever was not
    cancelled gets in, never more than there are places for, and then every place is free again.
    """

    async def play() -> None:
        turns = Turns(places)
        crowd = Crowd(turns.take)
        cancelled: set[asyncio.Task[None]] = set()
        for step, value in story:
            if step == "come":
                crowd.come(str(value))
            elif step == "cancel" and crowd.tasks:
                task = crowd.tasks[int(value) % len(crowd.tasks)]
                task.cancel()
                cancelled.add(task)
            elif step == "end" and crowd.inside:
                crowd.let_go()
            else:
                await asyncio.sleep(0)
            assert len(crowd.inside) <= places and turns.free >= 0
        await settled()
        while crowd.inside:
            crowd.let_go()
            await settled()
        assert [task for task in crowd.tasks if not task.done()] == [], "they wait for ever"
        assert all(task in cancelled for task in crowd.tasks if task.cancelled())
        assert turns.free == places

    asyncio.run(play())


def test_a_place_is_held_until_its_thread_ends() -> None:
    """Who goes away leaves work that cannot be stopped: its place is free when it has ended, not before."""

    async def play() -> None:
        turns, begun, gate = Turns(1), threading.Event(), threading.Event()

        def work() -> None:
            begun.set()
            assert gate.wait(60)

        async def go_away() -> None:
            with anyio.CancelScope() as scope:  # as the server's task groups cancel
                leaving.append(scope)
                await turns.run("a", work)

        leaving: list[anyio.CancelScope] = []
        first = asyncio.create_task(go_away())
        assert await asyncio.to_thread(begun.wait, 60)
        leaving[0].cancel()
        second = asyncio.create_task(turns.run("b", lambda: 7))
        await settled()
        assert turns.free == 0 and not second.done()
        gate.set()
        assert await second == 7
        await first
        assert turns.free == 1

    asyncio.run(play())


def test_a_flood_holds_no_other_tenant_up(open_house: OpenHouse) -> None:
    """While slow admissions of one tenant fill both places and a line behind them, another's job is accepted as soon
    as one place is free. Control: the first tenant's next one is not.
    """
    house = open_house(admissions=2, tenant_submissions=FLOOD)
    assert house.ask("b", "GET", "/livez").status_code == 200
    loop = house.gate.server.servers[0].get_loop()
    turns: Turns = house.app.state.gateway.decoding
    gates = [threading.Event() for _ in range(FLOOD)]
    begun: list[int] = []
    answers: dict[str, httpx2.Response] = {}

    def work(number: int) -> None:
        begun.append(number)
        assert gates[number].wait(120)

    def submit(tenant: str) -> None:
        answers[tenant] = house.submit(tenant)

    with ExitStack() as stack:
        stack.callback(lambda: [gate.set() for gate in gates])
        for number in range(FLOOD):
            asyncio.run_coroutine_threadsafe(turns.run("a", partial(work, number)), loop)
        wait_for(lambda: len(begun) == 2, "both places to be taken")
        threads = [threading.Thread(target=submit, args=tenant) for tenant in "ab"]
        for thread in threads:
            thread.start()
        wait_for(lambda: (turns.waiting("a"), turns.waiting("b")) == (FLOOD - 1, 1), "both submissions to wait")
        gates[begun[0]].set()
        wait_for(lambda: "b" in answers, "the other tenant's answer")
        assert answers["b"].status_code == 202 and "a" not in answers
    for thread in threads:
        thread.join(60)
    assert answers["a"].status_code == 202 and turns.free == 2
