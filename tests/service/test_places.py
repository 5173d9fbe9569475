"""What one tenant has in hand at a gateway is bounded, and the others never notice: over real sockets."""

from __future__ import annotations

import threading
from contextlib import ExitStack

import httpx2
import pytest

from service.callers.places import Places
from service.problems import Problem
from tests.service.conftest import Bench, data_url, picture
from tests.service.houses import OpenHouse
from tests.waiting import wait_for
from workers.tenants import SOLE_TENANT

CAP = 3
SUBMISSIONS = ("/v1/customize", "/v1/references", "/v1/trainings")


def refused(answer: httpx2.Response) -> bool:
    """Whether it is the refusal of who has too much in hand."""
    if answer.status_code != 429:
        return False
    assert answer.json()["code"] == "too_many_requests" and answer.json()["retryable"] is True
    assert int(answer.headers["retry-after"]) >= 1
    return True


@pytest.mark.parametrize("path", SUBMISSIONS)
@pytest.mark.parametrize("cap", [CAP, CAP + 1], ids=["full", "control: one more"])
def test_bodies_that_do_not_end(open_house: OpenHouse, path: str, cap: int) -> None:
    """A tenant with as many unfinished bodies as it may is refused before it sends the next, whatever that is; another
    is served, and so is the first once one of them has ended.
    """
    house = open_house(tenant_submissions=cap)
    peers = [house.half_sent("a", path) for _ in range(CAP)]
    wait_for(lambda: house.app.state.gateway.submissions.taken("a") == CAP, "the bodies to begin")
    assert refused(house.submit("a")) == (cap == CAP)
    assert refused(
        house.ask("a", "POST", "/v1/references", content=picture(), headers={"Content-Type": "image/png"})
    ) == (cap == CAP)
    assert house.submit("b").status_code == 202
    assert house.ask("a", "GET", "/v1/jobs").status_code == 200, "what has no body is answered"
    peers[0].close()
    wait_for(lambda: house.submit("a").status_code == 202, "its place")


@pytest.mark.parametrize("cap", [CAP, CAP + 1], ids=["full", "control: one more"])
def test_streams(open_house: OpenHouse, bench: Bench, cap: int) -> None:
    """A tenant follows as much as it may at a time. A stream that ends, or whose reader has gone, makes room."""
    house = open_house(tenant_streams=cap)
    jobs = {tenant: house.submit(tenant).json()["id"] for tenant in "ab"}
    with ExitStack() as stack:

        def follow(tenant: str) -> httpx2.Response:
            url = f"{house.gate.url}/v1/jobs/{jobs[tenant]}/events"
            return stack.enter_context(httpx2.stream("GET", url, headers=house.keys[tenant], timeout=240))

        streams = [follow("a") for _ in range(CAP)]
        assert [stream.status_code for stream in streams] == [200] * CAP
        if cap == CAP:
            assert refused(house.ask("a", "GET", f"/v1/jobs/{jobs['a']}/events"))
        else:
            assert follow("a").status_code == 200
        assert follow("b").status_code == 200
        streams[0].close()
        wait_for(lambda: follow("a").status_code == 200, "the place of the one who has gone")
        bench.ledger.cancel(jobs["a"])
        bench.ledger.cancel(jobs["b"])
        places = house.app.state.gateway.streams
        wait_for(lambda: places.taken("a") == places.taken("b") == 0, "the places of those that have ended")


def test_who_waits_for_too_much_is_answered_at_once(open_house: OpenHouse, bench: Bench) -> None:
    """A long poll beyond the cap is a plain one, with a hint when to come again, and a submission is accepted without
    being waited for; another tenant waits as ever. Control: below the cap the same caller waits.
    """
    house = open_house(tenant_waits=CAP)
    jobs = {tenant: house.submit(tenant).json()["id"] for tenant in "ab"}
    done: list[tuple[str, httpx2.Response]] = []

    def wait(tenant: str) -> threading.Thread:
        path = f"/v1/jobs/{jobs[tenant]}?wait=60"
        thread = threading.Thread(target=lambda: done.append((tenant, house.ask(tenant, "GET", path))))
        thread.start()
        return thread

    watcher = house.app.state.gateway.watcher
    threads = [wait("a") for _ in range(CAP)]
    wait_for(lambda: watcher.watching == CAP, "those who may wait")
    assert done == [], "the control: they do wait"
    threads.append(wait("b"))
    wait_for(lambda: watcher.watching == CAP + 1, "the other tenant to wait")
    answer = house.ask("a", "GET", f"/v1/jobs/{jobs['a']}?wait=60")
    assert (answer.status_code, answer.json()["status"]) == (200, "queued")
    assert int(answer.headers["retry-after"]) >= 1
    known = {"If-None-Match": answer.headers["etag"]}
    again = house.ask("a", "GET", f"/v1/jobs/{jobs['a']}?wait=60", headers=known)
    assert (again.status_code, again.content) == (304, b"") and int(again.headers["retry-after"]) >= 1
    body = {"prompt": "a toy", "references": [{"image": data_url(picture()), "role": "subject"}]}
    accepted = house.ask("a", "POST", "/v1/customize", json=body, headers={"Prefer": "wait=60"})
    assert accepted.status_code == 202 and "preference-applied" not in accepted.headers
    for job in jobs.values():
        bench.ledger.cancel(job)
    for thread in threads:
        thread.join(60)
    assert sorted((tenant, answer.json()["status"]) for tenant, answer in done) == [("a", "canceled")] * CAP + [
        ("b", "canceled")
    ]
    assert house.app.state.gateway.waits.taken("a") == 0


def test_the_operator_has_no_cap() -> None:
    """Who is alone takes nothing from anybody: `default`, that of a service without keys, has no bound, as in shares.
    Control: any other name has.
    """
    places = Places(1)
    with places.take(SOLE_TENANT), places.take(SOLE_TENANT), places.take("a"):
        with pytest.raises(Problem), places.take("a"):
            pass
        assert places.full("a") and not places.full("b")
    assert not places.full("a")
