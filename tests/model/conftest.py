"""Loaded models that tests share."""

from pathlib import Path

import pytest

from model.weights.checkpoints import LoadedModel, ModelSource, load_model

GOLDEN = Path(__file__).parents[1] / "golden" / "assets"


@pytest.fixture(scope="session")
def tiny() -> LoadedModel:
    """The shipped model in float32 on the CPU."""
    return load_model(ModelSource(device="cpu", dtype="float32"))


@pytest.fixture(scope="session")
def recorded() -> ModelSource:
    """The tiny random FLUX of the recordings, cell 16, 512 text tokens."""
    return ModelSource(base_model=str(GOLDEN / "tiny_flux"), dreamo=GOLDEN / "lora", device="cpu", dtype="float32")
