"""Small datasets in each format, whole and sound; tests then break one thing at a time and run the check."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from workers.pictures import encode
from workers.training.datasets import check
from workers.training.datasets.faults import REMEDIES

Pixels = NDArray[np.uint8]
TILE = 512


def noise(seed: int, height: int = 16, width: int = 16) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def half_mask(height: int = 16, width: int = 16) -> Pixels:
    """Its left half is inside."""
    mask = np.zeros((height, width), np.uint8)
    mask[:, : width // 2] = 255
    return mask


def save(path: Path, pixels: Pixels) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode(pixels, "png"))
    return path.name


def write_lines(path: Path, rows: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def native_rows(folder: Path, count: int = 3) -> list[dict[str, Any]]:
    """Rows of two references, the first with a mask, and their pictures in `folder`."""
    rows: list[dict[str, Any]] = []
    for number in range(count):
        for part in ("target", "ref1", "ref2"):
            save(folder / f"{number}.{part}.png", noise(10 * number + len(part)))
        save(folder / f"{number}.mask1.png", half_mask())
        rows.append(
            {
                "key": f"sample-{number}",
                "task": "multi_subject",
                "prompt": "a cat [ref#1] beside a dog [ref#2]",
                "target": f"{number}.target.png",
                "references": [
                    {
                        "slot": 1,
                        "role": "subject",
                        "image": f"{number}.ref1.png",
                        "target_mask": f"{number}.mask1.png",
                    },
                    {"slot": 2, "role": "garment", "image": f"{number}.ref2.png"},
                ],
            }
        )
    return rows


def native_members(count: int = 3) -> dict[str, bytes]:
    """Members of a shard: rows of one reference with a mask."""
    members: dict[str, bytes] = {}
    for number in range(count):
        meta = {"task": "single_subject", "prompt": "a cat [ref#1]", "references": [{"slot": 1, "role": "subject"}]}
        members[f"{number}.json"] = json.dumps(meta).encode()
        members[f"{number}.target.png"] = encode(noise(number), "png")
        members[f"{number}.ref1.png"] = encode(noise(number + 50, 8, 8), "png")
        members[f"{number}.mask1.png"] = encode(half_mask(), "png")
    return members


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    """As other people's tools do: tarfile's defaults."""
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def wide_picture(left: Pixels, right: Pixels) -> Pixels:
    """Two tiles of equal size with 8 pixels of padding around each, by OminiControl's crop offsets."""
    side = left.shape[0]
    wide = np.full((side + 16, 2 * side + 32, 3), 255, np.uint8)
    wide[8 : side + 8, 8 : side + 8] = left
    wide[8 : side + 8, side + 16 : 2 * side + 16] = right
    return wide


def subject_row(image: str, category: str = "pet", quality: int = 5) -> dict[str, Any]:
    return {
        "image": image,
        "collection": "collection_2",
        "quality_assessment": {"compositeStructure": 5, "objectConsistency": quality, "imageQuality": 5},
        "description": {
            "item": "Striped Cat",
            "description_0": "A striped cat on a sofa.",
            "description_1": "The cat in a garden.",
            "category": category,
            "description_valid": True,
        },
    }


def subject_rows(folder: Path, count: int = 2) -> list[dict[str, Any]]:
    """Rows beside wide pictures of the published size, of plain tiles."""
    rows: list[dict[str, Any]] = []
    for number in range(count):
        tiles = [np.full((TILE, TILE, 3), 40 * number + shade, np.uint8) for shade in (20, 30)]
        rows.append(subject_row(save(folder / f"wide{number}.png", wide_picture(*tiles))))
    return rows


def x2i_rows(folder: Path, count: int = 2) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for number in range(count):
        for part in ("a", "b", "out"):
            save(folder / "images" / f"{number}{part}.png", noise(number + ord(part[0])))
        rows.append(
            {
                "task_type": "subject_driven",
                "instruction": "A cat<img><|image_1|></img>, and the dog from <img><|image_2|></img> .",
                "input_images": [f"images/{number}a.png", f"images/{number}b.png"],
                "output_image": f"images/{number}out.png",
            }
        )
    return rows


def uno_rows(folder: Path, count: int = 2) -> list[dict[str, Any]]:
    """An evaluation list as UNO has it."""
    for number in range(count):
        save(folder / "dreambooth" / f"{number}.png", noise(number))
    return [
        {"prompt": "a backpack in the jungle", "image_paths": [f"./dreambooth/{number}.png"]} for number in range(count)
    ]


def run(capfd: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, dict[str, Any]]:
    """The check's exit status and its JSON."""
    status = check.main([*map(str, arguments), "--json"])
    return status, json.loads(capfd.readouterr().out)


def places(report: dict[str, Any]) -> list[tuple[str, int | None, str, str]]:
    """(file, row, field, code) of each fault; each has its code's remedy."""
    assert all(fault["remedy"] == REMEDIES[fault["code"]] for fault in report["faults"])
    return [(fault["file"], fault["row"], fault["field"], fault["code"]) for fault in report["faults"]]
