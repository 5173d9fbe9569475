"""Loads a model: FLUX parts in diffusers layout, DreamO's files fused into the transformer, its vectors beside it.

Every file is safetensors; a checkpoint that lacks a tensor, or has one of another shape, is refused, never filled in.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel
from transformers.utils import logging as transformers_logging

from model.errors import WeightsError
from model.precision import check_device, quantized
from model.schedule import ShiftRule, read_shift_rule
from model.spec import ModelSpec, Version, load_spec, own_version
from model.text import PromptEncoder
from model.transformer import EmbeddingTables, Network
from model.vae import LatentCodec
from model.weights.adapters import EMBEDDINGS, MAIN, Adapter, AdapterFile, fuse, read_adapter, stack
from model.weights.fingerprints import fingerprint_of
from model.weights.parts import load_part

log = logging.getLogger(__name__)

SHIPPED = Path(__file__).parents[1] / "tiny"
"""The small model that comes with the project; its DreamO files lie in `dreamo/` beside the rest."""

FUSED_EMBEDDINGS = "dreamo_embeddings.safetensors"
_BASE_FILES = ["*/*.json", "*/*.txt", "*/*.model", "*/*.safetensors", "*.json"]


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where a model comes from and how it is loaded.

    Attributes:
        base_model: a directory in diffusers layout, or a hub id.
        dreamo: directory of the released DreamO files; None takes `<base_model>/dreamo`.
        fused: directory written by `dreamserve fuse`; replaces the base's transformer and `dreamo`.
        version: the stack of adapters; None takes the base's own.
        turbo: whether the Turbo adapter is in the stack (12 steps instead of 25 and more).
        dtype: `auto` is bfloat16 on CUDA, float32 elsewhere. device: `auto` prefers CUDA.
        cutout, faces: tools that prepare references; see `preprocessors.prepare.load_tools`.
        compile: whether `torch.compile` runs the blocks; `auto`: on CUDA, and without if it fails.
        graphs: where compiled graphs are kept for the next process; None: where torch does.
        precision: of the blocks' large products; see `model.precision`.
    """

    base_model: str = str(SHIPPED)
    dreamo: Path | None = None
    fused: Path | None = None
    version: Version | None = None
    turbo: bool = True
    dtype: str = "auto"
    device: str = "auto"
    cutout: str = "auto"
    faces: str = "auto"
    compile: Literal["auto", "on", "off"] = "auto"
    graphs: Path | None = None
    precision: Literal["full", "fp8", "int8"] = "full"

    @property
    def served_version(self) -> Version:
        """The stack's: the base's own where none is asked for."""
        return self.version or own_version(self.base_model)

    def stack(self) -> tuple[AdapterFile, ...]:
        """The adapter files, in fusing order."""
        return stack(self.served_version, turbo=self.turbo)

    def torch_device(self) -> torch.device:
        """The device to run on.

        Raises:
            WeightsError: `device_unavailable`: CUDA is asked for and there is none.
        """
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self.device.startswith("cuda") and not torch.cuda.is_available():
            raise WeightsError("device_unavailable", "DREAMSERVE_DEVICE is cuda, but torch finds no CUDA device")
        return torch.device(self.device)

    def torch_dtype(self) -> torch.dtype:
        """The dtype of all networks."""
        if self.dtype == "auto":
            return torch.bfloat16 if self.torch_device().type == "cuda" else torch.float32
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[self.dtype]


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """The parts of a model, on their device.

    Attributes:
        main: DreamO's main file, as it is fused into the transformer; None if it is not at hand.
        base: fingerprint of the transformer without adapters; None if that is not at hand and was not noted.
    """

    spec: ModelSpec
    transformer: FluxTransformer2DModel
    tables: EmbeddingTables
    text: PromptEncoder
    codec: LatentCodec
    shift: ShiftRule
    main: Path | None = None
    base: str | None = None


@dataclass(frozen=True, slots=True)
class FusedTransformer:
    """A transformer with its adapters fused in, DreamO's three embedding tensors and, if it is there, its main file."""

    transformer: FluxTransformer2DModel
    embeddings: dict[str, torch.Tensor]
    main: Path | None = None


def load_model(source: ModelSource) -> LoadedModel:
    """Load everything a worker needs.

    Raises:
        WeightsError: with a code and a sentence that names the file and the remedy.
    """
    quiet_libraries()
    return _assemble(source, load_transformer(source))


def load_plain(source: ModelSource, embeddings: Mapping[str, torch.Tensor]) -> LoadedModel:
    """FLUX without DreamO, as training starts from it, with the given embedding tensors.

    Args:
        embeddings: under the names of `adapters.EMBEDDINGS`.

    Raises:
        WeightsError: see `load_model`.
    """
    quiet_libraries()
    base = resolve_base(source.base_model)
    transformer = load_part(FluxTransformer2DModel, base, "transformer", source.torch_dtype())
    checked = check_embeddings("the given embeddings", dict(embeddings), transformer)
    return _assemble(source, FusedTransformer(transformer, checked))


def _assemble(source: ModelSource, fused: FusedTransformer) -> LoadedModel:
    device, dtype = source.torch_device(), source.torch_dtype()
    base = resolve_base(source.base_model)
    spec = load_spec(source.base_model, version=source.version, turbo=source.turbo)
    text = load_text(base, dtype, spec.text_tokens)
    text.add_placeholders(fused.embeddings["dreamo_t5_embedding"])
    vae = load_part(AutoencoderKL, base, "vae", dtype)
    tables = EmbeddingTables(
        fused.embeddings["dreamo_task_embedding"].to(device, dtype),
        fused.embeddings["dreamo_idx_embedding"].to(device, dtype),
    )
    if source.precision != "full":  # before the device gets to hold it, which may be too small for all of it
        check_device(source.precision, device)
        quantized(Network(fused.transformer), source.precision)
    for network in (fused.transformer, text.t5, text.clip, vae):
        cast("torch.nn.Module", network).to(device).eval().requires_grad_(False)
    shift = read_shift_rule(base / "scheduler" / "scheduler_config.json")
    return LoadedModel(spec, fused.transformer, tables, text, LatentCodec(vae), shift, fused.main, _base_of(source))


def quiet_libraries() -> None:
    """Silence progress bars and load reports: what they would say is checked and raised here."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    diffusers_logging.set_verbosity_error()


def resolve_base(base_model: str) -> Path:
    """The local directory of a path or hub id; a hub id is downloaded once.

    Raises:
        WeightsError: `model_not_found`.
    """
    path = Path(base_model)
    if not path.exists():
        try:
            path = Path(snapshot_download(base_model, allow_patterns=_BASE_FILES))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            raise WeightsError(
                "model_not_found",
                f"DREAMSERVE_BASE_MODEL={base_model!r} is neither a directory nor a hub repository that can be "
                f"had from here ({type(error).__name__})",
            ) from error
    if not (path / "transformer" / "config.json").is_file():
        raise WeightsError("model_not_found", f"{path} is not in diffusers layout: transformer/config.json is missing")
    return path


def load_transformer(source: ModelSource) -> FusedTransformer:
    """The transformer with DreamO fused in: from the `fused` directory, else base plus the released files."""
    dtype = source.torch_dtype()
    if source.fused is not None:
        _check_recipe(source, source.fused)
        transformer = load_part(FluxTransformer2DModel, source.fused, "transformer", dtype)
        embeddings = check_embeddings(
            str(source.fused / FUSED_EMBEDDINGS), _load_tensors(source.fused / FUSED_EMBEDDINGS), transformer
        )
        return FusedTransformer(transformer, embeddings, _main_of(source))
    base = resolve_base(source.base_model)
    directory = source.dreamo or base / "dreamo"
    if not directory.is_dir():
        raise WeightsError(
            "weights_missing",
            f"no DreamO files at {directory}: set DREAMSERVE_DREAMO to the directory that holds {MAIN}",
        )
    adapters = [(read_adapter(directory / f.path), f.weight) for f in source.stack()]
    transformer = load_part(FluxTransformer2DModel, base, "transformer", dtype)
    embeddings = check_embeddings(adapters[0][0].source, dict(adapters[0][0].embeddings), transformer)
    for adapter, _ in adapters:
        _report_unused(adapter)
    transformer.load_state_dict(fuse(transformer.state_dict(), adapters), strict=False)
    return FusedTransformer(transformer, embeddings, directory / MAIN)


def _main_of(source: ModelSource) -> Path | None:
    """DreamO's main file, where a model that has it fused in already may leave it out."""
    file = (source.dreamo or Path(source.base_model) / "dreamo") / MAIN
    return file if file.is_file() else None


def _base_of(source: ModelSource) -> str | None:
    """The base's fingerprint; what is fused already has noted which one it was made of."""
    if source.fused is not None:
        noted = _recipe(source.fused)
        if "base" in noted:
            return noted["base"]
    return fingerprint_of(resolve_base(source.base_model) / "transformer")


def _recipe(fused: Path) -> dict[str, Any]:
    """What `write_fused` has noted; empty: nothing."""
    file = fused / FUSED_EMBEDDINGS
    if not file.is_file():
        raise WeightsError("weights_missing", f"{file} is missing: run `dreamserve fuse` again")
    try:
        with safe_open(file, framework="pt") as opened:
            return dict(json.loads((opened.metadata() or {}).get("recipe", "{}")))
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise WeightsError("weights_format", f"{file} is not what `dreamserve fuse` writes: {error}") from error


def _check_recipe(source: ModelSource, fused: Path) -> None:
    """Refuse to serve a stack by the defaults of another; `main` has no Turbo in it, with or without."""
    noted = _recipe(fused)
    version, turbo = noted.get("version", source.served_version), noted.get("turbo", source.turbo)
    if version != source.served_version or (version != "main" and turbo != source.turbo):
        raise WeightsError(
            "fused_mismatch",
            f"{fused} was fused with {settings_of(version, turbo=turbo)}, and something else is set: set them so, "
            "or fuse anew",
        )


def settings_of(version: str, *, turbo: bool) -> str:
    """The variables by which a worker serves a stack."""
    return f"DREAMSERVE_VERSION={version} DREAMSERVE_TURBO={str(turbo).lower()}"


def write_fused(source: ModelSource, out: Path) -> None:
    """Fuse once and write `transformer/` (diffusers layout), the embedding tensors and how they were made.

    Raises:
        WeightsError: also `output_exists` when `out` holds files already.
    """
    if out.exists() and any(out.iterdir()):
        raise WeightsError("output_exists", f"{out} is not empty: name a new directory")
    quiet_libraries()
    fused = load_transformer(source)
    fused.transformer.save_pretrained(out / "transformer", safe_serialization=True)
    recipe = {
        "base_model": source.base_model,
        "base": _base_of(source),
        "version": source.served_version,
        "turbo": source.turbo,
        "dtype": str(source.torch_dtype()).removeprefix("torch."),
        "stack": [[f.name, f.path, f.weight] for f in source.stack()],
    }
    save_file(
        {key: tensor.contiguous() for key, tensor in fused.embeddings.items()},
        out / FUSED_EMBEDDINGS,
        metadata={"recipe": json.dumps(recipe)},
    )


def load_text(base: Path, dtype: torch.dtype, max_tokens: int) -> PromptEncoder:
    """Both tokenizers and text encoders of a FLUX directory, without DreamO's tokens."""
    tokenizer_file = base / "tokenizer_2" / "tokenizer.json"
    if not tokenizer_file.is_file():
        raise WeightsError("weights_missing", f"{tokenizer_file} is missing: T5's fast tokenizer is needed")
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokenizer.no_padding()  # a file may have been saved with either; both are ours to do
    tokenizer.no_truncation()
    return PromptEncoder(
        CLIPTokenizer.from_pretrained(base / "tokenizer"),
        load_part(CLIPTextModel, base, "text_encoder", dtype),
        tokenizer,
        load_part(T5EncoderModel, base, "text_encoder_2", dtype),
        max_tokens,
    )


def check_embeddings(
    source: str, embeddings: dict[str, torch.Tensor], transformer: FluxTransformer2DModel
) -> dict[str, torch.Tensor]:
    """The three tensors, with the shapes this transformer needs; T5's is checked where T5 is known."""
    width = transformer.config["num_attention_heads"] * transformer.config["attention_head_dim"]
    shapes = {"dreamo_task_embedding": (2, width), "dreamo_idx_embedding": (10, width)}
    for key in EMBEDDINGS:
        if key not in embeddings:
            raise WeightsError("weights_key_missing", f"{source} lacks {key}.weight: is it DreamO's main file?")
        if key in shapes and tuple(embeddings[key].shape) != shapes[key]:
            raise WeightsError(
                "weights_shape",
                f"{source}: {key} is {tuple(embeddings[key].shape)}, this transformer needs {shapes[key]}",
            )
    return {key: embeddings[key] for key in EMBEDDINGS}


def _load_tensors(file: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise WeightsError("weights_format", f"{file} is not a whole safetensors file: {error}") from error


def _report_unused(adapter: Adapter) -> None:
    if adapter.unused:
        log.warning("%s: %d keys not used, %s among them", adapter.source, len(adapter.unused), adapter.unused[0])
