"""Find what a picture shows: pixels uint8 [h, w, 3] RGB → alpha uint8 [h, w], 255 = keep.

`GrabCut` needs no weights and is the default. `Ben2` is what the released DreamO uses; its package and weights are
the operator's to bring, so nothing of it is imported before it is asked for.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image

from model.preprocessors.networks import imagenet_input, load_network, optional_attribute, safetensors_file

Pixels = NDArray[np.uint8]

_PLAIN_SIDE = 1024
"""Longest side, in pixels, at which a plain background is flooded; edges keep their detail."""
_GRABCUT_SIDE = 384
"""The same for GrabCut, whose time grows with the area."""
_SMALLEST = 16
"""A picture with a shorter side is kept whole: too little to tell a border from."""
_PLAIN_TOLERANCE = 10
_PLAIN_SHARE = 0.8
"""A border is plain if this share of it differs by no more than the tolerance from its median, in any channel."""
_LEAST_TOLERANCE = 5
_ITERATIONS = 5


class Cutout(Protocol):
    """Separates a picture's subject from its background."""

    def mask(self, pixels: Pixels) -> Pixels:
        """Alpha of the subject: uint8 [h, w, 3] RGB → uint8 [h, w]."""
        ...


class GrabCut:
    """Cut-out without weights: a flood from a plain border, else OpenCV's GrabCut around the centre.

    The same pixels give the same mask. A mask that would keep nothing or everything keeps the whole picture.
    """

    def mask(self, pixels: Pixels) -> Pixels:
        """Alpha of the subject: uint8 [h, w, 3] RGB → uint8 [h, w]."""
        background = plain_background(pixels)
        return separate(pixels) if background is None else 255 - background


def plain_background(pixels: Pixels) -> Pixels | None:
    """The background of a picture taken before a plain wall: soft uint8 [h, w], 255 = background.

    Background is what has the border's colour and is connected to the border, so white cloth on white stays as long
    as its outline shows. None where the border is not plain, or where nothing or everything would be background.
    """
    small = _shrink(pixels, _PLAIN_SIDE)
    height, width = small.shape[:2]
    if min(height, width) < _SMALLEST:
        return None
    smooth = cv2.medianBlur(small, 3).astype(np.int16)
    ring = _ring(height, width, max(2, round(0.02 * min(height, width))))
    colour = np.median(smooth[ring], axis=0)
    distance = np.abs(smooth - colour).max(axis=2)
    border = distance[ring]
    if np.mean(border <= _PLAIN_TOLERANCE) < _PLAIN_SHARE:
        return None
    # Three standard deviations of the border's noise: the plainer the wall, the fainter an outline may be.
    tolerance = float(np.clip(4.5 * np.median(border), _LEAST_TOLERANCE, _PLAIN_TOLERANCE))
    background = _touching_border((distance <= tolerance).astype(np.uint8))
    subject = _without_specks(1 - background)
    return _restore(255 - _soften(subject), pixels.shape) if _sensible(subject) else None


def separate(pixels: Pixels, labels: Pixels | None = None) -> Pixels:
    """GrabCut at a bounded size: soft alpha uint8 [h, w] of what differs from the surroundings.

    Args:
        pixels: uint8 [h, w, 3] RGB.
        labels: what is known, in OpenCV's GC_* values, uint8 [h, w]; by default the outermost ring is background and
            the middle is probably the subject.
    """
    small = _shrink(pixels, _GRABCUT_SIDE)
    height, width = small.shape[:2]
    if min(height, width) < _SMALLEST:
        return _everything(pixels)
    if labels is None:
        seeds = _centre(height, width)
    else:
        seeds = cv2.resize(labels, (width, height), interpolation=cv2.INTER_NEAREST).astype(np.uint8)
    subject = _grabcut(cv2.bilateralFilter(small, 5, 20, 5).astype(np.uint8), seeds)
    subject = _without_specks(_without_holes(subject))
    return _restore(_soften(subject), pixels.shape) if _sensible(subject) else _everything(pixels)


def _grabcut(small: Pixels, seeds: Pixels) -> Pixels:
    """Run OpenCV's GrabCut from seeds: uint8 [h, w] of 0 and 1."""
    known_subject = np.isin(seeds, (cv2.GC_FGD, cv2.GC_PR_FGD))
    if known_subject.all() or not known_subject.any():
        return known_subject.astype(np.uint8)
    labels = seeds.copy()
    models = np.zeros((1, 65)), np.zeros((1, 65))
    # OpenCV's generator is seeded for each thread; its k-means draws from it.
    cv2.setRNGSeed(0)
    cv2.grabCut(small, labels, (0, 0, 1, 1), *models, _ITERATIONS, cv2.GC_INIT_WITH_MASK)  # the box is not used
    return np.isin(labels, (cv2.GC_FGD, cv2.GC_PR_FGD)).astype(np.uint8)


class Ben2:
    """The released cut-out network (PramaLLC/BEN2) with the operator's own copy of its weights.

    Args:
        weights: `model.safetensors`, or the directory that holds it.
        device: torch device. On CUDA the network runs in float16, as released.

    Raises:
        WeightsError: the package or the file is missing, or the file is not that network's.
    """

    def __init__(self, weights: Path, device: str) -> None:
        file = safetensors_file(
            weights, "model.safetensors", "download model.safetensors from PramaLLC/BEN2, not BEN2_Base.pth"
        )
        deterministic = torch.backends.cudnn.deterministic
        network = optional_attribute("ben2.modeling_ben2", "BEN_Base", f"install it: {BEN2_INSTALL}")
        torch.backends.cudnn.deterministic = deterministic  # importing ben2 sets it for the whole process
        self._network = load_network(network(), file, device)
        self._device = torch.device(device)
        self._dtype = torch.float16 if self._device.type == "cuda" else torch.float32
        self._busy = threading.Lock()

    def mask(self, pixels: Pixels) -> Pixels:
        """Alpha of the subject: uint8 [h, w, 3] RGB → uint8 [h, w]."""
        prepared = ben2_input(pixels, self._dtype).to(self._device)
        with self._busy, torch.inference_mode():
            saliency = self._network(prepared)[0, 0]
        return alpha_from_map(saliency.cpu().numpy(), pixels.shape[0], pixels.shape[1])


BEN2_INSTALL = "pip install --no-deps git+https://github.com/PramaLLC/BEN2.git"


def ben2_input(pixels: Pixels, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """What BEN2 sees: [1, 3, 1024, 1024], aspect not kept; normalised in `dtype`, as released."""
    image = Image.fromarray(pixels).resize((1024, 1024), Image.Resampling.LANCZOS)
    return imagenet_input(np.asarray(image), dtype)


def alpha_from_map(saliency: NDArray[np.floating], height: int, width: int) -> Pixels:
    """BEN2's map [H, W] → alpha uint8 [height, width]: bilinear, stretched to 0..1, truncated to 8 bits.

    A constant map says nothing, and stretching it would show rounding or divide by zero: it keeps the whole picture.
    """
    size = (height, width)
    if not saliency.max() > saliency.min():  # NaN ends here too
        return np.full(size, 255, dtype=np.uint8)
    resized = F.interpolate(torch.tensor(saliency)[None, None], size=size, mode="bilinear")[0, 0]
    least, most = resized.min(), resized.max()
    if least == most:  # what differed fell between the samples
        return np.full(size, 255, dtype=np.uint8)
    return ((resized - least) / (most - least) * 255).numpy().astype(np.uint8)


def _shrink(pixels: Pixels, side: int) -> Pixels:
    height, width = pixels.shape[:2]
    scale = side / max(height, width)
    if scale >= 1:
        return np.ascontiguousarray(pixels)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return cv2.resize(pixels, size, interpolation=cv2.INTER_AREA).astype(np.uint8)


def _ring(height: int, width: int, thickness: int) -> NDArray[np.bool_]:
    ring = np.ones((height, width), dtype=np.bool_)
    ring[thickness:-thickness, thickness:-thickness] = False
    return ring


def _centre(height: int, width: int) -> Pixels:
    seeds = np.full((height, width), cv2.GC_PR_BGD, dtype=np.uint8)
    middle = (width // 2, height // 2)
    cv2.ellipse(seeds, middle, (round(0.4 * width), round(0.42 * height)), 0, 0, 360, cv2.GC_PR_FGD, -1)
    thickness = max(1, round(0.02 * min(height, width)))
    surroundings = _ring(height, width, thickness)
    # Things stand on the lower edge more often than they touch another one.
    surroundings[-thickness:, width // 5 : -(width // 5)] = False
    seeds[surroundings] = cv2.GC_BGD
    return seeds


def _touching_border(mask: Pixels) -> Pixels:
    _, parts = cv2.connectedComponents(mask, connectivity=4)
    ring = _ring(mask.shape[0], mask.shape[1], 1)
    touching = np.unique(parts[ring & (mask > 0)])
    return np.isin(parts, touching[touching > 0]).astype(np.uint8)


def _without_holes(subject: Pixels) -> Pixels:
    """Small holes filled; one as large as the eye of a handle shows the background and stays."""
    enclosed = 1 - _touching_border(1 - subject) - subject
    _, parts, stats, _ = cv2.connectedComponentsWithStats(enclosed, connectivity=4)
    small = 1 + np.flatnonzero(stats[1:, cv2.CC_STAT_AREA] < 0.02 * subject.sum())
    return subject | np.isin(parts, small).astype(np.uint8)


def _without_specks(subject: Pixels) -> Pixels:
    opened = cv2.morphologyEx(subject, cv2.MORPH_OPEN, np.ones((3, 3), np.uint8)).astype(np.uint8)
    count, parts, stats, _ = cv2.connectedComponentsWithStats(opened, connectivity=8)
    if count == 1:
        return opened
    areas = stats[1:, cv2.CC_STAT_AREA]
    kept = 1 + np.flatnonzero(areas >= 0.05 * areas.max())
    return np.isin(parts, kept).astype(np.uint8)


def _sensible(subject: Pixels) -> bool:
    return 0.005 < float(subject.mean()) < 0.98


def _soften(subject: Pixels) -> Pixels:
    return cv2.GaussianBlur(subject * 255, (0, 0), 0.8).astype(np.uint8)


def _restore(alpha: Pixels, shape: tuple[int, ...]) -> Pixels:
    height, width = shape[:2]
    return cv2.resize(alpha, (width, height), interpolation=cv2.INTER_LINEAR).astype(np.uint8)


def _everything(pixels: Pixels) -> Pixels:
    return np.full(pixels.shape[:2], 255, dtype=np.uint8)
