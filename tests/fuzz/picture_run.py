"""Hostile pictures against a real gateway: what it answers, how long it takes, and how much memory that needs.

python -m tests.fuzz pictures --seed 1 --rounds 12
"""

from __future__ import annotations

import argparse
import base64
import http.client
import io
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from PIL import Image

from tests.conftest import ROOT
from tests.fuzz.bombs import bombs, png
from tests.fuzz.pictures import Case, chunk, malformed, whole
from workers.redis_process import start_redis

MOST_SECONDS = 1.0
MOST_BYTES = 256 * 2**20
LARGEST_DATA_URL = 2**18
CODES = frozenset({"image_undecodable", "image_unsupported", "image_too_large"})


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    body: dict[str, object]
    seconds: float
    """That the gateway's processes computed, whoever else had the machine meanwhile."""
    grown: int
    """Bytes by which their memory grew at most."""


@dataclass(slots=True)
class Verdict:
    """What came of a run. `wrong`: one line for each answer that should not be."""

    seen: Counter[str] = field(default_factory=Counter[str])
    slowest: tuple[float, str] = (0.0, "")
    largest: tuple[int, str] = (0, "")
    wrong: list[str] = field(default_factory=list[str])

    def table(self) -> str:
        rows = [f"{name:<20}{number}" for name, number in sorted(self.seen.items())]
        rows.append(f"{'slowest':<20}{self.slowest[0]:.2f} s  {self.slowest[1]}")
        rows.append(f"{'most memory':<20}{self.largest[0] / 2**20:.0f} MiB above base  {self.largest[1]}")
        return "\n".join([*rows, f"{'wrong':<20}{len(self.wrong)}", *self.wrong[:20]])


class Target:
    """A gateway process with the one that decodes for it, and what the two take."""

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self.process = process
        self._peer = http.client.HTTPConnection("127.0.0.1", port, timeout=240)
        self._gateway = psutil.Process(process.pid)
        for media_type, pictures in whole().items():  # what is allocated once and for all
            for data in pictures:
                assert self.post("/v1/references", data, media_type).status in (200, 201)
        self.base = self._read_memory("VmRSS")

    def upload(self, case: Case) -> Answer:
        return self.post("/v1/references", case.data, case.media_type)

    def customize(self, case: Case) -> Answer:
        """The same picture inside a request."""
        url = f"data:{case.media_type};base64,{base64.b64encode(case.data).decode()}"
        body = {"prompt": "a", "references": [{"image": url, "role": "subject"}]}
        return self.post("/v1/customize", json.dumps(body).encode(), "application/json")

    def post(self, path: str, data: bytes, media_type: str) -> Answer:
        for member in self._both():
            Path(f"/proc/{member.pid}/clear_refs").write_text("5")  # the peak is counted anew
        started = self._seconds()
        self._peer.request("POST", path, data, {"Content-Type": media_type})
        answer = self._peer.getresponse()
        body = json.loads(answer.read())
        seconds = self._seconds() - started
        self._peer.close()  # it would be hung up on while a bomb is made
        return Answer(answer.status, body, seconds, self._read_memory("VmHWM") - getattr(self, "base", 0))

    def _seconds(self) -> float:
        spent = [member.cpu_times() for member in self._both()]
        return sum(each.user + each.system for each in spent)

    def _read_memory(self, name: str) -> int:
        statuses = [Path(f"/proc/{member.pid}/status").read_text() for member in self._both()]
        lines = [line for status in statuses for line in status.splitlines() if line.startswith(name + ":")]
        return sum(int(line.split()[1]) * 1024 for line in lines)

    def _both(self) -> list[psutil.Process]:
        return [self._gateway, *self._gateway.children()]


@contextmanager
def gateway(home: Path, *, unlimited: bool = False) -> Generator[Target]:
    """A gateway process of its own over a Redis of its own; `unlimited` takes pictures of any size."""
    redis = start_redis(home)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DREAMSERVE_")}
    environment |= {"DREAMSERVE_REDIS_URL": redis.url, "DREAMSERVE_STATE_DIR": str(home)}
    command = [sys.executable, "-m", "tests.fuzz.picture_gateway", *(["--unlimited"] if unlimited else [])]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield Target(process, int(process.stdout.readline()))
    finally:
        process.terminate()
        process.wait(240)
        redis.stop()


def judge(target: Target, cases: Iterable[Case]) -> Verdict:
    """Send each case, and small ones also inside a request."""
    verdict = Verdict()
    for case in cases:
        ways = [target.upload] + [target.customize] * (len(case.data) < LARGEST_DATA_URL)
        for way in ways:
            answer = way(case)
            kind = f"{case.fate} → {'refused' if answer.status >= 400 else 'taken'}"
            verdict.seen[kind] += 1
            verdict.slowest = max(verdict.slowest, (answer.seconds, case.name))
            verdict.largest = max(verdict.largest, (answer.grown, case.name))
            verdict.wrong += [f"{case.name} by {way.__name__}: {fault}" for fault in _faults(case, answer)]
    if target.process.poll() is not None:
        verdict.wrong.append("the gateway has ended")
    return verdict


def _faults(case: Case, answer: Answer) -> Iterator[str]:
    if answer.seconds > MOST_SECONDS:
        yield f"{answer.seconds:.2f} s"
    if answer.grown > MOST_BYTES:
        yield f"{answer.grown / 2**20:.0f} MiB"
    if answer.status in (200, 201, 202):
        if case.fate == "refused":
            yield "taken"
        elif case.fate == "either" and not _is_picture(case):
            yield "taken, but Pillow does not read it"
    elif case.fate == "taken":
        yield f"refused, {answer.body.get('code')}"
    elif answer.status != 422 or answer.body["code"] not in CODES:
        yield f"status {answer.status}, {answer.body.get('code')}"


def _is_picture(case: Case) -> bool:
    """The oracle for what may be taken: Pillow, in this process, without our limits and checks."""
    try:
        with Image.open(io.BytesIO(case.data)) as image:
            image.load()
    except Exception:  # noqa: BLE001 - whatever it raises
        return False
    return True


def controls() -> Iterator[Case]:
    """Bombs that a gateway without limits must be caught at."""
    yield Case("control png", "image/png", png(9000, 9000, 8, 2, chunk(b"tRNS", bytes(6))))


def main(arguments: list[str]) -> int:
    """Run what is asked for; 1 if anything is wrong, or the control is not caught."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz pictures", description="Hostile pictures.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=12, help="of 118 malformed pictures each")
    asked = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as home, gateway(Path(home)) as target:
        verdicts = judge(target, malformed(asked.seed, asked.rounds)), judge(target, bombs())
    print(f"seed {asked.seed}")
    for what, verdict in zip(("malformed", "bombs"), verdicts, strict=True):
        print(f"\n{what}\n{verdict.table()}", flush=True)
    with tempfile.TemporaryDirectory() as home, gateway(Path(home), unlimited=True) as target:
        caught = [line for line in judge(target, controls()).wrong if line.endswith("MiB")]
    print(f"\n{'control':<20}{'caught, ' + caught[0] if caught else 'NOT CAUGHT'}")
    return 1 if any(verdict.wrong for verdict in verdicts) or not caught else 0
