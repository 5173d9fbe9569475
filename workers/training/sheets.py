"""What a run's pictures look like so far: a sheet with a few records' references, truth, picture and response maps.

A row is a record: its references, the truth, the model's picture, and for each reference where in the truth it looks
(equation 2 of DreamO, averaged over layers, its least value dark and its greatest bright), with the outline of its
mask. Records come from far beyond a run's own numbers and stay the same within a stage; of a dataset, which is finite,
they are records that are trained on too.

Cost of a sheet: RECORDS · (NUM_STEPS + 1) forwards of one sample without gradient, 36 in all, one after the other.
That is about one step of batch 8 with recomputed activations (8 samples, four forwards' worth each): 0.2 % of the time
at one sheet in 500 steps. Memory is that of one sample without gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from model.losses import noised
from model.packing import Condition, lay_out, pack
from model.routing import Capture
from model.sampling import Guidance, Sampler
from model.schedule import sigmas
from model.transformer import EmbeddingTables, Network, forward_with_maps
from model.weights.checkpoints import LoadedModel
from workers.pictures import encode
from workers.training.adapting import Embeddings
from workers.training.batches import Example, compose, step_generator
from workers.training.recipes import Stage
from workers.training.records import Pixels, Record

RECORDS = 4
FIRST = 2**62
"""Number of the first record shown: no run gets there, and StickerWorld's numbers end at 2**64."""
NUM_STEPS = 8
TILE = 192
"""Side of a tile in pixels."""

_GAP, _GREY = 4, 128
_WHOLE = Stage(name="show", steps=1, batch=1, mixture={"any": 1.0})
"""Nothing is dropped from what is shown, whatever the stage in training drops."""


@torch.no_grad()
def draw(model: LoadedModel, embeddings: Embeddings, records: Sequence[Record]) -> Pixels:
    """The sheet, [h, w, 3], in the base's precision, as a worker would serve the weights as they are.

    Draws from generators of its own.
    """
    rows = [_row(model, embeddings, record, number) for number, record in enumerate(records)]
    most = max(len(record.references) for record in records)
    return _sheet([[*_filled(given, most), *shown, *_filled(seen, most)] for given, shown, seen in rows])


def write(directory: Path, step: int, sheet: Pixels) -> Path:
    """Write `step-<n>.png`.

    Raises:
        OSError: the disk is full or not writable.
    """
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / f"step-{step:08d}.png"
    file.write_bytes(encode(sheet, "png"))
    return file


def sampled(model: LoadedModel, tables: EmbeddingTables, condition: Condition, noise: torch.Tensor) -> Pixels:
    """The model's picture of a condition in a few Euler steps, at the guidance it serves with: uint8 [H, W, 3]."""
    scale = model.spec.guidance.default
    levels = sigmas(NUM_STEPS, len(noise), model.shift)
    sampler = Sampler(Network(model.transformer), tables)
    run = sampler.begin(condition, None, Guidance(scale, scale), levels, noise)
    while not run.done:
        (run,) = sampler.advance([run])
    pixels = model.codec.decode(run.latents, condition.target_grid)
    return (pixels * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()


def responses(
    model: LoadedModel, tables: EmbeddingTables, condition: Condition, example: Example
) -> list[NDArray[np.float32]]:
    """Each reference's map over the truth's tokens, [rows, columns], with the truth half noised."""
    if not condition.references:
        return []
    time = torch.tensor(0.5).to(example.latents)
    noisy = noised(example.latents, example.noise, time)
    packed = pack(lay_out([condition]), [condition], [noisy], [time], [model.spec.guidance.default])
    _, maps = forward_with_maps(Network(model.transformer), tables, packed, Capture(holder=False))
    means = [maps.route(0, reference.slot).float().mean(0) for reference in condition.references]
    return [mean.unflatten(0, example.grid).cpu().numpy() for mean in means]


def overlaid(response: NDArray[np.float32], truth: Pixels, mask: Pixels | None) -> Pixels:
    """A map over the truth in grey, with the mask's outline in white: [TILE, TILE, 3]."""
    low, high = float(response.min()), float(response.max())
    levels = ((response - low) / max(high - low, 1e-12) * 255).astype(np.uint8)
    below = _scaled(truth)
    size = (below.shape[1], below.shape[0])
    heat = cv2.applyColorMap(cv2.resize(levels, size, interpolation=cv2.INTER_LINEAR), cv2.COLORMAP_INFERNO)
    grey = cv2.cvtColor(cv2.cvtColor(below, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    mixed = cv2.addWeighted(grey, 0.35, cv2.cvtColor(heat, cv2.COLOR_BGR2RGB), 0.65, 0)
    if mask is not None:
        inside = (cv2.resize(mask, size, interpolation=cv2.INTER_NEAREST) >= 128).astype(np.uint8)
        mixed[cv2.morphologyEx(inside, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)) > 0] = 255
    return _tile(mixed.astype(np.uint8))


def _row(
    model: LoadedModel, embeddings: Embeddings, record: Record, number: int
) -> tuple[list[Pixels], list[Pixels], list[Pixels]]:
    """A record's tiles: references; truth and picture; where each reference looks."""
    batch = compose([record], _WHOLE, model.codec, step_generator(0, FIRST, number))
    example = batch.examples[0]
    (embed,) = model.text.features([example.prompt], embeddings.placeholder_rows)
    kind = example.latents.dtype
    condition = Condition(embed.text.to(kind), embed.pooled.to(kind), example.grid, example.references)
    tables = EmbeddingTables(embeddings.type_rows.to(kind), embeddings.index_rows.to(kind))
    picture = sampled(model, tables, condition, example.noise)
    seen = responses(model, tables, condition, example)
    looks = [overlaid(map_, record.target, r.target_mask) for map_, r in zip(seen, record.references, strict=True)]
    return [_tile(r.pixels) for r in record.references], [_tile(record.target), _tile(picture)], looks


def _filled(tiles: Sequence[Pixels], count: int) -> list[Pixels]:
    blank = np.full((TILE, TILE, 3), _GREY, np.uint8)
    return [*tiles, *[blank] * (count - len(tiles))]


def _sheet(rows: Sequence[Sequence[Pixels]]) -> Pixels:
    """Tiles side by side and rows below each other, with a gap around each."""
    pitch = TILE + _GAP
    sheet = np.full((len(rows) * pitch + _GAP, len(rows[0]) * pitch + _GAP, 3), _GREY, np.uint8)
    for down, row in enumerate(rows):
        for across, tile in enumerate(row):
            top, left = _GAP + down * pitch, _GAP + across * pitch
            sheet[top : top + TILE, left : left + TILE] = tile
    return sheet


def _tile(pixels: Pixels) -> Pixels:
    """The picture as large as a tile allows, on grey."""
    scaled = _scaled(pixels)
    tile = np.full((TILE, TILE, 3), _GREY, np.uint8)
    top, left = (TILE - scaled.shape[0]) // 2, (TILE - scaled.shape[1]) // 2
    tile[top : top + scaled.shape[0], left : left + scaled.shape[1]] = scaled
    return tile


def _scaled(pixels: Pixels) -> Pixels:
    height, width = pixels.shape[:2]
    scale = TILE / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    kind = cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST
    return cv2.resize(pixels, size, interpolation=kind).astype(np.uint8)
