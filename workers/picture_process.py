"""Proof that pictures decode, without holding up whoever else the process serves.

Pillow lets others run while it decodes PNG and JPEG. A WebP it decodes whole and copies while holding the interpreter:
of 4096 × 3072 pixels every other thread waits for 50 ms, and the process holds 200 MB. So those go to a process of
their own, `python -m workers.picture_process`, one at a time: it has few means, sees no setting of ours, and what a
hostile file makes of it is no more than its end. No torch.
"""

from __future__ import annotations

import json
import os
import resource
import struct
import subprocess
import sys
import threading
from pathlib import Path
from typing import BinaryIO, Final, cast

import structlog

from workers.pictures import PictureCode, PictureError, PictureInfo, PictureLimits, check, inspect, undecodable

_QUESTION: Final = struct.Struct("!5Q")
"""Bytes of the picture that follows, and the four caps."""
_PATIENCE_S: Final = 60.0
"""A picture within the caps takes less than one."""
_ATTEMPTS: Final = 2
_HEADROOM: Final = 512 * 2**20
"""Bytes the process may take beyond what it begins with; WebP at its cap takes 200 MB."""
_PASSED_ON: Final = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH")

_LOG = structlog.stdlib.get_logger("workers.picture_process")


class PictureProver:
    """Proves pictures, from any thread. The process beside begins with the first WebP and ends with this one.

    Attributes:
        limits: what a picture is held to.
    """

    def __init__(self, limits: PictureLimits) -> None:
        self.limits = limits
        self._one = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def inspect(self, data: bytes) -> PictureInfo:
        """See `pictures.inspect`."""
        return inspect(data, self.limits)

    def check(self, data: bytes) -> tuple[int, int]:
        """Height and width of a picture that decodes to the last pixel; see `pictures.check`.

        A picture at which the process has ended twice counts as one that does not decode.

        Raises:
            PictureError: any of its codes.
        """
        if self.inspect(data).format != "webp":
            return check(data, self.limits)
        with self._one:
            for attempt in range(1, _ATTEMPTS + 1):
                process = self._process or self._start()
                if process is None:
                    return check(data, self.limits)  # rather slowly than not at all
                answer = self._ask(process, data)
                if answer is not None:
                    return _read(answer)
                _LOG.warning("picture process ended", status=self._end(), attempt=attempt)
        raise undecodable()

    def close(self) -> None:
        """End the process, when what it has in hand is done."""
        with self._one:
            self._end()

    def _start(self) -> subprocess.Popen[bytes] | None:
        environment = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        command = [sys.executable, "-m", "workers.picture_process"]
        try:
            self._process = subprocess.Popen(
                command,
                env=environment | {"OPENBLAS_NUM_THREADS": "1"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,  # Ctrl-C is for the service, which ends it
            )
        except OSError as error:
            _LOG.warning("picture process not started", errno=error.errno)
        return self._process

    def _ask(self, process: subprocess.Popen[bytes], data: bytes) -> bytes | None:
        """A line; None if the process has ended, by itself or for its slowness."""
        source, sink = cast(BinaryIO, process.stdout), cast(BinaryIO, process.stdin)
        watchdog = threading.Timer(_PATIENCE_S, process.kill)
        watchdog.start()
        try:
            sink.write(_QUESTION.pack(len(data), *_caps(self.limits)))
            sink.write(data)
            sink.flush()
            answer = source.readline()
        except OSError:
            return None
        finally:
            watchdog.cancel()
        return answer if answer.endswith(b"\n") else None

    def _end(self) -> int | None:
        """Its exit status."""
        process, self._process = self._process, None
        if process is None:
            return None
        process.kill()
        process.communicate()
        return process.returncode


def _caps(limits: PictureLimits) -> tuple[int, int, int, int]:
    return limits.max_bytes, limits.max_pixels, limits.max_webp_pixels, limits.max_side


def _read(answer: bytes) -> tuple[int, int]:
    said = json.loads(answer)
    if "code" in said:
        raise PictureError(cast(PictureCode, said["code"]), said["message"])
    return said["height"], said["width"]


def _answer(data: bytes, limits: PictureLimits) -> dict[str, object]:
    try:
        height, width = check(data, limits)
    except PictureError as error:
        return {"code": error.code, "message": error.message}
    return {"height": height, "width": width}


def _bound_memory() -> None:
    """Nothing it is sent may cost more than `_HEADROOM`; Linux only, where what it begins with can be read."""
    status = Path("/proc/self/status")
    if status.exists():
        begun = next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if "VmData" in line)
        resource.setrlimit(resource.RLIMIT_DATA, (begun + _HEADROOM, begun + _HEADROOM))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main() -> None:
    """Answer until standard input ends: with its parent, however that ends."""
    _bound_memory()
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    while len(question := source.read(_QUESTION.size)) == _QUESTION.size:
        length, *caps = _QUESTION.unpack(question)
        answer = _answer(source.read(length), PictureLimits(*caps))
        sink.write(json.dumps(answer).encode() + b"\n")
        sink.flush()


if __name__ == "__main__":
    main()
