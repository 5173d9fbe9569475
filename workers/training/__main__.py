"""`dreamserve train RECIPE`: run a recipe, with progress and a log; SIGTERM and Ctrl-C checkpoint first."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from model.errors import ModelError
from workers.training.dry_run import describe
from workers.training.export import ExportError
from workers.training.failures import TrainingError
from workers.training.leaving import heed_signals
from workers.training.log import TrainingLog
from workers.training.recipes import Recipe, RecipeError, load_recipe
from workers.training.start import prepare
from workers.training.stderr import say
from workers.training.storage import StorageError

app = typer.Typer(add_completion=False)

STOPPED = 3
"""Exit status of a run that was asked to stop and can be resumed."""


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="Name of a shipped recipe, or a YAML file.")],
    out: Annotated[Path | None, typer.Option(help="For checkpoints and the adapter. Default: runs/RECIPE.")] = None,
    base: Annotated[str | None, typer.Option(help="Base model, instead of the recipe's.")] = None,
    data: Annotated[Path | None, typer.Option(help="Dataset directory, instead of the recipe's.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the newest checkpoint.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Say what would be trained and how large it is.")] = False,
) -> None:
    """Train an adapter by a recipe and write it in the released format and in peft's.

    SIGTERM and Ctrl-C end the run after the step at hand, with a checkpoint and exit status 3; a second Ctrl-C at once,
    and the run goes on from the checkpoint before.
    """
    try:
        plan = load_recipe(recipe).with_overrides(base=base, data=data)
        if dry_run:
            print(describe(plan))
        elif not _run(plan, out or Path("runs") / plan.name, resume=resume):
            raise typer.Exit(STOPPED)
    except (RecipeError, ModelError, StorageError, ExportError, TrainingError) as error:
        say(f"dreamserve train: {error}")
        raise typer.Exit(2) from error


def _run(plan: Recipe, directory: Path, *, resume: bool) -> bool:
    """Whether the recipe was run to its end."""
    if not resume and (directory / "checkpoints").exists():
        raise RecipeError(f"{directory} holds a run already: --resume it, or name another --out")
    with TrainingLog(directory, plan.steps) as log:
        run = prepare(plan, directory, log.step)
        heed_signals(run.stop)
        if resume and not run.resume():
            say(f"no checkpoint in {directory}: starting anew")
        if not run.run():
            say(f"stopped after step {run.step}: go on with --resume")
            return False
        if not run.leads:
            return True
        exported = run.export()
    print(f"wrote {exported.directory} (sha256 {exported.digest})")
    return True


if __name__ == "__main__":
    app(prog_name="dreamserve train")
