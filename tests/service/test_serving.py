"""`dreamserve serve` and `submit` as processes talking over HTTP; only the model is left out."""

from __future__ import annotations

import io
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx2
import pytest
from PIL import Image
from typer.testing import CliRunner

from service.callers.auth import exposed
from service.cli import app
from service.commands.process_tree import TreeFailedError
from service.commands.samples import TILE, contact_sheet, ring, star
from service.commands.serving import TRAINING_GRACE_S, Serving, _programs
from tests.service.conftest import environment_of, picture

SERVE = """
import sys
from pathlib import Path
from service.commands.serving import Serving, serve
command = (sys.executable, "-m", "tests.service.fake_worker")
serve(
    Serving("127.0.0.1", 0, 2, Path(sys.argv[1]), None, worker_command=command),
    report=lambda text: print(text, file=sys.stderr, flush=True),
    ready=lambda address: print(address, flush=True),
)
"""

SETTLED = """
import gc, sys
from service.app import app_factory
from service.commands.serving import run_gateway
app = app_factory()
app.add_api_route("/settled", lambda: [app.openapi_schema is not None, gc.get_freeze_count()])
run_gateway(app, "127.0.0.1", 0, int(sys.argv[1]))
"""


@pytest.fixture(scope="module")
def address(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A whole service; at the end SIGTERM must stop all of it, which closing its pipes proves."""
    state = tmp_path_factory.mktemp("state")
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, str(state)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment_of(model_dir),
    )
    assert process.stdout is not None
    line = process.stdout.readline().strip()
    assert line, process.communicate()[1]
    yield line
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=240)  # returns only when nobody holds the pipes any more
    assert process.returncode == 0, errors
    with pytest.raises(httpx2.HTTPError):
        httpx2.get(f"{line}/livez", timeout=1.0)


def test_submit_writes_the_picture(address: str, tmp_path: Path) -> None:
    """From files on the disk to a file on the disk, with an empty slot, the seed and the timings shown."""
    cat = tmp_path / "cat.png"
    cat.write_bytes(picture())
    out = tmp_path / "out.webp"
    arguments = ["--prompt", "[ref#2] here", "--reference", "none", "--reference", f"subject={cat}", "-o", str(out)]
    options = ["--size", "80x48", "--steps", "3", "--seed", "11"]
    done = CliRunner().invoke(app, ["submit", "--url", address, *arguments, *options])
    assert done.exit_code == 0, done.output
    assert "seed 11" in done.output
    assert "denoise 0.10 s" in done.output
    with Image.open(out) as image:
        assert (image.format, image.size) == ("WEBP", (80, 48))


def test_submit_numbers_several_pictures(address: str, tmp_path: Path) -> None:
    """Two pictures become two files and two seeds."""
    arguments = [
        "--prompt",
        "a",
        "--num-images",
        "2",
        "--seed",
        "18446744073709551615",
        "-o",
        str(tmp_path / "a.png"),
    ]
    done = CliRunner().invoke(app, ["submit", "--url", address, *arguments])
    assert done.exit_code == 0, done.output
    assert "seed 18446744073709551615, 0" in done.output
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a-0.png", "a-1.png"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--prompt", "a [ref#1]"], ["/prompt", "placeholder_without_reference"]),
        (["--prompt", "a", "--size", "81x48"], ["/width", "multiple of 8"]),
        (["--prompt", "fail"], ["No face was found"]),
        (["--prompt", "a", "--size", "big"], ["WIDTHxHEIGHT"]),
        (["--prompt", "a", "--reference", "cat.png"], ["ROLE=FILE"]),
        (["--prompt", "a", "--reference", "subject=/nowhere.png"], ["cannot read"]),
        (["--prompt", "a", "--reference", f"subject={__file__}"], ["not a PNG"]),
        (["--prompt", "a", "--url", "http://127.0.0.1:1"], ["no answer"]),
        (["--prompt", "a", "--url", "127.0.0.1:1"], ["cannot ask", "http://"]),
        (["--prompt", "a", "--key", "abc\n"], ["an API key is"]),
        (["--prompt", "a", "--guidance", "nan"], ["/guidance", "malformed_json"]),
        (["--prompt", "a", "--adapter", "x:inf"], ["NAME:SCALE"]),
    ],
)
def test_submit_explains_failures(address: str, tmp_path: Path, arguments: list[str], said: list[str]) -> None:
    """Exit 1, nothing written, and a message that names the fault."""
    out = tmp_path / "out.png"
    done = CliRunner().invoke(app, ["submit", "--url", address, "-o", str(out), *arguments])
    assert done.exit_code == 1
    assert not out.exists()
    for words in said:
        assert words in done.output


def test_submit_looks_for_the_folder_first(address: str, tmp_path: Path) -> None:
    """A slip in the file's name is told before a picture is made for it, not by throwing it away."""
    before = len(httpx2.get(f"{address}/v1/jobs").json()["jobs"])
    for file, said in ((tmp_path / "missing" / "x.png", "no folder"), (tmp_path / "dir.png", "cannot write")):
        (tmp_path / "dir.png").mkdir(exist_ok=True)
        done = CliRunner().invoke(app, ["submit", "--url", address, "--prompt", "a", "-o", str(file)])
        assert (done.exit_code, said in done.output) == (1, True)
    assert len(httpx2.get(f"{address}/v1/jobs").json()["jobs"]) == before


def test_submit_names_the_job_of_a_picture_that_it_cannot_write(address: str, tmp_path: Path) -> None:
    """What was made is not lost: the second of two files is in the way of nobody but this one."""
    (tmp_path / "a-1.png").mkdir()
    arguments = ["--prompt", "a", "--num-images", "2", "-o", str(tmp_path / "a.png")]
    done = CliRunner().invoke(app, ["submit", "--url", address, *arguments])
    assert done.exit_code == 1
    (job, *_) = httpx2.get(f"{address}/v1/jobs").json()["jobs"]
    assert f"/v1/jobs/{job['id']}/images/1" in done.output
    assert (tmp_path / "a-0.png").is_file()


def test_killed_worker_is_replaced(address: str) -> None:
    """A worker that dies is started again; the service keeps two."""
    cards = httpx2.get(f"{address}/v1/models").json()["workers"]
    victim = cards[0]["pid"]
    os.kill(victim, signal.SIGKILL)
    fresh: set[int] = set()
    for _ in range(400):
        fresh = {card["pid"] for card in httpx2.get(f"{address}/v1/models").json()["workers"]}
        if len(fresh - {card["pid"] for card in cards}) == 1:
            return
    pytest.fail(f"no new worker among {fresh}")


def test_workers_have_less_time_than_serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Theirs if it is short enough; training workers have longer. What they refuse is refused before they start."""
    serving = Serving("127.0.0.1", 0, 1, tmp_path, None, training_workers=1)

    def graces() -> dict[str, tuple[str | None, float | None]]:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            programs = _programs(serving, listener, "redis://x")
        return {one.name: (one.environment.get("DREAMSERVE_GRACE_S"), one.grace_s) for one in programs}

    assert graces() == {
        "gateway": (None, None),
        "worker 1": ("6.0", None),
        "training worker 1": (None, TRAINING_GRACE_S),
        "courier": (None, None),
    }
    monkeypatch.setenv("DREAMSERVE_GRACE_S", "2.5")
    assert graces()["worker 1"] == ("2.5", None)
    monkeypatch.setenv("DREAMSERVE_GRACE_S", "long")
    with pytest.raises(TreeFailedError, match="DREAMSERVE_GRACE_S"):
        graces()


def test_serve_ends_when_the_model_cannot_be_loaded(tmp_path: Path) -> None:
    """A wrong model ends `serve` at once with status 2 and the remedy, and leaves nothing running."""
    command = [
        sys.executable,
        "-m",
        "service.cli",
        "serve",
        "--port",
        "0",
        "--state-dir",
        str(tmp_path / "state"),
    ]
    done = subprocess.run(
        command, env=environment_of(tmp_path / "none"), capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 2
    assert "model_not_found" in done.stderr
    assert done.stdout == ""


def test_gateway_alone_needs_redis(model_dir: Path) -> None:
    """Without a Redis there is nothing to serve: said at once, not with every request."""
    command = [sys.executable, "-m", "service.cli", "gateway"]
    done = subprocess.run(
        command, env=environment_of(model_dir), capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 2
    assert "DREAMSERVE_REDIS_URL" in done.stderr


def test_a_wrong_setting_is_explained(model_dir: Path) -> None:
    """By its variable and what is wrong with it, without its value."""
    environment = environment_of(model_dir) | {"DREAMSERVE_BODIES_MIB": "1", "DREAMSERVE_PORT": "canary"}
    command = [sys.executable, "-m", "service.cli", "gateway"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 2
    assert "DREAMSERVE_BODIES_MIB" in done.stderr and "less than two bodies" in done.stderr
    assert "DREAMSERVE_PORT" in done.stderr and "canary" not in done.stderr


def test_no_answer_waits_for_what_could_be_done_before(model_dir: Path, tmp_path: Path) -> None:
    """When the gateway first answers, its document is written and its heap is out of the garbage collector's way.

    Either would hold up every caller for a tenth of a second, one at the first question, one every few seconds.
    """
    where = {"DREAMSERVE_REDIS_URL": f"unix://{tmp_path}/none", "DREAMSERVE_STATE_DIR": str(tmp_path)}
    with socket.create_server(("127.0.0.1", 0)) as listener:
        command = [sys.executable, "-c", SETTLED, str(listener.fileno())]
        environment = environment_of(model_dir) | where
        with subprocess.Popen(command, env=environment, pass_fds=(listener.fileno(),)) as process:
            try:
                url = f"http://127.0.0.1:{listener.getsockname()[1]}/settled"
                written, frozen = httpx2.get(url, timeout=240).json()
            finally:
                process.terminate()
    assert written
    assert frozen > 50_000  # it imports more than twice as many objects


def test_samples_and_sheet() -> None:
    """The drawn references differ and decode; the sheet enlarges small pictures without inventing colours."""
    tiny = Image.new("RGB", (2, 1))
    tiny.putdata([(255, 0, 0), (0, 0, 255)])
    buffer = io.BytesIO()
    tiny.save(buffer, "PNG")
    assert star() != ring()
    with Image.open(io.BytesIO(contact_sheet([("a", star()), ("b", buffer.getvalue())]))) as sheet:
        left = sheet.width - 24 - TILE
        tile = sheet.crop((left, 24 + TILE // 4, left + TILE, 24 + 3 * TILE // 4))
        assert {colour for _, colour in tile.getcolors() or []} == {(255, 0, 0), (0, 0, 255)}


def test_serve_gives_up_on_a_worker_that_only_crashes(model_dir: Path, tmp_path: Path) -> None:
    """A worker that dies before it ever was ready ends `serve` after a few tries, not never."""
    code = SERVE.replace('"-m", "tests.service.fake_worker"', '"-S", "-c", "raise SystemExit(1)"')
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(
        command, env=environment_of(model_dir), capture_output=True, text=True, timeout=240, check=False
    )
    assert "TreeFailedError: it ended too often" in done.stderr


@pytest.mark.parametrize(
    ("host", "open_to_others"),
    [
        ("127.0.0.1", False),
        ("127.8.0.1", False),
        ("::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:10.0.0.1", True),
        ("localhost", False),
        ("0.0.0.0", True),
        ("::", True),
        ("192.168.0.5", True),
        ("example.org", True),
    ],
)
def test_an_open_address_is_known_as_one(host: str, open_to_others: bool) -> None:
    """Serving beyond this machine without keys is refused."""
    assert exposed(host) == open_to_others


def test_each_process_gets_a_port_for_metrics(tmp_path: Path) -> None:
    """From the given one on, none twice; without one, none."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        serving = Serving("127.0.0.1", 0, 2, tmp_path, None, training_workers=1, metrics_port=9100)
        ports = {
            program.name: program.environment.get("DREAMSERVE_METRICS_PORT")
            for program in _programs(serving, listener, "redis://x")
        }
        assert ports == {
            "gateway": "9100",
            "worker 1": "9101",
            "worker 2": "9102",
            "training worker 1": "9103",
            "courier": "9104",
        }
        silent = replace(serving, metrics_port=None)
        assert all(
            "DREAMSERVE_METRICS_PORT" not in program.environment for program in _programs(silent, listener, "redis://x")
        )
