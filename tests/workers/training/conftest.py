"""What tests of training share."""

from __future__ import annotations

from collections.abc import Generator

import pytest
import torch

from model.weights.checkpoints import LoadedModel, ModelSource, load_model


@pytest.fixture
def one_thread() -> Generator[None]:
    """Small tensors on several threads crawl when the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    """The shipped model with its DreamO adapter."""
    return load_model(ModelSource(device="cpu", dtype="float32"))
