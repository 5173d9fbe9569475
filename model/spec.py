"""What a model accepts and what it does when nothing is said: limits and defaults, read from its directory.

Imports no torch: the gateway validates against the same `ModelSpec` that the worker runs by.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from pydantic import TypeAdapter, ValidationError

from model.errors import WeightsError
from model.roles import PLACEHOLDERS, Role

Version = Literal["v1", "v1.1", "main"]
"""A released stack, or `main`: the main file alone, as this project's training writes it."""

SPEC_FILE = "dreamserve.json"
"""Optional file at the top of a model directory: its `spec` object overrides the values derived from FLUX, its
`version` names the stack of the adapters that come with the model."""


@dataclass(frozen=True, slots=True)
class Range:
    """Inclusive bounds, the grid a value must lie on (`step`), and the default."""

    minimum: float
    maximum: float
    step: float
    default: float

    def __post_init__(self) -> None:
        if not self.minimum <= self.default <= self.maximum:
            raise ValueError(f"default {self.default} lies outside {self.minimum}..{self.maximum}")

    def admits(self, value: float) -> bool:
        """Whether `value` lies within the bounds and, for a whole-number step, on the grid."""
        on_grid = self.step < 1 or float(value) % self.step == 0
        return self.minimum <= value <= self.maximum and on_grid


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Limits and defaults of one loaded model. Sizes are pixels.

    Attributes:
        about: what a user of this model should know; shown by `/v1/models` and the demo.
        cell: pixels per token side: VAE factor × 2 (FLUX: 16).
        text_tokens: length of the T5 sequence, padding included.
        identity_resolution: side of the square an identity reference becomes.
        exclusive_roles: roles that these weights cannot mix with others.
        style_trigger: sentence the prompt of a style reference must start with; empty for none.
    """

    name: str
    cell: int
    width: Range
    height: Range
    num_inference_steps: Range
    guidance: Range
    true_cfg_scale: Range
    reference_resolution: Range
    identity_resolution: int
    text_tokens: int
    max_references: int = len(PLACEHOLDERS)
    max_images: int = 4
    max_prompt_characters: int = 4000
    roles: tuple[Role, ...] = tuple(Role)
    exclusive_roles: tuple[Role, ...] = (Role.STYLE,)
    style_trigger: str = "generate a same style image."
    about: str = ""


def flux_spec(name: str, cell: int, *, version: str, turbo: bool) -> ModelSpec:
    """FLUX.1-dev with DreamO, by the released application's ranges and defaults (dreamo app.py).

    Wider than the application's sliders where the weights allow it; 512² is known to lose quality.
    """
    side = Range(16 * cell, 128 * cell, cell, 64 * cell)
    return ModelSpec(
        name=name,
        cell=cell,
        width=side,
        height=side,
        num_inference_steps=Range(1, 50, 1, 12 if turbo else 28),
        guidance=Range(1.0, 10.0, 0.1, 4.5 if version == "v1.1" else 3.5),
        true_cfg_scale=Range(1.0, 5.0, 0.1, 1.0),
        reference_resolution=Range(32 * cell, 64 * cell, cell, 32 * cell),
        identity_resolution=512,
        text_tokens=512,
    )


def own_version(base_model: str) -> Version:
    """The adapter stack that a base comes with by its `dreamserve.json`; v1.1, the newest released one, without.

    Raises:
        WeightsError: `weights_format` when it names none that there is.
    """
    named = (_read_json(base_model, SPEC_FILE) or {}).get("version", "v1.1")
    if named not in get_args(Version):
        raise WeightsError(
            "weights_format", f"{base_model}/{SPEC_FILE}: no version {named!r}; there are v1.1, v1, main"
        )
    return cast("Version", named)


def load_spec(base_model: str, *, version: Version | None = None, turbo: bool = True) -> ModelSpec:
    """Read the spec of a directory in diffusers layout, or of a hub id.

    Args:
        version: None takes the base's own.

    Raises:
        WeightsError: `model_not_found` when there is no such directory or repository; `weights_format` when its
            configuration is not that of a FLUX VAE or its `dreamserve.json` does not fit.
    """
    vae = _read_json(base_model, "vae/config.json")
    if vae is None:
        raise WeightsError(
            "model_not_found",
            f"no model in diffusers layout at {base_model!r} (vae/config.json is missing): set "
            "DREAMSERVE_BASE_MODEL to a directory or a hub id that holds FLUX.1-dev",
        )
    if not isinstance(vae.get("block_out_channels"), list):
        raise WeightsError("weights_format", f"{base_model}/vae/config.json is not an AutoencoderKL's")
    cell = 2 * 2 ** (len(vae["block_out_channels"]) - 1)
    name = "dreamo-" + Path(base_model).name.lower()
    spec = flux_spec(name, cell, version=version or own_version(base_model), turbo=turbo)
    overrides = (_read_json(base_model, SPEC_FILE) or {}).get("spec", {})
    if not overrides:
        return spec
    try:
        return TypeAdapter(ModelSpec).validate_python({**asdict(spec), **overrides, "cell": cell})
    except ValidationError as error:
        raise WeightsError("weights_format", f"{base_model}/{SPEC_FILE}: {error.errors()[0]['msg']}") from error


def _read_json(base_model: str, path: str) -> dict[str, Any] | None:
    """One JSON file of a local directory or of a hub repository; None where it does not exist."""
    local = Path(base_model)
    if local.exists():
        file = local / path
    else:
        try:
            file = Path(hf_hub_download(base_model, path))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError):
            return None
    if not file.is_file():
        return None
    try:
        return json.loads(file.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise WeightsError("weights_format", f"{file} is not JSON: {error}") from error
