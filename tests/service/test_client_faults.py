"""Both clients where something is lost, late, full or wrong: what is tried again, what is not, and what is said."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2
import pytest

from service.app import create_app
from service.client import (
    AdapterUse,
    BusyError,
    DamagedImageError,
    DreamserveError,
    GoneError,
    InvalidRequestError,
    JobTimeoutError,
    NoAnswerError,
    NotFoundError,
    Reference,
    RefusedError,
    UnauthenticatedError,
    UnexpectedAnswerError,
)
from tests.service.awaited import Connect
from tests.service.conftest import Bench, Open, picture, settings
from tests.service.gates import Gate, serve
from tests.service.lossy import Fault, Proxy, proxied
from tests.waiting import stop_child, wait_for
from workers.jobs import Progress
from workers.redis_process import start_redis


@pytest.fixture
def gate(open_gate: Open) -> Gate:
    return open_gate()


def refused(call: Callable[[], Any], kind: type[DreamserveError], code: str) -> Any:
    """The error that a call raises, which is exactly of this kind."""
    with pytest.raises(kind) as caught:
        call()
    assert (type(caught.value), caught.value.code) == (kind, code)
    assert str(caught.value).endswith(f"({code})")
    return caught.value


@pytest.mark.parametrize("keep", [0, 1, 100, 900])
@pytest.mark.parametrize("abrupt", [False, True])
def test_a_lost_answer_makes_no_second_job(connect: Connect, gate: Gate, bench: Bench, keep: int, abrupt: bool) -> None:
    """The gateway accepts, and its answer is lost twice, before or within it: the third brings the one job there is."""
    with proxied(gate.address, lambda number: Fault(keep, abrupt) if number < 2 else None) as proxy:
        job = connect(proxy.url).customize("a toy", seed=3)
    assert len(proxy.began) == 3
    assert [record.job.id for record in bench.ledger.list()[0]] == [job.id]


def test_without_a_key_a_lost_answer_makes_two(gate: Gate, bench: Bench) -> None:
    """The control: the proxy loses what the gateway has accepted, and only the key makes that harmless."""
    with proxied(gate.address, lambda number: Fault(0) if number == 0 else None) as proxy:
        for _ in range(2):
            try:
                httpx2.post(f"{proxy.url}/v1/customize", json={"prompt": "a toy"})
            except httpx2.TransportError:
                continue
    assert len(bench.ledger.list()[0]) == 2


def test_a_deletion_whose_answer_is_lost_is_done(connect: Connect, gate: Gate) -> None:
    """What the second try does not find any more, the first has deleted; who deletes twice is told."""
    with proxied(gate.address, lambda number: Fault(0) if number in (2, 4) else None) as proxy:
        client = connect(proxy.url)
        job = client.customize("a").cancel()
        job.delete()
        client.delete_reference(connect(gate.url).upload(picture()).id)
    assert len(proxy.began) == 6
    refused(job.delete, GoneError, "job_gone")


def test_a_connection_that_was_kept_too_long(connect: Connect, gate: Gate) -> None:
    """A server that hangs up between two calls is none of the caller's business."""
    with proxied(gate.address, lambda number: Fault(0, abrupt=True) if number % 2 else None) as proxy:
        client = connect(proxy.url)
        assert [client.models()[0].name for _ in range(4)] == ["unit"] * 4


def test_an_answer_that_never_comes(connect: Connect) -> None:
    """A silent host is given up after `timeout`, tried again for `retry_for`, and then said to be silent."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        began = time.monotonic()
        error = refused(connect(url, timeout=0.2, retry_for=0.6).models, NoAnswerError, "no_answer")
        assert time.monotonic() - began >= 0.4, "one try is not enough"
    assert error.retryable and error.request_id.startswith("req_")


@contextmanager
def _running(server: ThreadingHTTPServer) -> Generator[str]:
    """The server's address while it runs in a thread."""
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()


class _Fading(ThreadingHTTPServer):
    """Answers its first question with `known`, and no other."""

    def __init__(self, known: bytes) -> None:
        super().__init__(("127.0.0.1", 0), _Fade)
        self.known = known
        self.asked = 0
        self.over = threading.Event()

    def shutdown(self) -> None:
        self.over.set()
        super().shutdown()


class _Fade(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, _Fading)
        self.server.asked += 1
        if self.server.asked > 1:
            self.server.over.wait(100)
            return
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.server.known)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.mark.parametrize("retry_for", [0.0, 80.0])
@pytest.mark.parametrize(
    ("path", "body"), [("customize", {"prompt": "a"}), ("trainings", {"recipe": "sticker-adapter"})]
)
def test_a_wait_ends_in_time_though_nobody_answers(
    connect: Connect, gate: Gate, path: str, body: dict[str, str], retry_for: float
) -> None:
    """A service that falls silent does not hold a wait for longer than was asked for, and the job is said to go on."""
    known = httpx2.post(f"{gate.url}/v1/{path}", json=body).content
    with _Fading(known) as server, _running(server) as url:
        client = connect(url, timeout=60.0, retry_for=retry_for)
        job = client.job("j") if path == "customize" else client.training("t")
        began = time.monotonic()
        error = refused(lambda: job.wait(1.0), JobTimeoutError, "job_timeout")
        assert 1.0 <= time.monotonic() - began < 30
        assert error.job.id == job.id


def test_a_wait_ends_in_time_while_answers_are_lost(connect: Connect, gate: Gate) -> None:
    """Tries within a wait end with it."""
    job = connect(gate.url).customize("a")
    with proxied(gate.address, lambda number: Fault(0) if number else None) as proxy:
        patient = connect(proxy.url, retry_for=80.0).job(job.id)
        began = time.monotonic()
        refused(lambda: patient.wait(1.0), JobTimeoutError, "job_timeout")
        assert 1.0 <= time.monotonic() - began < 30


def test_a_wait_with_time_left_gives_up_as_any_call(connect: Connect, gate: Gate) -> None:
    """Nobody is kept waiting for a service that has been away for longer than its calls are tried again."""
    known = httpx2.post(f"{gate.url}/v1/customize", json={"prompt": "a"}).content
    with _Fading(known) as server, _running(server) as url:
        job = connect(url, retry_for=0.3).job("j")
    began = time.monotonic()
    refused(lambda: job.wait(100.0), NoAnswerError, "no_answer")
    assert time.monotonic() - began < 50


class _Slow(BaseHTTPRequestHandler):
    """A proxy that has no patience: the first answer is its own, after a second; the next is the service's."""

    known = b""
    tries = 0

    def do_POST(self) -> None:
        type(self).tries += 1
        self.rfile.read(int(self.headers["Content-Length"]))
        if self.tries == 1:
            time.sleep(1.0)
        self.send_response(504 if self.tries == 1 else 202)
        self.end_headers()
        self.wfile.write(b"<html>" if self.tries == 1 else self.known)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.mark.parametrize(("retry_for", "tries"), [(0.5, 2), (0.0, 1)])
def test_a_wait_that_was_asked_for_uses_up_no_patience(
    connect: Connect, gate: Gate, retry_for: float, tries: int
) -> None:
    """Of an answer that is lost after all of the time it was to take, there is a second try, unless none is wanted."""

    class Slow(_Slow):
        known = httpx2.post(f"{gate.url}/v1/customize", json={"prompt": "a"}).content

    with ThreadingHTTPServer(("127.0.0.1", 0), Slow) as server, _running(server) as url:
        client = connect(url, retry_for=retry_for)
        if tries == 1:
            refused(lambda: client.customize("a", wait=1), UnexpectedAnswerError, "unexpected_answer")
        else:
            assert client.customize("a", wait=1).status == "queued"
        assert Slow.tries == tries


def test_nobody_there(connect: Connect) -> None:
    """An error of the tree without an answer, and at once one of the language where there cannot be one."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = taken.getsockname()
    refused(connect(f"http://127.0.0.1:{address[1]}", retry_for=0).models, NoAnswerError, "no_answer")
    for url in ("127.0.0.1:8080", "ftp://127.0.0.1", "http://", "http://a:b", "x"):
        with pytest.raises(ValueError, match="URL"):
            connect(url)


@pytest.mark.parametrize("key", ["dreamserve_abc\n", "ключ", "two words"])
def test_a_key_that_cannot_be_sent(connect: Connect, key: str) -> None:
    """Said when the client is made, and not as a service that does not answer; the key is not repeated."""
    with pytest.raises(ValueError, match="API key") as caught:
        connect("http://127.0.0.1:1", key)
    assert key.strip() not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "pointer", "code"),
    [
        ({"idempotency_key": "bestellung-ä"}, "Idempotency-Key:", "invalid_value"),
        ({"idempotency_key": "a\n"}, "Idempotency-Key:", "invalid_value"),
        ({"guidance": float("nan")}, "/guidance", "malformed_json"),
        ({"adapter": AdapterUse("x", float("inf"))}, "/adapter", "malformed_json"),
        ({"negative_prompt": "a \ud800"}, "/negative_prompt", "malformed_json"),
    ],
)
def test_a_request_that_cannot_be_sent(connect: Connect, options: dict[str, Any], pointer: str, code: str) -> None:
    """One error of the tree, with a pointer as the service would give it."""
    client = connect("http://127.0.0.1:1", retry_for=0)
    error = refused(lambda: client.customize("a", **options), InvalidRequestError, code)
    assert (error.pointers, error.retryable, error.status) == ((pointer,), False, 0)


def test_retry_after_is_waited_for(connect: Connect, model_dir: Path, tmp_path: Path) -> None:
    """While Redis is away the service asks for two seconds; the next try comes no sooner, and makes the one job."""
    server = start_redis(tmp_path)
    app = create_app(settings(server.url, tmp_path, model_dir).model_copy(update={"redis_timeout_s": 0.3}))
    gates = serve(app)
    gate = next(gates)
    try:
        with proxied(gate.address, lambda _: None) as proxy:
            client = connect(proxy.url)
            client.models()
            stop_child(server.process.pid)
            error = refused(lambda: connect(proxy.url, retry_for=1).customize("a"), BusyError, "queue_unavailable")
            assert (error.status, error.retry_after_s, error.retryable) == (503, 2.0, True)
            first = len(proxy.began)
            back = threading.Thread(target=_continue_after, args=(proxy, first, server.process.pid))
            back.start()
            client.customize("b")
            back.join()
            assert proxy.began[first + 1] - proxy.answered[first] >= 2
            assert [job.request["prompt"] for job in client.jobs()].count("b") == 1
    finally:
        os.kill(server.process.pid, signal.SIGCONT)
        next(gates, None)
        server.stop()


def _continue_after(proxy: Proxy, exchange: int, pid: int) -> None:
    wait_for(lambda: len(proxy.answered) > exchange, "an answer")
    os.kill(pid, signal.SIGCONT)


def test_a_full_service(connect: Connect, open_gate: Open) -> None:
    """Where waiting as long as it asks for would be more than `retry_for`, the answer is the error, with its advice."""
    client = connect(open_gate(bound_s=1e-6).url, retry_for=5)
    client.customize("a")  # the first is taken however large it is
    error = refused(lambda: client.customize("b"), BusyError, "over_capacity")
    assert (error.status, error.retryable) == (503, True)
    assert error.retry_after_s >= 1


def test_what_cannot_pass_is_not_tried_again(connect: Connect, gate: Gate) -> None:
    """A slip is said at once, with a pointer to each."""
    with proxied(gate.address, lambda _: None) as proxy:
        client = connect(proxy.url)
        error = refused(
            lambda: client.customize("a [ref#2]", [Reference.bytes(picture(), role="nose")], width=81),
            InvalidRequestError,
            "invalid_request",
        )
        assert set(error.pointers) == {"/prompt", "/width", "/references/0/role"}
        assert {fault.code for fault in error.faults} >= {"size_off_grid", "role_not_supported"}
        assert (error.status, error.retryable) == (422, False)
        assert error.request_id.startswith("req_")
        assert len(proxy.began) == 1


def test_every_refusal_has_its_class(connect: Connect, open_gate: Open, bench: Bench) -> None:
    """By status; what has no class of its own is a plain refusal with the service's code."""
    client = connect(open_gate().url)
    refused(lambda: client.customize("a", sead=3), InvalidRequestError, "unknown_field")
    refused(lambda: client.job("job_unknown"), NotFoundError, "not_found")
    refused(lambda: client.job("../models"), NotFoundError, "not_found")
    refused(client.customize("a").delete, RefusedError, "job_not_finished")
    client.customize("a", idempotency_key="k")
    error = refused(lambda: client.customize("b", idempotency_key="k"), InvalidRequestError, "idempotency_conflict")
    assert error.pointers == ("Idempotency-Key:",)
    stranger = connect(open_gate(auth="keys").url, "dreamserve_no_key")
    error = refused(stranger.models, UnauthenticatedError, "unauthenticated")
    assert "no_key" not in repr(error) + str(vars(error))


def test_a_picture_that_changed_on_its_way(connect: Connect, gate: Gate, bench: Bench, tmp_path: Path) -> None:
    """One wrong bit, and nothing is written; the same picture is fetched unharmed the next time."""
    job = connect(gate.url).customize("a")
    bench.finish(job.id, picture())
    with proxied(gate.address, lambda number: Fault(spoil=True) if number == 1 else None) as proxy:
        (image,) = connect(proxy.url).job(job.id).images
        refused(lambda: image.save(tmp_path / "out.png"), DamagedImageError, "image_damaged")
        assert not (tmp_path / "out.png").exists()
        assert image.save(tmp_path / "out.png").read_bytes() == picture()


def test_a_stream_that_drops_goes_on(connect: Connect, gate: Gate, bench: Bench) -> None:
    """Cut anywhere, within a line too, three times: each event comes once, in order, as over one connection."""
    job = connect(gate.url).customize("a")
    token = bench.ledger.claim(job.id, "w")
    assert token is not None
    for step in range(1, 9):
        bench.ledger.beat(job.id, token, Progress("denoise", step, 8))
    bench.ledger.cancel(job.id)
    bench.ledger.release_canceled(job.id, token)
    whole = list(job.events())
    cuts = {0: Fault(400), 1: Fault(0, abrupt=True), 2: Fault(470)}
    with proxied(gate.address, cuts.get) as proxy:
        told = list(connect(proxy.url).events(job.id))
    assert told == whole
    assert len(whole) > 10
    assert len(proxy.began) == 4


class _Page(BaseHTTPRequestHandler):
    """Another service: it answers everything with a page, by the status that the path's first part names."""

    def do_GET(self) -> None:
        self.send_response(int(self.path.split("/")[1]))
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(b"<html>{}</html>")

    def do_POST(self) -> None:
        self.do_GET()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def elsewhere() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Page) as server, _running(server) as url:
        yield url


@pytest.mark.parametrize(("status", "retryable"), [(200, False), (302, False), (404, False), (500, False), (502, True)])
def test_an_answer_of_something_else(connect: Connect, elsewhere: str, status: int, retryable: bool) -> None:
    """A wrong address or a proxy's own page is said to be one, whatever its status, and never read as a job."""
    client = connect(f"{elsewhere}/{status}", retry_for=0)
    for call in (client.models, lambda: client.customize("a"), lambda: list(client.events("job_1"))):
        error = refused(call, UnexpectedAnswerError, "unexpected_answer")
        assert error.retryable == retryable
    assert error.status in (status, 0)
