"""How well a model customizes, measured on StickerWorld scenes it has never seen, by metrics with exact truth.

    python -m workers.training.measuring.evaluate [--count 400] [--seed 0] [--table two-references]

prints a table per kind of scene: the model, the model with its references withheld, and three controls that say what
the figures can be: the truth, the truth through the VAE (no model of this VAE can do better), and shuffled truth
(chance). The model is the one a worker would load: the same DREAMSERVE_ variables choose it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import track

from model.errors import ModelError
from model.pipeline import Pipeline, PreparedReference
from model.preprocessors.prepare import to_tensor_range
from model.requests import ImageRequest
from workers.inference.worker import load_pipeline
from workers.settings import WorkerSettings
from workers.training.measuring.attending import peaks_inside
from workers.training.oracle.scores import score
from workers.training.oracle.tables import RESPONSE, Rate, Summary, summarise, table
from workers.training.records import Pixels
from workers.training.stickerworld.scenes import Scene
from workers.training.stickerworld.settings import Settings
from workers.training.stickerworld.world import scene

app = typer.Typer(add_completion=False)

TABLES: Mapping[str, Settings] = {
    "two-references": Settings(mixture=(("multi_subject", 1.0),), max_subjects=2),
    "two-references-named-sizes": Settings(mixture=(("multi_subject", 1.0),), max_subjects=2, loose=1.0),
    "one-reference": Settings(mixture=(("single_subject", 1.0),)),
    "text-alone": Settings(mixture=(("text_to_image", 1.0),)),
    "two-columns": Settings(mixture=(("two_column", 1.0),)),
    "identity": Settings(mixture=(("identity_like", 1.0),)),
    "garment": Settings(mixture=(("try_on_like", 1.0),)),
    "style-by-text": Settings(mixture=(("style_text", 1.0),)),
    "style-of-content": Settings(mixture=(("style_content", 1.0),)),
}
"""What there is to measure. Sizes named also means placed freely; everything else stands on the nine places."""

_ERR = Console(stderr=True)


@app.command()
def evaluate(
    count: Annotated[int, typer.Option(min=2, help="Fresh scenes.")] = 400,
    seed: Annotated[int, typer.Option(help="Of the scenes and of the pictures.")] = 0,
    tables: Annotated[
        list[str] | None, typer.Option("--table", help=f"One of {', '.join(TABLES)}; again for more. Default: all.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Denoise steps; default: the model's.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Pictures in one forward.")] = 8,
    held_out: Annotated[bool, typer.Option(help="Looks and phrases that training never shows.")] = True,
) -> None:
    """Print how well a model does, beside controls, on each kind of scene."""
    chosen = tables or list(TABLES)
    if unknown := [name for name in chosen if name not in TABLES]:
        print(f"dreamserve evaluate: no table {unknown[0]!r}; there are {', '.join(TABLES)}", file=sys.stderr)
        raise typer.Exit(2)
    try:
        pipeline = load_pipeline(WorkerSettings())
    except ModelError as error:
        print(f"dreamserve evaluate: {error}", file=sys.stderr)
        raise typer.Exit(2) from error
    for name in chosen:
        settings = replace(TABLES[name], split="held_out" if held_out else "train")
        scenes = [scene(seed, index, settings) for index in range(count)]
        print(f"\n{name}\n\n{table(columns(pipeline, scenes, seed=seed, steps=steps, batch=batch))}", flush=True)


def columns(
    pipeline: Pipeline, scenes: Sequence[Scene], *, seed: int, steps: int | None = None, batch: int = 8
) -> dict[str, Summary]:
    """Summaries of the model and of its controls over the same scenes."""
    made = pictures(pipeline, scenes, seed=seed, steps=steps, batch=batch)
    truth = [one.picture for one in scenes]
    without: dict[str, Summary] = {}
    if any(one.references for one in scenes):
        withheld = pictures(pipeline, scenes, seed=seed, steps=steps, batch=batch, withhold=True)
        without = {"references withheld": _summary(scenes, withheld)}
    model = _summary(scenes, made)
    if peaks := peaks_inside(pipeline.model, [one.record() for one in scenes], seed=seed):
        rate = Rate(sum(peaks) / len(peaks), len(peaks))
        model = replace(model, rates={**model.rates, RESPONSE: rate})
    return {
        "model": model,
        **without,
        "truth": _summary(scenes, truth),
        "truth through the VAE": _summary(scenes, [through_vae(pipeline, picture) for picture in truth]),
        "shuffled truth": _summary(scenes, [*truth[1:], truth[0]]),
    }


def pictures(
    pipeline: Pipeline,
    scenes: Sequence[Scene],
    *,
    seed: int,
    steps: int | None = None,
    batch: int = 8,
    withhold: bool = False,
) -> list[Pixels]:
    """The model's picture of each scene, several in a forward; picture i is drawn with seed + i."""
    made: list[Pixels] = []
    numbered = list(enumerate(scenes))
    groups = [numbered[first : first + batch] for first in range(0, len(scenes), batch)]
    for group in track(groups, "without references" if withhold else "pictures", console=_ERR, transient=True):
        runs = [
            pipeline.start(
                pipeline.encode(_request(pipeline, one, steps), () if withhold else _prepared(one)), seed + i
            )
            for i, one in group
        ]
        while not runs[0].done:
            runs = list(pipeline.step(runs))
        made += [pipeline.decode(run) for run in runs]
    return made


def through_vae(pipeline: Pipeline, picture: Pixels) -> Pixels:
    """A picture encoded to the posterior's mean and decoded: the best the VAE can show."""
    codec = pipeline.model.codec
    moments = codec.moments(torch.from_numpy(to_tensor_range(picture)))
    mean = codec.sample(moments, torch.zeros(moments.shape[0] // 2, *moments.shape[1:]))
    pixels = codec.decode(mean, codec.grid(*picture.shape[:2]))
    return np.ascontiguousarray((pixels * 255).round().byte().permute(1, 2, 0).cpu().numpy())


def _summary(scenes: Sequence[Scene], made: Sequence[Pixels]) -> Summary:
    return summarise(score(one, picture) for one, picture in zip(scenes, made, strict=True))


def _prepared(one: Scene) -> tuple[PreparedReference, ...]:
    """StickerWorld's references are cut out and sized already."""
    return tuple(PreparedReference(r.slot, r.role, r.pixels) for r in one.record().references)


def _request(pipeline: Pipeline, one: Scene, steps: int | None) -> ImageRequest:
    spec = pipeline.spec
    height, width = one.picture.shape[:2]
    return ImageRequest(
        prompt=one.prompt,
        negative_prompt="",
        references=(),
        height=height,
        width=width,
        num_inference_steps=steps or int(spec.num_inference_steps.default),
        guidance=spec.guidance.default,
        first_step_guidance=spec.guidance.default,
    )


if __name__ == "__main__":
    app(prog_name="python -m workers.training.measuring.evaluate")
