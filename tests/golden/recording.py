"""Drives the production code with recordings of the released DreamO pipeline and compares tensor by tensor.

A recording is a safetensors file: an end-to-end case, transformer weights after fusing, T5's table after the
placeholders are added, or reference preprocessing. Which one it is follows from its content.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from safetensors import safe_open

from model.blocks import double_block, single_block, to_request_order
from model.noise import ReleasedDraws
from model.packing import Kind, Layout, lay_out, pack
from model.pipeline import EncodedReference, EncodedRequest, Pipeline
from model.preprocessors.cutout import alpha_from_map
from model.preprocessors.faces import align_face, whiten
from model.preprocessors.prepare import area_size, load_tools, on_white, resize_area, resize_long, to_tensor_range
from model.requests import ImageRequest
from model.roles import Role
from model.sampling import Denoising, moved
from model.text import PromptEmbeds
from model.transformer import embed, embed_time, site_of, split_vectors
from model.weights.adapters import Version, fuse, read_adapter, stack
from model.weights.checkpoints import ModelSource, load_model, load_transformer

ROLES = {"ip": Role.SUBJECT, "id": Role.IDENTITY, "style": Role.STYLE}
DTYPES = {"torch.float32": "float32", "torch.bfloat16": "bfloat16"}


@dataclass(frozen=True, slots=True)
class Row:
    """One checked tensor.

    Attributes:
        error: the largest absolute difference; inf for another shape or other tokens.
        relative: ‖got − wanted‖ / ‖wanted‖ over all of it, where both are tensors of one shape.
    """

    name: str
    error: float
    relative: float = 0.0


@dataclass(frozen=True, slots=True)
class Recording:
    """A recorded file in memory."""

    path: Path
    tensors: Mapping[str, torch.Tensor]
    metadata: Mapping[str, str]

    @property
    def meta(self) -> dict[str, Any]:
        return json.loads(self.metadata["meta"])


@dataclass(frozen=True, slots=True)
class Assets:
    """Where the weights of a recording lie: `tiny_flux/` and `lora/` under `directory`."""

    directory: Path
    version: Version = "v1.1"
    turbo: bool = True

    def source(self, dtype: str) -> ModelSource:
        return ModelSource(
            base_model=str(self.directory / "tiny_flux"),
            dreamo=self.directory / "lora",
            version=self.version,
            turbo=self.turbo,
            dtype=dtype,
            device="cpu",
        )


def read_recording(path: Path) -> Recording:
    """Read a safetensors file with its metadata."""
    with safe_open(path, framework="pt") as file:
        names = file.keys()
        return Recording(path, {name: file.get_tensor(name) for name in names}, file.metadata() or {})


def check(recording: Recording, assets: Assets) -> Iterator[Row]:
    """Rows for every tensor of a recording that production code can reproduce."""
    tensors = recording.tensors
    if "final_latents_packed" in tensors:
        yield from check_case(recording, assets)
    elif "t5_input_embedding_after_prepare" in tensors:
        yield from check_t5_table(recording, assets)
    elif any(key.startswith("area0") for key in tensors):
        yield from check_preprocessing(recording)
    else:
        yield from check_fused(recording, assets)


def compare(name: str, got: torch.Tensor, wanted: torch.Tensor) -> Row:
    if tuple(got.shape) != tuple(wanted.shape):
        return Row(f"{name} {tuple(got.shape)} for {tuple(wanted.shape)}", float("inf"), float("inf"))
    difference = got.double() - wanted.double()
    largest = difference.abs().max()
    if torch.isnan(largest):
        return Row(name, float("inf"), float("inf"))
    return Row(name, float(largest), float(difference.norm() / wanted.double().norm().clamp(min=1e-12)))


def same(name: str, got: object, wanted: object) -> Row:
    return Row(name, 0.0) if got == wanted else Row(name, float("inf"), float("inf"))


def check_fused(recording: Recording, assets: Assets) -> Iterator[Row]:
    """Weights after fusing, and that nothing else changed."""
    dtype = DTYPES[str(next(iter(recording.tensors.values())).dtype)]
    source = assets.source(dtype)
    weights = load_transformer(source).transformer.state_dict()
    changed = fuse(
        weights,
        [
            (read_adapter(assets.directory / "lora" / f.path), f.weight)
            for f in stack(assets.version, turbo=assets.turbo)
        ],
    )
    yield same("names of the fused weights", set(changed), set(recording.tensors))
    for key, wanted in recording.tensors.items():
        yield compare(key, weights[key], wanted)


def check_t5_table(recording: Recording, assets: Assets) -> Iterator[Row]:
    model = load_model(assets.source("float32"))
    wanted = recording.tensors["t5_input_embedding_after_prepare"]
    yield compare("t5 table", model.text.t5.get_input_embeddings().weight, wanted)
    for token, number in json.loads(recording.metadata["tokens"]).items():
        yield same(token, model.text.t5_tokenizer.token_to_id(token), number)


def check_case(recording: Recording, assets: Assets) -> Iterator[Row]:
    """One recorded call, from tokens and pixels to the final latents."""
    wanted = Wanted(recording.tensors)
    meta = recording.meta
    model = load_model(assets.source(DTYPES[meta.get("dtype", "torch.float32")]))
    if "fuse_dtype" in meta:  # fused in one dtype, run in another
        fused = load_transformer(assets.source(DTYPES[meta["fuse_dtype"]])).transformer
        model.transformer.load_state_dict(fused.state_dict())
    pipeline = Pipeline(model, load_tools("grabcut", "opencv", "cpu"))
    yield from _check_prompt(pipeline, recording)
    encoded = _encoded(pipeline, recording)
    for number, reference in enumerate(encoded.references):
        yield from wanted.rows(f"ref{number}.vae_moments", reference.moments[None])
    run = pipeline.start(encoded, meta["seed"], ReleasedDraws(meta["seed"], meta["global_rng_seed"]))
    for number, reference in enumerate(run.condition.references):
        yield from wanted.rows(f"ref{number}.latents_packed", reference.tokens[None])
    yield from wanted.rows("init_latents_packed", run.latents[None])
    yield from wanted.rows("sigmas", run.sigmas)
    yield from wanted.rows("timesteps", run.sigmas[:-1] * 1000)
    yield from _check_layout(pipeline, run, wanted)
    yield from _check_depth(pipeline, run, wanted)
    while not run.done:
        parts = pipeline.lanes.samplers[0].velocities([run])[0]
        yield from _check_step(run, parts, wanted)
        run = moved(run, parts)
    yield compare("final_latents_packed", run.latents[None], recording.tensors["final_latents_packed"])
    if "image" in recording.tensors:
        image = model.codec.decode(run.latents, run.condition.target_grid)
        yield from wanted.rows("image", image[None])


@dataclass(frozen=True, slots=True)
class Wanted:
    """The recorded tensors. A recording need not hold all of them; what it holds is compared."""

    tensors: Mapping[str, torch.Tensor]

    def rows(self, name: str, got: torch.Tensor) -> Iterator[Row]:
        if name in self.tensors:
            yield compare(name, got, self.tensors[name])


def _check_prompt(pipeline: Pipeline, recording: Recording) -> Iterator[Row]:
    meta, text, wanted = recording.meta, pipeline.model.text, Wanted(recording.tensors)
    tokens = text.tokenize(meta["prompt"])
    if "t5_ids" in meta:
        yield same("t5_ids", list(tokens.t5), _trimmed(meta["t5_ids"], end=tokens.t5[-1]))
    if "clip_ids" in meta:
        yield same("clip_ids", list(tokens.clip), _trimmed(meta["clip_ids"], end=tokens.clip[-1]))
    if text.t5.dtype != torch.float32:
        return  # stored embeddings are used; in bfloat16 they depend on the release of transformers
    for prefix, prompt in (("", meta["prompt"]), ("negative_", meta.get("neg_prompt", ""))):
        embeds = text.encode(prompt)
        yield from wanted.rows(f"{prefix}prompt_embeds", embeds.text[None])
        yield from wanted.rows(f"{prefix}pooled_prompt_embeds", embeds.pooled[None])


def _trimmed(ids: list[int], end: int) -> list[int]:
    """Ids up to the end token, in case the recording is padded."""
    return ids[: ids.index(end) + 1]


def _encoded(pipeline: Pipeline, recording: Recording) -> EncodedRequest:
    """The recorded request after the encoders; stored prompt embeddings are used where there are any."""
    meta, tensors = recording.meta, recording.tensors
    codec, text = pipeline.model.codec, pipeline.model.text
    request = ImageRequest(
        prompt=meta["prompt"],
        negative_prompt=meta["neg_prompt"],
        references=(),
        height=meta["height"],
        width=meta["width"],
        num_inference_steps=meta["steps"],
        guidance=meta["guidance"],
        first_step_guidance=meta["first_step_guidance"],
        true_cfg_scale=meta["true_cfg"],
        true_cfg_start=meta["cfg_start_step"],
        true_cfg_end=meta["cfg_end_step"],
        negative_guidance=meta["neg_guidance"],
    )

    def embeds(prefix: str, prompt: str) -> PromptEmbeds:
        if f"{prefix}prompt_embeds" not in tensors:
            return text.encode(prompt)
        stored = tensors[f"{prefix}prompt_embeds"][0], tensors[f"{prefix}pooled_prompt_embeds"][0]
        return PromptEmbeds(*stored)

    references: list[EncodedReference] = []
    for number, reference in enumerate(meta["refs"]):
        pixels = tensors[f"ref{number}.img"][0]
        grid = codec.grid(pixels.shape[1], pixels.shape[2])
        role = ROLES[reference["task"]]
        references.append(EncodedReference(reference["idx"], role, codec.moments(pixels), grid))
    uses_negative = meta["true_cfg"] > 1 and meta["cfg_end_step"] > meta["cfg_start_step"]
    negative = embeds("negative_", meta["neg_prompt"]) if uses_negative else None
    return EncodedRequest(request, embeds("", meta["prompt"]), negative, tuple(references))


def _check_layout(pipeline: Pipeline, run: Denoising, wanted: Wanted) -> Iterator[Row]:
    layout: Layout = lay_out([run.condition])
    num_text = layout.num_text
    yield from wanted.rows("txt_ids", layout.ids[:num_text])
    yield from wanted.rows("img_ids", layout.ids[num_text:])
    yield from wanted.rows("embeddings", pipeline.model.tables.rows(layout)[None])
    references = [segment for segment in layout.segments if segment.kind is Kind.REFERENCE]
    for number, segment in enumerate(references):
        yield from wanted.rows(f"ref{number}.pos_ids", segment.ids)


def _check_step(run: Denoising, parts: list[torch.Tensor], wanted: Wanted) -> Iterator[Row]:
    name = f"step{run.step}"
    yield from wanted.rows(f"{name}.timestep_over_1000", run.timestep.reshape(1))
    yield from wanted.rows(f"{name}.guidance", torch.tensor([run.guidance.at(run.step)]))
    yield from wanted.rows(f"{name}.noise_pred_pos", parts[0][None])
    if f"{name}.noise_pred_pos" in wanted.tensors:
        yield same(f"{name}.branches", len(parts), 2 if f"{name}.noise_pred_neg" in wanted.tensors else 1)
    if len(parts) == 2 and run.negative is not None:
        yield from wanted.rows(f"{name}.noise_pred_neg", parts[1][None])
        yield from wanted.rows(f"{name}.neg_guidance", torch.tensor([run.guidance.negative]))
        layout = lay_out([run.negative])
        yield from wanted.rows(f"{name}.neg_img_ids", layout.ids[layout.num_text :])
    yield from wanted.rows(f"{name}.latents_after", moved(run, parts).latents[None])


@torch.inference_mode()
def _check_depth(pipeline: Pipeline, run: Denoising, wanted: Wanted) -> Iterator[Row]:
    """Outputs inside the first forward, block by block."""
    model, tables = pipeline.model.transformer, pipeline.model.tables
    layout = lay_out([run.condition])
    packed = pack(layout, [run.condition], [run.latents], [run.timestep], [run.guidance.at(0)])
    site = site_of(model, layout)
    embedded = embed(model, tables, packed)
    got = {"pos_embed.0": site.cos, "pos_embed.1": site.sin}
    got["x_embedder.0"] = (embedded.image - tables.rows(layout))[None]
    text, image = embedded.text, embedded.image
    _, *by_layer = split_vectors(model, embedded.vectors)
    vectors = iter(by_layer)
    for number, block in enumerate(model.transformer_blocks):
        text, image, _ = double_block(block, text, image, next(vectors), next(vectors), site)
        got[f"double{number}.0"], got[f"double{number}.1"] = text[None], image[None]
    joint = to_request_order(torch.cat([text, image]), site)
    for number, block in enumerate(model.single_transformer_blocks):
        joint, _ = single_block(block, joint, next(vectors), site)
        got[f"single{number}.0"] = joint[None]
    for key, value in got.items():
        yield from wanted.rows(f"deep.step0.{key}", value)
    time = wanted.tensors.get("deep.step0.time_text_embed.0")
    if time is not None:
        yield compare(
            "deep.step0.time_text_embed.0",
            embed_time(model, packed.timestep, packed.guidance, packed.pooled),
            torch.nn.functional.silu(time),
        )


def check_preprocessing(recording: Recording) -> Iterator[Row]:
    """Reference preparation after the networks: sizes, resizes, cut-out on white, face on white."""
    meta, tensors = recording.meta, {key: value.numpy() for key, value in recording.tensors.items()}
    for resolution, height, width, wanted in meta["resize_area_table"]:
        got = area_size(height, width, resolution, cell=16)
        yield same(f"area {height}x{width} at {resolution}", list(got), wanted)
    for number in range(3):
        side = round(meta[f"area{number}"] ** 0.5)
        got = resize_area(tensors[f"area{number}.in"], side, cell=16)
        yield _pixels(f"area{number}", got, tensors[f"area{number}.out"])
    yield _pixels("area0.tensor", to_tensor_range(tensors["area0.out"]), tensors["area0.tensor"][0])
    yield _pixels("long0", resize_long(tensors["long0.in"], meta["long0"]), tensors["long0.out"])
    rgb, face = tensors["face.in_rgb"], meta["face"]
    aligned = align_face(rgb, np.array(face["landmarks"], dtype=np.float32))
    yield _pixels("face.aligned", cv2.cvtColor(aligned, cv2.COLOR_RGB2BGR), tensors["face.aligned_bgr"])
    recorded = cv2.cvtColor(tensors["face.aligned_bgr"], cv2.COLOR_BGR2RGB)
    yield _pixels("face.out", whiten(recorded, tensors["face.labels"]), tensors["face.out_rgb"])
    image = tensors["ben2.in_rgb"]
    alpha = alpha_from_map(tensors["ben2.mask"][0, 0], image.shape[0], image.shape[1])
    yield _pixels("ben2.out", on_white(image, alpha), tensors["ben2.out_rgb"])


def _pixels(name: str, got: np.ndarray, wanted: np.ndarray) -> Row:
    return compare(name, torch.from_numpy(np.ascontiguousarray(got)), torch.from_numpy(wanted))
