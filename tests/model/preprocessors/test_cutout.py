"""Cut-outs: the released steps around BEN2, and that the weightless one finds what a picture shows."""

from __future__ import annotations

import importlib.util
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray
from safetensors.torch import save_file

from model.errors import WeightsError
from model.preprocessors.cutout import Ben2, GrabCut, alpha_from_map, ben2_input, plain_background
from model.preprocessors.prepare import on_white
from tests.model.preparation import overlap, recorded_tensor

Pixels = NDArray[np.uint8]

STAND_IN = """
import torch
class BEN_Base(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.head = torch.nn.Conv2d(3, 1, 3, padding=1)
    def forward(self, x):
        return self.head(x).sigmoid()
"""


def scene(shape: str, wall: str, side: int = 200, seed: int = 0) -> tuple[Pixels, Pixels]:
    """A drawn thing before a wall, with film grain; and its true mask."""
    rng = np.random.default_rng(seed)
    truth = np.zeros((side, side), dtype=np.uint8)
    middle = (side // 2, side // 2)
    match shape:
        case "ball":
            cv2.circle(truth, middle, side * 3 // 10, (255,), -1)
        case "bottle":  # stands on the lower edge
            cv2.rectangle(truth, (side * 3 // 10, side * 4 // 10), (side * 7 // 10, side), (255,), -1)
            cv2.rectangle(truth, (side * 45 // 100, side // 8), (side * 55 // 100, side // 2), (255,), -1)
        case _:  # a ring: the wall shows through
            cv2.circle(truth, middle, side * 27 // 100, (255,), side // 8)
    rows, columns = np.mgrid[:side, :side]
    stripes = 40 * np.sin(columns / 5 + rows / 11)
    thing = np.array([190, 70, 50]) + np.stack([stripes, stripes * 0.4, stripes * 0.2], axis=2)
    match wall:
        case "plain":
            behind = np.full((side, side, 3), 205.0)
        case "shaded":
            behind = np.stack([130 + rows / 4, 150 + rows / 5, 160 + columns / 5], axis=2)
        case _:
            blotches = rng.integers(0, 120, (9, 9), dtype=np.uint8)
            soft = cv2.resize(blotches, (side, side), interpolation=cv2.INTER_CUBIC).astype(float)
            behind = np.stack([soft * 0.3, 60 + soft, 40 + soft * 0.8], axis=2)
    grain = rng.normal(0, 1.0 if wall == "plain" else 5.0, (side, side, 1))
    share = cv2.GaussianBlur(truth, (0, 0), 0.7)[..., None] / 255
    return np.clip(thing * share + behind * (1 - share) + grain, 0, 255).astype(np.uint8), truth


def test_alpha_is_the_released_one() -> None:
    """BEN2's map to a picture on white: the recorded bytes, truncation and Pillow's blending included."""
    pixels = recorded_tensor("ben2.in_rgb")
    alpha = alpha_from_map(recorded_tensor("ben2.mask")[0, 0], pixels.shape[0], pixels.shape[1])
    np.testing.assert_array_equal(on_white(pixels, alpha), recorded_tensor("ben2.out_rgb"))


def test_what_ben2_sees_is_the_released_input() -> None:
    """Resize filter, channel order and normalisation: the recorded crop of the input, exactly."""
    got = ben2_input(recorded_tensor("ben2.in_rgb"))
    assert got.shape == (1, 3, 1024, 1024)
    crop = got[:, :, 300:316, 600:616].numpy()
    np.testing.assert_array_equal(crop, recorded_tensor("ben2.model_input_crop"))


def test_half_precision_is_normalised_in_half_precision() -> None:
    """As released on CUDA: rounded before the mean is taken off, not after."""
    pixels = recorded_tensor("ben2.in_rgb")
    got, exact = ben2_input(pixels, torch.float16), ben2_input(pixels)
    assert got.dtype == torch.float16
    assert not torch.equal(got, exact.half())
    assert (got.float() - exact).abs().max() < 5e-3


@pytest.mark.parametrize("value", [0.0, 0.7, float("nan")])
def test_a_map_that_says_nothing_keeps_the_picture(value: float) -> None:
    """The released code divides by zero here and pastes whatever the cast of NaN gives."""
    saliency = np.full((8, 8), value, dtype=np.float32)
    assert (alpha_from_map(saliency, 5, 7) == 255).all()


@given(
    saliency=arrays.arrays(np.float32, (6, 6), elements=st.floats(0, 1, width=32)),
    height=st.integers(6, 40),
    width=st.integers(6, 40),
)
def test_alpha_spans_the_whole_range(saliency: NDArray[np.float32], height: int, width: int) -> None:
    """Stretched: the most salient pixel is opaque and, unless the map says nothing, the least transparent."""
    alpha = alpha_from_map(saliency, height, width)
    assert alpha.shape == (height, width)
    assert alpha.max() == 255
    assert alpha.min() in (0, 255)


@pytest.mark.parametrize(
    ("shape", "wall"),
    [
        *((shape, wall) for shape in ("ball", "bottle") for wall in ("plain", "shaded", "blotched")),
        ("ring", "blotched"),  # before a plain wall the hole stays filled: the flood comes from the border only
    ],
)
def test_grabcut_finds_what_the_picture_shows(shape: str, wall: str) -> None:
    """Balls, a bottle on the lower edge, a ring with a hole, before three kinds of wall."""
    pixels, truth = scene(shape, wall)
    assert overlap(GrabCut().mask(pixels), truth) > 0.93


def test_white_on_white_keeps_the_inside() -> None:
    """A white shirt on a white page has the page's colour inside a faint outline: only the outside goes."""
    pixels = np.full((300, 300, 3), 252, dtype=np.uint8)
    cv2.rectangle(pixels, (70, 60), (230, 240), (238, 238, 240), -1)
    cv2.rectangle(pixels, (80, 70), (220, 230), (252, 252, 252), -1)
    truth = np.zeros((300, 300), dtype=np.uint8)
    truth[60:241, 70:231] = 255
    assert plain_background(pixels) is not None
    assert overlap(GrabCut().mask(pixels), truth) > 0.97


def test_specks_on_a_plain_wall_go() -> None:
    """Dust and small print beside the subject become background."""
    pixels, truth = scene("ball", "plain")
    cv2.circle(pixels, (20, 20), 3, (20, 20, 20), -1)
    cv2.putText(pixels, "shop", (140, 190), cv2.FONT_HERSHEY_PLAIN, 0.8, (90, 90, 90))
    mask = GrabCut().mask(pixels)
    assert mask[15:26, 15:26].max() == 0
    assert overlap(mask, truth) > 0.93


def test_a_shaded_wall_is_not_flooded() -> None:
    """A thing of the wall's middle grey before a shaded wall would be flooded away; GrabCut takes over."""
    pixels, _ = scene("ball", "shaded")
    assert plain_background(pixels) is None


@pytest.mark.parametrize("shape", [(1, 1), (3, 300), (300, 3), (15, 15), (64, 64), (64, 500)])
def test_a_picture_of_one_colour_is_kept_whole(shape: tuple[int, int]) -> None:
    """Nothing to tell apart, or too little of it: the whole picture, never a white one."""
    pixels = np.full((*shape, 3), 120, dtype=np.uint8)
    assert (GrabCut().mask(pixels) == 255).all()


@settings(max_examples=20)
@given(height=st.integers(1, 90), width=st.integers(1, 90), seed=st.integers(0, 99))
def test_any_picture_gets_a_mask_that_keeps_something(height: int, width: int, seed: int) -> None:
    """Noise of any size: the right shape, and something is kept."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    mask = GrabCut().mask(pixels)
    assert mask.shape == (height, width)
    assert mask.dtype == np.uint8
    assert mask.max() > 127


def test_the_same_pixels_give_the_same_mask() -> None:
    """OpenCV's GrabCut draws random numbers: neither earlier draws nor another thread may change a mask."""
    pixels, _ = scene("ball", "blotched")
    first = GrabCut().mask(pixels).tobytes()
    cv2.setRNGSeed(12345)
    cv2.randu(np.zeros((5, 5)), 0, 1)
    assert GrabCut().mask(pixels).tobytes() == first
    with ThreadPoolExecutor(2) as threads:
        masks = list(threads.map(lambda _: GrabCut().mask(pixels).tobytes(), range(4)))
    assert set(masks) == {first}


def test_the_picture_is_left_alone() -> None:
    """Cutting out does not write to the caller's pixels."""
    pixels, _ = scene("ball", "blotched")
    before = pixels.copy()
    pixels.setflags(write=False)
    GrabCut().mask(pixels)
    np.testing.assert_array_equal(pixels, before)


class Booby:
    """A pickle that leaves a file when it is opened."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, ...]:
        return (self.trace.touch, ())


@pytest.mark.parametrize("as_directory", [True, False])
def test_a_pickle_is_refused_unopened(tmp_path: Path, as_directory: bool) -> None:
    """BEN2_Base.pth, named or found, is not loaded; the message names the file that is."""
    trace = tmp_path / "opened"
    file = tmp_path / "BEN2_Base.pth"
    file.write_bytes(pickle.dumps(Booby(trace)))
    with pytest.raises(WeightsError, match=r"BEN2_Base\.pth.*model\.safetensors") as refused:
        Ben2(tmp_path if as_directory else file, "cpu")
    assert refused.value.code == "weights_format"
    assert not trace.exists()


def test_missing_weights_are_named(tmp_path: Path) -> None:
    """A wrong path stops the worker with the file it looked for."""
    with pytest.raises(WeightsError, match=r"model\.safetensors is missing") as refused:
        Ben2(tmp_path, "cpu")
    assert refused.value.code == "weights_missing"


@pytest.mark.skipif(importlib.util.find_spec("ben2") is not None, reason="ben2 is installed")
def test_a_missing_package_is_named(tmp_path: Path) -> None:
    """Weights without the package: the message says how to install it."""
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match="pip install --no-deps git") as refused:
        Ben2(tmp_path, "cpu")
    assert refused.value.code == "weights_missing"


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory for weights, and an importable `ben2` whose network is one convolution."""
    package = tmp_path / "site" / "ben2"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "modeling_ben2.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(package.parent)
    for name in ("ben2", "ben2.modeling_ben2"):
        monkeypatch.delitem(__import__("sys").modules, name, raising=False)
    weights = tmp_path / "weights"
    weights.mkdir()
    return weights


def test_ben2_runs_between_the_recorded_steps(stand_in: Path) -> None:
    """The adapter feeds the prepared picture to the network it loaded and turns that map into alpha."""
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(1, 3, 3, 3, generator=generator), torch.zeros(1)
    save_file({"head.weight": weight, "head.bias": bias}, stand_in / "model.safetensors")
    pixels, _ = scene("ball", "shaded", side=80)
    got = Ben2(stand_in, "cpu").mask(pixels)
    saliency = torch.nn.functional.conv2d(ben2_input(pixels), weight, bias, padding=1).sigmoid()
    np.testing.assert_array_equal(got, alpha_from_map(saliency[0, 0].numpy(), 80, 80))


@pytest.mark.parametrize(
    ("tensors", "code"),
    [
        ({"head.weight": torch.zeros(1, 3, 3, 3)}, "weights_key_missing"),
        ({"head.weight": torch.zeros(1, 3, 5, 5), "head.bias": torch.zeros(1)}, "weights_shape"),
        (None, "weights_format"),
    ],
)
def test_another_networks_weights_are_refused(
    stand_in: Path, tensors: dict[str, torch.Tensor] | None, code: str
) -> None:
    """A missing tensor, another shape and a torn file each have their code and name the file."""
    file = stand_in / "model.safetensors"
    if tensors is None:
        file.write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{}")
    else:
        save_file(tensors, file)
    with pytest.raises(WeightsError, match=r"model\.safetensors") as refused:
        Ben2(file, "cpu")
    assert refused.value.code == code
