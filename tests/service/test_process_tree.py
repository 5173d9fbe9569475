"""Children are restarted, stopped to the last one, and never outlive their parent."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from service.commands.process_tree import ProcessTree, Program, TreeFailedError


def _python(code: str, *arguments: str, name: str = "child", **options: Any) -> Program:
    return Program(name, (sys.executable, "-S", "-c", code, *arguments), **options)


def _closed(reader: int, seconds: float = 10.0) -> bool:
    """Whether every holder of the pipe's other end is gone: it then reads as ended."""
    return bool(select.select([reader], [], [], seconds)[0]) and os.read(reader, 1) == b""


def test_ended_child_is_started_again(tmp_path: Path) -> None:
    """A crashed child comes back, after a pause that grows, and each end is reported."""
    log = tmp_path / "starts"
    said: list[str] = []
    program = _python("import sys; open(sys.argv[1], 'a').write('x'); sys.exit(5)", str(log))
    tree = ProcessTree([program], report=said.append)
    tree.start()
    deadline = time.monotonic() + 60
    while not (log.exists() and len(log.read_text()) >= 2 and len(said) >= 2):
        assert time.monotonic() < deadline
        tree.watch()
        time.sleep(0.01)
    tree.stop(1.0)
    assert said[:2] == [
        "child ended with status 5; again in 0.5 s",
        "child ended with status 5; again in 1 s",
    ]


def test_child_that_cannot_run_ends_the_tree() -> None:
    """Exit status 2 means that no restart helps: the tree says so instead of trying for ever."""
    tree = ProcessTree([_python("raise SystemExit(2)", name="worker 1")], report=lambda _: None)
    tree.start()
    deadline = time.monotonic() + 60
    with pytest.raises(TreeFailedError, match="worker 1"):
        while time.monotonic() < deadline:
            tree.watch()
            time.sleep(0.01)
    tree.stop(1.0)


def test_stop_leaves_nothing_behind() -> None:
    """A child that ignores SIGTERM, and a grandchild that nobody asked, are gone after `stop`."""
    reader, writer = os.pipe()
    code = (
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "os.fork()\n"
        "os.write(int(sys.argv[1]), b'!')\n"
        "time.sleep(600)\n"
    )
    tree = ProcessTree([_python(code, str(writer), pass_fds=(writer,))], report=lambda _: None)
    tree.start()
    os.close(writer)
    assert os.read(reader, 1) + os.read(reader, 1) == b"!!"
    tree.stop(0.2)
    assert _closed(reader)
    os.close(reader)


def test_who_hurries_waits_for_nobody() -> None:
    """However long they may take otherwise."""
    reader, writer = os.pipe()
    code = (
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "os.write(int(sys.argv[1]), b'!')\n"
        "time.sleep(600)\n"
    )
    said: list[str] = []
    tree = ProcessTree([_python(code, str(writer), pass_fds=(writer,), grace_s=600.0)], report=said.append)
    tree.start()
    os.close(writer)
    assert os.read(reader, 1) == b"!"
    looks = iter([False, False])
    tree.stop(600.0, lambda: next(looks, True))
    assert _closed(reader)
    assert len(said) == 1 and said[0].endswith("did not end at once: killed")
    os.close(reader)


def test_a_program_may_have_a_longer_grace(tmp_path: Path) -> None:
    """What one of them has to write takes longer than the others get, and those do not get longer for it."""
    code = (
        "import os, signal, sys, time\n"
        "def leave(*_):\n"
        "    time.sleep(1.0)\n"
        "    open(sys.argv[1], 'w').close()\n"
        "    sys.exit()\n"
        "signal.signal(signal.SIGTERM, leave)\n"
        "os.write(int(sys.argv[2]), b'!')\n"
        "time.sleep(600)\n"
    )
    reader, writer = os.pipe()
    said: list[str] = []
    patient, hasty = (
        _python(code, str(tmp_path / name), str(writer), name=name, pass_fds=(writer,), grace_s=grace_s)
        for name, grace_s in (("patient", 20.0), ("hasty", None))
    )
    tree = ProcessTree([patient, hasty], report=said.append)
    tree.start()
    assert os.read(reader, 1) + os.read(reader, 1) == b"!!"
    pid = tree.pids()["hasty"]
    tree.stop(0.2)
    assert [file.name for file in tmp_path.iterdir()] == ["patient"]
    assert said == [f"process {pid} did not end within 0.2 s: killed"]
    os.close(reader)
    os.close(writer)


@pytest.mark.skipif(sys.platform != "linux", reason="a service of the Linux kernel")
def test_killed_parent_takes_its_children_along() -> None:
    """kill -9 of the parent leaves it no time to stop anything; the kernel does."""
    reader, writer = os.pipe()
    parent_code = (
        "import sys, time\n"
        "from service.commands.process_tree import ProcessTree, Program\n"
        "child = \"import os, sys, time; os.write(int(sys.argv[1]), b'!'); time.sleep(600)\"\n"
        "command = (sys.executable, '-S', '-c', child, sys.argv[1])\n"
        "ProcessTree([Program('child', command, pass_fds=(int(sys.argv[1]),))], report=print).start()\n"
        "time.sleep(600)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", parent_code, str(writer)], pass_fds=(writer,))
    os.close(writer)
    assert os.read(reader, 1) == b"!"
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert _closed(reader)
    os.close(reader)
