"""What frozen encoders make of a dataset's pictures and prompts, kept on disk from epoch to epoch.

Of a picture the posterior's parameters are kept, so each step still draws its own latents from them. Of prompts those
without placeholders: the T5 row of a placeholder is trained, and through attention every feature of its prompt depends
on it, so such a prompt is encoded in each step, with its gradient.

An entry is found by what it was made of: pixels or token ids, and the encoder's weights, configuration, precision and
kind of device. So a changed picture, tokenizer or encoder never meets an old entry, and runs may share a directory.

Numbers kept, at two bytes each in bfloat16: a picture 2 · 16 · H/8 · W/8 (256 KiB at 512 × 512, 1 MiB at 1024 × 1024),
a prompt FLUX's 512 × 4096 + 768 (4 MiB). Pictures and prompts may each fill half of the limit. When a half is full
nothing more is written to it and nothing is thrown out: in the next epoch every entry is as likely to be wanted.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from model.preprocessors.prepare import to_tensor_range
from model.roles import ADDED_TOKENS
from model.text import PromptEmbeds, PromptEncoder
from model.vae import LatentCodec
from workers.training.records import Pixels

_LOG = logging.getLogger(__name__)
_DIGEST = "sha256"
Tensors = Mapping[str, torch.Tensor]


class Encodings:
    """Encodes pictures and prompts one at a time, so that each is a function of its own content, cached or not.

    Args:
        directory: for the files; None keeps none.
        limit: bytes that they may take, as far as this process knows.
    """

    def __init__(self, codec: LatentCodec, text: PromptEncoder, directory: Path | None, limit: int) -> None:
        self._codec = codec
        self._text = text
        self._pictures = Shelf(directory / "pictures", limit // 2) if directory and limit else None
        self._prompts = Shelf(directory / "prompts", limit // 2) if directory and limit else None

    @torch.no_grad()
    def moments(self, pictures: Sequence[Pixels]) -> list[torch.Tensor]:
        """Posterior parameters [2C, H/f, W/f] of each picture."""
        return [self._moments(pixels) for pixels in pictures]

    @torch.no_grad()
    def prompt(self, prompt: str) -> PromptEmbeds:
        """Features of a prompt without placeholders."""
        if self._prompts is None:
            return self._text.features([prompt])[0]
        tokens = self._text.tokenize(prompt)
        device = self._text.t5.device
        key = _key(self._text_identity, _precision(device), repr((tokens.t5, tokens.clip)).encode())
        kept = self._prompts.read(key)
        if kept is not None and {"text", "pooled"} <= set(kept):
            return PromptEmbeds(kept["text"].to(device), kept["pooled"].to(device))
        made = self._text.features([prompt])[0]
        self._prompts.write(key, {"text": made.text, "pooled": made.pooled})
        return made

    def _moments(self, pixels: Pixels) -> torch.Tensor:
        if self._pictures is None:
            return self._encoded(pixels)
        device: torch.device = self._codec.vae.device
        key = _key(
            self._vae_identity, _precision(device), repr(pixels.shape).encode(), np.ascontiguousarray(pixels).data
        )
        kept = self._pictures.read(key)
        if kept is not None and "moments" in kept:
            return kept["moments"].to(device)
        made = self._encoded(pixels)
        self._pictures.write(key, {"moments": made})
        return made

    def _encoded(self, pixels: Pixels) -> torch.Tensor:
        return self._codec.batch_moments(torch.from_numpy(to_tensor_range(pixels))[None])[0]

    @cached_property
    def _vae_identity(self) -> bytes:
        return _identity(self._codec.vae.config, self._codec.vae.state_dict())

    @cached_property
    def _text_identity(self) -> bytes:
        """Both encoders, without the added tokens' rows: those are trained, and no prompt kept here holds them."""
        t5 = self._text.t5
        table = t5.get_input_embeddings().weight
        first = len(table) - len(ADDED_TOKENS)
        state = {
            name: tensor[:first] if tensor.data_ptr() == table.data_ptr() else tensor
            for name, tensor in t5.state_dict().items()
        }
        facts = {"max_tokens": self._text.max_tokens, "clip_pad": self._text.clip_tokenizer.pad_token_id}
        clip = _identity(self._text.clip.config.to_dict(), self._text.clip.state_dict())
        return _identity({**t5.config.to_dict(), **facts}, state) + clip


class Shelf:
    """Named tensors by key, each set in a file that is whole or not there.

    Args:
        limit: bytes; what would go beyond is not written.
    """

    def __init__(self, directory: Path, limit: int) -> None:
        self._directory = directory
        self._limit = limit
        self._closed = False

    def read(self, key: str) -> Tensors | None:
        """The tensors on the CPU; None if there are none, or they are damaged, which is logged."""
        file = self._file(key)
        try:
            tensors = load(file.read_bytes())
            if bytes(tensors.pop(_DIGEST).tolist()) == digest(tensors):
                return tensors
            fault = "its digest does not fit"
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            fault = type(error).__name__
        _LOG.warning("cache: %s is damaged (%s) and is made anew", file, fault)
        return None

    def write(self, key: str, tensors: Tensors) -> None:
        """Keep tensors; where the disk refuses, log it once and keep nothing more."""
        if self._closed:
            return
        whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        data = save({**whole, _DIGEST: torch.tensor(list(digest(whole)), dtype=torch.uint8)})
        try:
            if self._taken + len(data) > self._limit:
                self._closed = True
                _LOG.info("cache: %s is full", self._directory)
                return
            _replace(self._file(key), data)
        except OSError as error:
            self._closed = True
            _LOG.warning("cache: %s cannot be written (%s): nothing more is kept", self._directory, error.strerror)
            return
        self._taken += len(data)

    @cached_property
    def _taken(self) -> int:
        return sum(file.stat().st_size for file in self._directory.glob("*/*.safetensors"))

    def _file(self, key: str) -> Path:
        return self._directory / key[:2] / f"{key}.safetensors"


def digest(tensors: Tensors) -> bytes:
    """sha256 of names, dtypes, shapes and values."""
    summary = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        summary.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        summary.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return summary.digest()


def _identity(config: Mapping[str, Any], state: Tensors) -> bytes:
    """Names an encoder; its place on this machine does not count."""
    facts = {key: value for key, value in config.items() if not key.startswith("_")}
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode() + digest(state)).digest()


def _precision(device: torch.device) -> bytes:
    """What else decides the values: kind of device, autocast, and torch's own kernels."""
    kind = device.type
    mixed = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return f"{kind} {mixed} {torch.__version__}\n".encode()


def _key(*parts: bytes | memoryview) -> str:
    summary = hashlib.sha256()
    for part in parts:
        summary.update(part)
    return summary.hexdigest()


def _replace(file: Path, data: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor, part = tempfile.mkstemp(dir=file.parent, suffix=".part")
    try:
        with os.fdopen(descriptor, "wb") as opened:
            opened.write(data)
        Path(part).replace(file)
    except OSError:
        Path(part).unlink(missing_ok=True)
        raise
