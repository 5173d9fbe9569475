"""Reference preparation: the released sizes and rounding, which tool runs for which role, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from model.errors import UnusableReferenceError, WeightsError
from model.preprocessors.cutout import GrabCut
from model.preprocessors.faces import Landmarks, OpenCvFaces, align_face
from model.preprocessors.prepare import (
    Tools,
    area_size,
    load_tools,
    on_white,
    prepare_reference,
    resize_area,
    resize_long,
    to_tensor_range,
)
from model.requests import Reference
from model.roles import Role
from tests.model.portrait import Portrait, draw_portrait
from tests.model.preparation import recorded_meta, recorded_tensor

Pixels = NDArray[np.uint8]
sides = st.integers(1, 4096)
resolutions = st.sampled_from([32, 64, 512, 768, 1024])
cells = st.sampled_from([4, 8, 16])


class Untouchable:
    """Tools that fail the test when they are used."""

    def mask(self, pixels: Pixels) -> Pixels:
        raise AssertionError(f"a cut-out of {pixels.shape} was made")

    def landmarks(self, pixels: Pixels) -> Landmarks | None:
        raise AssertionError(f"a face was searched in {pixels.shape}")

    def keep(self, aligned: Pixels) -> Pixels:
        raise AssertionError(f"a face of {aligned.shape} was parsed")


class FindingOnly(Untouchable):
    """Finds faces but must not be asked what to keep."""

    def __init__(self, faces: OpenCvFaces) -> None:
        self._faces = faces

    def landmarks(self, pixels: Pixels) -> Landmarks | None:
        return self._faces.landmarks(pixels)


@pytest.fixture(scope="module")
def tools() -> Tools:
    """The weightless tools."""
    return load_tools("auto", "auto", "cpu")


@pytest.fixture(scope="module")
def portrait() -> Portrait:
    """A drawn portrait, 400x360."""
    return draw_portrait()


def reference(pixels: Pixels, role: Role, mask: Pixels | None = None, resolution: int = 64, slot: int = 3) -> Reference:
    return Reference(slot=slot, role=role, pixels=pixels, mask=mask, resolution=resolution)


def noise(height: int, width: int, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("row", recorded_meta()["resize_area_table"], ids=str)
def test_area_size_is_the_released_one(row: list[object]) -> None:
    """Every recorded size: one pixel off changes the number of tokens and every later value."""
    resolution, height, width, wanted = row
    assert list(area_size(height, width, resolution, cell=16)) == wanted  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("row", recorded_meta()["resize_long_table"], ids=str)
def test_long_edge_is_the_released_one(row: list[object]) -> None:
    """Every recorded size of the identity path; where the released code crashes we name the fault."""
    longest, height, width, wanted = row
    pixels = np.zeros((int(str(height)), int(str(width)), 3), dtype=np.uint8)
    if wanted == "error":
        with pytest.raises(UnusableReferenceError, match=r"references\[4\].*too thin") as refused:
            resize_long(pixels, int(str(longest)), slot=5)
        assert (refused.value.code, refused.value.slot) == ("reference_too_thin", 5)
    else:
        assert list(resize_long(pixels, int(str(longest))).shape[:2]) == wanted


@pytest.mark.parametrize("number", [0, 1, 2])
def test_area_resize_is_the_released_one(number: int) -> None:
    """Shrinking and enlarging give the recorded bytes."""
    side = round(recorded_meta()[f"area{number}"] ** 0.5)
    got = resize_area(recorded_tensor(f"area{number}.in"), side, cell=16)
    np.testing.assert_array_equal(got, recorded_tensor(f"area{number}.out"))


def test_long_resize_is_the_released_one() -> None:
    """The identity path's shrinking gives the recorded bytes."""
    got = resize_long(recorded_tensor("long0.in"), recorded_meta()["long0"])
    np.testing.assert_array_equal(got, recorded_tensor("long0.out"))


def test_tensor_range_is_the_released_one() -> None:
    """Float rounding of the VAE's input is the recorded one, bit for bit."""
    got = to_tensor_range(recorded_tensor("area0.out"))
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, recorded_tensor("area0.tensor")[0])


@given(height=sides, width=sides, resolution=resolutions, cell=cells)
def test_area_size_keeps_its_promises(height: int, width: int, resolution: int, cell: int) -> None:
    """Whole cells, no more area than asked, less than a cell lost on each side; else too thin, and truly so."""
    scale = resolution / (height * width) ** 0.5
    try:
        got = area_size(height, width, resolution, cell, slot=2)
    except UnusableReferenceError as refused:
        assert (refused.code, refused.slot) == ("reference_too_thin", 2)
        assert min(height, width) * scale < cell + 1e-6
        return
    assert got[0] % cell == got[1] % cell == 0
    assert got[0] * got[1] <= resolution**2
    for side, wanted in zip(got, (height * scale, width * scale), strict=True):
        assert wanted - cell - 1e-6 < side <= wanted + 1e-6


@settings(max_examples=25)
@given(
    height=st.integers(1, 160),
    width=st.integers(1, 160),
    seed=st.integers(0, 9),
    cell=cells,
    role=st.sampled_from([Role.SUBJECT, Role.GARMENT, Role.STYLE, Role.CONTENT]),
)
def test_any_picture_is_prepared_or_refused(
    height: int, width: int, seed: int, cell: int, role: Role, tools: Tools
) -> None:
    """No size or content crashes; what comes out fits the grid and is the same bytes the second time."""
    sent = reference(noise(height, width, seed), role)
    try:
        first = prepare_reference(sent, cell, 32, tools)
    except UnusableReferenceError as refused:
        assert (refused.code, refused.slot) == ("reference_too_thin", 3)
        return
    assert first.dtype == np.uint8
    assert first.shape[0] % cell == first.shape[1] % cell == 0
    assert first.shape[0] * first.shape[1] <= 64**2
    assert first.tobytes() == prepare_reference(sent, cell, 32, tools).tobytes()


@pytest.mark.parametrize("role", [Role.STYLE, Role.CONTENT])
def test_style_and_content_keep_their_background(role: Role) -> None:
    """Style and content references are resized only: no tool runs."""
    pixels = noise(90, 120)
    got = prepare_reference(reference(pixels, role), 8, 32, Tools(Untouchable(), Untouchable()))
    np.testing.assert_array_equal(got, resize_area(pixels, 64, 8))


@pytest.mark.parametrize("role", [Role.SUBJECT, Role.GARMENT, Role.STYLE])
def test_a_mask_goes_before_the_cut_out(role: Role) -> None:
    """The caller's mask decides what is kept, and no tool is asked."""
    pixels, mask = noise(64, 64), np.zeros((64, 64), dtype=np.uint8)
    mask[16:48, 8:56] = 255
    got = prepare_reference(reference(pixels, role, mask), 8, 32, Tools(Untouchable(), Untouchable()))
    expected = np.full_like(pixels, 255)
    expected[16:48, 8:56] = pixels[16:48, 8:56]
    np.testing.assert_array_equal(got, expected)


def test_a_subject_is_cut_out_on_white(tools: Tools) -> None:
    """A red ball before a green wall comes out red on white."""
    rows, columns = np.mgrid[:128, :128]
    ball = (rows - 64) ** 2 + (columns - 64) ** 2 < 40**2
    pixels = np.where(ball[..., None], (200, 40, 40), (60, 140, 70)).astype(np.uint8)
    got = prepare_reference(reference(pixels, Role.SUBJECT), 8, 32, tools)
    assert got.shape == (64, 64, 3)
    assert (got[:8] == 255).all()
    np.testing.assert_array_equal(got[32, 32], (200, 40, 40))


@pytest.mark.parametrize(("side", "cell", "shape"), [(512, 16, (512, 512, 3)), (32, 8, (32, 32, 3))])
def test_an_identity_becomes_an_aligned_square(
    side: int, cell: int, shape: tuple[int, ...], tools: Tools, portrait: Portrait
) -> None:
    """Face and hair on white at the model's size, whatever `resolution` says; the same bytes twice."""
    sent = reference(portrait.pixels, Role.IDENTITY, resolution=64)
    got = prepare_reference(sent, cell, side, tools)
    assert got.shape == shape
    assert (got[-side // 16 :] == 255).all()  # neck and clothes
    assert (got[: side // 8, : side // 8] == 255).all()  # wall
    red, green, blue = got[side * 5 // 8, side // 2].astype(int)
    assert 255 > red > green > blue > 60  # skin, at the nose
    assert got.tobytes() == prepare_reference(sent, cell, side, tools).tobytes()


def test_a_mask_goes_before_the_face_parser(tools: Tools, portrait: Portrait) -> None:
    """The caller's mask is aligned with the face and replaces the parser."""
    mask = np.zeros(portrait.pixels.shape[:2], dtype=np.uint8)
    mask[:190] = 255
    faces = OpenCvFaces()
    got = prepare_reference(
        reference(portrait.pixels, Role.IDENTITY, mask), 16, 512, Tools(Untouchable(), FindingOnly(faces))
    )
    landmarks = faces.landmarks(portrait.pixels)
    assert landmarks is not None
    aligned = align_face(portrait.pixels, landmarks)
    np.testing.assert_array_equal(got, on_white(aligned, align_face(mask, landmarks)))
    assert (got[300:] == 255).all()
    assert (got[200] != 255).any()


def test_without_a_face_an_identity_is_refused(tools: Tools) -> None:
    """The error names the reference and all three ways out."""
    with pytest.raises(UnusableReferenceError) as refused:
        prepare_reference(reference(noise(200, 200), Role.IDENTITY, slot=2), 8, 32, tools)
    assert (refused.value.code, refused.value.slot) == ("no_face", 2)
    for part in ("references[1]", "frontal face", "on_no_face", "role subject"):
        assert part in refused.value.message


def test_without_a_face_an_identity_may_be_a_subject(tools: Tools) -> None:
    """`on_no_face: subject` gives exactly what the role subject gives."""
    pixels = noise(200, 200)
    lenient = Reference(1, Role.IDENTITY, pixels, None, 64, on_no_face="subject")
    got = prepare_reference(lenient, 8, 32, tools)
    subject = prepare_reference(reference(pixels, Role.SUBJECT), 8, 32, tools)
    np.testing.assert_array_equal(got, subject)


def test_a_mask_that_keeps_nothing_is_refused(tools: Tools, portrait: Portrait) -> None:
    """An empty mask, and one that misses the face, would leave a white picture."""
    nothing = np.zeros(portrait.pixels.shape[:2], dtype=np.uint8)
    with pytest.raises(UnusableReferenceError) as refused:
        prepare_reference(reference(portrait.pixels, Role.SUBJECT, nothing), 8, 32, tools)
    assert (refused.value.code, refused.value.slot) == ("empty_cutout", 3)
    beside = nothing.copy()
    beside[380:, :20] = 255
    with pytest.raises(UnusableReferenceError) as refused:
        prepare_reference(reference(portrait.pixels, Role.IDENTITY, beside), 8, 32, tools)
    assert refused.value.code == "empty_cutout"
    assert "references[2]" in refused.value.message


def test_a_thin_reference_is_refused_by_slot(tools: Tools) -> None:
    """On each path the caller learns which reference to crop."""
    thin = np.full((2000, 1, 3), 90, dtype=np.uint8)
    for role in (Role.SUBJECT, Role.STYLE, Role.IDENTITY):
        with pytest.raises(UnusableReferenceError) as refused:
            prepare_reference(reference(thin, role, slot=7), 8, 32, tools)
        assert (refused.value.code, refused.value.slot) == ("reference_too_thin", 7)
        assert "references[6]" in refused.value.message


@pytest.mark.parametrize(("cutout", "faces"), [("auto", "auto"), ("grabcut", "opencv")])
def test_the_weightless_tools_always_load(cutout: str, faces: str) -> None:
    """Both names of the default."""
    loaded = load_tools(cutout, faces, "cpu")
    assert isinstance(loaded.cutout, GrabCut)
    assert isinstance(loaded.faces, OpenCvFaces)


@pytest.mark.parametrize(
    ("cutout", "faces", "variable"),
    [
        ("rembg", "auto", "DREAMSERVE_CUTOUT"),
        ("ben2", "auto", "DREAMSERVE_CUTOUT"),
        ("ben2:", "auto", "DREAMSERVE_CUTOUT"),
        ("auto", "insightface", "DREAMSERVE_FACES"),
        ("auto", "facexlib:", "DREAMSERVE_FACES"),
        ("auto", "opencv:here", "DREAMSERVE_FACES"),
    ],
)
def test_another_tool_is_refused_with_the_choices(cutout: str, faces: str, variable: str) -> None:
    """A slip in the settings stops the worker at start and says what may be written."""
    with pytest.raises(WeightsError, match=rf"{variable}=.*use auto") as refused:
        load_tools(cutout, faces, "cpu")
    assert refused.value.code == "weights_format"
