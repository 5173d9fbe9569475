"""What strangers and ill-meaning tenants do to a gateway at once, from a process of their own.

    python -m tests.benchmarks.traffic.attacks PORT SOCKETS RATE   # a tenant's key in ATTACKER_KEY

Until standard input ends: SOCKETS slow sockets; and RATE requests a second of each kind: no key or a wrong one,
malformed JSON, damaged pictures, bombs. Prints a line when it has begun, and at the end how often what was answered.
"""

from __future__ import annotations

import base64
import json
import os
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator

from service.callers.connections import allow_open_files
from tests.benchmarks.traffic.load import Server, asked, repeated, request
from tests.fuzz.bombs import bombs
from tests.fuzz.json_corpus import cases
from tests.fuzz.pictures import Case, malformed
from tests.fuzz.slow_sockets import Crowd

LARGEST = 2**20
"""Bytes of a bomb that is sent; what bombs are is that they are small."""


def strangers() -> Iterator[bytes]:
    """Without a key, with a wrong one, with half of one."""
    keys = ["", "Bearer", f"Bearer dreamserve_{'0' * 12}_{'a' * 43}", "Basic YTpi", "Bearer dreamserve_" + "x" * 2000]
    body = json.dumps({"prompt": "a"}).encode()
    return repeated(
        [
            message
            for key in keys
            for message in (
                request("GET", "/v1/jobs", {"Authorization": key}),
                request("POST", "/v1/customize", {"Authorization": key}, body),
            )
        ]
    )


def texts(key: str) -> Iterator[bytes]:
    """Every text that is no JSON, or may be none."""
    headers = {"Authorization": f"Bearer {key}"}
    return repeated([request("POST", "/v1/customize", headers, case.raw or b" ") for case in cases()])


def pictures(key: str, made: Iterator[Case]) -> Iterator[bytes]:
    """Hostile pictures, as references."""
    messages: list[bytes] = []
    for case in made:
        if len(case.data) <= LARGEST:
            url = f"data:{case.media_type};base64,{base64.b64encode(case.data).decode()}"
            body = json.dumps({"prompt": "a", "references": [{"image": url, "role": "subject"}]}).encode()
            messages.append(request("POST", "/v1/customize", {"Authorization": f"Bearer {key}"}, body))
    random.Random(0).shuffle(messages)
    return repeated(messages)


class Attack(threading.Thread):
    """One kind, at a rate, one at a time."""

    def __init__(self, server: Server, messages: Iterator[bytes], rate: float, count: Callable[[int], None]) -> None:
        super().__init__(daemon=True)
        self._server, self._messages, self._rate, self._count = server, messages, rate, count
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.wait(1 / self._rate):
            try:
                self._count(asked(self._server, next(self._messages)).status)
            except (OSError, RuntimeError):
                self._count(0)  # hung up on


def main() -> None:
    port, sockets, rate = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    allow_open_files()
    server, key, answers = Server(port, os.getpid()), os.environ["ATTACKER_KEY"], Counter[int]()
    kinds = [strangers(), texts(key), pictures(key, malformed(1, 1)), pictures(key, bombs())]
    attacks = [Attack(server, messages, rate, lambda status: answers.update([status])) for messages in kinds]
    crowd = Crowd(("127.0.0.1", port), sockets)
    for thread in (crowd, *attacks):
        thread.start()
    while crowd.opened < sockets:
        time.sleep(0.05)
    print("begun", flush=True)
    sys.stdin.read()
    for thread in (crowd, *attacks):
        thread.over.set()
    print(json.dumps({**answers, "slow sockets opened": crowd.opened}), flush=True)


if __name__ == "__main__":
    main()
