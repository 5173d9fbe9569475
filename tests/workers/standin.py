"""A small deterministic pipeline with the real one's contract, and a worker process around it.

    python -m tests.workers.standin [--burst]

`STANDIN_DIR` is where it notes each load and where a prompt's `gate:<name>` waits for the file `<name>` to appear; the
base model `slow` waits for `loaded` there.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.errors import DrawingError, UnusableReferenceError, WeightsError
from model.requests import ImageRequest, Reference
from model.spec import ModelSpec, flux_spec
from workers.inference.worker import run_worker
from workers.settings import WorkerSettings

LOADS = "loads"
BASE = "5" * 32
FAULTS: dict[str, Callable[[], Exception]] = {
    "oom": lambda: RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "memory": MemoryError,
    "face": lambda: UnusableReferenceError("no_face", "Send a picture with a face.", slot=1),
    "boom": lambda: KeyError("canary-in-an-exception"),
}


@dataclass(frozen=True, slots=True)
class Run:
    """Mirrors model.sampling.Denoising as far as a worker looks at it."""

    request: Any
    seed: int
    num_steps: int
    step: int = 0

    @property
    def done(self) -> bool:
        return self.step >= self.num_steps


class StandinPipeline:
    """Pixels follow from prompt, seed, steps and references alone. `on_step` is called before each step."""

    def __init__(self, on_step: Callable[[Run], None] | None = None, num_lanes: int = 1) -> None:
        self.on_step = on_step
        self.num_lanes = num_lanes
        self.requests: list[Any] = []
        self.warmed = False
        self.starts = 0
        self.shared = 0

    @property
    def spec(self) -> ModelSpec:
        return flux_spec("standin", 16, version="v1.1", turbo=True)

    def settle_thread(self) -> None:
        """Nothing here depends on threads."""

    def describe(self) -> dict[str, str | int | None]:
        return {
            "device": "none",
            "dtype": "uint8",
            "compiled": "false",
            "kernels": "none",
            "parameters": 0,
            "base": BASE,
            "torch": "none",
            "diffusers": "none",
            "transformers": "none",
        }

    def warm(self) -> None:
        self.warmed = True

    @property
    def key(self) -> str:
        return "standin"

    @property
    def preparation(self) -> str:
        return "none"

    def needs_negative(self, request: ImageRequest) -> bool:
        return request.true_cfg_scale > 1

    def prepare_reference(self, reference: Reference) -> Any:
        return reference

    def load_adapter(self, file: Path, made_for: str | None = None) -> Any:  # noqa: ARG002
        raise WeightsError("adapter_mismatch", f"nothing in a stand-in could be changed by {file.name}")

    def encode_prompt(self, prompt: str, adaptation: Any = None) -> Any:
        assert adaptation is None
        for word in prompt.split():
            if word in FAULTS:
                raise FAULTS[word]()
        return prompt.encode()

    def encode_reference(self, reference: Any) -> Any:
        return reference

    def assemble(
        self, request: ImageRequest, prompt: Any, negative: Any, references: Sequence[Any], adaptation: Any = None
    ) -> Any:
        """The request with its references, which `requests` collects."""
        assert adaptation is None
        assert prompt == request.prompt.encode()
        assert negative == (request.negative_prompt.encode() if self.needs_negative(request) else None)
        whole = replace(request, references=tuple(references))
        self.requests.append(whole)
        return whole

    def start(self, encoded: Any, seed: int, *, beside: Any = None) -> Any:
        assert beside is None or beside.request is encoded
        self.starts += 1
        self.shared += beside is not None
        return Run(encoded, seed, encoded.num_inference_steps)

    def group(self, run: Any) -> str:
        return type(run).__name__

    def num_tokens(self, run: Any) -> int:
        return 64 + run.request.height * run.request.width // 64

    def release_memory(self) -> None:
        """There is none to give back."""

    def step(self, runs: Sequence[Any]) -> Sequence[Any]:
        for run in runs:
            if self.on_step is not None:
                self.on_step(run)
        return tuple(replace(run, step=run.step + 1) for run in runs)

    def preview(self, run: Any) -> NDArray[np.uint8]:
        """A grey that grows with the steps."""
        return np.full((8, 8, 3), 255 * run.step // run.num_steps, np.uint8)

    def decode(self, run: Any) -> NDArray[np.uint8]:
        assert run.done
        if "nan" in run.request.prompt.split():
            raise DrawingError("not_finite", "The picture has numbers that are not finite.")
        return picture(run.request.prompt, run.seed, run.step, run.request.height, run.request.width)


def picture(prompt: str, seed: int, steps: int, height: int, width: int) -> NDArray[np.uint8]:
    """What the pipeline draws: uint8 [height, width, 3]."""
    words = [*prompt.encode(), seed % 2**32, seed >> 32, steps]
    return np.random.default_rng(words).integers(0, 256, (height, width, 3), dtype=np.uint8)


def gate_in(directory: Path) -> Callable[[Run], None]:
    """Hold a run before its second step until its gate's file is there."""

    def wait(run: Run) -> None:
        for word in run.request.prompt.split():
            while word.startswith("gate:") and run.step == 1 and not (directory / word[5:]).exists():
                time.sleep(0.005)

    return wait


def load(settings: WorkerSettings) -> StandinPipeline:
    """Note the load; the base model `absent` cannot be loaded."""
    if settings.base_model == "absent":
        raise WeightsError("model_not_found", "there is no such model: set DREAMSERVE_BASE_MODEL")
    directory = Path(os.environ["STANDIN_DIR"])
    while settings.base_model == "slow" and not (directory / "loaded").exists():
        time.sleep(0.005)
    with (directory / LOADS).open("a") as loads:
        loads.write(f"{os.getpid()}\n")
    return StandinPipeline(gate_in(directory))


if __name__ == "__main__":
    sys.exit(run_worker(WorkerSettings(), load, burst="--burst" in sys.argv))
