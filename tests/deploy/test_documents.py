"""What docs/operations.md tells to type for containers, with a stand-in for docker that notes what it was asked."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import typer.main

from service.cli import app
from tests.conftest import ROOT
from tests.deploy.composition import composition, violations

SHIM = """#!/bin/sh
echo "$@" >> "$NOTED"
case "$*" in *"keys create"*) echo a-key; esac
"""


def typed() -> list[str]:
    """The blocks of the section."""
    section = (ROOT / "docs" / "operations.md").read_text().split("## In containers")[1]
    return [block for block in re.findall(r"```sh\n(.*?)```", section, re.DOTALL) if "docker compose" in block]


def run(script: str, folder: Path) -> list[list[str]]:
    """What docker was asked, word by word."""
    (folder / "docker").write_text(SHIM)
    (folder / "docker").chmod(0o755)
    shutil.copy(ROOT / ".env.example", folder)
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "NOTED": str(folder / "noted")}
    subprocess.run(["bash", "-euo", "pipefail", "-c", script], cwd=folder, env=environment, check=True, timeout=240)
    return [line.split() for line in (folder / "noted").read_text().splitlines()]


def test_the_first_start(tmp_path: Path) -> None:
    """The lines leave an .env with a password of its own, with which compose has all that it asks for."""
    asked = run(f'{typed()[0]}\necho "$key" > key', tmp_path)
    assert (tmp_path / "key").read_text() == "a-key\n"
    assert asked[0][:2] == ["compose", "up"]
    lines = [line for line in (tmp_path / ".env").read_text().splitlines() if line and not line.startswith("#")]
    variables = dict(line.split("=", 1) for line in lines)
    assert re.fullmatch("[0-9a-f]{64}", variables["REDIS_PASSWORD"])
    started = composition(**variables)
    assert violations(started) == []
    url = started["services"]["gateway"]["environment"]["DREAMSERVE_REDIS_URL"]
    assert url == f"redis://:{variables['REDIS_PASSWORD']}@redis:6379/0"


def test_what_is_run_inside_is_there(tmp_path: Path) -> None:
    """Services and commands by their names."""
    commands = typer.main.get_command(app).commands.keys()  # pyright: ignore[reportAttributeAccessIssue]  # it is a group
    services = composition()["services"].keys()
    asked = run("\n".join(typed()), tmp_path)
    inside = [words for words in asked if words[1] in ("exec", "run")]
    assert len(inside) == 2
    for words in inside:
        place = next(number for number, word in enumerate(words) if word in services)
        command = next(word for word in words[place + 1 :] if word != "dreamserve")
        assert command in commands
    scaled = re.findall(r"--scale (\w+)=", " ".join(" ".join(words) for words in asked))
    assert set(scaled) <= services
