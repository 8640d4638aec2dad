"""FairFace: its bins and categories, the official validation split as test, what spreadsheets do to bins."""

from __future__ import annotations

import pytest

from facemllm.errors import UserError
from facemllm.ingest.reader import Refused

TRAIN = (
    "file,age,gender,race,service_test",
    *("train/1.jpg,0-2,Male,East Asian,False", "train/2.jpg,more than 70,Female,Latino_Hispanic,True"),
    *(
        "train/3.jpg,3-Sep,Male,Black,False",
        "train/4.jpg,19-Oct,Male,Black,False",
        "train/5.jpg,Oct-19,Male,Black,True",
    ),
    *("train/6.jpg,70-79,Male,Black,True", "train/7.jpg,3-9,male,Black,True", "train/8.jpg,3-9,Male,Martian,True"),
    *("train/9.jpg,3-9,Male,Black", "train/1.jpg,3-9,Male,Black,True", "../x.jpg,3-9,Male,Black,True"),
    *("val/1.jpg,3-9,Male,Black,True", "train/10.jpg,20-29,Female,Middle Eastern,nan"),
)
VAL = (
    "file,age,gender,race,service_test",
    "val/1.jpg,60-69,Female,Southeast Asian,True",
    "val/2.jpg,3-9,Male,Indian,True",
)


@pytest.fixture
def tree(tmp_path, picture):
    for margin, side in (("025", 50), ("125", 90)):
        home = tmp_path / f"fairface-img-margin{margin}-trainval"
        for number in (*range(1, 9), 10, 77):
            picture(home / f"train/{number}.jpg", number, (side, side))
        picture(home / "val/1.jpg", 101, (side, side))
    (tmp_path / "fairface_label_train.csv").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(TRAIN).encode())
    (tmp_path / "fairface_label_val.csv").write_text("\n".join(VAL))
    return tmp_path


def test_rows_and_splits(tree, take):
    rows = take("fairface", tree, ["ingest.validation_share=0.0"]).rows
    assert [(row["source_id"], row["split"], row["facts"]) for row in rows] == [
        ("train/1", "train", {"age_range": "0-2", "gender": "male", "ethnicity": "east_asian"}),
        ("train/2", "train", {"age_range": "70+", "gender": "female", "ethnicity": "latino_hispanic"}),
        ("train/10", "train", {"age_range": "20-29", "gender": "female", "ethnicity": "middle_eastern"}),
        ("val/1", "test", {"age_range": "60-69", "gender": "female", "ethnicity": "southeast_asian"}),
    ]
    assert all(row["width"] == 50 and row["subject_id"] is None for row in rows)


def test_what_is_refused(tree, take):
    date = ": a spreadsheet turned the bin into a date; use the label file as it was downloaded"
    bins = "0-2, 3-9, 10-19, 20-29, 30-39, 40-49, 50-59, 60-69, more than 70"
    races = "White, Black, Latino_Hispanic, East Asian, Southeast Asian, Indian, Middle Eastern"
    home, listed = "fairface-img-margin025-trainval", "fairface_label_train.csv"
    assert take("fairface", tree).refused == [
        Refused(listed, 4, "age is '3-Sep'" + date),
        Refused(listed, 5, "age is '19-Oct'" + date),
        Refused(listed, 6, "age is 'Oct-19'" + date),
        Refused(listed, 7, f"age is '70-79', not one of {bins}"),
        Refused(listed, 8, "gender is 'male', not one of Male, Female"),
        Refused(listed, 9, f"race is 'Martian', not one of {races}"),
        Refused(listed, 10, "4 fields where the header has 5"),
        Refused(listed, 11, "train/1.jpg has a row already"),
        Refused(listed, 12, "the path '../x.jpg' leads out of the dataset's folder"),
        Refused(listed, 13, "file is 'val/1.jpg', not train/<number>.jpg"),
        Refused(f"{home}/train/77.jpg", 0, f"no label row in {listed}"),
        Refused(f"{home}/val/2.jpg", 3, "the picture is missing"),
    ]


def test_the_text_false_is_not_true(tree, take):
    found = take("fairface", tree, rows="service_test")
    assert set(found.column("split")) == {"train/2", "val/1"}
    assert Refused("fairface_label_train.csv", 14, "service_test is 'nan', not True or False") in found.refused


def test_margins_lie_in_folders_of_their_own(tree, take):
    assert {row["width"] for row in take("fairface", tree, margin="125").rows} == {90}
    flat = tree / "fairface-img-margin025-trainval"
    for part in ("train", "val"):
        (flat / f"fairface_label_{part}.csv").write_bytes((tree / f"fairface_label_{part}.csv").read_bytes())
    assert len(take("fairface", flat).rows) == 4
    with pytest.raises(UserError, match="fairface-img-margin125-trainval/train is missing"):
        take("fairface", flat, margin="125")


def test_a_label_file_of_another_form_stops_the_import(tree, take):
    for text, said in (
        (b"file,age,sex,race\n", "line 1: column gender is missing; found file, age, sex, race"),
        (b"", "fairface_label_val.csv: empty"),
        (b"file,age,gender,race\nval/1.jpg,3-9,Male,Caf\xe9\n", "not UTF-8 text"),
    ):
        (tree / "fairface_label_val.csv").write_bytes(text)
        with pytest.raises(UserError, match=said):
            take("fairface", tree)
    (tree / "fairface_label_val.csv").write_text("file,age,gender,race\n")
    with pytest.raises(UserError, match="column service_test is missing"):
        take("fairface", tree, rows="service_test")
