"""WebP is proven in a process beside: with the answers of this one, whatever becomes of that."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

import numpy as np
import psutil
import pytest

from tests.conftest import ROOT
from tests.fuzz.pictures import malformed, whole
from tests.waiting import wait_for
from tests.workers.test_pictures import COLORS, code_of
from workers import picture_process
from workers.picture_process import PictureProver
from workers.pictures import PictureError, PictureLimits, check, encode

WEBP = encode(COLORS, "webp")


@pytest.fixture
def prover() -> Generator[PictureProver]:
    prover = PictureProver(PictureLimits())
    yield prover
    prover.close()


def child() -> psutil.Process:
    (found,) = [
        process
        for process in psutil.Process().children()
        if process.status() != psutil.STATUS_ZOMBIE and "workers.picture_process" in process.cmdline()
    ]
    return found


def outcome(prover: PictureProver | None, data: bytes) -> tuple[int, int] | tuple[str, str]:
    try:
        return prover.check(data) if prover else check(data, PictureLimits())
    except PictureError as error:
        return error.code, error.message


def test_it_answers_as_this_process_does(prover: PictureProver) -> None:
    """Whole and damaged pictures of every format: the same sizes, codes and words."""
    pictures = [data for each in whole().values() for data in each] + [case.data for case in malformed(3, 1)]
    answers = [outcome(prover, data) for data in pictures]
    assert answers == [outcome(None, data) for data in pictures]
    assert len({answer[0] for answer in answers if isinstance(answer[0], str)}) >= 2


def test_webp_is_not_decoded_here(prover: PictureProver, monkeypatch: pytest.MonkeyPatch) -> None:
    """What would hold up the gateway's other callers is done elsewhere; the control is what is done here."""

    def here(_data: bytes, _limits: PictureLimits) -> tuple[int, int]:
        raise AssertionError("decoded here")

    monkeypatch.setattr(picture_process, "check", here)
    assert prover.check(WEBP) == COLORS.shape[:2]
    with pytest.raises(AssertionError, match="decoded here"):
        prover.check(encode(COLORS, "png"))


def test_its_limits_are_the_provers() -> None:
    """Caps that are not the usual ones hold for both formats; the process is told, since it reads no settings."""
    prover = PictureProver(PictureLimits(max_pixels=600, max_webp_pixels=500))
    assert code_of(lambda: prover.check(WEBP)) == "image_too_large"
    assert prover.check(encode(COLORS, "png")) == (20, 30)
    prover.close()


def test_another_one_begins_when_it_was_killed(prover: PictureProver) -> None:
    """Out of memory on the machine, or an operator's hand: no picture is lost to it."""
    prover.check(WEBP)
    first = child()
    first.kill()
    assert prover.check(WEBP) == (20, 30)
    assert child().pid != first.pid


def test_one_that_hangs_is_replaced(prover: PictureProver, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes no more than its patience, and the picture gets another try."""
    prover.check(WEBP)
    stopped = child()
    stopped.suspend()
    monkeypatch.setattr(picture_process, "_PATIENCE_S", 0.2)
    prover._ask(prover._process, WEBP)  # type: ignore[arg-type]  # pyright: ignore[reportPrivateUsage]
    wait_for(lambda: stopped.status() == psutil.STATUS_ZOMBIE, "its end")
    monkeypatch.undo()
    assert prover.check(WEBP) == (20, 30)


def test_a_picture_at_which_it_ends_is_refused(prover: PictureProver, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault of the decoder that ends it: the caller hears that the picture cannot be read, after a second try."""
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert code_of(lambda: prover.check(WEBP)) == "image_undecodable"
    monkeypatch.undo()
    assert prover.check(WEBP) == (20, 30), "and the next is proven again"


def test_without_a_process_to_be_had(prover: PictureProver, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that starts no more processes still takes pictures, here."""
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    assert prover.check(WEBP) == (20, 30)


def test_it_sees_no_setting(prover: PictureProver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Secrets of the gateway are in its environment, and must not be in that of what decodes strangers' files."""
    monkeypatch.setenv("DREAMSERVE_WEBHOOK_SECRETS", "canary")
    prover.check(WEBP)
    assert "DREAMSERVE_WEBHOOK_SECRETS" not in child().environ()


@pytest.mark.skipif(sys.platform != "linux", reason="what is bounded can be read on Linux only")
def test_its_memory_is_bounded() -> None:
    """A picture that takes more than there is headroom, were there no caps: refused, and the process lives on."""
    prover = PictureProver(PictureLimits(2**30, 2**62, 2**62, 2**31))
    large = encode(np.zeros((6600, 6600, 3), np.uint8), "webp")
    assert code_of(lambda: prover.check(large)) == "image_undecodable"
    before = child().pid
    assert prover.check(WEBP) == (20, 30)
    assert child().pid == before
    prover.close()


def test_it_ends_with_its_parent() -> None:
    """Also with one that is killed: nothing is left behind."""
    code = (
        "from tests.workers.test_picture_process import *\n"
        "prover = PictureProver(PictureLimits()); prover.check(WEBP); print(child().pid, flush=True); input()"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout
    number = int(parent.stdout.readline())
    assert psutil.pid_exists(number)
    os.kill(parent.pid, signal.SIGKILL)
    parent.communicate()
    wait_for(lambda: not Path(f"/proc/{number}").exists() or psutil.Process(number).status() == "zombie", "its end")
