"""From a reference picture to the pixels the VAE encodes, by the released application's rules (dreamo_generator.py).

Pictures are uint8 [h, w, 3] RGB, masks uint8 [h, w] with 255 = keep.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from model.errors import UnusableReferenceError, WeightsError
from model.preprocessors.cutout import Ben2, Cutout, GrabCut, Pixels
from model.preprocessors.faces import FACE_SIDE, Faces, FacexlibFaces, OpenCvFaces, align_face, face_transform
from model.requests import Reference
from model.roles import RULES

LONGEST_EDGE = 1024
"""A picture is shrunk to this before a face is searched in it."""


@dataclass(frozen=True, slots=True)
class Tools:
    """What prepares references: one tool that cuts subjects out, one that finds faces."""

    cutout: Cutout
    faces: Faces


def load_tools(cutout: str, faces: str, device: str) -> Tools:
    """The tools by name. `auto` means those that need no weights.

    Args:
        cutout: `auto`, `grabcut`, or `ben2:PATH` (a `model.safetensors` or its directory).
        faces: `auto`, `opencv`, or `facexlib:DIR` (see `FacexlibFaces`).
        device: torch device for the networks.

    Raises:
        WeightsError: `weights_format` for another name, and whatever the tool raises while loading.
    """
    return Tools(_load_cutout(cutout, device), _load_faces(faces, device))


def prepare_reference(reference: Reference, cell: int, identity_resolution: int, tools: Tools) -> Pixels:
    """The picture as the VAE shall see it: uint8 [h', w', 3], both sides multiples of `cell`.

    Args:
        reference: what the caller sent.
        cell: pixels per token side.
        identity_resolution: side of the square an identity reference becomes (released: 512).
        tools: used only where the role needs them and the caller gave no mask.

    Raises:
        UnusableReferenceError: `no_face`, `empty_cutout` (the mask keeps nothing), `reference_too_thin`.
    """
    if reference.mask is not None and not reference.mask.any():
        raise _empty_mask(reference, "keeps nothing")
    preparation = RULES[reference.role].preparation
    if preparation == "face":
        face = _prepare_face(reference, tools.faces)
        if face is not None:
            return _square(face, identity_resolution, cell, reference.slot)
        if reference.on_no_face == "fail":
            raise _no_face(reference)
    pixels, mask = reference.pixels, reference.mask
    if mask is None and preparation != "none":
        mask = tools.cutout.mask(pixels)
    if mask is not None:
        pixels = on_white(pixels, mask)
    return resize_area(pixels, reference.resolution, cell, slot=reference.slot)


def area_size(height: int, width: int, resolution: int, cell: int, *, slot: int = 1) -> tuple[int, int]:
    """(h', w') of about resolution² pixels: the aspect kept, each side floored to a multiple of `cell`.

    Raises:
        UnusableReferenceError: `reference_too_thin` where a side would become 0; `slot` is named in it.
    """
    scale = math.sqrt(resolution * resolution / (height * width))
    size = (int(height * scale) // cell * cell, int(width * scale) // cell * cell)
    if 0 in size:
        raise _too_thin(height, width, slot)
    return size


def resize_area(pixels: Pixels, resolution: int, cell: int, *, slot: int = 1) -> Pixels:
    """The picture at `area_size`, enlarged if it is smaller."""
    height, width = area_size(pixels.shape[0], pixels.shape[1], resolution, cell, slot=slot)
    return cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA).astype(np.uint8)


def resize_long(pixels: Pixels, longest: int, *, slot: int = 1) -> Pixels:
    """A picture or mask with no edge beyond `longest`; a smaller one is left alone.

    Raises:
        UnusableReferenceError: `reference_too_thin` where the other edge would become 0.
    """
    height, width = pixels.shape[:2]
    if max(height, width) <= longest:
        return pixels
    scale = longest / max(height, width)
    size = (int(width * scale), int(height * scale))
    if 0 in size:
        raise _too_thin(height, width, slot)
    return cv2.resize(pixels, size, interpolation=cv2.INTER_AREA).astype(np.uint8)


def on_white(pixels: Pixels, mask: Pixels) -> Pixels:
    """The picture over white by its mask, blended with Pillow's rounding: [h, w, 3]."""
    white = Image.new("RGB", pixels.shape[1::-1], (255, 255, 255))
    white.paste(Image.fromarray(pixels), mask=Image.fromarray(mask))
    return np.array(white)


def to_tensor_range(pixels: Pixels) -> NDArray[np.float32]:
    """[h, w, 3] in 0..255 → float32 [3, h, w] in [-1, 1]."""
    scaled = pixels.transpose(2, 0, 1).astype(np.float32) / np.float32(255)
    return np.ascontiguousarray(scaled * 2 - 1)


def _prepare_face(reference: Reference, faces: Faces) -> Pixels | None:
    """Face and hair in FFHQ's pose on white, [512, 512, 3]; None without a usable face."""
    pixels = resize_long(reference.pixels, LONGEST_EDGE, slot=reference.slot)
    landmarks = faces.landmarks(pixels)
    if landmarks is None or face_transform(landmarks) is None:
        return None
    aligned = align_face(pixels, landmarks)
    if reference.mask is None:
        return on_white(aligned, faces.keep(aligned))
    mask = align_face(resize_long(reference.mask, LONGEST_EDGE, slot=reference.slot), landmarks)
    if not mask.any():
        raise _empty_mask(reference, "keeps nothing of the face")
    return on_white(aligned, mask)


def _square(face: Pixels, resolution: int, cell: int, slot: int) -> Pixels:
    return face if resolution == FACE_SIDE else resize_area(face, resolution, cell, slot=slot)


def _load_cutout(choice: str, device: str) -> Cutout:
    kind, _, path = choice.partition(":")
    if choice in ("auto", "grabcut"):
        return GrabCut()
    if kind == "ben2" and path:
        return Ben2(Path(path), device)
    raise WeightsError("weights_format", f"DREAMSERVE_CUTOUT={choice!r}: use auto, grabcut or ben2:PATH")


def _load_faces(choice: str, device: str) -> Faces:
    kind, _, path = choice.partition(":")
    if choice in ("auto", "opencv"):
        return OpenCvFaces()
    if kind == "facexlib" and path:
        return FacexlibFaces(Path(path), device)
    raise WeightsError("weights_format", f"DREAMSERVE_FACES={choice!r}: use auto, opencv or facexlib:DIR")


def _no_face(reference: Reference) -> UnusableReferenceError:
    return UnusableReferenceError(
        "no_face",
        f"No face was found in references[{reference.slot - 1}]: send a picture of one frontal face, set its "
        'on_no_face to "subject", or choose the role subject.',
        slot=reference.slot,
    )


def _empty_mask(reference: Reference, fault: str) -> UnusableReferenceError:
    return UnusableReferenceError(
        "empty_cutout",
        f"The mask of references[{reference.slot - 1}] {fault}: paint what to keep white, or leave the mask out.",
        slot=reference.slot,
    )


def _too_thin(height: int, width: int, slot: int) -> UnusableReferenceError:
    return UnusableReferenceError(
        "reference_too_thin",
        f"references[{slot - 1}] is {width}x{height} pixels, too thin to be scaled: crop it nearer to a square.",
        slot=slot,
    )
