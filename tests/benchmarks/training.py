"""A training sample through the trainer: cached encodings, forward, losses, backward, clipping, AdamW.

The network trains as recipes have it: LoRA on the released modules and DreamO's embeddings over a frozen base. Prompts
hold placeholders, so T5 runs in every step, with a graph to their rows. Weights and pictures are random.

Goals for FLUX.1-dev on an H200, at 55 % of what it makes of a large product: 0.65 s a sample, 0.91 s where blocks are
computed again in the backward pass, at most 2 % for the routing loss.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import CLIPTokenizer, T5Config, T5EncoderModel

from model.fabricate import Shape, make_clip, make_transformer, write_tokenizers
from model.positions import Grid
from model.roles import Role
from model.spec import load_spec
from model.text import PromptEncoder
from model.transformer import EmbeddingTables
from model.weights.checkpoints import SHIPPED, LoadedModel, quiet_libraries
from tests.benchmarks.measure import Figure, figure, interleaved, own_seconds
from tests.benchmarks.step_cases import SHIFT, make_codec
from tests.benchmarks.step_cases import SIZES as STEP_SIZES
from workers.training.adapting import Embeddings, fresh_tables
from workers.training.failures import TrainingError
from workers.training.recipes import Recipe, Stage
from workers.training.records import Pixels, Record, RecordReference
from workers.training.trainer import Trainer

PROMPT = "a toy [ref#1] and a mug [ref#2] on a wooden table"


@dataclass(frozen=True, slots=True)
class Size:
    """A model, and samples of two references, in tokens; a reference is `side` × `side`.

    Attributes:
        t5: layers, heads and feed-forward width of the text encoder, whose heads are of 64 or fewer channels.
        text: T5 tokens.
    """

    name: str
    shape: Shape
    t5: tuple[int, int, int]
    text: int
    target: Grid
    side: int
    rank: int
    batch: int


def _small(heads: int, double: int, single: int) -> Shape:
    return Shape(double, single, heads, (8, 12, 12), text_width=64, pooled_width=64)


SIZES = {
    # What trains the shipped model, and FLUX's proportions: whole on a GPU, on a narrow model elsewhere.
    "cpu": (
        Size("tiny model, batch 16", _small(6, 2, 4), (2, 4, 128), 32, (9, 9), 3, 64, 16),
        Size("FLUX's proportions", _small(4, 2, 4), (2, 4, 128), 128, (32, 32), 16, 16, 1),
    ),
    "cuda": (
        Size("tiny model, batch 64", _small(8, 3, 6), (2, 4, 128), 32, (9, 9), 3, 64, 64),
        Size(
            "FLUX.1-dev, 1024²",
            Shape(19, 38, 24, (16, 56, 56), text_width=4096, pooled_width=768),
            (24, 64, 10240),
            512,
            (64, 64),
            32,
            128,
            1,
        ),
    ),
}

LOSSES = {
    "flow": {"route": 0.0, "holder": 0.0},
    "route": {"route": 1.0, "holder": 0.0},
    "route and holder": {"route": 1.0, "holder": 1.0},
}
AGAIN = ", checkpointed"

Steps = dict[str, Callable[[], object]]


def run(device: str, rounds: int) -> list[Figure]:
    """Rows for each size: seconds a sample and what losses and checkpointing add; on CUDA also the memory."""
    return [row for size in SIZES[device] for row in _measured(size, device, rounds)]


def _measured(size: Size, device: str, rounds: int) -> list[Figure]:
    what, details = f"training, {size.name}", {"batch": size.batch, "references": 2, "rank": size.rank}
    timer = own_seconds if device == "cpu" and torch.get_num_threads() == 1 else None
    details["timer"] = "process" if timer else "wall"
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(size, device, Path(folder))
        steps = {name: step for name, step in _steps(trainer).items() if _fits(name, step, trainer)}
        seconds = interleaved(steps, rounds=rounds, device=device, warmup=1, timer=timer)
        peaks = {name: _peak(step) for name, step in steps.items()} if device == "cuda" else {}
    rows = [figure(f"{what}: {n}", "s/sample", [s / size.batch for s in v], **details) for n, v in seconds.items()]
    for part, base, name in _pairs(seconds):
        extra = [100 * (v / b - 1) for v, b in zip(seconds[name], seconds[base], strict=True)]
        rows.append(figure(f"{what}: added by {part}", "%", extra, **details))
    return rows + [figure(f"{what}: memory, {name}", "GiB", [peak], **details) for name, peak in peaks.items()]


def _pairs(seconds: dict[str, list[float]]) -> list[tuple[str, str, str]]:
    """What is added, to which step, and the step that has it; of those that were measured."""
    pairs = [(name, "flow", name) for name in ("route", "route and holder")]
    pairs.append((f"route{AGAIN}", f"flow{AGAIN}", f"route{AGAIN}"))
    pairs += [(f"checkpointing, {name}", name, f"{name}{AGAIN}") for name in ("flow", "route")]
    return [pair for pair in pairs if {pair[1], pair[2]} <= seconds.keys()]


def _steps(trainer: Trainer) -> Steps:
    """The trainer's own step by its losses, with blocks' insides kept or computed again."""
    stages = {stage.name: stage for stage in trainer.recipe.stages}
    trainer._enter(trainer.recipe.stages[0])

    def step(stage: Stage, again: bool) -> None:
        trainer.objective.checkpointing = again
        trainer._one(stage, 0)

    kept: Steps = {name: partial(step, stages[_stage(name)], False) for name in LOSSES}
    return kept | {f"{name}{AGAIN}": partial(step, stages[name], True) for name in ("flow", "route")}


def _fits(name: str, step: Callable[[], object], trainer: Trainer) -> bool:
    """Whether the device's memory holds such a step; says so if not."""
    try:
        step()
    except TrainingError as error:
        if not isinstance(error.__cause__, torch.OutOfMemoryError):
            raise
        print(f"not measured, the device's memory does not hold it: {name}")
    else:
        return True
    trainer.objective.zero_grad(set_to_none=True)
    torch.cuda.empty_cache()
    return False


def _peak(step: Callable[[], object]) -> float:
    """GiB that are taken at most during a step: weights, text encoders, optimizer and activations."""
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated() / 2**30


def make_trainer(size: Size, device: str, folder: Path) -> Trainer:
    """A trainer of random weights and random records; its stages are those of `LOSSES`."""
    quiet_libraries()
    torch.manual_seed(0)
    precision = "bfloat16" if device == "cuda" else "float32"
    stages = [
        {"name": _stage(name), "steps": 1, "batch": size.batch, "mixture": {"multi_subject": 1}, "losses": losses}
        for name, losses in LOSSES.items()
    ]
    fields: dict[str, Any] = {
        "name": "benchmark",
        "data": {"source": "directory", "path": folder},
        "lora": {"rank": size.rank},
        "precision": precision,
        "pictures_every": 0,
        "stages": stages,
    }
    model, embeddings = _model(size, device, getattr(torch, precision), folder)
    source = _Records(size, model.codec.cell)
    return Trainer(Recipe.model_validate(fields), model, embeddings, source, folder, lambda _: None)


def _stage(name: str) -> str:
    return name.replace(" ", "-")


def _model(size: Size, device: str, dtype: torch.dtype, folder: Path) -> tuple[LoadedModel, Embeddings]:
    rows = fresh_tables(size.shape.width, size.shape.text_width, seed=0)
    with torch.device(device):
        transformer = make_transformer(size.shape).to(dtype)
    text = _text(size, device, dtype, folder)
    text.add_placeholders(rows["dreamo_t5_embedding"])
    for network in (transformer, text.t5, text.clip):
        network.eval().requires_grad_(False)
    tables = EmbeddingTables(*(rows[f"dreamo_{key}_embedding"].to(device, dtype) for key in ("task", "idx")))
    codec = make_codec(STEP_SIZES[device], device, dtype)
    return LoadedModel(load_spec(str(SHIPPED)), transformer, tables, text, codec, SHIFT), Embeddings(rows)


def _text(size: Size, device: str, dtype: torch.dtype, folder: Path) -> PromptEncoder:
    """Text encoders without placeholders; only T5 has the size that FLUX's has, CLIP is a small part of a step."""
    write_tokenizers(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer_2" / "tokenizer.json"))
    clip_tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    layers, heads, wide = size.t5
    config = T5Config(
        vocab_size=tokenizer.get_vocab_size(),
        d_model=size.shape.text_width,
        d_kv=size.shape.text_width // heads,
        d_ff=wide,
        num_layers=layers,
        num_heads=heads,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
    )
    with torch.device(device):
        t5 = T5EncoderModel(config).to(dtype)
        clip = make_clip(size.shape, len(clip_tokenizer)).to(dtype)
    return PromptEncoder(clip_tokenizer, clip, tokenizer, t5, size.text)


class _Records:
    """Noise in the left half for one reference, in the right for the other."""

    def __init__(self, size: Size, cell: int) -> None:
        random = np.random.default_rng(0)
        height, width = (cell * tokens for tokens in size.target)
        side = cell * size.side

        def noise(*shape: int) -> Pixels:
            return random.integers(0, 256, shape, dtype=np.uint8)

        masks = [np.zeros((height, width), np.uint8) for _ in range(2)]
        masks[0][:, : width // 2] = masks[1][:, width // 2 :] = 255
        self._records = [
            Record(
                f"{number}",
                "multi_subject",
                PROMPT,
                tuple(
                    RecordReference(slot, Role.SUBJECT, noise(side, side, 3), mask)
                    for slot, mask in enumerate(masks, start=1)
                ),
                noise(height, width, 3),
            )
            for number in range(size.batch)
        ]

    def record(self, index: int, stage: Stage) -> Record:  # noqa: ARG002  # as a source has it
        return self._records[index % len(self._records)]
