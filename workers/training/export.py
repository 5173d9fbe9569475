"""A trained adapter as files: in the released DreamO keys, and in peft's.

Both hold the same change. The released form has one down matrix for q, k and v of a stream; where they were trained
apart, the three are stacked into one of three times the rank, which is exact.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from safetensors.torch import save_file

from model.weights.adapters import MAIN, LowRank
from workers.training.storage import replaced, writing

PEFT = "adapter_model.safetensors"
CARD = "adapter.json"

_BLOCK = re.compile(r"(single_)?transformer_blocks\.(\d+)\.(.+)")
_QKV = {
    "attn.to_q": ("qkv_lora", "1", 0),
    "attn.to_k": ("qkv_lora", "1", 1),
    "attn.to_v": ("qkv_lora", "1", 2),
    "attn.add_q_proj": ("qkv_lora", "2", 0),
    "attn.add_k_proj": ("qkv_lora", "2", 1),
    "attn.add_v_proj": ("qkv_lora", "2", 2),
}
_PROJ = {"attn.to_out.0": "1", "attn.to_add_out": "2", "proj_out": ""}


class ExportError(Exception):
    """The adapter changes a module that a format has no key for; the message names it."""


@dataclass(frozen=True, slots=True)
class Exported:
    """The files written and the sha256 of the released one, by which the adapter is known."""

    directory: Path
    digest: str


def released_state(changes: Mapping[str, LowRank]) -> dict[str, torch.Tensor]:
    """Tensors under the released keys.

    Raises:
        ExportError: a module outside the released set, e.g. an MLP.
    """
    fused: dict[str, dict[int, LowRank]] = {}
    state: dict[str, torch.Tensor] = {}
    for module, change in changes.items():
        match = _BLOCK.fullmatch(module)
        part = match[3] if match else ""
        if match is None or (part not in _QKV and part not in _PROJ):
            raise ExportError(f"the released format has no key for {module}: train with targets released or attention")
        single = match[1] is not None
        prefix = f"{'single' if single else 'double'}_blocks_{match[2]}_processor"
        if part in _QKV:
            name, stream, place = _QKV[part]
            fused.setdefault(f"{prefix}.{name}{'' if single else stream}", {})[place] = change
        else:
            state |= _pair(f"{prefix}.proj_lora{'' if single else _PROJ[part]}", change)
    for name, parts in fused.items():
        state |= _pair(name, _stacked(parts))
    return state


def peft_state(changes: Mapping[str, LowRank]) -> dict[str, torch.Tensor]:
    """Tensors under diffusers' keys for peft adapters; the scale is folded into the up matrices."""
    state: dict[str, torch.Tensor] = {}
    for module, change in changes.items():
        state[f"transformer.{module}.lora_A.weight"] = change.down.contiguous()
        state[f"transformer.{module}.lora_B.weight"] = (change.up * change.scale).contiguous()
    return state


def write_adapter(
    directory: Path,
    changes: Mapping[str, LowRank],
    embeddings: Mapping[str, torch.Tensor],
    facts: Mapping[str, object],
) -> Exported:
    """Write both formats and a card with `facts` and the digest.

    Raises:
        ExportError: see `released_state`.
        StorageError: the disk is full or not writable; what was there before is untouched.
    """
    metadata = {"facts": json.dumps(dict(facts), sort_keys=True)}
    tables = {f"{name}.weight": tensor.contiguous() for name, tensor in embeddings.items()}
    released = released_state(changes) | tables
    with writing("the adapter", directory):
        directory.mkdir(parents=True, exist_ok=True)
        with replaced(directory / MAIN) as main, replaced(directory / PEFT) as peft, replaced(directory / CARD) as card:
            save_file(released, main, metadata=metadata)
            save_file(peft_state(changes), peft, metadata=metadata)
            digest = hashlib.sha256(main.read_bytes()).hexdigest()
            facts = {**facts, "sha256": digest, "files": [MAIN, PEFT]}
            card.write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n")
    return Exported(directory, digest)


def write_transformer(directory: Path, transformer: FluxTransformer2DModel) -> None:
    """Write a trained base in diffusers layout, bfloat16, without the adapter that is on it.

    Raises:
        StorageError: the disk is full or not writable.
    """
    state = {
        name.replace(".base_layer.", "."): tensor.to(torch.bfloat16).contiguous()
        for name, tensor in transformer.state_dict().items()
        if ".lora_" not in name
    }
    config = json.loads(transformer.to_json_string())
    config.pop("_name_or_path", None)  # where it lay on the machine that trained it
    with writing("the trained transformer", directory):
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        with replaced(directory / "diffusion_pytorch_model.safetensors") as weights:
            save_file(state, weights, metadata={"format": "pt"})


def _pair(name: str, change: LowRank) -> dict[str, torch.Tensor]:
    return {
        f"{name}.down.weight": change.down.contiguous(),
        f"{name}.up.weight": (change.up * change.scale).contiguous(),
    }


def _stacked(parts: Mapping[int, LowRank]) -> LowRank:
    """q, k and v as one change: ups one below the other over a shared down, or block by block over stacked downs."""
    query, key, value = (parts[place] for place in range(3))
    ups = [part.up * part.scale for part in (query, key, value)]
    if torch.equal(query.down, key.down) and torch.equal(query.down, value.down):
        return LowRank(query.down, torch.cat(ups))
    return LowRank(torch.cat([query.down, key.down, value.down]), torch.block_diag(*ups))
