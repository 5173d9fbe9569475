"""Find a face, bring it to the pose the networks were trained on, and drop what is not face or hair.

Landmarks are float32 [5, 2] of (x, y): left eye, right eye, nose, left and right corner of the mouth, as seen in the
picture. An aligned face is uint8 [512, 512, 3] RGB in FFHQ's pose.
"""

from __future__ import annotations

import threading
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, cast

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from model.preprocessors.cutout import Pixels, separate
from model.preprocessors.networks import imagenet_input, load_network, optional_attribute, safetensors_file

Landmarks = NDArray[np.float32]

FACE_SIDE = 512
FACE_TEMPLATE = np.array(
    [
        [192.98138, 239.94708],
        [318.90277, 240.1936],
        [256.63416, 314.01935],
        [201.26117, 371.41043],
        [313.08905, 371.15118],
    ]
)
"""Where FFHQ's 512×512 pictures have the five landmarks."""
OUTSIDE = (132, 133, 135)
"""RGB of what an aligned face shows beyond the picture's edge."""
DROPPED_LABELS = (0, 7, 8, 9, 14, 15, 16, 18)
"""BiSeNet's labels that become white: background, ears, earring, neck, necklace, cloth, hat."""


class Faces(Protocol):
    """Finds faces and tells them from what surrounds them."""

    def landmarks(self, pixels: Pixels) -> Landmarks | None:
        """Landmarks of the face whose box lies nearest the picture's centre; None without a usable face."""
        ...

    def keep(self, aligned: Pixels) -> Pixels:
        """Face and hair of an aligned face: alpha uint8 [512, 512]."""
        ...


class OpenCvFaces:
    """Faces without weights to download: OpenCV's bundled Haar cascades, and GrabCut around the head.

    Cascades are loaded for the first face: OpenCV 5 has none, and is good for all else.
    """

    def __init__(self) -> None:
        self._busy = threading.Lock()  # a cascade keeps scratch memory

    @cached_property
    def _face(self) -> cv2.CascadeClassifier:
        return _cascade("haarcascade_frontalface_alt2.xml")

    @cached_property
    def _eye(self) -> cv2.CascadeClassifier:
        return _cascade("haarcascade_eye.xml")

    def landmarks(self, pixels: Pixels) -> Landmarks | None:
        """Landmarks of the face nearest the centre, by its eyes; where they are not found, by its box."""
        grey = cv2.equalizeHist(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)).astype(np.uint8)
        height, width = grey.shape
        least = max(24, min(height, width) // 10)
        with self._busy:
            found = self._face.detectMultiScale(grey, 1.1, 5, minSize=(least, least))
            if len(found) == 0:
                return None
            boxes = np.array([[x, y, x + w, y + h] for x, y, w, h in found], dtype=np.float32)
            box = boxes[nearest_to_centre(boxes, height, width)]
            return landmarks_from_eyes(*self._eyes(grey, box))

    def keep(self, aligned: Pixels) -> Pixels:
        """Face and hair: alpha uint8 [512, 512]."""
        seeds = _HEAD.copy()
        seeds[(aligned == OUTSIDE).all(axis=2)] = cv2.GC_BGD
        return separate(aligned, seeds)

    def _eyes(self, grey: Pixels, box: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Centres (x, y) of both eyes: of the found pair that fits a face best, else where eyes mostly are."""
        left, top, right, bottom = (int(v) for v in box)
        side = right - left
        upper = grey[top : top + round(0.6 * (bottom - top)), left:right]
        least = max(8, side // 8)
        found = self._eye.detectMultiScale(upper, 1.05, 4, minSize=(least, least), maxSize=(side // 2, side // 2))
        centres = np.array([[x + w / 2, y + h / 2] for x, y, w, h in found], dtype=np.float32).reshape(-1, 2)
        expected = _EYES_IN_BOX * side
        eyes = expected.copy()
        for eye in range(2):
            distances = np.linalg.norm(centres - expected[eye], axis=1)
            if len(distances) == 0 or distances.min() > 0.13 * side:
                eyes = expected
                break
            eyes[eye] = centres[distances.argmin()]
        origin = np.array([left, top], dtype=np.float32)
        return eyes[0] + origin, eyes[1] + origin


class FacexlibFaces:
    """The released tools: facexlib's RetinaFace and BiSeNet, with the operator's converted weights.

    Args:
        directory: holds `detection_Resnet50_Final.safetensors` and `parsing_bisenet.safetensors`.
        device: torch device.

    Raises:
        WeightsError: the package or a file is missing, or a file is not that network's. The `.pth` files as
            published are pickles and are refused.
    """

    def __init__(self, directory: Path, device: str) -> None:
        files = [
            safetensors_file(directory, f"{name}.safetensors", CONVERT)
            for name in ("detection_Resnet50_Final", "parsing_bisenet")
        ]
        remedy = "install facexlib as docs/decisions/0007-preprocessors.md says, or set DREAMSERVE_FACES to opencv"
        retinaface = optional_attribute("facexlib.detection.retinaface", "RetinaFace", remedy)
        bisenet = optional_attribute("facexlib.parsing.bisenet", "BiSeNet", remedy)
        detector = retinaface(network_name="resnet50", device=torch.device(device))
        self._detector: Any = load_network(detector, files[0], device)
        self._parser = load_network(bisenet(num_class=19), files[1], device)
        self._device = device
        self._busy = threading.Lock()  # the detector keeps each picture's scale in itself

    def landmarks(self, pixels: Pixels) -> Landmarks | None:
        """Landmarks of the face nearest the centre, of those found with a confidence above 0.97."""
        bgr = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
        with self._busy, torch.inference_mode():
            faces = self._detector.detect_faces(bgr, 0.97)
        if len(faces) == 0:
            return None
        nearest = faces[nearest_to_centre(faces, pixels.shape[0], pixels.shape[1])]
        return nearest[5:15].reshape(5, 2).astype(np.float32)

    def keep(self, aligned: Pixels) -> Pixels:
        """Face and hair: alpha uint8 [512, 512]."""
        with self._busy, torch.inference_mode():
            scores = self._parser(imagenet_input(aligned).to(self._device))[0]
        return kept(scores.argmax(dim=1)[0].byte().cpu().numpy())


CONVERT = (
    "convert the published .pth once, by torch.load(file, weights_only=True) and safetensors.torch.save_file, "
    "or set DREAMSERVE_FACES to opencv"
)


def nearest_to_centre(boxes: NDArray[np.floating], height: int, width: int) -> int:
    """Index of the box (x0, y0, x1, y1, …) whose centre lies nearest the picture's; the first of equals."""
    centres = (boxes[:, 0:2] + boxes[:, 2:4]) / 2
    return int(np.linalg.norm(centres - np.array([width / 2, height / 2]), axis=1).argmin())


def landmarks_from_eyes(left: NDArray[np.float32], right: NDArray[np.float32]) -> Landmarks:
    """Five landmarks of a face of FFHQ's proportions with these eyes: one similarity maps them on the template."""
    template = FACE_TEMPLATE @ (1, 1j)
    turn = complex(*(right - left)) / (template[1] - template[0])
    points = complex(*left) + turn * (template - template[0])
    return np.stack([points.real, points.imag], axis=1).astype(np.float32)


def face_transform(landmarks: Landmarks) -> NDArray[np.float64] | None:
    """The similarity [2, 3] that brings landmarks to the template; None where they coincide."""
    estimated = cv2.estimateAffinePartial2D(landmarks, FACE_TEMPLATE, method=cv2.LMEDS)[0]
    transform = cast("NDArray[np.float64] | None", estimated)  # the stub forgets None
    if transform is None or not np.isfinite(transform).all() or abs(np.linalg.det(transform[:, :2])) < 1e-9:
        return None
    return transform


def align_face(pixels: Pixels, landmarks: Landmarks) -> Pixels:
    """The face in FFHQ's pose: uint8 [512, 512, 3] for a picture, [512, 512] for a mask (0 outside).

    Raises:
        ValueError: the landmarks coincide.
    """
    transform = face_transform(landmarks)
    if transform is None:
        raise ValueError("the landmarks of a face coincide")
    border = OUTSIDE if pixels.ndim == 3 else 0
    return cv2.warpAffine(
        pixels,
        transform,
        (FACE_SIDE, FACE_SIDE),
        borderMode=cv2.BORDER_CONSTANT,
        borderValue=border,  # pyright: ignore[reportArgumentType, reportCallIssue]  # the stub lacks a scalar
    ).astype(np.uint8)


def kept(labels: Pixels) -> Pixels:
    """BiSeNet's labels [h, w] → alpha: 255 where face or hair is, 0 elsewhere."""
    return np.where(np.isin(labels, DROPPED_LABELS), 0, 255).astype(np.uint8)


def whiten(aligned: Pixels, labels: Pixels) -> Pixels:
    """The aligned face [h, w, 3] with everything white that is not face or hair."""
    return np.where(kept(labels)[..., None] > 0, aligned, 255).astype(np.uint8)


_EYES_IN_BOX = np.array([[0.31, 0.40], [0.69, 0.40]], dtype=np.float32)
"""Where the eyes mostly lie in a box of the frontal cascade, in box sides."""


def _cascade(name: str) -> cv2.CascadeClassifier:
    return cv2.CascadeClassifier(str(Path(cv2.__file__).parent / "data" / name))


def _head_seeds() -> Pixels:
    """Where head and hair are in FFHQ's pose, as GrabCut labels [512, 512]. The hair may touch the upper edge."""
    seeds = np.full((FACE_SIDE, FACE_SIDE), cv2.GC_BGD, dtype=np.uint8)
    cv2.ellipse(seeds, (256, 256), (250, 330), 0, 0, 360, cv2.GC_PR_BGD, -1)
    cv2.ellipse(seeds, (256, 242), (165, 235), 0, 0, 360, cv2.GC_PR_FGD, -1)
    neck = np.zeros((FACE_SIDE, FACE_SIDE), dtype=np.uint8)
    neck[425:, 140:372] = 1
    cv2.ellipse(neck, (256, 300), (125, 176), 0, 0, 360, 0, -1)
    seeds[neck > 0] = cv2.GC_BGD
    cv2.ellipse(seeds, (256, 240), (115, 200), 0, 0, 360, cv2.GC_FGD, -1)
    return seeds


_HEAD = _head_seeds()
