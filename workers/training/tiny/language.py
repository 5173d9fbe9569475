"""Trains the small model's text encoders on StickerWorld's grammar: `python -m workers.training.tiny.language OUT`.

FLUX takes its text encoders from elsewhere, trained on the world's text. The small model has the grammar alone, so its
encoders learn to read that: one layer of attention, asked with a learned query about each place of the picture, has to
name from the T5 features what the prompt puts there (or which reference), how it looks and how large it is, and what
lies behind. A block of the transformer reads text in the same way. Words that name a sticker or its place have to know
the same by themselves: without that, which sticker stands where is not learned in any reasonable time. Afterwards both
encoders are frozen.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextModel, T5EncoderModel

from model.fabricate import Shape, make_clip, make_t5, write_tokenizers
from model.roles import ADDED_TOKENS, PLACEHOLDERS, Role
from model.text import PromptEncoder
from model.weights.checkpoints import load_text
from workers.training.stickerworld.backgrounds import BACKGROUNDS
from workers.training.stickerworld.colours import NAMED
from workers.training.stickerworld.drafts import Draft
from workers.training.stickerworld.draws import Draws
from workers.training.stickerworld.faces import EXPRESSIONS, Face
from workers.training.stickerworld.grammar import vocabulary
from workers.training.stickerworld.layouts import PLACES
from workers.training.stickerworld.scenes import Part
from workers.training.stickerworld.settings import DREAMO_MIXTURE, Settings, Split
from workers.training.stickerworld.shapes import GARMENT_SHAPES, STICKER_SHAPES
from workers.training.stickerworld.tasks import TASKS
from workers.training.stickerworld.textures import TEXTURES

app = typer.Typer(add_completion=False)

SHAPES = (*STICKER_SHAPES, *GARMENT_SHAPES)
ANSWERS: Mapping[str, tuple[str, ...]] = {
    "source": ("nothing", "text", "1", "2", "3"),
    "shape": SHAPES,
    "texture": tuple(TEXTURES),
    "colour": tuple(NAMED),
    "size": ("as the reference", "small", "large"),
    "background": ("nothing", *BACKGROUNDS),
    "expression": EXPRESSIONS,
    "column": ("left", "centre", "right"),
}
"""What can be asked, and the answers there are."""

_TAGGED = ("source", "shape", "texture", "colour", "size")
"""What a word that names a sticker knows of it."""

_CELLS = 2 * len(PLACES)
HEAD, GARMENT, LEFT_GROUND, RIGHT_GROUND, STYLE, CONTENT = range(_CELLS, _CELLS + 6)
QUESTIONS = _CELLS + 6
"""The cells of the left and the right picture, a figure's head and garment, two backgrounds, style, content."""

_UNASKED = -100

_PLACED = re.compile(rf"\b(?:at|on) the ({'|'.join(sorted(PLACES, key=len, reverse=True))})\b")
_NAMING = frozenset({"sticker", *STICKER_SHAPES, *PLACEHOLDERS, *" ".join(PLACES).split()})
"""Words that have to know what their sentence says of a sticker."""


@dataclass(frozen=True, slots=True)
class LanguagePlan:
    """Attributes:
    tokens: length of the T5 sequence, padding included.
    rate: of learning, decayed to nothing by a cosine.
    named_sizes: share of the prompts that name sizes.
    """

    steps: int = 3000
    batch: int = 64
    tokens: int = 48
    rate: float = 2e-3
    warmup: int = 200
    named_sizes: float = 0.4
    seed: int = 0


class Reader(nn.Module):
    """Answers every question from a prompt's features with one layer of attention; used in training alone.

    Args:
        width: of the T5 features. pooled: of CLIP's.
    """

    def __init__(self, width: int, pooled: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.queries = nn.Parameter(torch.randn(QUESTIONS, width))
        self.keys = nn.Linear(width, width)
        self.values = nn.Linear(width, width)
        self.answers = nn.ModuleDict({name: nn.Linear(2 * width, len(options)) for name, options in ANSWERS.items()})
        self.tags = nn.ModuleDict(
            {name: nn.Linear(width, len(options)) for name, options in ANSWERS.items() if name in _TAGGED}
        )
        self.cells = nn.Linear(width, _CELLS)
        self.grounds = nn.Linear(pooled, 2 * len(ANSWERS["background"]))

    def forward(self, text: Tensor) -> dict[str, Tensor]:
        """[n, L, width] → logits by name, [n, QUESTIONS, options]."""

        def split(values: Tensor) -> Tensor:
            return values.unflatten(-1, (self.heads, -1)).transpose(-2, -3)

        queries = self.queries.expand(len(text), -1, -1)
        read = F.scaled_dot_product_attention(split(queries), split(self.keys(text)), split(self.values(text)))
        seen = torch.cat([read.transpose(-2, -3).flatten(-2), queries], dim=-1)
        return {name: layer(seen) for name, layer in self.answers.items()}


def drafts(plan: LanguagePlan, step: int, split: Split = "train") -> list[Draft]:
    """A step's scenes, unpainted."""
    plain, named = (
        Settings(mixture=DREAMO_MIXTURE, split=split, placement="free", sizes=sizes, shape_words=0.3)
        for sizes in ("fixed", "named")
    )
    made: list[Draft] = []
    for number in range(plan.batch):
        draws = Draws(plan.seed, step * plan.batch + number)
        settings = named if draws.chance(plan.named_sizes) else plain
        made.append(TASKS[draws.weighted(settings.mixture)](draws, settings))
    return made


def truths(scenes: Sequence[Draft]) -> dict[str, Tensor]:
    """The answers, [n, QUESTIONS] by name; `_UNASKED` where nothing in the prompt says."""
    rows = [_truth(scene) for scene in scenes]
    return {name: torch.tensor([row[name] for row in rows]) for name in ANSWERS}


def _truth(scene: Draft) -> dict[str, list[int]]:
    row = {name: [_UNASKED] * QUESTIONS for name in ANSWERS}
    row["source"] = [0] * QUESTIONS
    for question, side in ((LEFT_GROUND, 0), (RIGHT_GROUND, 1)):
        there = side < len(scene.panels)
        row["background"][question] = 1 + list(BACKGROUNDS).index(scene.panels[side].background) if there else 0
    for carried in scene.carried:
        if carried.role in (Role.STYLE, Role.CONTENT):
            row["source"][STYLE if carried.role is Role.STYLE else CONTENT] = 1 + carried.slot
            if carried.role is Role.CONTENT:
                return row  # what the picture shows is not in the prompt
    for part in scene.parts:
        _describe(row, part, scene)
    return row


def _describe(row: dict[str, list[int]], part: Part, scene: Draft) -> None:
    if isinstance(part.look, Face):
        row["expression"][HEAD] = EXPRESSIONS.index(part.look.expression)
        row["column"][HEAD] = ANSWERS["column"].index(part.place)
        question = HEAD
    elif part.look.shape in GARMENT_SHAPES:
        question = GARMENT
    else:
        right = part.box.left >= scene.panels[0].width
        question = len(PLACES) * right + PLACES.index(part.place)
    row["source"][question] = 1 if part.slot is None else 1 + part.slot
    size = scene.panels[0].width // 3
    row["size"][question] = 0 if part.side == size else (1 if part.side < size else 2)
    if part.slot is None and part.judged and not isinstance(part.look, Face):
        for name, value in (("shape", part.look.shape), ("texture", part.look.texture), ("colour", part.look.bin)):
            row[name][question] = ANSWERS[name].index(value)


def train_language(out: Path, shape: Shape, plan: LanguagePlan) -> float:
    """Write tokenizers and trained encoders below `out` in diffusers' layout.

    The rows of DreamO's added tokens are left where T5 has its spare rows, from which an adapter's training starts.

    Returns:
        Share of answers that are right on phrases and looks that training did not show.
    """
    write_tokenizers(out, vocabulary())
    clip_size = len(json.loads((out / "tokenizer" / "vocab.json").read_text()))
    t5_size = Tokenizer.from_file(str(out / "tokenizer_2" / "tokenizer.json")).get_vocab_size()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)
        clip, t5 = make_clip(shape, clip_size), make_t5(shape, t5_size)
        reader = Reader(shape.text_width, shape.pooled_width)
    spare = t5.get_input_embeddings().weight.shape[0]
    for name, encoder in (("text_encoder", clip), ("text_encoder_2", t5)):
        encoder.save_pretrained(out / name)
    encoder = load_text(out, torch.float32, plan.tokens)
    encoder.add_placeholders(t5.get_input_embeddings().weight[t5_size : t5_size + len(ADDED_TOKENS)].detach())
    _fit(encoder, reader, plan)
    right = accuracy(encoder, reader, plan)
    encoder.t5.resize_token_embeddings(spare, mean_resizing=False)
    encoder.t5.config.vocab_size = spare
    _save(encoder.clip, out / "text_encoder")
    _save(encoder.t5, out / "text_encoder_2")
    return right


def _fit(encoder: PromptEncoder, reader: Reader, plan: LanguagePlan) -> None:
    trained = [*encoder.t5.parameters(), *encoder.clip.parameters(), *reader.parameters()]
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained, lr=plan.rate, betas=(0.9, 0.99), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, plan.rate, total_steps=plan.steps, pct_start=min(0.5, plan.warmup / plan.steps), cycle_momentum=False
    )
    for step in track(range(plan.steps), "language", console=Console(stderr=True)):
        scenes = drafts(plan, step)
        text, pooled = _features(encoder, scenes)
        truth = truths(scenes)
        loss = _loss(reader, text, pooled, truth) + _tag_loss(reader, text, named(encoder, scenes), truth)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()


def _features(encoder: PromptEncoder, scenes: Sequence[Draft]) -> tuple[Tensor, Tensor]:
    embeds = encoder.features([scene.prompt for scene in scenes])
    return torch.stack([one.text for one in embeds]), torch.stack([one.pooled for one in embeds])


def _loss(reader: Reader, text: Tensor, pooled: Tensor, truth: Mapping[str, Tensor]) -> Tensor:
    parts = [
        F.cross_entropy(logits.flatten(0, 1), truth[name].flatten(), _weights(name), ignore_index=_UNASKED)
        for name, logits in reader(text).items()
        if (truth[name] != _UNASKED).any()
    ]
    grounds = reader.grounds(pooled).unflatten(-1, (2, -1))
    target = truth["background"][:, [LEFT_GROUND, RIGHT_GROUND]]
    parts.append(F.cross_entropy(grounds.flatten(0, 1), target.flatten()))
    return torch.stack(parts).sum()


def named(encoder: PromptEncoder, scenes: Sequence[Draft]) -> Tensor:
    """Tokens that name a sticker of a scene or its place: rows (scene, token, cell), [n, 3]."""
    rows: list[tuple[int, int, int]] = []
    for number, scene in enumerate(scenes):
        prompt = scene.prompt
        encoded = encoder.t5_tokenizer.encode(prompt)
        start = 0
        for match in _PLACED.finditer(prompt):
            # Of a two-column prompt's sentences either can come first.
            second = prompt.rfind("the right is", 0, match.end()) > prompt.rfind("the left is", 0, match.end())
            cell = len(PLACES) * second + PLACES.index(match[1])
            rows += [
                (number, token, cell)
                for token, (word, (begin, end)) in enumerate(zip(encoded.tokens, encoded.offsets, strict=True))
                if start <= begin and end <= match.end() and word.strip("▁") in _NAMING and token < encoder.max_tokens
            ]
            start = match.end()
    return torch.tensor(rows)


def _tag_loss(reader: Reader, text: Tensor, names: Tensor, truth: Mapping[str, Tensor]) -> Tensor:
    scene, token, cell = names[truth["source"][names[:, 0], names[:, 2]] > 0].unbind(1)
    features = text[scene, token]
    parts = [F.cross_entropy(reader.cells(features), cell)]
    for name, layer in reader.tags.items():
        wanted = truth[name][scene, cell]
        if (wanted != _UNASKED).any():
            parts.append(F.cross_entropy(layer(features), wanted, _weights(name), ignore_index=_UNASKED))
    return torch.stack(parts).sum()


def _weights(name: str) -> Tensor | None:
    """Of the answers: most cells are empty, which says little."""
    return torch.tensor([0.1, *[1.0] * (len(ANSWERS[name]) - 1)]) if name == "source" else None


@torch.no_grad()
def accuracy(encoder: PromptEncoder, reader: Reader, plan: LanguagePlan, *, batches: int = 8) -> float:
    """Share of right answers among those that say something, on held-out phrases and looks."""
    right = asked = 0
    for step in range(batches):
        scenes = drafts(plan, step, "held_out")
        truth = truths(scenes)
        text, _ = _features(encoder, scenes)
        for name, logits in reader(text).items():
            known = truth[name] != _UNASKED
            if name == "source":
                known &= truth[name] > 0
            right += int((logits.argmax(-1) == truth[name])[known].sum())
            asked += int(known.sum())
    return right / asked


def _save(encoder: CLIPTextModel | T5EncoderModel, folder: Path) -> None:
    network: Any = encoder
    network.to(torch.bfloat16).save_pretrained(folder)


@app.command()
def main(
    out: Annotated[Path, typer.Argument(help="Model directory to write into, e.g. model/tiny.")],
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = LanguagePlan().steps,
    seed: Annotated[int, typer.Option(help="Of weights and prompts.")] = 0,
) -> None:
    """Train both text encoders, write them, and print how well held-out prompts are read."""
    right = train_language(out, Shape(), LanguagePlan(steps=steps, seed=seed))
    print(f"wrote {out}: {right:.3f} of the answers right on held-out prompts")


if __name__ == "__main__":
    app(prog_name="python -m workers.training.tiny.language")
