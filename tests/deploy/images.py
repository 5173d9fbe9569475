"""deploy/Dockerfile as data: stages and their instructions, own and inherited."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from tests.conftest import ROOT

DOCKERFILE: Final = ROOT / "deploy" / "Dockerfile"
TARGETS: Final = ("gateway", "courier", "worker", "training")


@dataclass(frozen=True, slots=True)
class Stage:
    """One FROM and what follows it. `base`: a stage's name, or an image's."""

    name: str
    base: str
    instructions: tuple[tuple[str, str], ...]


def read(text: str) -> dict[str, Stage]:
    """Stages by name, in their order."""
    bases = dict(re.findall(r"^ARG (\w+)=(\S+)$", text.partition("\nFROM ")[0], re.MULTILINE))
    lines = re.sub(r"\\\n", " ", re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE)).splitlines()
    stages: dict[str, Stage] = {}
    for line in lines:
        word, _, rest = line.strip().partition(" ")
        if word == "FROM":
            base, name = re.fullmatch(r"(\S+) AS (\S+)", rest).groups()  # pyright: ignore[reportOptionalMemberAccess]
            base = re.sub(r"\$\{(\w+)\}", lambda match: bases[match[1]], base)
            stages[name] = Stage(name, base, ())
        elif word and stages:
            last = stages[next(reversed(stages))]
            stages[last.name] = Stage(last.name, last.base, (*last.instructions, (word, " ".join(rest.split()))))
    return stages


def inherited(stages: dict[str, Stage], name: str) -> Iterator[tuple[str, str]]:
    """A stage's instructions after those of the stages below it."""
    stage = stages[name]
    if stage.base in stages:
        yield from inherited(stages, stage.base)
    yield from stage.instructions


def last(stages: dict[str, Stage], name: str, word: str) -> str:
    """The instruction that holds in the end; empty: none."""
    return next((rest for found, rest in reversed([*inherited(stages, name)]) if found == word), "")


def words(instruction: str) -> list[str]:
    """The JSON list of a CMD or ENTRYPOINT, or the one at the end of a HEALTHCHECK; empty: none."""
    return json.loads(instruction[instruction.index("[") :]) if "[" in instruction else []


def copied(stages: dict[str, Stage]) -> list[str]:
    """What is taken out of the repository, by any stage."""
    return [
        source
        for stage in stages.values()
        for word, rest in stage.instructions
        if word == "COPY" and not rest.startswith("--from=")
        for source in rest.split()[:-1]
    ]


def wrong(stages: dict[str, Stage]) -> list[str]:
    """What is not as promised, as `target: rule`."""
    found: list[str] = []
    for name in TARGETS:
        below = [rest for _, rest in inherited(stages, name)]
        light = name in ("gateway", "courier")
        checks = {
            "user": last(stages, name, "USER") == "10001:10001",
            "stop": last(stages, name, "STOPSIGNAL") == "SIGTERM",
            "health": "/opt/ready.py" in last(stages, name, "HEALTHCHECK"),
            "label": "image.title" in last(stages, name, "LABEL"),
            "entry": words(last(stages, name, "ENTRYPOINT")) == ["dreamserve"],
            "compiler": not (light and any("apt-get" in rest for rest in below)),
            "installer": not any("pip" in rest for rest in below),
        }
        found += [f"{name}: {rule}" for rule, kept in checks.items() if not kept]
    found += [f"{stage.name}: unhashed" for stage in stages.values() if not _hashed(stage)]
    found += [f"{s.name}: no tag" for s in stages.values() if s.base not in stages and ":" not in s.base]
    return found


def _hashed(stage: Stage) -> bool:
    """Whether all that is installed comes by hash; torch and our own wheel are the exceptions."""
    installs = [part for _, rest in stage.instructions for part in rest.split("&&") if " install " in part]
    by_pip = [part for part in installs if " pip " in part]
    return all("--require-hashes" in part or "/wheel/" in part or "-r torch.txt" in part for part in by_pip)
