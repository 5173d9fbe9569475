"""Recordings of the released DreamO pipeline, through the production code; and proof that the check can fail."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from model.weights.adapters import Version
from model.weights.checkpoints import load_transformer
from tests.golden.__main__ import HERE, TOLERANCE, main
from tests.golden.recording import Assets, Recording, check, read_recording

RECORDINGS = sorted(HERE.glob("*.safetensors"))
MORE = HERE / "more"
"""Recorded since, by running the released code (461e35ba) on the pinned stack and the same weights."""


def worst(recording: Recording, assets: Assets | None = None) -> float:
    return max(row.error for row in check(recording, assets or Assets(HERE)))


@pytest.mark.parametrize("path", RECORDINGS, ids=lambda path: path.stem)
def test_recording(path: Path) -> None:
    """Every tensor production code can reproduce is within 1e-4 of the released pipeline's."""
    recording = read_recording(path)
    rows = list(check(recording, Assets(HERE)))
    assert len(rows) >= 10
    assert {row.name: row.error for row in rows if row.error > TOLERANCE} == {}


@pytest.mark.parametrize(
    ("name", "version", "turbo"),
    [("style", "v1.1", True), ("empty_slot", "v1.1", True), ("v1_no_turbo_true_cfg", "v1", False)],
)
def test_more_recordings(name: str, version: Version, turbo: bool) -> None:
    """A style reference, an empty first slot, and the v1 stack without turbo under true CFG with placeholders."""
    assert worst(read_recording(MORE / f"{name}.safetensors"), Assets(HERE, version, turbo)) <= TOLERANCE


def altered(name: str, **meta: object) -> Recording:
    """A recording whose parameters say something else than what was run."""
    recording = read_recording(HERE / f"{name}.safetensors")
    return Recording(recording.path, recording.tensors, {"meta": json.dumps(recording.meta | meta)})


def drift(recording: Recording) -> float:
    """The worst relative distance of any tensor."""
    return max(row.relative for row in check(recording, Assets(HERE)))


def test_bfloat16_stays_with_the_release() -> None:
    """Three references with placeholders in bfloat16, four steps: as near as two CPUs are; another VAE draw is not.

    CPUs add up a product of bfloat16 matrices in different orders: on the recording's kind the latents are equal bit
    for bit, on another, under four instruction sets, .005 of their norm away after the last step. That each rounding
    is the release's is tests/model/test_transformer.py's, on whatever CPU it runs.
    """
    assert drift(read_recording(MORE / "three_references_bfloat16.safetensors")) < 1e-2
    assert drift(altered("more/three_references_bfloat16", global_rng_seed=1)) > 2e-2


@pytest.mark.parametrize(
    ("name", "meta"),
    [
        ("case_a_norefs", {"seed": 8}),
        ("case_b_one_ip", {"global_rng_seed": 1}),
        ("case_c_id_ip", {"guidance": 4.4}),
        ("case_e_true_cfg", {"neg_guidance": 3.5}),
        ("case_e_true_cfg", {"cfg_end_step": 1}),
        ("case_e_true_cfg", {"first_step_guidance": 3.5}),
    ],
)
def test_a_wrong_parameter_shows(name: str, meta: dict[str, object]) -> None:
    """Control: each wrong parameter moves the result far beyond the tolerance."""
    assert worst(altered(name, **meta)) > 100 * TOLERANCE


def test_swapped_slots_show() -> None:
    """Control: index embeddings in the wrong slots are caught."""
    recording = read_recording(HERE / "case_c_id_ip.safetensors")
    references = [ref | {"idx": 3 - ref["idx"]} for ref in recording.meta["refs"]]
    assert worst(altered("case_c_id_ip", refs=references)) > 1e-2


@pytest.mark.parametrize(("version", "turbo"), [("v1", True), ("v1.1", False)])
def test_another_stack_shows(version: Version, turbo: bool) -> None:
    """Control: fusing another version, or without turbo, is caught."""
    recording = read_recording(HERE / "fused_v1.1_turbo.safetensors")
    assert worst(recording, Assets(HERE, version, turbo)) > 1e-2


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command prints rows and `worst=…`, exits 0 when all is well, 1 above the tolerance, 2 on a bad file."""
    command = [sys.executable, "-m", "tests.golden", str(tmp_path / "missing.safetensors")]
    assert subprocess.run(command, capture_output=True, check=False, timeout=240).returncode == 2
    assert main(["--assets", str(HERE), str(HERE / "case_a_norefs.safetensors")]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("worst=")
    recording = read_recording(HERE / "fused_v1.1_turbo.safetensors")
    tensors = dict(recording.tensors)
    tensors["proj_out.weight"] = tensors["proj_out.weight"] + 1e-3
    save_file(tensors, tmp_path / "bad.safetensors")
    assert main(["--assets", str(HERE), str(tmp_path / "bad.safetensors")]) == 1
    assert main(["--assets", str(tmp_path), str(HERE / "case_a_norefs.safetensors")]) == 2


def test_bfloat16_fusing_is_exact() -> None:
    """A bfloat16 recording is compared with fusing in bfloat16, bit for bit; the float32 weights rounded are not it.

    The recording holds four tensors that diffusers 0.33.1 with peft 0.15.2 gave on the same files (v1, no turbo).
    """
    recording = read_recording(MORE / "fused_v1_no_turbo_bfloat16.safetensors")
    assets = Assets(HERE, "v1", turbo=False)
    rows = [row for row in check(recording, assets) if row.name in recording.tensors]
    assert len(rows) == len(recording.tensors)
    assert max(row.error for row in rows) == 0
    single = load_transformer(assets.source("float32")).transformer.state_dict()
    assert any(not torch.equal(single[key].bfloat16(), tensor) for key, tensor in recording.tensors.items())
