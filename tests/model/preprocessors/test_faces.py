"""Faces: the released alignment and whitening, and that the weightless detector finds a drawn face."""

from __future__ import annotations

import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.torch import save_file

from model.errors import WeightsError
from model.preprocessors.faces import (
    DROPPED_LABELS,
    FACE_TEMPLATE,
    OUTSIDE,
    FacexlibFaces,
    OpenCvFaces,
    align_face,
    face_transform,
    kept,
    landmarks_from_eyes,
    nearest_to_centre,
    whiten,
)
from model.preprocessors.networks import imagenet_input
from tests.model.portrait import draw_portrait
from tests.model.preparation import overlap, recorded_meta, recorded_tensor

coordinates = st.floats(-2000, 2000, width=32)

STAND_IN_DETECTOR = """
import numpy as np
import torch
class RetinaFace(torch.nn.Module):
    def __init__(self, network_name, device):
        super().__init__()
        assert network_name == "resnet50"
        self.weight = torch.nn.Parameter(torch.zeros(2, 15))
        self.blue = None
    def detect_faces(self, image, threshold):
        assert threshold == 0.97
        self.blue = image[0, 0, 0]
        return self.weight.numpy() if self.blue == 190 else np.zeros((0, 15), np.float32)
"""
STAND_IN_PARSER = """
import torch
class BiSeNet(torch.nn.Module):
    def __init__(self, num_class):
        super().__init__()
        self.scores = torch.nn.Conv2d(3, num_class, 1)
        self.norm = torch.nn.BatchNorm2d(3)
    def forward(self, x):
        return self.scores(x), None, None
"""


@pytest.fixture(scope="module")
def faces() -> OpenCvFaces:
    """The weightless detector."""
    return OpenCvFaces()


def recorded_landmarks() -> NDArray[np.float32]:
    return np.array(recorded_meta()["face"]["landmarks"], dtype=np.float32)


def test_the_aligned_face_is_the_released_one() -> None:
    """Estimator, template, interpolation and border colour: the recorded bytes."""
    aligned = align_face(recorded_tensor("face.in_rgb"), recorded_landmarks())
    np.testing.assert_array_equal(aligned[..., ::-1], recorded_tensor("face.aligned_bgr"))


def test_the_transform_is_the_released_one() -> None:
    """The recorded affine, to the last bits of a double."""
    transform = face_transform(recorded_landmarks())
    assert transform is not None
    np.testing.assert_allclose(transform, recorded_meta()["face"]["affine"], rtol=0, atol=1e-12)


def test_the_whitened_face_is_the_released_one() -> None:
    """Exactly the recorded labels turn white: ears, neck and hats go, hair and glasses stay."""
    aligned = recorded_tensor("face.aligned_bgr")[..., ::-1]
    got = whiten(aligned, recorded_tensor("face.labels"))
    np.testing.assert_array_equal(got, recorded_tensor("face.out_rgb"))
    assert set(range(19)) - set(DROPPED_LABELS) == {1, 2, 3, 4, 5, 6, 10, 11, 12, 13, 17}


def test_what_the_parser_sees_is_the_released_input() -> None:
    """Channel order and normalisation of the parser's input: the recorded crop, exactly."""
    got = imagenet_input(recorded_tensor("face.aligned_bgr")[..., ::-1])
    crop = got[:, :, 200:216, 200:216].numpy()
    np.testing.assert_array_equal(crop, recorded_tensor("face.parser_input_crop"))


def test_the_picked_face_is_the_released_one() -> None:
    """Not the surest or the first box: the one nearest the centre of the picture."""
    face = recorded_meta()["face"]
    boxes = np.array(face["boxes"], dtype=np.float32)
    height, width = recorded_tensor("face.in_rgb").shape[:2]
    picked = nearest_to_centre(boxes, height, width)
    assert picked == 1
    np.testing.assert_allclose(boxes[picked, 5:15].reshape(5, 2), face["landmarks"], rtol=1e-6)


@given(
    boxes=st.lists(st.tuples(*[st.integers(0, 500)] * 4), min_size=1, max_size=6),
    height=st.integers(1, 500),
    width=st.integers(1, 500),
)
def test_no_box_is_nearer_than_the_picked_one(boxes: list[tuple[int, int, int, int]], height: int, width: int) -> None:
    """Against the definition, in whole numbers; of equals the first."""
    doubled = [(x0 + x1 - width) ** 2 + (y0 + y1 - height) ** 2 for x0, y0, x1, y1 in boxes]
    assert nearest_to_centre(np.array(boxes, dtype=np.float64), height, width) == doubled.index(min(doubled))


@given(left=st.tuples(coordinates, coordinates), right=st.tuples(coordinates, coordinates))
def test_eyes_land_where_the_template_has_them(left: tuple[float, float], right: tuple[float, float]) -> None:
    """Two eyes give five landmarks that one similarity takes onto the template, unless the eyes coincide."""
    eyes = np.array([left, right], dtype=np.float32)
    distance = np.linalg.norm(eyes[1] - eyes[0])
    if distance < 1:
        return
    landmarks = landmarks_from_eyes(eyes[0], eyes[1])
    np.testing.assert_allclose(landmarks[:2], eyes, atol=1e-3 * max(1, np.abs(eyes).max()))
    transform = face_transform(landmarks)
    assert transform is not None
    mapped = landmarks @ transform[:, :2].T + transform[:, 2]
    # float32 coordinates up to 2000 are exact to 1e-4 pixels, enlarged by 126 / distance.
    np.testing.assert_allclose(mapped, FACE_TEMPLATE, atol=0.1 + 60 / distance)


def test_landmarks_that_coincide_are_no_face() -> None:
    """A degenerate detection has no transform, and aligning by it is an error of the caller."""
    point = np.full((5, 2), 50, dtype=np.float32)
    assert face_transform(point) is None
    with pytest.raises(ValueError, match="coincide"):
        align_face(np.zeros((90, 90, 3), dtype=np.uint8), point)


@pytest.mark.parametrize(
    ("size", "centre", "scale", "degrees"),
    [
        ((400, 360), (180, 190), 1.0, 0.0),
        ((400, 360), (180, 190), 1.0, 8.0),
        ((400, 360), (120, 150), 0.6, 0.0),
        ((600, 600), (300, 300), 1.4, -6.0),
        ((700, 900), (300, 300), 1.0, 0.0),
    ],
)
def test_a_drawn_face_is_found(
    size: tuple[int, int], centre: tuple[float, float], scale: float, degrees: float, faces: OpenCvFaces
) -> None:
    """Large and small, tilted and off the centre: the eyes lie within a tenth of their distance."""
    portrait = draw_portrait(*size, centre=centre, scale=scale, degrees=degrees)
    landmarks = faces.landmarks(portrait.pixels)
    assert landmarks is not None
    assert landmarks.shape == (5, 2)
    distance = np.linalg.norm(portrait.eyes[1] - portrait.eyes[0])
    assert np.abs(landmarks[:2] - portrait.eyes).max() < 0.1 * distance
    again = faces.landmarks(portrait.pixels)
    assert again is not None
    assert again.tobytes() == landmarks.tobytes()


def test_of_two_faces_the_central_one_is_taken(faces: OpenCvFaces) -> None:
    """The smaller face in the middle goes before the larger one beside it."""
    large = draw_portrait(600, 800, centre=(140, 250), scale=1.3)
    both = draw_portrait(600, 800, centre=(430, 280), scale=0.9, onto=large.pixels)
    landmarks = faces.landmarks(both.pixels)
    assert landmarks is not None
    assert np.abs(landmarks[:2] - both.eyes).max() < 8


@pytest.mark.parametrize("kind", ["noise", "one colour", "one pixel", "upside down"])
def test_where_no_face_is_none_is_found(kind: str, faces: OpenCvFaces) -> None:
    """No false face, and no crash on degenerate pictures."""
    pixels = {
        "noise": np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8),
        "one colour": np.full((300, 300, 3), 128, dtype=np.uint8),
        "one pixel": np.zeros((1, 1, 3), dtype=np.uint8),
        "upside down": np.ascontiguousarray(draw_portrait().pixels[::-1]),
    }[kind]
    assert faces.landmarks(pixels) is None


@pytest.mark.parametrize(("scale", "degrees"), [(1.0, 0.0), (1.4, 8.0)])
def test_face_and_hair_are_kept(scale: float, degrees: float, faces: OpenCvFaces) -> None:
    """Hair stays; wall, neck and clothes go."""
    portrait = draw_portrait(600, 600, centre=(300, 300), scale=scale, degrees=degrees)
    landmarks = faces.landmarks(portrait.pixels)
    assert landmarks is not None
    aligned = align_face(portrait.pixels, landmarks)
    keep = faces.keep(aligned)
    assert keep.shape == (512, 512)
    assert overlap(keep, align_face(portrait.head, landmarks)) > 0.9
    assert keep[490:, 200:312].max() < 128


def test_what_lies_beyond_the_picture_goes(faces: OpenCvFaces) -> None:
    """A face at the edge is aligned onto grey, which is not kept."""
    portrait = draw_portrait(300, 260, centre=(95, 130))
    landmarks = faces.landmarks(portrait.pixels)
    assert landmarks is not None
    aligned = align_face(portrait.pixels, landmarks)
    beyond = align_face(np.full((300, 260), 255, dtype=np.uint8), landmarks) == 0
    assert beyond.sum() > 5000
    np.testing.assert_array_equal(aligned[beyond], np.broadcast_to(OUTSIDE, (int(beyond.sum()), 3)))
    inside = cv2.erode(beyond.astype(np.uint8), np.ones((9, 9), np.uint8)) > 0
    assert faces.keep(aligned)[inside].max() < 128


@pytest.mark.parametrize("name", ["detection_Resnet50_Final", "parsing_bisenet"])
def test_published_pickles_are_refused(tmp_path: Path, name: str) -> None:
    """The .pth files facexlib publishes are not loaded; the message says how to convert them."""
    for other in ("detection_Resnet50_Final", "parsing_bisenet"):
        save_file({"x": torch.zeros(1)}, tmp_path / f"{other}.safetensors")
    (tmp_path / f"{name}.safetensors").rename(tmp_path / f"{name}.pth")
    with pytest.raises(WeightsError, match=rf"{name}\.pth.*convert.*save_file") as refused:
        FacexlibFaces(tmp_path, "cpu")
    assert refused.value.code == "weights_format"


def test_missing_face_weights_are_named(tmp_path: Path) -> None:
    """A wrong directory stops the worker with the file it looked for."""
    with pytest.raises(WeightsError, match=r"detection_Resnet50_Final\.safetensors is missing") as refused:
        FacexlibFaces(tmp_path / "nowhere", "cpu")
    assert refused.value.code == "weights_missing"


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with weights, and an importable `facexlib` with two networks of one layer."""
    site = tmp_path / "site"
    for package, module, text in (
        ("detection", "retinaface", STAND_IN_DETECTOR),
        ("parsing", "bisenet", STAND_IN_PARSER),
    ):
        folder = site / "facexlib" / package
        folder.mkdir(parents=True)
        (folder / "__init__.py").touch()
        (folder / f"{module}.py").write_text(text)
    (site / "facexlib" / "__init__.py").touch()
    for name in [name for name in sys.modules if name.partition(".")[0] == "facexlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(site)
    found = torch.tensor(recorded_meta()["face"]["boxes"])
    # Data-parallel training leaves the prefix; the published detector has it.
    save_file({"module.weight": found}, tmp_path / "detection_Resnet50_Final.safetensors")
    weight = torch.zeros(19, 3, 1, 1)
    weight[17, 0], weight[16, 2] = 1.0, 1.0  # red is hair, blue is cloth
    parser = {"scores.weight": weight, "scores.bias": torch.zeros(19)}
    parser |= {f"norm.{key}": torch.ones(3) for key in ("weight", "bias", "running_mean", "running_var")}
    save_file(parser, tmp_path / "parsing_bisenet.safetensors")
    return tmp_path


def test_facexlib_runs_between_the_recorded_steps(stand_in: Path) -> None:
    """The adapter hands the detector BGR, picks the central face, and drops what the parser calls cloth."""
    tools = FacexlibFaces(stand_in, "cpu")
    pixels = np.full((300, 260, 3), (150, 170, 190), dtype=np.uint8)
    landmarks = tools.landmarks(pixels)
    assert landmarks is not None
    np.testing.assert_allclose(landmarks, recorded_landmarks(), rtol=1e-6)
    assert tools.landmarks(np.ascontiguousarray(pixels[..., ::-1])) is None
    aligned = np.full((512, 512, 3), (250, 20, 20), dtype=np.uint8)
    aligned[256:] = (20, 20, 250)
    keep = tools.keep(aligned)
    assert (keep[:256] == 255).all()
    assert (keep[256:] == 0).all()
    labels = np.where(np.arange(512)[:, None] < 256, 17, 16).astype(np.uint8).repeat(512, axis=1)
    np.testing.assert_array_equal(keep, kept(labels))
