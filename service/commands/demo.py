"""The whole line once, as a stranger would use it: serve, submit two references, look at the result."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

from service.client import Job, Reference
from service.commands.samples import contact_sheet, sample
from service.commands.submit import SubmitError, service_at
from workers.lifeline import die_with_parent

PROMPT = "the star [ref#1] at the top left and the ring [ref#2] at the bottom right on grass"
SEED = 7
READY_S = 300.0
STOP_S = 40.0


def run_demo(out: Path, report: Callable[[str], None]) -> Job:
    """Write `demo.png` and `contact-sheet.png` to `out`; everything that was started has ended on return.

    Raises:
        SubmitError: the service did not start, or refused or failed the job.
    """
    samples = {"star": sample("star"), "ring": sample("ring")}
    references = [Reference.bytes(data, role="subject") for data in samples.values()]
    report("starting Redis, a worker and the gateway ...")
    with (
        tempfile.TemporaryDirectory(prefix="dreamserve-demo-") as state,
        _serving(Path(state)) as url,
        service_at(url) as client,
    ):
        report(f"ready at {url}; submitting two references")
        about = client.models()[0].about
        job = client.customize(PROMPT, references, seed=SEED).wait()
        picture = job.images[0].read()
    if about:
        report(about)
    out.mkdir(parents=True, exist_ok=True)
    (out / "demo.png").write_bytes(picture)
    captions = [f"[ref#{slot}] {name}" for slot, name in enumerate(samples, start=1)]
    tiles = [*zip(captions, samples.values(), strict=True), (f"result, seed {SEED}", picture)]
    (out / "contact-sheet.png").write_bytes(contact_sheet(tiles))
    return job


@contextmanager
def _serving(state_dir: Path) -> Generator[str]:
    """`dreamserve serve` on a free loopback port with nothing of the caller's own Redis or state."""
    own = ("DREAMSERVE_REDIS_URL", "DREAMSERVE_AUTH")
    environment = {key: value for key, value in os.environ.items() if key not in own}
    command = [sys.executable, "-m", "service.cli", "serve", "--host", "127.0.0.1", "--port", "0"]
    process = subprocess.Popen(
        [*command, "--workers", "1", "--state-dir", str(state_dir)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        env=environment,
        text=True,
        preexec_fn=die_with_parent(),  # noqa: PLW1509 - one system call; no other threads here
    )
    try:
        assert process.stdout is not None  # noqa: S101 - a pipe was asked for
        if not select.select([process.stdout], [], [], READY_S)[0]:
            raise SubmitError(f"the service was not ready within {READY_S:g} s")
        line = process.stdout.readline()
        if not line.strip():
            raise SubmitError(f"the service ended with status {process.wait()} before it was ready")
        yield line.split()[-1]
    finally:
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
