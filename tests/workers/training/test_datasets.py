"""Published formats become records as their makers meant them."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from model.roles import PLACEHOLDERS, Role
from tests.workers.training.fabricated_datasets import (
    half_mask,
    noise,
    save,
    subject_row,
    uno_rows,
    wide_picture,
    write_lines,
    x2i_rows,
)
from workers.training.datasets.faults import BadRowError, DatasetError
from workers.training.datasets.folder import Folder
from workers.training.datasets.formats import open_training
from workers.training.datasets.prompts import from_image_tags, named_slots, place_after, without_placeholders
from workers.training.datasets.subject200k import Subject200K, Tiles
from workers.training.datasets.two_column import TwoColumn
from workers.training.datasets.uno import UnoList, UnoPairs
from workers.training.datasets.x2i import X2i

SMALL = Tiles(side=16)


def small_pairs(folder: Path, categories: list[str]) -> Subject200K:
    """One pair of 16-pixel tiles for each category."""
    for number, _ in enumerate(categories):
        save(folder / f"{number}.png", wide_picture(noise(2 * number), noise(2 * number + 1)))
    rows = [{**subject_row(f"{number}.png", category)} for number, category in enumerate(categories)]
    return Subject200K.at(write_lines(folder / "rows.jsonl", rows), tiles=SMALL)


def test_tiles_are_cut_where_the_makers_cut_them(tmp_path: Path) -> None:
    """The published layout: Pillow's boxes (8, 8, 520, 520) and (528, 8, 1040, 520) of the wide picture."""
    wide = noise(1, 528, 1056)
    save(tmp_path / "wide.png", wide)
    write_lines(tmp_path / "rows.jsonl", [subject_row("wide.png")])
    first, second = Subject200K.at(tmp_path)
    left = np.asarray(Image.fromarray(wide).crop((8, 8, 520, 520)))
    right = np.asarray(Image.fromarray(wide).crop((528, 8, 1040, 520)))
    for record, target, reference in ((first, left, right), (second, right, left)):
        assert np.array_equal(record.target, target)
        assert np.array_equal(record.references[0].pixels, reference)
    assert first.prompt == "A striped cat [ref#1] on a sofa."
    assert second.prompt == "The cat [ref#1] in a garden."
    assert (first.key, second.key) == ("rows.jsonl:1/0", "rows.jsonl:1/1")


def test_the_filter_keeps_what_the_makers_keep(tmp_path: Path) -> None:
    """All three scores at 5, the description valid; one that was never scored goes too."""
    rows = [subject_row("a.png") for _ in range(6)]
    rows[1]["quality_assessment"]["imageQuality"] = 4
    rows[2]["quality_assessment"] = None
    rows[3]["description"]["description_valid"] = False
    del rows[4]["quality_assessment"]["compositeStructure"]
    write_lines(tmp_path / "rows.jsonl", rows)
    assert Subject200K.at(tmp_path).kept.tolist() == [0, 5]
    assert Subject200K.at(tmp_path, minimum_quality=4).kept.tolist() == [0, 1, 5]
    (tmp_path / "rows.jsonl").unlink()
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    assert Subject200K.at(tmp_path).kept.tolist() == [0, 5]


def test_masks_go_with_their_tile(tmp_path: Path) -> None:
    """`mask_1` marks the subject in the right tile, which is the second direction's target."""
    save(tmp_path / "wide.png", wide_picture(noise(0), noise(1)))
    save(tmp_path / "mask.png", half_mask())
    write_lines(tmp_path / "rows.jsonl", [{**subject_row("wide.png"), "mask_1": "mask.png"}])
    first, second = Subject200K.at(tmp_path, tiles=SMALL)
    assert first.references[0].target_mask is None
    assert np.array_equal(second.references[0].target_mask, half_mask())


def test_two_columns_are_two_pairs_side_by_side(tmp_path: Path) -> None:
    """Targets, references and masks are the pairs' own; the masks move into their column."""
    for number in range(2):
        save(tmp_path / f"{number}.png", wide_picture(noise(2 * number), noise(2 * number + 1)))
    save(tmp_path / "mask.png", half_mask())
    rows = [{**subject_row(f"{n}.png"), "mask_0": "mask.png", "mask_1": "mask.png"} for n in range(2)]
    pairs = Subject200K.at(write_lines(tmp_path / "rows.jsonl", rows), tiles=SMALL)
    columns = TwoColumn.of(pairs, length=20, seed=3)
    for index, record in enumerate(columns):
        left, right = (pairs[each] for each in columns.columns(index))
        assert np.array_equal(record.target, np.hstack((left.target, right.target)))
        assert [each.slot for each in record.references] == [1, 2]
        for each, column in zip(record.references, (left, right), strict=True):
            assert np.array_equal(each.pixels, column.references[0].pixels)
        inside = [np.flatnonzero(each.target_mask.any(axis=0)) for each in record.references]
        assert inside[0].tolist() == list(range(8))
        assert inside[1].tolist() == list(range(16, 24))
    assert any(
        record.prompt == "Generate a two-column image. The left is A striped cat [ref#1] on a sofa. "
        "The right is The cat [ref#2] in a garden."
        for record in columns
    )


@pytest.mark.parametrize(("share", "low", "high"), [(0.0, 0.0, 0.0), (0.3, 0.25, 0.35), (1.0, 1.0, 1.0)])
def test_the_share_of_one_category_is_kept(tmp_path: Path, share: float, low: float, high: float) -> None:
    """Exactly that share has two subjects of one category; both columns are never one pair."""
    pairs = small_pairs(tmp_path, ["cat", "dog", "cat", "dog", "cat", "hat", "hat", "dog"])
    columns = TwoColumn.of(pairs, length=2000, seed=1, same_category=share)
    drawn = [tuple(side // 2 for side in columns.columns(index)) for index in range(len(columns))]
    assert all(left != right for left, right in drawn)
    same = np.mean([pairs.categories[left] == pairs.categories[right] for left, right in drawn])
    assert low <= same <= high
    assert {left for left, _ in drawn} == {right for _, right in drawn} == set(range(8))


def test_two_columns_follow_from_the_seed(tmp_path: Path) -> None:
    """Any process can make any sample again; another seed makes others."""
    pairs = small_pairs(tmp_path, ["cat", "dog", "cat", "hat"])
    keys = [[TwoColumn.of(pairs, length=30, seed=seed).key(index) for index in range(30)] for seed in (1, 1, 2)]
    assert keys[0] == keys[1] != keys[2]


def test_x2i_rows(tmp_path: Path) -> None:
    """Image tags become placeholders in place, or go with the preposition that led to them."""
    write_lines(tmp_path / "web-image-1.jsonl", x2i_rows(tmp_path))
    save(tmp_path / "images" / "mask.png", half_mask())
    plain = {"instruction": "A cat.", "input_images": None, "output_image": "images/0out.png"}
    masked = {**x2i_rows(tmp_path)[0], "masks": [None, "images/mask.png"]}
    write_lines(tmp_path / "web-image-2.jsonl", [plain, masked])
    source = X2i.at(tmp_path)
    assert [source.task(index) for index in range(4)] == ["multi_subject"] * 2 + ["text_to_image", "multi_subject"]
    first = source[0]
    assert first.prompt == "A cat [ref#1], and the dog from [ref#2]."
    assert [each.slot for each in first.references] == [1, 2]
    assert np.array_equal(first.references[1].pixels, noise(ord("b")))
    assert np.array_equal(first.target, noise(ord("o")))
    assert [each.target_mask is None for each in source[3].references] == [True, False]
    dropped = X2i.at(tmp_path, placeholders=False, role=Role.GARMENT)[0]
    assert dropped.prompt == "A cat, and the dog."
    assert {each.role for each in dropped.references} == {Role.GARMENT}


def test_x2i_pictures_may_lie_elsewhere(tmp_path: Path) -> None:
    """OmniGen's `--image_path`: names start there, and the lists' own directory no longer counts."""
    rows = x2i_rows(tmp_path)
    (tmp_path / "lists").mkdir()
    write_lines(tmp_path / "lists" / "a.jsonl", rows)
    with pytest.raises(BadRowError):
        X2i.at(tmp_path / "lists")[0]
    assert len(X2i.at(tmp_path / "lists", images=tmp_path)[0].references) == 2


def test_uno_lists(tmp_path: Path) -> None:
    """An evaluation list gives items without a target; a list with targets gives records."""
    rows = uno_rows(tmp_path)
    (tmp_path / "dreambench.json").write_text(json.dumps(rows))
    item = UnoList.at(tmp_path / "dreambench.json")[1]
    assert (item.key, item.prompt) == ("dreambench.json:2", "a backpack in the jungle")
    assert np.array_equal(item.references[0].pixels, noise(1))
    assert not hasattr(item, "target")
    (tmp_path / "uno_1m.json").write_text(json.dumps([{**rows[0], "image_tgt_path": "./dreambooth/1.png"}]))
    record = UnoPairs.at(tmp_path / "uno_1m.json")[0]
    assert np.array_equal(record.target, noise(1))
    with pytest.raises(BadRowError, match="image_tgt_path"):
        UnoPairs.at(tmp_path / "dreambench.json")[0]


def test_training_on_subject200k_mixes_both_tasks(tmp_path: Path) -> None:
    """DreamO's first stage asks for pairs and two-column samples; one source has both, with distinct keys."""
    write_lines(tmp_path / "rows.jsonl", [subject_row(f"{number}.png") for number in range(3)])
    for number in range(3):
        save(tmp_path / f"{number}.png", noise(number, 528, 1056))
    source = open_training(tmp_path, "subject200k")
    tasks = [source.task(index) for index in range(len(source))]
    assert tasks == ["single_subject"] * 6 + ["two_column"] * 6
    for index in (5, 6, 11):
        assert (source[index].task, source[index].key) == (tasks[index], source.key(index))
    assert source[6].target.shape == (512, 1024, 3)
    with pytest.raises(IndexError):
        source[12]


def test_sources_travel_to_loader_processes(tmp_path: Path) -> None:
    """A pickled source reads the same; opening one decodes nothing, so a missing picture is met only when read."""
    pairs = small_pairs(tmp_path, ["cat", "dog"])
    twin: Subject200K = pickle.loads(pickle.dumps(pairs))
    assert np.array_equal(twin[3].target, pairs[3].target)
    (tmp_path / "0.png").unlink()
    assert Subject200K.at(tmp_path, tiles=SMALL)[2].key == "rows.jsonl:2/0"
    with pytest.raises(BadRowError) as caught:
        twin[0]
    again = pickle.loads(pickle.dumps(caught.value))
    assert again.faults == caught.value.faults


def test_parquet_without_pyarrow_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The distributed form needs pyarrow, which is not a dependency: the message says what to install."""
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train-00000.parquet").write_bytes(b"PAR1")
    with pytest.raises(DatasetError, match="pip install pyarrow"):
        Subject200K.at(tmp_path)


def test_parquet_rows(tmp_path: Path) -> None:
    """The distributed form gives the records that the unpacked one gives, across row groups; damage is a bad row."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [subject_row(f"{number}.png", quality=4 if number == 1 else 5) for number in range(5)]
    packed = []
    for number, row in enumerate(rows):
        name = save(tmp_path / f"{number}.png", wide_picture(noise(2 * number), noise(2 * number + 1)))
        packed.append({**row, "image": {"bytes": (tmp_path / name).read_bytes(), "path": None}})
    write_lines(tmp_path / "rows.jsonl", rows)
    unpacked = Subject200K.at(tmp_path / "rows.jsonl", tiles=SMALL)
    parquet.write_table(pyarrow.Table.from_pylist(packed), tmp_path / "train.parquet", row_group_size=2)
    source = Subject200K.at(tmp_path / "train.parquet", tiles=SMALL)
    assert len(source) == len(unpacked) == 8
    for ours, theirs in zip(source, unpacked, strict=True):
        assert np.array_equal(ours.target, theirs.target)
        assert ours.prompt == theirs.prompt
    assert source[7].key == "train.parquet:5/1"
    data = (tmp_path / "train.parquet").read_bytes()
    (tmp_path / "train.parquet").write_bytes(data[:200])
    with pytest.raises(BadRowError, match="file_unreadable"):
        Subject200K.at(tmp_path / "train.parquet", tiles=SMALL)[0]


WORDS = st.sampled_from(["cat", "a", "the dog", "from", "of course", "hat.", "in", "sofa,"])


@given(st.lists(WORDS, min_size=1, max_size=6), st.integers(1, 9))
def test_a_placeholder_comes_out_without_a_trace(words: list[str], slot: int) -> None:
    """Plain text (half of DreamO's prompts) is the prompt as it was before the placeholder went in."""
    prompt = " ".join([*words, "red mug", *words[::-1]])
    placed = place_after(prompt, "Red Mug", slot)
    assert f"red mug {PLACEHOLDERS[slot - 1]}" in placed
    assert named_slots(placed) == {slot}
    assert without_placeholders(placed) == prompt


@pytest.mark.parametrize(
    ("prompt", "noun", "placed"),
    [
        ("A cathedral and a cat.", "cat", "A cathedral and a cat [ref#2]."),
        ("The mug is red.", "tall mug", "The mug [ref#2] is red."),
        ("The mug is red.", "hat", "The mug is red."),
        ("The C++ (book)", "book", "The C++ (book [ref#2])"),
        ("Anything", " ", "Anything"),
    ],
)
def test_the_noun_is_found_as_a_word(prompt: str, noun: str, placed: str) -> None:
    """Whole words, any case, else the phrase's last word, else nothing."""
    assert place_after(prompt, noun, 2) == placed


@pytest.mark.parametrize(
    ("instruction", "prompt", "plain"),
    [
        ("The man is in <img><|image_1|></img>.", "The man is in [ref#1].", "The man is."),
        ("<img><|image_2|></img> waves.", "[ref#2] waves.", "waves."),
        ("A dog<|image_1|>and a cat <img> <|image_2|> </img>", "A dog [ref#1] and a cat [ref#2]", "A dog and a cat"),
    ],
)
def test_image_tags(instruction: str, prompt: str, plain: str) -> None:
    """All the ways in which OmniGen's tag is written, between words that touch it."""
    assert from_image_tags(instruction) == prompt
    assert without_placeholders(prompt) == plain


def test_a_text_without_tags_stays() -> None:
    """Nothing is tidied where nothing was taken out."""
    assert without_placeholders("two  spaces , kept ") == "two  spaces , kept "


def test_nothing_outside_the_folder_is_read(tmp_path: Path) -> None:
    """Dots, absolute names and links out are refused; a link that stays inside is not."""
    inside = tmp_path / "data"
    inside.mkdir()
    (tmp_path / "secret").write_bytes(b"secret")
    (inside / "own").write_bytes(b"own")
    (inside / "away").symlink_to(tmp_path / "secret")
    (inside / "beside").symlink_to(inside / "own")
    folder = Folder.at(inside)
    for name in ("../secret", str(tmp_path / "secret"), "away", "x/../../secret", "nul\0l"):
        with pytest.raises(Exception, match="path_escape"):
            folder.read(name, 100)
    assert folder.read("beside", 100) == b"own"
    with pytest.raises(Exception, match="image_too_large"):
        folder.read("own", 2)


def test_reading_data_needs_no_torch(tmp_path: Path) -> None:
    """The check runs on a machine without the model's libraries."""
    code = "import sys; import workers.training.datasets.check; assert not {'torch', 'pandas'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
