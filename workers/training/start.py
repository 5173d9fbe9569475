"""From a recipe to a trainer that is ready to run: model, embeddings, records."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from model.roles import ADDED_TOKENS
from model.spec import ModelSpec, load_spec
from model.weights.adapters import EMBEDDINGS, MAIN, Adapter, read_adapter
from model.weights.checkpoints import (
    SHIPPED,
    LoadedModel,
    ModelSource,
    load_model,
    load_plain,
    load_text,
    quiet_libraries,
    resolve_base,
)
from workers.training.adapting import Embeddings, fresh_tables, start_from
from workers.training.recipes import Recipe, RecipeError
from workers.training.reports import StepReport
from workers.training.sources import DirectorySource, StickerSource, check_stages, open_source
from workers.training.trainer import Trainer


def prepare(recipe: Recipe, directory: Path, report: Callable[[StepReport], None]) -> Trainer:
    """Load what the recipe names.

    Raises:
        WeightsError: the base or its DreamO files.
        RecipeError: the records.
    """
    quiet_libraries()
    source = records_of(recipe)
    model = load_start(recipe)
    table = model.text.t5.get_input_embeddings().weight
    tables: dict[str, torch.Tensor] = dict(zip(EMBEDDINGS, (model.tables.type, model.tables.index, table), strict=True))
    trainer = Trainer(recipe, model, Embeddings(tables), source, directory, report)
    if (start := starting_adapter(recipe)) is not None:
        try:
            start_from(model.transformer, start.changes)
        except ValueError as error:
            raise RecipeError(f"model.adapter: {start.source}: {error}") from error
    return trainer


def starting_adapter(recipe: Recipe) -> Adapter | None:
    """What `model.adapter` names.

    Raises:
        WeightsError: it cannot be read.
    """
    match recipe.model.adapter:
        case None:
            return None
        case "own":
            return read_adapter(resolve_base(recipe.model.base or str(SHIPPED)) / "dreamo" / MAIN)
        case Path() as path:
            return read_adapter(path / MAIN if path.is_dir() else path)


def records_of(recipe: Recipe, spec: ModelSpec | None = None) -> StickerSource | DirectorySource:
    """The recipe's records, known to hold every task that a stage asks for.

    Args:
        spec: of the model that takes them; None reads the recipe's.

    Raises:
        RecipeError: see `sources.open_source` and `sources.check_stages`.
    """
    spec = spec or load_spec(recipe.model.base or str(SHIPPED))
    source = open_source(
        recipe.data,
        recipe.seed,
        cell=spec.cell,
        resolution=int(spec.width.default),
        reference_resolution=int(spec.reference_resolution.default),
    )
    check_stages(source, recipe.stages)
    return source


def own_device(environment: Mapping[str, str], *, cuda: bool) -> str:
    """Where this process computes: one of several that `torchrun` starts on a machine has the GPU of its number. All of
    the model goes there, also what is not trained and accelerate does not move."""
    number = environment.get("LOCAL_RANK")
    return f"cuda:{number}" if cuda and number is not None else "auto"


def load_start(recipe: Recipe) -> LoadedModel:
    """The model that training starts from."""
    part = recipe.model
    base = part.base or str(SHIPPED)
    device = own_device(os.environ, cuda=torch.cuda.is_available())
    source = ModelSource(base_model=base, dreamo=part.dreamo, version=part.version, dtype=part.dtype, device=device)
    if part.dreamo is not None:
        return load_model(source)
    if (start := starting_adapter(recipe)) is not None:
        return load_plain(source, start.embeddings)
    config = json.loads((resolve_base(base) / "transformer" / "config.json").read_bytes())
    width = config["num_attention_heads"] * config["attention_head_dim"]
    tables = fresh_tables(width, config["joint_attention_dim"], seed=recipe.seed)
    if part.placeholders == "spare":
        tables["dreamo_t5_embedding"] = spare_rows(resolve_base(base))
    return load_plain(source, tables)


def spare_rows(base: Path) -> torch.Tensor:
    """[10, Ct]: the rows that a base's T5 has right after its vocabulary.

    Raises:
        WeightsError: the encoder cannot be read.
        RecipeError: it has too few.
    """
    encoder = load_text(base, torch.float32, 1)
    first = encoder.t5_tokenizer.get_vocab_size()
    rows = encoder.t5.get_input_embeddings().weight[first : first + len(ADDED_TOKENS)].detach().clone()
    if len(rows) < len(ADDED_TOKENS):
        raise RecipeError(f"model.placeholders: the T5 of {base} has {len(rows)} spare rows: use `fresh`")
    return rows
