"""What is not a number is no picture: neither a job's nor the first that a worker draws."""

from __future__ import annotations

import copy
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from typing import cast

import numpy as np
import pytest
import torch
from torch import nn

from model.errors import DrawingError, WeightsError
from model.pipeline import Pipeline
from model.preprocessors.prepare import load_tools
from model.vae import LatentCodec
from model.weights.checkpoints import LoadedModel
from tests.model.drawing import begun


@pytest.fixture
def pipeline(tiny: LoadedModel) -> Pipeline:
    return Pipeline(tiny, load_tools("grabcut", "opencv", "cpu"))


@contextmanager
def damaged(module: nn.Module, value: float) -> Generator[None]:
    """One number of a layer's bias is another, for a while."""
    bias = cast("torch.Tensor", module.bias)
    kept = bias[0].clone()
    bias[0] = value
    yield
    bias[0] = kept


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_latents_that_are_not_finite_are_no_picture(pipeline: Pipeline, value: float) -> None:
    """One of them, which the VAE spreads over a part; the same run with its own latents is a picture."""
    run = begun(pipeline)
    assert pipeline.decode(run).dtype == np.uint8
    latents = run.latents.clone()
    latents[3, 5] = value
    with pytest.raises(DrawingError) as refused:
        pipeline.decode(replace(run, latents=latents))
    assert refused.value.code == "not_finite"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_pixels_that_are_not_finite_are_no_picture(tiny: LoadedModel, value: float) -> None:
    """Also infinite ones, which would be cut to white; and no model that draws them is served."""
    vae = copy.deepcopy(tiny.codec.vae)
    pipeline = Pipeline(replace(tiny, codec=LatentCodec(vae)), load_tools("grabcut", "opencv", "cpu"))
    run = begun(pipeline)
    with damaged(vae.decoder.conv_out, value):
        with pytest.raises(DrawingError):
            pipeline.decode(run)
        with pytest.raises(WeightsError, match="DREAMSERVE_DTYPE") as refused:
            pipeline.warm()
    assert refused.value.code == "not_finite"
    pipeline.warm()


def test_a_transformer_that_is_not_finite_is_not_served(tiny: LoadedModel) -> None:
    """One number of one layer suffices: the first picture tells."""
    model = replace(tiny, transformer=copy.deepcopy(tiny.transformer))
    pipeline = Pipeline(model, load_tools("grabcut", "opencv", "cpu"))
    with damaged(cast("nn.Module", model.transformer.proj_out), float("nan")), pytest.raises(WeightsError) as refused:
        pipeline.warm()
    assert refused.value.code == "not_finite"
