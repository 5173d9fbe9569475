"""`make gpu` on a machine of others: what is brought along is enough, nothing else is touched, and it goes on."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.benchmarks.__main__ import SUITES
from tests.conftest import ROOT

SCRIPT = ROOT / "deploy" / "gpu.sh"
THERE = {
    *("torch", "triton", "transformers", "peft", "accelerate", "opencv-python-headless", "hypothesis", "numpy"),
    *("huggingface-hub", "tokenizers", "safetensors", "filelock", "regex"),
}
"""What the machine has: what the comment in deploy/gpu.txt names, and what transformers cannot do without."""
OPTIONAL = {"xformers", "pyarrow"}
"""Imported only where they are installed."""
TRACES = "opentelemetry-"
"""So begin the distributions that share one module's name; all but the API are for the extra `traces`."""
MACHINE = {"python_version": "3.12", "python_full_version": "3.12.3", "sys_platform": "linux", "extra": ""}


def brought() -> dict[str, Requirement]:
    """The lines of deploy/gpu.txt by name."""
    lines = (ROOT / "deploy" / "gpu.txt").read_text().splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(requirement.name): requirement for requirement in found}


def imported() -> Iterator[str]:
    """First parts of the modules that our files import, lazily too."""
    for room in ("kernels", "model", "workers", "service", "tests"):
        for file in (ROOT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                match node:
                    case ast.Import(names=names):
                        yield from (name.name.split(".")[0] for name in names)
                    case ast.ImportFrom(module=str(module), level=0):
                        yield module.split(".")[0]
                    case ast.Call(func=ast.Attribute(attr="import_module"), args=[ast.Constant(value=str(name)), *_]):
                        yield name.split(".")[0]
                    case _:
                        pass


def needed() -> set[str]:
    """Distributions of our imports, and what they need, as far as the machine does not have them."""
    homes = packages_distributions()
    left = [name for module in set(imported()) for name in homes.get(module, [])]
    found: set[str] = set()
    while left:
        name = canonicalize_name(left.pop())
        if name in found or name in THERE or name in OPTIONAL or name == "dreamserve":
            continue
        if name.startswith(TRACES) and name != "opentelemetry-api":
            continue
        found.add(name)
        wanted = [Requirement(line) for line in requires(name) or []]
        left += [one.name for one in wanted if one.marker is None or one.marker.evaluate(MACHINE)]
    return found


def test_all_that_our_code_imports_is_brought_along() -> None:
    """Tests of every room can be collected there; a new dependency that is not in the list fails here, not there."""
    wanted = needed()
    assert {"diffusers", "pydantic-core", "rq", "pillow"} <= wanted
    assert wanted - brought().keys() == set()
    assert not brought().keys() & THERE


def test_the_lock_has_all_of_it() -> None:
    """`make wheels` takes versions and hashes from the lock, so each line must be there, in a version that fits."""
    locked = dict(re.findall(r"^([a-z0-9-]+)==(\S+)", (ROOT / "requirements-dev.lock").read_text(), re.MULTILINE))
    for name, requirement in brought().items():
        assert requirement.specifier.contains(locked[name]), name


def write_wheel(folder: Path, name: str, version: str) -> None:
    """A wheel of one module that knows its version."""
    folder.mkdir(exist_ok=True)
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", f"version = {version!r}\n")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", f"{name}.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")


def test_only_what_is_missing_is_installed(tmp_path: Path) -> None:
    """On top of an interpreter of a virtual environment: its packages are seen and stay, those lacking come from
    wheels."""
    write_wheel(tmp_path / "wheels", "lacking", "1.0")
    write_wheel(tmp_path / "wheels", "einops", "99.0")
    (tmp_path / "deploy").mkdir()
    (tmp_path / "deploy" / "gpu.txt").write_text("lacking>=1\neinops>=0.8\n")
    said = subprocess.run(
        [SCRIPT, "no-such-suite"],
        cwd=tmp_path,
        env={**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert said.returncode == 1
    assert "no torch that finds a CUDA device" in said.stderr
    ask = "import lacking, einops, torch; print(lacking.version, einops.__version__, torch.__version__)"
    python = tmp_path / ".gpu" / "env" / "bin" / "python"
    there = subprocess.run([python, "-c", ask], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=240)
    here = subprocess.run(
        [sys.executable, "-c", ask.replace("lacking, ", "").replace("lacking.version, ", "")],
        capture_output=True,
        text=True,
        check=True,
        timeout=240,
    )
    assert there.stdout == f"1.0 {here.stdout}"


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A folder with sources, and an interpreter with CUDA that notes what it was to run and fails where told to."""
    for room in ("kernels", "model", "workers", "tests"):
        (tmp_path / room).mkdir()
        (tmp_path / room / "some.py").touch()
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\n[ "$1" = -c ] && exit\necho "$@" >> ran\ncase "$*" in *"$FAILING"*) exit 1;; esac\n')
    python.chmod(0o755)
    return tmp_path


def ran(machine: Path, *parts: str, failing: str = "nothing") -> tuple[int, list[str]]:
    """Exit status, and what was run."""
    (machine / "ran").write_text("")
    environment = {**os.environ, "PYTHON": "./python", "FAILING": failing}
    done = subprocess.run([SCRIPT, *parts], cwd=machine, env=environment, capture_output=True, check=False, timeout=240)
    return done.returncode, (machine / "ran").read_text().splitlines()


def test_a_failure_stops_nothing_and_is_told(machine: Path) -> None:
    """Tests, `ops` with the table that the others run by, other suites in order, a training; one failed: status 1."""
    status, lines = ran(machine, failing="tests.benchmarks step")
    assert status == 1
    assert lines[0] == "-m pytest -m gpu tests"
    assert lines[1] == "-m tests.benchmarks ops --device cuda --write-table"
    assert lines[-1].startswith("-m workers.training sticker-adapter")
    suites = [line.split()[2] for line in lines[1:-1]]
    assert suites == [suite for suite in SUITES if suite in suites]
    assert {"step", "precision", "training"} <= set(suites)


def test_it_goes_on_where_it_was(machine: Path) -> None:
    """What has passed is not run again, what failed is; what is named is; and all of it once a source has changed."""
    _, everything = ran(machine, failing="tests.benchmarks step")
    assert ran(machine) == (0, ["-m tests.benchmarks step --device cuda"])
    assert ran(machine) == (0, [])
    assert ran(machine, "step") == (0, ["-m tests.benchmarks step --device cuda"])
    (machine / "model" / "some.py").write_text("changed = True\n")
    assert len(ran(machine)[1]) == len(everything)
