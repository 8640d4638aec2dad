"""RAF-DB in its native layout: both subsets, aligned and original pictures, and the traps of its label files."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from facemllm.errors import UserError
from facemllm.ingest.reader import Refused

MANUAL = "30\t40\n70 40\n50.5\t60\n35 80\n65 80\n{}\n{}\n{}\n"


@pytest.fixture
def tree(tmp_path, picture):
    """Five listed pictures, one unlisted, and a list with every trap in it."""
    basic = tmp_path / "basic"
    for seed, stem in enumerate(("train_00001", "train_00002", "test_0001", "train_00007", "train_00099")):
        picture(basic / f"Image/aligned/{stem}_aligned.jpg", seed, (100, 100))
        picture(basic / f"Image/original/{stem}.jpg", seed, (120, 100), "PNG")
    manual = basic / "Annotation" / "manual"
    manual.mkdir(parents=True)
    (manual / "train_00001_manu_attri.txt").write_text(MANUAL.format(1, 2, 4))
    (manual / "train_00002_manu_attri.txt").write_text(MANUAL.format(2, 0, 0))
    (manual / "train_00007_manu_attri.txt").write_text(MANUAL.format(0, 1, 9))
    labels = basic / "EmoLabel" / "list_patition_label.txt"
    labels.parent.mkdir()
    lines = ("train_00001.jpg 4", "train_00002.jpg 7", "test_0001.jpg 1", "train_00003.jpg 2", "train_00001.jpg 5")
    odd = ("train_00004.jpg 8", "train_00005.jpg", "../train_00006.jpg 1", "train_00007.jpg 3")
    labels.write_bytes(b"\xef\xbb\xbf" + "\r\n".join((*lines, *odd, "")).encode())
    return tmp_path


def test_aligned_pictures_get_their_labels_and_no_landmarks(tree, take):
    found = take("raf-db", tree, ["ingest.validation_share=0.0"])
    assert [(row["source_id"], row["split"], row["facts"]) for row in found.rows] == [
        (
            "basic/train_00001",
            "train",
            {"expression": "happiness", "gender": "female", "ethnicity": "asian", "age_range": "70+"},
        ),
        ("basic/train_00002", "train", {"expression": "neutral", "ethnicity": "caucasian", "age_range": "0-3"}),
        ("basic/test_0001", "test", {"expression": "surprise"}),
    ]
    assert all(row["subject_id"] is None and (row["width"], row["height"]) == (100, 100) for row in found.rows)


def test_what_cannot_be_used_is_refused_with_its_line(tree, take):
    listed = "basic/EmoLabel/list_patition_label.txt"
    aligned = "basic/Image/aligned"
    class_8 = "the basic expression is '8', not one of 1 to 7; a compound list needs the option subset: compound"
    assert take("raf-db", tree).refused == [
        Refused(f"{aligned}/train_00003_aligned.jpg", 4, "the picture is missing"),
        Refused(listed, 5, "train_00001.jpg has a row already"),
        Refused(listed, 6, class_8),
        Refused(listed, 7, "1 fields where 2 were expected"),
        Refused(listed, 8, "'../train_00006.jpg' is no picture name of RAF-DB (train_00001.jpg, test_0001.jpg)"),
        Refused(
            f"{aligned}/train_00007_aligned.jpg", 9, "train_00007_manu_attri.txt: the age bin is '9', not one of 0 to 4"
        ),
        Refused(f"{aligned}/train_00099_aligned.jpg", 0, "no label row in list_patition_label.txt"),
    ]


def test_original_pictures_without_boxes_are_whole_and_have_landmarks(tree, take):
    row = take("raf-db", tree, pictures="original").rows[0]
    assert (row["width"], row["height"]) == (120, 100)
    assert row["landmarks"] == [[30, 40], [70, 40], [50.5, 60], [35, 80], [65, 80]]


@pytest.mark.parametrize("place", ["Annotation/boundingbox", "boundingbox"])
def test_original_pictures_are_cropped_to_their_box(tree, take, place):
    boxes = tree / "basic" / place
    boxes.mkdir(parents=True)
    for stem in ("train_00001", "test_0001"):
        (boxes / f"{stem}_boundingbox.txt").write_text("20 30 80.0 90\n")
    (boxes / "train_00002_boundingbox.txt").write_text("20 30 80\n")
    red = np.zeros((100, 120, 3), np.uint8)
    red[30:90, 20:80] = (255, 0, 0)
    Image.fromarray(red).save(tree / "basic/Image/original/train_00001.jpg", "PNG")
    found = take("raf-db", tree, pictures="original")
    row = found.rows[0]
    assert (row["width"], row["height"], row["box"]) == (60, 60, [0, 0, 60, 60])
    assert row["landmarks"] == [[10, 10], [50, 10], [30.5, 30], [15, 50], [45, 50]]
    stored = np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])))
    assert (stored[..., 0] > 240).all()
    assert (stored[..., 1:] < 15).all()
    assert [row["source_id"] for row in found.rows] == ["basic/train_00001", "basic/test_0001"]
    reasons = {refused.file: refused.reason for refused in found.refused}
    ragged = "train_00002_boundingbox.txt: 3 numbers where a box has four"
    assert reasons["basic/Image/original/train_00002.jpg"] == ragged
    assert reasons["basic/Image/original/train_00007.jpg"].startswith("train_00007_manu_attri.txt")


def test_damaged_manual_files_are_refused(tree, take):
    manual = tree / "basic/Annotation/manual"
    for text, reason in (
        (b"1 2\n3 4\n0\n0\n0\n", "not five points and three codes"),
        (MANUAL.replace("50.5", "nan").format(0, 0, 0).encode(), "a landmark is nan, outside -inf to inf"),
        (b"\xff\xfe1 2", "not UTF-8 text"),
        (b"1" * 70_000, "the file has 70,000 bytes, more than 65,536"),
    ):
        (manual / "train_00001_manu_attri.txt").write_bytes(text)
        first = take("raf-db", tree).refused[0]
        assert first == Refused(
            "basic/Image/aligned/train_00001_aligned.jpg", 1, f"train_00001_manu_attri.txt: {reason}"
        )


def test_the_eleven_compound_classes(tmp_path, take, picture):
    names = [
        *("happily_surprised", "happily_disgusted", "sadly_fearful", "sadly_angry", "sadly_surprised"),
        *("sadly_disgusted", "fearfully_angry", "fearfully_surprised", "angrily_surprised", "angrily_disgusted"),
        "disgustedly_surprised",
    ]
    rows = []
    for number in range(1, 12):
        picture(tmp_path / f"compound/Image/aligned/train_{number:04}_aligned.jpg", number)
        rows.append(f"train_{number:04}.jpg {number}")
    (tmp_path / "compound/EmoLabel").mkdir()
    (tmp_path / "compound/EmoLabel/list_partition_label.txt").write_text("\n".join([*rows, "train_0012.jpg 12"]))
    found = take("raf-db", tmp_path, subset="compound")
    assert found.column("expression") == {f"compound/train_{n:04}": name for n, name in enumerate(names, start=1)}
    assert [refused.reason for refused in found.refused] == ["the compound expression is '12', not one of 1 to 11"]
    assert len(take("raf-db", tmp_path / "compound", subset="compound").rows) == 11
    with pytest.raises(UserError, match="this is the compound subset; say so in the source's options: subset: comp"):
        take("raf-db", tmp_path / "compound")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"train_00001.jpg 4 0\n", "list_patition_label.txt, line 1: 'train_00001.jpg 4 0' has 3 columns where RAF-DB"),
        (b"train_00001.jpg 4 \xe9\n", "list_patition_label.txt: not UTF-8 text"),
        (b"", "has 0 columns"),
    ],
)
def test_a_list_of_another_form_stops_the_import(tree, take, text, said):
    (tree / "basic/EmoLabel/list_patition_label.txt").write_bytes(text)
    with pytest.raises(UserError, match=said):
        take("raf-db", tree)


def test_what_is_missing_is_named(tree, take):
    with pytest.raises(UserError, match="compound/EmoLabel or EmoLabel is missing"):
        take("raf-db", tree, subset="compound")
    (tree / "basic/EmoLabel/list_patition_label.txt").unlink()
    with pytest.raises(UserError, match=r"list_patition_label\.txt or EmoLabel/list_partition_label\.txt is missing"):
        take("raf-db", tree)
