"""Makes the shipped model from nothing, part by part: `python -m workers.training.tiny.small_model OUT`.

    VAE → text encoders → a transformer whose blocks do nothing yet → `dreamserve train tiny` → the model directory

What is there already is not made again, and training goes on from its newest checkpoint, so the command can be
repeated after it was stopped.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import load_file, save_file

from model.errors import ModelError
from model.fabricate import Shape, make_transformer, write_index
from model.spec import SPEC_FILE
from model.weights.adapters import MAIN
from workers.training.failures import TrainingError
from workers.training.log import TrainingLog
from workers.training.recipes import Recipe, RecipeError, load_recipe
from workers.training.start import prepare
from workers.training.stderr import say
from workers.training.storage import StorageError
from workers.training.tiny.autoencoder import AutoencoderPlan, fidelity, train_autoencoder
from workers.training.tiny.language import LanguagePlan, train_language

app = typer.Typer(add_completion=False)

SHAPE = Shape(heads=6, text_width=128, pooled_width=64)
"""Width 192 and 2 + 4 blocks: 5.2 M parameters."""

TEXT = ("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2")

SPEC = {
    "name": "dreamo-tiny",
    "about": "A small model trained on procedural stickers: it puts the stickers you send where you say, on one of "
    "eight backgrounds. For photographs point DREAMSERVE_BASE_MODEL at FLUX.1-dev.",
    "width": {"minimum": 48, "maximum": 144, "step": 8, "default": 72},
    "height": {"minimum": 48, "maximum": 144, "step": 8, "default": 72},
    "num_inference_steps": {"minimum": 1, "maximum": 50, "step": 1, "default": 12},
    "reference_resolution": {"minimum": 16, "maximum": 72, "step": 8, "default": 24},
    "identity_resolution": 24,
    "text_tokens": 48,
}


def write_start(out: Path, language: LanguagePlan, autoencoder: AutoencoderPlan) -> None:
    """What `recipes/tiny.yaml` starts from: trained VAE and text encoders, and an untrained transformer."""
    _once(out, TEXT, lambda part: _language(part, language))
    _once(out, ("vae",), lambda part: _autoencoder(part / "vae", autoencoder))
    _once(
        out,
        ("transformer",),
        lambda part: still_transformer(SHAPE, language.seed).save_pretrained(part / "transformer"),
    )
    write_index(out)
    (out / SPEC_FILE).write_text(json.dumps({"version": "main", "spec": SPEC}, indent=1) + "\n")


@torch.no_grad()
def still_transformer(shape: Shape, seed: int) -> Any:
    """Random weights, but every gate and the last projection zero, so that each block starts as the identity."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = make_transformer(shape)
    for name, parameter in transformer.named_parameters():
        modulation = ".linear." in name and (".norm" in name or name.startswith("norm_out"))
        if modulation or name.startswith("proj_out"):
            parameter.zero_()
    return transformer


def train(recipe: Recipe, directory: Path) -> None:
    """Run a recipe to its end, from the newest checkpoint in the directory if there is one, and export."""
    with TrainingLog(directory, recipe.steps) as log:
        run = prepare(recipe, directory, log.step)
        run.resume()
        run.run()
        run.export()


def assemble(start: Path, run: Path, out: Path) -> None:
    """Put the parts together as a model directory, in bfloat16."""
    for name in (*TEXT, "vae", "scheduler"):
        shutil.rmtree(out / name, ignore_errors=True)
        shutil.copytree(start / name, out / name)
    shutil.rmtree(out / "transformer", ignore_errors=True)
    shutil.copytree(run / "transformer", out / "transformer")
    for file in sorted((out / "vae").glob("*.safetensors")):
        save_file(_halved(file), file, metadata={"format": "pt"})
    (out / "dreamo").mkdir(parents=True, exist_ok=True)
    save_file(_halved(run / "adapter" / MAIN), out / "dreamo" / MAIN)
    for name in ("model_index.json", SPEC_FILE):
        shutil.copyfile(start / name, out / name)


def _halved(file: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.to(torch.bfloat16) for name, tensor in load_file(file).items()}


def _once(out: Path, names: tuple[str, ...], make: Callable[[Path], object]) -> None:
    """Make folders of these names beside their place and move them there, unless all are there."""
    if all((out / name).exists() for name in names):
        return
    part = out / ".part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    make(part)
    for name in names:
        shutil.rmtree(out / name, ignore_errors=True)
        (part / name).rename(out / name)
    part.rmdir()


def _language(out: Path, plan: LanguagePlan) -> None:
    print(f"text encoders: {train_language(out, SHAPE, plan):.3f} of the answers right on held-out prompts")


def _autoencoder(out: Path, plan: AutoencoderPlan) -> None:
    vae = train_autoencoder(plan)
    vae.save_pretrained(out)
    print(f"VAE: {fidelity(vae, plan, steps=16):.2f} dB on held-out pictures")


@app.command()
def main(
    out: Annotated[Path, typer.Argument(help="Model directory to write, e.g. model/tiny.")],
    runs: Annotated[Path, typer.Option(help="For parts and checkpoints.")] = Path("runs"),
    seed: Annotated[int, typer.Option(help="Of everything.")] = 0,
) -> None:
    """Train the small model and write it; hours on two CPU cores."""
    start = runs / "tiny-start"
    try:
        recipe = load_recipe("tiny").with_overrides(base=str(start)).model_copy(update={"seed": seed})
        write_start(start, LanguagePlan(seed=seed), AutoencoderPlan(seed=seed))
        train(recipe, runs / recipe.name)
        assemble(start, runs / recipe.name, out)
    except (RecipeError, ModelError, StorageError, TrainingError) as error:
        say(f"dreamserve small model: {error}")
        raise typer.Exit(2) from error
    print(f"wrote {out}")


if __name__ == "__main__":
    app(prog_name="python -m workers.training.tiny.small_model")
