"""What the networks that prepare references share: weights from safetensors files, and ImageNet's input."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file

from model.errors import WeightsError


def imagenet_input(pixels: NDArray[np.uint8], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """uint8 [h, w, 3] RGB → [1, 3, h, w] with ImageNet's mean 0 and deviation 1, normalised in `dtype`."""
    values = torch.from_numpy(np.array(pixels, order="C")).permute(2, 0, 1).float().div(255).to(dtype)
    mean = torch.tensor([0.485, 0.456, 0.406], dtype=dtype)[:, None, None]
    deviation = torch.tensor([0.229, 0.224, 0.225], dtype=dtype)[:, None, None]
    return ((values - mean) / deviation)[None].contiguous()


def optional_attribute(module: str, name: str, remedy: str) -> Any:
    """`name` of a module that the operator may or may not have installed.

    Raises:
        WeightsError: `weights_missing`, with the remedy.
    """
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise WeightsError("weights_missing", f"{module}.{name} cannot be imported ({error}): {remedy}") from error


def safetensors_file(path: Path, default_name: str, remedy: str) -> Path:
    """`path` itself if it names a weights file, else the file of that name in the directory `path`.

    Raises:
        WeightsError: `weights_format` where there is only a pickled file, which is never opened; `weights_missing`
            where there is nothing.
    """
    file = path if path.suffix in {".safetensors", *_PICKLED} else path / default_name
    if file.is_file() and file.suffix == ".safetensors":
        return file
    candidates = (file, file.with_suffix(".pth"), *sorted(file.parent.glob("*")))
    pickled = [p for p in candidates if p.is_file() and p.suffix in _PICKLED]
    if pickled:
        raise WeightsError("weights_format", f"{pickled[0]} is a pickle, which is never loaded: {remedy}")
    raise WeightsError("weights_missing", f"{file} is missing: {remedy}")


def load_network(network: torch.nn.Module, file: Path, device: str) -> torch.nn.Module:
    """Fill a network from a safetensors file and make it ready for inference.

    A prefix `module.`, left by data-parallel training, is dropped.

    Raises:
        WeightsError: `weights_format` (not a safetensors file), `weights_key_missing`, `weights_shape`.
    """
    try:
        state = load_file(file)
    except (SafetensorError, OSError) as error:
        raise WeightsError("weights_format", f"{file} is not a whole safetensors file: {error}") from error
    state = {key.removeprefix("module."): tensor for key, tensor in state.items()}
    wanted = network.state_dict()
    # Counters that batch normalisation keeps for training; converters often leave them out.
    missing = sorted(key for key in wanted.keys() - state.keys() if not key.endswith("num_batches_tracked"))
    if missing:
        raise WeightsError("weights_key_missing", f"{file} lacks {len(missing)} tensors, {missing[0]} among them")
    for key, tensor in state.items():
        if key in wanted and tensor.shape != wanted[key].shape:
            shapes = f"{tuple(tensor.shape)}, not {tuple(wanted[key].shape)}"
            raise WeightsError("weights_shape", f"{file}: {key} is {shapes}")
    network.load_state_dict(state, strict=False)
    return network.eval().requires_grad_(False).to(device)


_PICKLED = {".pth", ".pt", ".ckpt", ".bin", ".pkl"}
