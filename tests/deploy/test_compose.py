"""What docker-compose.yml promises: least privilege, one way out, no secrets, and time enough to leave."""

from __future__ import annotations

import copy
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from typing import Any

import pytest

from service.app import create_app
from service.commands.serving import http_config
from service.settings import GatewaySettings
from tests.conftest import ROOT
from tests.deploy.composition import (
    FILES,
    KERNELS,
    SECRETS,
    SETTINGS,
    composition,
    interpolated,
    passed,
    seconds,
    variables_of,
    violations,
)
from workers import redis_process
from workers.courier import worker as courier
from workers.settings import WorkerSettings

Compose = dict[str, Any]
FIXED = {"STATE_DIR", "REDIS_URL", "HOST", "PORT", "ADAPTERS_DIR", "METRICS_PORT"}
"""Settings that containers have no choice in: the images set them, or they follow from the volumes."""


def test_every_container_is_confined() -> None:
    """No root, no writable root file system, no capabilities, bounds, and no network but those named."""
    assert violations(composition()) == []
    assert set(composition()["services"]) == {"redis", *SETTINGS}


LOOSENED: dict[str, Callable[[Compose], object]] = {
    "worker: user": lambda file: file["services"]["worker"].pop("user"),
    "gateway: user": lambda file: file["services"]["gateway"].update(user="0:0"),
    "redis: read_only": lambda file: file["services"]["redis"].update(read_only=False),
    "courier: cap_drop": lambda file: file["services"]["courier"].update(cap_add=["NET_ADMIN"]),
    "training: no-new-privileges": lambda file: file["services"]["training"].pop("security_opt"),
    "gateway: memory": lambda file: file["services"]["gateway"].pop("mem_limit"),
    "worker: pids": lambda file: file["services"]["worker"].update(pids_limit=-1),
    "worker: health": lambda file: file["services"]["worker"].update(healthcheck={"disable": True}),
    "redis: health": lambda file: file["services"]["redis"].pop("healthcheck"),
    "courier: privileges": lambda file: file["services"]["courier"].update(network_mode="host"),
    "gateway: redis first": lambda file: file["services"]["gateway"].update(depends_on=["redis"]),
    "worker: way out by outside": lambda file: file["services"]["worker"]["networks"].append("outside"),
    "training: way out by default": lambda file: file["services"]["training"].pop("networks"),
    "gateway: way out by front": lambda file: file["networks"]["front"].clear(),
    "gateway: asks for names outside": lambda file: file["services"]["gateway"].pop("dns"),
    "inside: not internal": lambda file: file["networks"]["inside"].update(internal=False),
    "gateway: publishes 8080:8080": lambda file: file["services"]["gateway"].update(ports=["8080:8080"]),
    "redis: publishes 127.0.0.1:6379:6379": lambda file: file["services"]["redis"].update(
        ports=["127.0.0.1:6379:6379"]
    ),
    "worker: writes /state/adapters": lambda file: file["services"]["worker"]["volumes"].append(
        "adapters:/state/adapters"
    ),
    "courier: writes /state/artifacts": lambda file: file["services"]["courier"]["volumes"].append(
        "artifacts:/state/artifacts"
    ),
    "worker: holds the engine": lambda file: file["services"]["worker"]["volumes"].append(
        "/var/run/docker.sock:/run/engine:ro"
    ),
    "courier: no setting DREAMSERVE_GRACE_S": lambda file: file["services"]["courier"]["environment"].update(
        DREAMSERVE_GRACE_S="1"
    ),
    "gateway: holds webhook secrets": lambda file: file["services"]["gateway"]["environment"].update(
        {SECRETS: "whsec_x"}
    ),
}


@pytest.mark.parametrize("rule", LOOSENED)
def test_a_loosened_file_is_caught(rule: str) -> None:
    """Each rule sees its own violation: the check is no formality."""
    loosened = copy.deepcopy(composition())  # anchors are shared
    LOOSENED[rule](loosened)
    assert rule in violations(loosened)


def test_webhook_secrets_reach_the_courier_alone() -> None:
    """The gateway decodes strangers' bytes and only needs to know whether there are any."""
    services = composition(**{SECRETS: "whsec_canary"})["services"]
    assert {name for name, service in services.items() if "whsec_canary" in str(service)} == set()
    assert services["courier"]["environment"][SECRETS] is None  # as it stands in .env
    assert GatewaySettings(webhook_secrets=services["gateway"]["environment"][SECRETS]).webhook_secrets
    assert not GatewaySettings(webhook_secrets=passed(composition()["services"]["gateway"])[SECRETS]).webhook_secrets


def test_no_start_without_a_password() -> None:
    """An empty password would leave Redis open to all containers; compose says what to do instead."""
    with pytest.raises(LookupError, match=r"\.env\.example"):
        composition(REDIS_PASSWORD="")
    example = (ROOT / ".env.example").read_text()
    assert re.findall(r"^REDIS_PASSWORD=(.*)$", example, re.MULTILINE) == [""]
    assert "/.env" in (ROOT / ".gitignore").read_text().splitlines()


def test_every_setting_can_be_set() -> None:
    """What a process reads, its container can be given; what .env.example names, compose takes."""
    services = composition()["services"]
    missing = {
        variable
        for name, settings in SETTINGS.items()
        for variable in variables_of(settings) | KERNELS[name]
        if not any(variable in passed(services[other]) for other in SETTINGS)
    }
    # A training's own patience is longer than a worker's, so it has variables of its own.
    assert {"DREAMSERVE_COMMIT_PATIENCE_S", "DREAMSERVE_STALL_S"} <= passed(services["training"]).keys()
    assert missing == {f"DREAMSERVE_{name}" for name in FIXED} - {"DREAMSERVE_REDIS_URL"}
    named = set(re.findall(r"^#?(?!COMPOSE_)([A-Z_]+)=", (ROOT / ".env.example").read_text(), re.MULTILINE))
    text = "".join((ROOT / file).read_text() for file in FILES)
    assert {name for name in named if not re.search(rf"\b{name}\b", text)} == set()
    assert {"REDIS_PASSWORD", "DREAMSERVE_BASE_MODEL", "DREAMSERVE_DREAMO"} <= named


def test_there_is_time_to_leave() -> None:
    """Nobody is killed while it does as the code promises on SIGTERM."""
    periods = {name: seconds(service["stop_grace_period"]) for name, service in composition()["services"].items()}
    application = create_app(GatewaySettings(redis_url="redis://nowhere"))
    graceful = http_config(application).timeout_graceful_shutdown
    assert graceful is not None
    assert periods["gateway"] >= GatewaySettings().drain_s + graceful + 10
    assert periods["worker"] >= WorkerSettings().grace_s + 30
    assert periods["courier"] >= courier._GRACE_S + 10
    assert periods["training"] >= 120


def test_redis_is_kept_as_the_private_one() -> None:
    """A Redis that drops what memory lacks, or syncs later, loses jobs that were accepted."""
    redis = composition()["services"]["redis"]
    (script,) = redis["command"][2:]
    words = dict(re.findall(r"--([a-z-]+) (\S+)", script))
    options = redis_process._options(ROOT, ROOT)
    ours = {name.removeprefix("--"): value for name, value in zip(options[::2], options[1::2], strict=True)}
    for name in ("appendonly", "appendfsync", "maxmemory-policy", "stream-node-max-bytes"):
        assert words[name] == ours[name], name
    assert '--save ""' in script
    assert "requirepass" not in script.partition("exec")[2], "everybody on the machine may read a command line"
    unit = {"mb": 1, "g": 1024}
    bound, limit = (re.fullmatch(r"(\d+)(mb|g)", text) for text in (words["maxmemory"], redis["mem_limit"]))
    assert bound is not None and limit is not None
    assert 2 * int(bound[1]) * unit[bound[2]] <= int(limit[1]) * unit[limit[2]], "a rewrite of its log may double it"


def test_gpus_are_an_overlay() -> None:
    """Without it nothing asks for a GPU; with it worker and training worker have one each."""
    assert "nvidia" not in str(composition())
    overlay = composition(FILES[1])["services"]
    assert overlay.keys() <= composition()["services"].keys()
    devices = {
        name: service["deploy"]["resources"]["reservations"]["devices"][0]["device_ids"]
        for name, service in overlay.items()
    }
    assert devices["worker"] != devices["training"]


@pytest.mark.parametrize("files", [FILES[:1], FILES])
def test_compose_takes_the_files(files: tuple[str, ...]) -> None:
    """Docker's own parser agrees, where it is installed."""
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "compose", "version"], capture_output=True, check=False).returncode:
        pytest.skip("no docker compose here")
    chosen = [word for file in files for word in ("--file", file)]
    command = [docker, "compose", *chosen, "--profile", "training", "config", "--quiet"]
    environment = {**os.environ, "REDIS_PASSWORD": "a-password"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr


def test_interpolation_is_composes() -> None:
    """The tests' own reading of `${…}` gives what compose gives."""
    read = interpolated(["$$x", "${A:-b}", "${C:-d}", "${A:+e}", "${C:+f}", "${C}"], {"C": "c"})
    assert read == ["$x", "b", "c", "", "f", "c"]
