"""docker-compose.yml as data, and the rules that it keeps: each says in a line what breaks it."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

import yaml

from kernels.dispatch import VARIABLE
from service.settings import GatewaySettings
from tests.conftest import ROOT
from workers.settings import CourierSettings, QueueSettings, TrainingSettings, WorkerSettings

FILES: Final = ("docker-compose.yml", "deploy/compose.gpu.yml")
SETTINGS: Final[Mapping[str, type[QueueSettings]]] = {
    "gateway": GatewaySettings,
    "worker": WorkerSettings,
    "courier": CourierSettings,
    "training": TrainingSettings,
}
WRITABLE: Final[Mapping[str, set[str]]] = {
    "redis": {"/data"},
    "gateway": {"/state/artifacts", "/state/artifacts/references"},
    "worker": {"/state/artifacts", "/state/artifacts/references", "/state/compiled"},
    "courier": {"/state/artifacts/references"},
    "training": {"/state/adapters", "/state/trainings", "/state/compiled"},
}
"""Who may write where; all else is mounted to be read."""
KERNELS: Final[Mapping[str, set[str]]] = {
    name: {VARIABLE} if name in ("worker", "training") else set() for name in SETTINGS
}
SECRETS: Final = "DREAMSERVE_WEBHOOK_SECRETS"

_REFERENCE = re.compile(r"\$\$|\$\{(?P<name>\w+)(?:(?P<how>:[-?+])(?P<word>[^}]*))?\}")


def interpolated(value: Any, variables: Mapping[str, str]) -> Any:
    """A value of the file as compose reads it. Raises LookupError: `:?` and nothing there."""

    def one(match: re.Match[str]) -> str:
        if match[0] == "$$":
            return "$"
        found = variables.get(match["name"], "")
        match match["how"]:
            case ":-":
                return found or match["word"]
            case ":+":
                return match["word"] if found else ""
            case ":?" if not found:
                raise LookupError(match["word"])
            case _:
                return found

    match value:
        case str():
            return _REFERENCE.sub(one, value)
        case dict():
            return {name: interpolated(part, variables) for name, part in value.items()}
        case list():
            return [interpolated(part, variables) for part in value]
        case _:
            return value


def composition(file: str = FILES[0], **variables: str) -> dict[str, Any]:
    """The file with what would stand in .env; the password is there."""
    read = yaml.safe_load((ROOT / file).read_text())
    return interpolated(read, {"REDIS_PASSWORD": "a-password", **variables})


def passed(service: Mapping[str, Any]) -> dict[str, str | None]:
    """A container's DREAMSERVE_ variables; None: taken from .env."""
    return {name: value for name, value in service["environment"].items() if name.startswith("DREAMSERVE_")}


def variables_of(settings: type[QueueSettings]) -> set[str]:
    """The variables that an entry point reads."""
    return {f"DREAMSERVE_{name.upper()}" for name in settings.model_fields}


def seconds(duration: str) -> float:
    """Of a duration such as `90s` or `5m`."""
    return float(duration[:-1]) * {"s": 1, "m": 60}[duration[-1]]


def violations(file: Mapping[str, Any]) -> list[str]:
    """What is not as promised, as `service: rule`."""
    found = [f"{name}: {rule}" for name, service in file["services"].items() for rule in _confinement(service)]
    found += [f"{name}: {rule}" for name, service in file["services"].items() for rule in _volumes(name, service)]
    return [*found, *_networks(file), *_variables(file["services"])]


def _confinement(service: Mapping[str, Any]) -> Iterator[str]:
    user, _, group = str(service.get("user", "")).partition(":")
    checks = {
        "user": user.isdigit() and int(user) > 0 and group.isdigit() and int(group) > 0,
        "read_only": service.get("read_only") is True,
        "cap_drop": service.get("cap_drop") == ["ALL"] and not service.get("cap_add"),
        "no-new-privileges": service.get("security_opt") == ["no-new-privileges:true"],
        "memory": re.fullmatch(r"\d+[mg]", str(service.get("mem_limit"))) is not None,
        "pids": isinstance(service.get("pids_limit"), int) and service["pids_limit"] > 0,
        "tmp": any(place.startswith("/tmp:size=") for place in service.get("tmpfs", ())),
        "init": service.get("init") is True,
        "privileges": not {"privileged", "devices", "pid", "ipc", "network_mode", "userns_mode"} & service.keys(),
        "grace": "stop_grace_period" in service,
        "health": "build" in service if "healthcheck" not in service else "test" in service["healthcheck"],
        "redis first": service.get("depends_on") in ({}, {"redis": {"condition": "service_healthy"}}),
    }
    return (rule for rule, kept in checks.items() if not kept)


def _volumes(name: str, service: Mapping[str, Any]) -> Iterator[str]:
    for volume in service.get("volumes", ()):
        source, target, *mode = volume.split(":")
        if mode != ["ro"] and target not in WRITABLE[name]:
            yield f"writes {target}"
        if "docker.sock" in source:
            yield "holds the engine"


def _networks(file: Mapping[str, Any]) -> Iterator[str]:
    networks = file["networks"]
    if not (networks.get("inside") or {}).get("internal"):
        yield "inside: not internal"
    for name, service in file["services"].items():
        for network in service.get("networks", ("default",)):
            if name != "courier" and not _closed(networks.get(network) or {}):
                yield f"{name}: way out by {network}"
            if name != "courier" and network != "inside" and service.get("dns") != ["127.0.0.1"]:
                yield f"{name}: asks for names outside"
        for port in service.get("ports", ()):
            address, _, _ = str(port).rpartition(":")[0].rpartition(":")
            if name != "gateway" or not address or not ipaddress.ip_address(address).is_loopback:
                yield f"{name}: publishes {port}"


def _closed(network: Mapping[str, Any]) -> bool:
    masquerade = network.get("driver_opts", {}).get("com.docker.network.bridge.enable_ip_masquerade")
    return network.get("internal") is True or masquerade == "false"


def _variables(services: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    for name, settings in SETTINGS.items():
        given = services[name]["environment"]
        for variable in passed(services[name]).keys() - variables_of(settings) - KERNELS[name]:
            yield f"{name}: no setting {variable}"
        if name != "courier" and str(given.get(SECRETS, "")) not in ("", "held by the courier"):
            yield f"{name}: holds webhook secrets"
