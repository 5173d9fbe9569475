"""Trainings as one of several processes: `torchrun … -m tests.workers.training.spread DIRECTORY[:STOP_AFTER] …`.

Each process writes what it ended with to DIRECTORY/rank-N.json; one training follows the other.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

from accelerate import Accelerator

from workers.training.recipes import Recipe
from workers.training.reports import StepReport
from workers.training.start import prepare

STAGE = {"steps": 3, "batch": 2, "optimizer": {"lr": 1e-3}, "mixture": {"single_subject": 0.5, "text_to_image": 0.5}}
RECIPE = Recipe.model_validate(
    {
        "name": "spread",
        "lora": {"rank": 2},
        "model": {"placeholders": "spare"},
        "stages": [
            {**STAGE, "name": "adapter", "losses": {"route": 1.0, "holder": 0.1}},
            {**STAGE, "name": "base", "train": "base", "losses": {"route": 0.0, "holder": 0.0}, "ema": 0.5},
        ],
    }
)


def train(directory: Path, stop_after: int | None) -> Accelerator:
    losses: list[float] = []

    def report(step: StepReport) -> None:
        losses.append(step.loss)
        if step.step == stop_after:
            run.stop.set()  # in the leading process alone, as a signal may come

    run = prepare(RECIPE, directory, report)
    run.resume()
    run.run()
    digest = hashlib.sha256()
    for _, parameter in sorted(run.objective.named_parameters()):
        digest.update(parameter.detach().numpy().tobytes())
    rank = run.accelerator.process_index
    ended = {"step": run.step, "digest": digest.hexdigest(), "losses": losses, "leads": run.leads}
    (directory / f"rank-{rank}.json").write_text(json.dumps(ended))
    return run.accelerator


def main() -> None:
    trainings = (argument.partition(":") for argument in sys.argv[1:])
    *_, accelerator = [train(Path(at), int(stop_after) if stop_after else None) for at, _, stop_after in trainings]
    accelerator.end_training()


if __name__ == "__main__":
    main()
