"""One network of a model from its folder in diffusers layout, whole and of its configuration, or refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from safetensors import SafetensorError

from model.errors import WeightsError

T = TypeVar("T")


def load_part(kind: Callable[..., T] | type[T], base: Path, folder: str, dtype: torch.dtype) -> T:
    """One network from its folder in diffusers layout.

    Raises:
        WeightsError: `weights_missing` (no folder or no safetensors in it), `weights_key_missing` (a tensor that the
            files lack, or the configuration), `weights_shape`, `weights_format`.
    """
    directory = base / folder
    if not list(directory.glob("*.safetensors")):
        raise WeightsError("weights_missing", f"{directory} holds no safetensors file")
    _check_indices(directory)
    load: Any = kind.from_pretrained  # type: ignore[attr-defined]  # of ModelMixin and PreTrainedModel alike
    dtype_name = "torch_dtype" if kind.__module__.startswith("diffusers.") else "dtype"
    try:
        network, report = load(
            directory,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that they are reported, and refused below
            **{dtype_name: dtype},
        )
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise WeightsError(
            "weights_format", f"{directory} cannot be loaded: {str(error).strip().splitlines()[0]}"
        ) from error
    missing, mismatched = sorted(report["missing_keys"]), sorted(report["mismatched_keys"])
    if missing:
        raise WeightsError("weights_key_missing", f"{directory} lacks {len(missing)} tensors, {missing[0]} among them")
    if surplus := [key for key in sorted(report["unexpected_keys"]) if _is_surplus(folder, key)]:
        raise WeightsError(
            "weights_key_missing",
            f"{directory} holds {len(surplus)} tensors that its config.json has no layer for, {surplus[0]} among them: "
            "copy both from one model",
        )
    if mismatched:
        name, found, wanted = mismatched[0]
        raise WeightsError(
            "weights_shape", f"{directory}: {name} is {tuple(found)}, the configuration says {tuple(wanted)}"
        )
    return network


_TEXT_BLOCK = re.compile(r"(text_model\.)?encoder\.(layers|block)\.\d+\.")


def _is_surplus(folder: str, key: str) -> bool:
    """Whether a tensor that no layer takes is missed. Files of text encoders may hold a whole CLIP's or T5's, too."""
    return folder in ("transformer", "vae") or _TEXT_BLOCK.match(key) is not None


def _check_indices(directory: Path) -> None:
    """That an index of shards is one, which the libraries take for granted."""
    for file in directory.glob("*.safetensors.index.json"):
        try:
            shards: object = json.loads(file.read_bytes())["weight_map"]
            whole = isinstance(shards, dict) and all(
                isinstance(name, str) for name in cast("dict[str, Any]", shards).values()
            )
        except (OSError, ValueError, KeyError, TypeError):
            whole = False
        if not whole:
            raise WeightsError("weights_format", f"{file} has no weight_map of its shards: copy it anew, or remove it")
