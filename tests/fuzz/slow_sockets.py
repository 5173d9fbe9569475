"""Slow and silent sockets beside ordinary callers: what the latter wait, without and with them.

    python -m tests.fuzz sockets --sockets 1000 --requests 200

A quarter says nothing, a quarter dribbles a head, a quarter dribbles a body, a quarter asks and never reads. The
gateway is a process of its own with the deadlines that are served with; sockets it hangs up on are opened again.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Generator
from pathlib import Path

import httpx2

from service.callers.connections import allow_open_files
from tests.conftest import ROOT
from workers.redis_process import start_redis

HEAD = b"GET /livez HTTP/1.1\r\nHost: x\r\nX-Slow: "
BODY = b"POST /v1/customize HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100000\r\n\r\n"
ASK = b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 20
OPENINGS = (b"", HEAD, BODY, ASK)


class Crowd(threading.Thread):
    """Keeps so many slow sockets open, each fed a byte a second."""

    def __init__(self, address: tuple[str, int], count: int) -> None:
        super().__init__(daemon=True)
        self.address = address
        self.peers: list[socket.socket | None] = [None] * count
        self.opened = 0
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.is_set():
            for number in range(len(self.peers)):
                self._feed(number)
            self.over.wait(1.0)
        for peer in self.peers:
            if peer:
                peer.close()

    def _feed(self, number: int) -> None:
        peer, opening = self.peers[number], OPENINGS[number % len(OPENINGS)]
        try:
            if peer is None:
                peer = socket.create_connection(self.address, timeout=240)
                peer.setblocking(False)
                self.opened += 1
                self.peers[number] = peer
                peer.send(opening)
            elif opening in (HEAD, BODY):
                peer.send(b"a")
            elif opening == b"" and not _open(peer):
                self.peers[number] = None
        except BlockingIOError:
            return
        except OSError:
            self.peers[number] = None


def _open(peer: socket.socket) -> bool:
    try:
        return bool(peer.recv(65536))
    except BlockingIOError:
        return True


@contextlib.contextmanager
def gateway(**changes: str) -> Generator[tuple[str, int, int]]:
    """Host, port and process id of a gateway with a Redis of its own; `changes`: environment variables."""
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0), backlog=2048) as listener:
        server = start_redis(Path(folder))
        environment = {**os.environ, "DREAMSERVE_REDIS_URL": server.url, "DREAMSERVE_STATE_DIR": folder, **changes}
        command = [sys.executable, "-m", "service.cli", "gateway", "--fd", str(listener.fileno())]
        process = subprocess.Popen(command, cwd=ROOT, env=environment, pass_fds=(listener.fileno(),))
        try:
            host, port = listener.getsockname()
            yield host, port, process.pid
        finally:
            process.terminate()
            process.wait()
            server.stop()


def _latencies(url: str, requests: int) -> list[float]:
    """Seconds of valid requests, sorted: half of them reads, half submissions."""
    seconds: list[float] = []
    with httpx2.Client(base_url=url, timeout=240, trust_env=False) as client:
        for number in range(requests):
            began = time.perf_counter()
            answer = (
                client.post("/v1/customize", json={"prompt": "a"}) if number % 2 else client.get("/v1/jobs?limit=1")
            )
            seconds.append(time.perf_counter() - began)
            assert answer.is_success, answer.text
    return sorted(seconds)


def _memory_mib(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def main(arguments: list[str]) -> int:
    """Print medians and 99th percentiles without and with the crowd."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz sockets")
    parser.add_argument("--sockets", type=int, default=1000)
    parser.add_argument("--requests", type=int, default=200)
    options = parser.parse_args(arguments)
    allow_open_files()
    with gateway() as (host, port, pid):
        url = f"http://{host}:{port}"
        _latencies(url, 20)
        for what in ("alone", f"beside {options.sockets} slow sockets"):
            crowd = Crowd((host, port), 0 if what == "alone" else options.sockets)
            crowd.start()
            while crowd.opened < len(crowd.peers):
                time.sleep(0.05)
            seconds = _latencies(url, options.requests)
            p50, p99 = (1000 * seconds[int(part * (len(seconds) - 1))] for part in (0.5, 0.99))
            print(f"{what}: p50 {p50:.1f} ms, p99 {p99:.1f} ms, gateway {_memory_mib(pid):.0f} MiB")
            crowd.over.set()
            crowd.join()
    return 0
