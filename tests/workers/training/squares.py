"""A source of the simplest records that still bind references to places: coloured squares, left and right."""

from __future__ import annotations

import numpy as np

from model.roles import Role
from workers.training.recipes import Stage
from workers.training.records import Record, RecordReference


class Squares:
    """Two references of one colour each; the target shows them where the prompt says."""

    def record(self, index: int, stage: Stage) -> Record:
        random = np.random.default_rng([7, index])
        target = np.full((32, 48, 3), 255, np.uint8)
        references: list[RecordReference] = []
        for slot in range(1, 1 + int(random.integers(1, 3))):
            colour = random.integers(0, 256, 3).astype(np.uint8)
            left = 8 + 24 * (slot - 1)
            target[8:24, left : left + 16] = colour
            mask = np.zeros(target.shape[:2], np.uint8)
            mask[8:24, left : left + 16] = 255
            references.append(RecordReference(slot, Role.SUBJECT, np.full((16, 16, 3), colour, np.uint8), mask))
        names = ["left", "right"]
        prompt = " and ".join(f"a square [ref#{r.slot}] on the {names[r.slot - 1]}" for r in references)
        return Record(f"{index}", next(iter(stage.mixture)), prompt, tuple(references), target)
