"""How `serve` ends: jobs in hand are given back, and whoever asks twice does not wait."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from service.client import Client
from tests.service.conftest import environment_of
from tests.waiting import wait_for

LEAVING = """
import sys
from pathlib import Path
from service.commands.serving import Serving, serve
slow = '''
import os, sys, time
from pathlib import Path
from tests.workers.standin import StandinPipeline
from workers.inference.worker import run_worker
from workers.settings import WorkerSettings
def step(_):
    if not Path(os.environ["FAST"]).exists():
        time.sleep(0.5)
sys.exit(run_worker(WorkerSettings(), lambda _: StandinPipeline(step)))
'''
serve(
    Serving("127.0.0.1", 0, 1, Path(sys.argv[1]), None, grace_s=6.0, worker_command=(sys.executable, "-c", slow)),
    report=lambda text: print(text, file=sys.stderr, flush=True),
    ready=lambda address: print(address, flush=True),
)
"""

STUBBORN = """
import sys
from pathlib import Path
from service.commands.serving import Serving, serve
stay = '''
import signal, sys, time
from pathlib import Path
home = Path(sys.argv[1])
signal.signal(signal.SIGTERM, lambda *_: (home / "asked").touch())
(home / "begun").touch()
time.sleep(3600)
'''
command = (sys.executable, "-S", "-c", stay, sys.argv[1])
serve(
    Serving("127.0.0.1", 0, 1, Path(sys.argv[1]) / "state", None, grace_s=3600.0, worker_command=command),
    report=lambda text: print(text, file=sys.stderr, flush=True),
    ready=lambda address: None,
)
"""


def test_a_restart_costs_no_attempt(model_dir: Path, tmp_path: Path) -> None:
    """A job that runs longer than `serve` waits is handed back before its worker would be killed, and run again."""
    environment = environment_of(model_dir) | {"FAST": str(tmp_path / "fast")}

    def serving() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", LEAVING, str(tmp_path / "state")]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, env=environment, text=True, **pipes)

    def leave(process: subprocess.Popen[str]) -> str:
        process.terminate()
        return process.communicate(timeout=240)[1]

    first = serving()
    try:
        assert first.stdout is not None
        with Client(first.stdout.readline().strip()) as client:
            job = client.customize("a toy", num_inference_steps=20)
            wait_for(lambda: (now := job.refresh().progress) and now.step >= 1, "a first step")
    finally:
        said = leave(first)
    assert "killed" not in said
    (tmp_path / "fast").touch()
    second = serving()
    try:
        assert second.stdout is not None
        with Client(second.stdout.readline().strip()) as client:
            ended = client.job(job.id).wait(60)
    finally:
        leave(second)
    assert ended.attempt == 1


def test_a_second_ctrl_c_waits_for_nobody(model_dir: Path, tmp_path: Path) -> None:
    """A worker that takes an hour to leave is waited for after one, not after two; nothing is left behind."""
    command = [sys.executable, "-c", STUBBORN, str(tmp_path)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment_of(model_dir))
    wait_for((tmp_path / "begun").exists, "the worker")
    process.send_signal(signal.SIGINT)
    wait_for((tmp_path / "asked").exists, "it to be asked to leave")
    assert process.poll() is None, "it is waited for"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=240)  # returns only when nobody holds the pipe any more
    assert (process.returncode, "did not end at once: killed" in errors) == (0, True), errors
