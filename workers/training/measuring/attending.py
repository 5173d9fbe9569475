"""Where references look: how often a reference's response map peaks inside its own subject.

The routing loss (equation 3 of DreamO) asks for that; this measures it on scenes with known masks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from model.weights.checkpoints import LoadedModel
from workers.training.adapting import Embeddings
from workers.training.batches import compose
from workers.training.objective import Objective
from workers.training.recipes import LossPart, Stage, TimePart
from workers.training.records import Record

_MIDDLE = TimePart(mean=0.0, std=0.5)
"""Times about the middle, where there is both a layout to look at and noise to look through."""


@torch.no_grad()
def peaks_inside(model: LoadedModel, records: Sequence[Record], *, seed: int, batch: int = 16) -> list[bool]:
    """For each reference with a mask: does its map, averaged over all layers, peak on a token inside its subject?

    A token is inside when at least half of it is. Noise and times follow from the seed.
    """
    table = model.text.t5.get_input_embeddings().weight
    tables = {
        "dreamo_task_embedding": model.tables.type,
        "dreamo_idx_embedding": model.tables.index,
        "dreamo_t5_embedding": table,
    }
    objective = Objective(model, Embeddings(tables), checkpointing=False)
    stage = Stage(name="look", steps=1, batch=batch, mixture={"any": 1.0}, time=_MIDDLE)
    found: list[bool] = []
    for first in range(0, len(records), batch):
        generator = torch.Generator().manual_seed(seed + first)
        samples = compose(records[first : first + batch], stage, model.codec, generator)
        _, maps = objective(samples, LossPart(route=1.0, holder=0.0))
        for (request, slot), mask in samples.masks.items():
            peak = maps.route(request, slot).float().mean(0).argmax()
            found.append(bool(mask[peak] >= 0.5))
    return found
