"""A loaded model as the worker drives it: preprocess → encode → start → step … → decode.

Each phase takes and returns frozen values, so the engine may run them wherever and with whomever it likes. The first
two are made of parts that depend on one prompt or one reference alone, which a worker may keep:
prepare_reference → encode_reference, encode_prompt → assemble.
"""

from __future__ import annotations

import logging
import platform
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch._dynamo.exc import TorchDynamoException

from kernels import dispatch
from model.compilation import compiled, keep_graphs
from model.errors import DrawingError, WeightsError
from model.lanes import Lanes, lanes_of
from model.network import Network, ready
from model.noise import Draws, SeededDraws
from model.packing import Condition, ReferenceTokens
from model.positions import Grid
from model.preprocessors.prepare import Tools, load_tools, prepare_reference, to_tensor_range
from model.previews import PreviewMap, fit_preview_map
from model.requests import ImageRequest, Reference
from model.roles import Role
from model.sampling import Denoising, Guidance, Sampler, begin
from model.schedule import sigmas
from model.spec import ModelSpec
from model.text import PromptEmbeds
from model.vae import pack_latents, shown
from model.weights.adapted import Adaptation, LoadedAdapter, load_adapter
from model.weights.checkpoints import LoadedModel, ModelSource, load_model

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PreparedReference:
    """A reference as the VAE takes it: uint8 [h, w, 3], both sides multiples of the cell.

    Only `slot` follows from where it stands; the rest is the same wherever the picture is sent.
    """

    slot: int
    role: Role
    pixels: NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class EncodedReference:
    """Posterior parameters [2C, 2·rows, 2·columns] of one reference."""

    slot: int
    role: Role
    moments: torch.Tensor
    grid: Grid


@dataclass(frozen=True, slots=True)
class EncodedRequest:
    """A request after both encoders; `start` draws an image's noise from it and reads no pixels of `request`.

    Attributes:
        adaptation: what its prompts were encoded with, and its images are drawn by; None: the model as it is served.
    """

    request: ImageRequest
    prompt: PromptEmbeds
    negative: PromptEmbeds | None
    references: tuple[EncodedReference, ...]
    adaptation: Adaptation | None = None


class Pipeline:
    """The model of one worker. Stateless between calls: everything about a request is in the values passed.

    Attributes:
        key: of this pipeline alone, never given again. What one of them has encoded is of no use to another.
    """

    def __init__(
        self,
        model: LoadedModel,
        tools: Tools,
        *,
        compile: Literal["auto", "on", "off"] = "off",
        compiler: Any = "inductor",
        lanes: int | None = None,
    ) -> None:
        """
        Args:
            compile: whether its blocks are compiled; `auto`: they run as they are if that fails.
            compiler: backend of `torch.compile`.
            lanes: forwards at once; by default what suits the device.
        """
        self.key = uuid.uuid4().hex
        self.model = model
        self.tools = tools
        self._network = ready(model.transformer)
        self._compile = compile
        self._preview_map: PreviewMap | None = None
        self._num_lanes = lanes or lanes_of(model.transformer.device, compiles=compile != "off")
        self._lay_lanes(self._network if compile == "off" else compiled(self._network, compiler))

    @property
    def spec(self) -> ModelSpec:
        return self.model.spec

    @property
    def num_lanes(self) -> int:
        """Forwards side by side."""
        return self._num_lanes

    def settle_thread(self) -> None:
        """For a thread that prepares or finishes beside the forwards: one core where lanes have one each."""
        if self._num_lanes > 1:
            torch.set_num_threads(1)

    def describe(self) -> dict[str, str | int | None]:
        """What runs here, for `/v1/models`, admission and the log. `base`: its fingerprint, None if nobody knows."""
        parameter = next(self.model.transformer.parameters())
        device = parameter.device
        return {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
            "dtype": str(parameter.dtype).removeprefix("torch."),
            "compiled": str(self._compile != "off").lower(),
            "kernels": "; ".join(f"{op}: {choice}" for op, choice in dispatch.describe().items()),
            "parameters": sum(p.numel() for p in self.model.transformer.parameters()),
            "base": self.model.base,
            "torch": torch.__version__,
            "diffusers": version("diffusers"),
            "transformers": version("transformers"),
        }

    @property
    def preparation(self) -> str:
        """By what references are prepared: tools, cell and the side of an identity reference."""
        tools = f"{type(self.tools.cutout).__name__} {type(self.tools.faces).__name__}"
        return f"{tools} {self.model.codec.cell} {self.spec.identity_resolution}"

    def preprocess(self, request: ImageRequest) -> tuple[PreparedReference, ...]:
        """Prepare the references of a request.

        Raises:
            UnusableReferenceError: naming the slot.
        """
        return tuple(self.prepare_reference(reference) for reference in request.references)

    def prepare_reference(self, reference: Reference) -> PreparedReference:
        """Cut out, align and resize one reference by its role. Nobody may write into its pixels.

        Raises:
            UnusableReferenceError: naming the slot.
        """
        pixels = prepare_reference(reference, self.model.codec.cell, self.spec.identity_resolution, self.tools)
        pixels.setflags(write=False)
        return PreparedReference(reference.slot, reference.role, pixels)

    def load_adapter(self, file: Path, made_for: str | None = None) -> LoadedAdapter:
        """Read an adapter's file onto the device. What is served stays as it is; nobody waits for it but the caller.

        Args:
            made_for: fingerprint of the base it was trained on, if that is known.

        Raises:
            AdapterError: see `adapted.load_adapter`.
        """
        return load_adapter(self.model, Adaptation(self._network, self.model.tables), file, made_for)

    def encode(
        self, request: ImageRequest, prepared: Sequence[PreparedReference], adaptation: Adaptation | None = None
    ) -> EncodedRequest:
        """Run the text encoders and the VAE encoder; the negative prompt only if true CFG will use it."""
        return self.assemble(
            request,
            self.encode_prompt(request.prompt, adaptation),
            self.encode_prompt(request.negative_prompt, adaptation) if self.needs_negative(request) else None,
            tuple(self.encode_reference(reference) for reference in prepared),
            adaptation,
        )

    def needs_negative(self, request: ImageRequest) -> bool:
        """Whether true CFG runs at any step, so that the negative prompt is read."""
        return request.true_cfg_scale > 1 and request.true_cfg_end > request.true_cfg_start

    def encode_prompt(self, prompt: str, adaptation: Adaptation | None = None) -> PromptEmbeds:
        """Features of a prompt from both text encoders, on the model's device."""
        return self.model.text.encode(prompt, adaptation and adaptation.placeholders)

    def encode_reference(self, reference: PreparedReference) -> EncodedReference:
        """The VAE posterior of one prepared reference."""
        height, width, _ = reference.pixels.shape
        return EncodedReference(
            reference.slot,
            reference.role,
            self.model.codec.moments(torch.from_numpy(to_tensor_range(reference.pixels))),
            self.model.codec.grid(height, width),
        )

    def assemble(
        self,
        request: ImageRequest,
        prompt: PromptEmbeds,
        negative: PromptEmbeds | None,
        references: Sequence[EncodedReference],
        adaptation: Adaptation | None = None,
    ) -> EncodedRequest:
        """The encoded parts of a request together.

        Args:
            negative: of the negative prompt; None unless the request `needs_negative`.
            references: in the request's order.
            adaptation: with which the prompts were encoded.
        """
        return EncodedRequest(request, prompt, negative, tuple(references), adaptation)

    def start(
        self, encoded: EncodedRequest, seed: int, draws: Draws | None = None, *, beside: Denoising | None = None
    ) -> Denoising:
        """One image of a request before its first step.

        Args:
            seed: 0 … 2**64 − 1.
            draws: replaces the draws that follow from the seed.
            beside: another image of the same encoded request, with which it shares what no seed changes.
        """
        draws = draws or SeededDraws(seed)
        request, codec = encoded.request, self.model.codec
        grid = codec.grid(request.height, request.width)
        noise = pack_latents(draws.target(codec.latent_shape(grid)))
        references = tuple(
            ReferenceTokens(
                reference.slot,
                reference.role,
                codec.sample(reference.moments, draws.reference(reference.slot, codec.latent_shape(reference.grid))),
                reference.grid,
            )
            for reference in encoded.references
        )
        condition = Condition(encoded.prompt.text, encoded.prompt.pooled, grid, references)
        negative = encoded.negative and Condition(encoded.negative.text, encoded.negative.pooled, grid, embedded=False)
        sampler, adaptation = self.lanes.samplers[0], encoded.adaptation
        return begin(
            adaptation.network if adaptation else sampler.network,
            adaptation.tables if adaptation else sampler.tables,
            condition,
            negative,
            guidance_of(request),
            sigmas(request.num_inference_steps, grid[0] * grid[1], self.model.shift),
            noise.to(condition.text.device, condition.text.dtype),
            beside,
        )

    def step(self, runs: Sequence[Denoising]) -> tuple[Denoising, ...]:
        """All runs one denoise step further, in one forward a lane; returns when the device has finished it.

        So a step's end means something: progress, cancellation and timings hang on it.

        Raises:
            ValueError: not all are of one `group`, or one is done.
        """
        moved = self.lanes.advance(runs, [self.num_tokens(run) for run in runs])
        if moved and moved[0].latents.is_cuda:
            torch.cuda.synchronize(moved[0].latents.device)
        return moved

    def group(self, run: Denoising) -> str:
        """Which runs can share a forward with this one: those of the same network, so of one adapter at one scale."""
        return f"{hash(run.network):x}"

    def num_tokens(self, run: Denoising) -> int:
        """Of a run's part of a forward: text, target and references, and those of true CFG's branch if it ever runs."""
        parts = [(run.condition, True), (run.negative, run.negative is not None)]
        return sum(
            len(condition.text) + rows * columns + sum(len(reference.tokens) for reference in condition.references)
            for condition, there in parts
            if there and condition is not None
            for rows, columns in [condition.target_grid]
        )

    def release_memory(self) -> None:
        """Give back what torch keeps for later, after a want of memory."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def decode(self, run: Denoising) -> NDArray[np.uint8]:
        """The picture of a finished run: uint8 [H, W, 3].

        Raises:
            DrawingError: `not_finite`: it would be black, or anything. Latents that are not finite show in pixels.
        """
        pixels = self.model.codec.develop(run.latents, run.condition.target_grid)
        if not bool(pixels.isfinite().all()):
            raise DrawingError(
                "not_finite",
                "The picture has numbers that are not finite: try a smaller scale of the adapter, or another seed. "
                "Without an adapter the server's operator has to look at the model.",
            )
        return (shown(pixels) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()

    def preview(self, run: Denoising) -> NDArray[np.uint8]:
        """What an unfinished run is heading for, a pixel a latent: uint8 [h, w, 3]."""
        if self._preview_map is None:
            self._preview_map = fit_preview_map(self.model.codec)
        return self._preview_map.picture(run)

    def warm(self) -> None:
        """Run every network at the default size, so that the first job pays for nothing; compiles what is compiled.

        Raises:
            WeightsError: `compile_failed`, if compilation was asked for; `not_finite`: it cannot draw.
        """
        try:
            self._warm_up()
        except TorchDynamoException as error:
            reason = str(error).partition("\n")[0][:300]
            remedy = "install a C and C++ compiler, or set DREAMSERVE_COMPILE=off"
            if self._compile == "on":
                raise WeightsError("compile_failed", f"the network cannot be compiled ({reason}): {remedy}") from error
            _LOG.warning("the network runs without torch.compile (%s): %s", reason, remedy)
            self._compile = "off"
            self._lay_lanes(self._network)
            self._warm_up()

    def _lay_lanes(self, network: Network) -> None:
        self.lanes = Lanes(lambda: Sampler(network, self.model.tables), self._num_lanes)

    def _warm_up(self) -> None:
        spec = self.spec
        request = ImageRequest(
            prompt="warm",
            negative_prompt="",
            references=(),
            height=int(spec.height.default),
            width=int(spec.width.default),
            num_inference_steps=1,
            guidance=spec.guidance.default,
            first_step_guidance=spec.guidance.default,
        )
        fresh = self.start(self.encode(request, ()), seed=0)
        (run,) = self.step([fresh])
        if self._compile != "off":
            self.step([fresh, fresh])  # A pack of several is a graph of its own.
        try:
            self.decode(run)
        except DrawingError as error:
            raise WeightsError(
                "not_finite",
                "the model draws numbers that are not finite: its files may be damaged, have them anew; or it needs "
                "DREAMSERVE_DTYPE=float32, DREAMSERVE_PRECISION=full or DREAMSERVE_COMPILE=off",
            ) from error


def guidance_of(request: ImageRequest) -> Guidance:
    """The guidance part of a request."""
    return Guidance(
        scale=request.guidance,
        first_step=request.first_step_guidance,
        true_scale=request.true_cfg_scale,
        start=request.true_cfg_start,
        end=request.true_cfg_end,
        negative=request.negative_guidance,
    )


def load_pipeline(source: ModelSource) -> Pipeline:
    """Load a model and the tools that prepare its references.

    Raises:
        WeightsError: anything that is missing or does not fit.
    """
    tools = load_tools(source.cutout, source.faces, str(source.torch_device()))
    model = load_model(source)
    device = model.transformer.device
    compiles = source.compile == "on" or (source.compile == "auto" and device.type == "cuda")
    if compiles and source.graphs is not None:
        keep_graphs(source.graphs, device)
    return Pipeline(model, tools, compile=source.compile if compiles else "off")
