"""Emo135 in the generic form: a folder an emotion, with and without splits above."""

from __future__ import annotations

import pytest

from facemllm.errors import UserError
from facemllm.ingest.reader import Refused


def test_folders_are_emotions(tmp_path, take, picture):
    names = ("grief/1.jpg", "grief/2.PNG", "Self-Pity/1.jpg", "012. Tender Love/a.b.webp", "99/1.jpg", "stray.jpg")
    for seed, name in enumerate(names):
        picture(tmp_path / name, seed)
    (tmp_path / "grief/notes.txt").write_text("x")
    (tmp_path / "grief/.hidden.jpg").write_text("x")
    (tmp_path / "grief/deeper").mkdir()
    found = take("emo135", tmp_path)
    assert [(row["source_id"], row["expression"], row["subject_id"]) for row in found.rows] == [
        ("012. Tender Love/a.b", "tender_love", None),
        ("Self-Pity/1", "self_pity", None),
        ("grief/1", "grief", None),
        ("grief/2", "grief", None),
    ]
    assert found.refused == [
        Refused("stray.jpg", 0, "not in the folder of an emotion"),
        Refused("99/1.jpg", 0, "the folder '99' names no emotion"),
        Refused("grief/deeper", 0, "a folder inside the folder of an emotion"),
        Refused("grief/notes.txt", 0, "not a picture by its name (.jpg, .jpeg, .jpe, .jfif, .png, .webp, .bmp)"),
    ]


def test_folders_of_splits_above_are_kept_and_validation_is_carved(tmp_path, take, picture):
    for seed, name in enumerate(("Train/grief/1.jpg", "test/grief/1.jpg", "val/love/1.jpg", "val/x.jpg")):
        picture(tmp_path / name, seed)
    found = take("emo135", tmp_path, ["ingest.validation_share=0.0"])
    assert found.column("split") == {"Train/grief/1": "train", "test/grief/1": "test", "val/love/1": "validation"}
    assert found.refused == [Refused("val/x.jpg", 0, "not in the folder of an emotion")]
    carved = take("emo135", tmp_path, ["ingest.validation_share=0.99", "ingest.test_share=0.0"])
    assert carved.column("split")["Train/grief/1"] == "validation"


def test_a_folder_without_folders_is_named(tmp_path, take, picture):
    picture(tmp_path / "1.jpg")
    with pytest.raises(UserError, match="no folder in it; Emo135 is read as one folder an emotion"):
        take("emo135", tmp_path)
