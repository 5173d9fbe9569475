"""The blocks as `torch.compile` makes them, and the directory in which it keeps what it made.

One graph serves every size: token counts are symbols, a block's weights are inputs. What makes another graph: whether
one request runs or several (their tokens name modulation rows), the last block, and a size at which `kernels.dispatch`
changes backends. The ops of `kernels` are operators of torch, so a graph never breaks (`fullgraph`).
"""

from __future__ import annotations

import hashlib
import os
import platform
import stat
from collections.abc import Iterable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch._dynamo import config as dynamo

from model.blocks import double_block, single_block
from model.errors import WeightsError
from model.transformer import Network

GRAPHS = 32
"""Graphs of one block that are kept at most; far more than there are, so that no request ever meets the limit."""


def compiled(network: Network, backend: Any = "inductor") -> Network:
    """The network with compiled blocks. Each graph is made when it is first needed: see `model.pipeline.Pipeline.warm`.

    Args:
        backend: of `torch.compile`.
    """
    dynamo.recompile_limit = max(dynamo.recompile_limit, GRAPHS)
    options: dict[str, Any] = {"fullgraph": True, "dynamic": True, "backend": backend}
    return replace(
        network, double=torch.compile(double_block, **options), single=torch.compile(single_block, **options)
    )


def keep_graphs(root: Path, device: torch.device) -> Path:
    """Have torch keep compiled graphs and kernels below `root`, so that the next process loads them.

    The directory is named after what they depend on: device, versions, our sources. This holds for the whole process;
    call it before anything is compiled.

    Raises:
        WeightsError: `cache_unsafe`: others may write there. What lies there is run as code.
    """
    directory = root / fingerprint(device)
    for place in (root, directory):
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        there = place.stat()
        if there.st_uid != os.geteuid() or there.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise WeightsError(
                "cache_unsafe",
                f"others may write to {place}, from which compiled code is loaded: `chmod 700` it, or remove it",
            )
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(directory.resolve())
    os.environ["TRITON_CACHE_DIR"] = str((directory / "triton").resolve())
    return directory


def fingerprint(device: torch.device) -> str:
    """A short name of the device, the versions and our own sources."""
    facts = [platform.machine(), torch.__version__, str(torch.version.cuda), _version("triton"), *_sources()]
    if device.type == "cuda":
        facts += [torch.cuda.get_device_name(device), str(torch.cuda.get_device_capability(device))]
    return hashlib.sha256("\0".join(facts).encode()).hexdigest()[:16]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _sources() -> Iterable[str]:
    for package in ("kernels", "model"):
        for file in sorted(Path(str(files(package))).glob("*.py")):
            yield hashlib.sha256(file.read_bytes()).hexdigest()
