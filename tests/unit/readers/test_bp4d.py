"""BP4D: 9 is not coded and never absent, frames with and without zeros before them, folds by person."""

from __future__ import annotations

import pytest

from facemllm.errors import UserError
from facemllm.ingest.reader import Refused
from facemllm.ingest.readers.action_units import BP4D_HELD_OUT as HELD_OUT

HEADER = "0,1,2,4,5,6,7,10,12,14,15,17,23,24"
ZEROS = {f"AU{unit}": 0.0 for unit in (1, 2, 4, 6, 7, 10, 12, 14, 15, 17, 23, 24)}


def sheet(path, *rows, end="\n", header=HEADER, start=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((start + end.join([header, *rows, ""])).encode())


@pytest.fixture
def tree(tmp_path, picture):
    labels = tmp_path / "AUCoding" / "AU_OCC"
    sheet(
        labels / "F001_T1.csv",
        "7,1,0,0,1,0,0,0,1,0,0,0,0,0",
        "8,9,9,0,9,0,0,0,0,0,0,0,0,1",
        "9,9,9,9,1,9,9,9,9,9,9,9,9,9",
        "10,2,0,0,0,0,0,0,0,0,0,0,0,0",
        "11,0,0,0",
        "8,0,0,0,0,0,0,0,0,0,0,0,0,0",
        "08,0,0,0,0,0,0,0,0,0,0,0,0,0",
        "x,0,0,0,0,0,0,0,0,0,0,0,0,0",
        "12,0,0,0,0,0,0,0,0,0,0,0,0,0",
        "13,0,0,0,0,0,0,0,0,0,0,0,0,0",
    )
    zeros = ",0" * 13
    sheet(labels / "M003_T8.csv", f"2440{zeros}", end="\r\n", start="﻿")
    sheet(labels / "F099_T1.csv", f"1{zeros}")
    sheet(labels / "notes.csv", "1,2")
    faces = tmp_path / "2D+3D"
    for seed, name in enumerate(
        [
            *("F001/T1/0007.jpg", "F001/T1/0008.jpg", "F001/T1/0009.jpg", "F001/T1/0010.jpg", "F001/T1/0013.jpg"),
            *("F001/T1/13.jpg", "F001/T1/0100.jpg", "M003/T8/2440.jpg", "F099/T1/1.jpg", "M003/T2/1.jpg"),
        ]
    ):
        picture(faces / name, seed=seed)
    return tmp_path


def test_rows_are_as_written_down(tree, take):
    found = take("bp4d", tree)
    units = found.column("action_units")
    coded = {name: value for name, value in ZEROS.items() if name not in ("AU1", "AU2")}
    assert units == {
        "F001/T1/0007": ZEROS | {"AU1": 1.0, "AU12": 1.0},
        "F001/T1/0008": coded | {"AU24": 1.0},
        "M003/T8/2440": ZEROS,
    }
    assert found.column("gender") == {"F001/T1/0007": "female", "F001/T1/0008": "female", "M003/T8/2440": "male"}
    sheet = "AUCoding/AU_OCC/F001_T1.csv"
    assert found.refused == [
        Refused(sheet, 4, "no action unit is coded"),
        Refused(sheet, 5, "AU1 is '2', not 0, 1 or 9"),
        Refused(sheet, 6, "4 fields where the header has 14"),
        Refused(sheet, 7, "8 has a row already"),
        Refused(sheet, 8, "frame 8 has a row already"),
        Refused(sheet, 9, "the frame is 'x', not a whole number"),
        Refused("2D+3D/F001/T1/12.jpg", 10, "the picture is missing"),
        Refused(sheet, 11, "frame 13 has 2 pictures: 0013.jpg, 13.jpg"),
        Refused("2D+3D/F001/T1/0100.jpg", 0, "no label row in F001_T1.csv"),
        Refused("AUCoding/AU_OCC/F099_T1.csv", 2, "F099 is in no fold; set the option fold: none"),
        Refused("AUCoding/AU_OCC/notes.csv", 0, "the name is not [subject]_[task].csv"),
        Refused("2D+3D/M003/T2", 0, "no label file for this task"),
    ]


def test_all_units(tree, take):
    units = take("bp4d", tree, units="all").column("action_units")
    assert units["F001/T1/0007"]["AU5"] == 1.0
    assert units["F001/T1/0009"] == {"AU5": 1.0}


def test_folds_by_person(tree, take):
    share = ["ingest.validation_share=0", "ingest.test_share=0.3"]
    splits = {fold: take("bp4d", tree, share, fold=fold).column("split") for fold in ("1", "2", "3")}
    assert {fold: split["F001/T1/0007"] for fold, split in splits.items()} == {"1": "train", "2": "train", "3": "test"}
    assert {fold: split["M003/T8/2440"] for fold, split in splits.items()} == {"1": "test", "2": "train", "3": "train"}
    drawn = take("bp4d", tree, ["ingest.validation_share=0.01", "ingest.test_share=0.98"], fold="none")
    assert set(drawn.column("split").values()) == {"test"}
    assert "F099/T1/1" in drawn.column("split")
    everybody = [person for people in HELD_OUT.values() for person in people.split()]
    expected = [f"F{n:03d}" for n in range(1, 24)] + [f"M{n:03d}" for n in range(1, 19)]
    assert sorted(everybody) == expected


def test_frames_can_be_thinned_out(tree, take):
    names = [row["source_id"] for row in take("bp4d", tree, every="2", fold="none").rows]
    assert names == ["F001/T1/0007", "F099/T1/1", "M003/T8/2440"]


def test_missing_files_and_columns(tree, take, tmp_path):
    sheet(tree / "AUCoding/AU_OCC/F001_T1.csv", "1,0,0", header="0,1,2")
    with pytest.raises(UserError, match=r"F001_T1\.csv, line 1: column 4, 6, 7"):
        take("bp4d", tree)
    (tree / "AUCoding/AU_OCC/F001_T1.csv").write_bytes(b"")
    with pytest.raises(UserError, match="empty; a header line"):
        take("bp4d", tree)
    with pytest.raises(UserError, match="AUCoding is missing"):
        take("bp4d", tree / "2D+3D")
    (tree / "2D+3D").rename(tree / "elsewhere")
    with pytest.raises(UserError, match="no folders of subjects"):
        take("bp4d", tree)
