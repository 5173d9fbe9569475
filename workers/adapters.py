"""`dreamserve adapters`: register adapter files that jobs may then name, and list what there is."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from pydantic import ValidationError

from model.errors import ModelError
from workers.registry import MAIN, NAME, Registry, RegistryError
from workers.settings import QueueSettings, describe_bad_settings

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)


@app.command()
def add(
    name: Annotated[str, typer.Argument(help="By which jobs name it: lowercase letters, digits, `.`, `_`, `-`.")],
    file: Annotated[Path, typer.Argument(help="A LoRA for FLUX, or a DreamO main file; safetensors.")],
) -> None:
    """Register an adapter for everybody, under its sha256 as version; the newest version is what jobs get.

    The file may have the keys of DreamO, diffusers, peft, kohya, ComfyUI, fal, OneTrainer or XLabs. It is checked
    against DREAMSERVE_BASE_MODEL and copied into DREAMSERVE_ADAPTERS_DIR; workers that run see it at once.
    """
    from model.weights.changes import examine  # noqa: PLC0415 - torch, which `list` does without

    settings = _settings()
    if not NAME.fullmatch(name):
        _fail("a name is at most 64 lowercase letters, digits, `.`, `_` and `-`, and ends with a letter or digit")
    try:
        _check_scale(file)
        found = examine(file, settings.base_model)
        card = {"file": file.name, "modules": found.modules, "rank": found.rank}
        adapter = Registry(settings.adapter_root).add(name, file, whole=found.whole, card=card)
    except (ModelError, RegistryError) as error:
        _fail(f"{error.code}: {error.message}")
    kind = "DreamO adapter" if found.whole else "LoRA"
    print(f"registered {name} {adapter.version}: a {kind} of rank {found.rank} on {found.modules} layers")


@app.command("list")
def list_() -> None:
    """Name, kind, date and version of all adapters for everybody, newest first."""
    for adapter in Registry(_settings().adapter_root).versions():
        kind = "dreamo" if adapter.file.name == MAIN else "lora"
        print(adapter.name, kind, time.strftime("%Y-%m-%d", time.gmtime(adapter.published_at)), adapter.version)


def _check_scale(file: Path) -> None:
    """Refuse what peft has saved with a scale that stands in another file than the one that is registered."""
    beside = file.with_name("adapter_config.json")
    if file.name != "adapter_model.safetensors" or not beside.is_file():
        return
    try:
        config: Any = json.loads(beside.read_bytes())
    except (OSError, ValueError):
        config = None
    if not isinstance(config, Mapping):
        _fail(f"{beside} cannot be read, and may give this adapter a scale: save the adapter again")
    # peft scales each module by its alpha over its own rank, so patterns of either make scales differ.
    elsewhere = any(config.get(name) for name in ("rank_pattern", "alpha_pattern", "use_rslora"))
    if elsewhere or config.get("lora_alpha") != config.get("r"):
        _fail(
            f"{beside} gives this adapter a scale that {file.name} lacks: save it with diffusers' save_lora_weights, "
            "whose transformer_lora_adapter_metadata writes it into the file"
        )


def _settings() -> QueueSettings:
    try:
        return QueueSettings()
    except ValidationError as error:
        _fail(describe_bad_settings(error))


def _fail(message: str) -> NoReturn:
    print(message, file=sys.stderr)
    raise typer.Exit(2)


if __name__ == "__main__":
    app(prog_name="dreamserve adapters")
