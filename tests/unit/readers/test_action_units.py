"""The readers of BP4D and DISFA: what 9 means, frames and their numbers, cameras, folds by person."""

import pytest

from facemllm.ingest.reader import Refused
from facemllm.ingest.readers.action_units import BP4D_HELD_OUT as HELD_OUT
from facemllm.ingest.readers.action_units import DISFA_HELD_OUT as HELD_OUT_DISFA
from facemllm.ingest.readers.action_units import DISFA_UNITS as UNITS
from tests.refusing import refuses

HEADER = "0,1,2,4,5,6,7,10,12,14,15,17,23,24"
ZEROS = {f"AU{unit}": 0.0 for unit in (1, 2, 4, 6, 7, 10, 12, 14, 15, 17, 23, 24)}


def sheet(path, *rows, end="\n", header=HEADER, start=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((start + end.join([header, *rows, ""])).encode())


@pytest.fixture
def tree(tmp_path, pictures):
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
    frames = [f"F001/T1/{number}.jpg" for number in ("0007", "0008", "0009", "0010", "0013", "13", "0100")]
    pictures(tmp_path / "2D+3D", *frames, "M003/T8/2440.jpg", "F099/T1/1.jpg", "M003/T2/1.jpg")
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


def test_all_units_and_frames_thinned_out(tree, take):
    units = take("bp4d", tree, units="all").column("action_units")
    assert (units["F001/T1/0007"]["AU5"], units["F001/T1/0009"]) == (1.0, {"AU5": 1.0})
    thinned = take("bp4d", tree, every="2", fold="none").column("split")
    assert list(thinned) == ["F001/T1/0007", "F099/T1/1", "M003/T8/2440"]


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


def test_missing_files_and_columns(tree, take, tmp_path):
    sheet(tree / "AUCoding/AU_OCC/F001_T1.csv", "1,0,0", header="0,1,2")
    refuses(r"F001_T1\.csv, line 1: column 4, 6, 7", take, "bp4d", tree)
    (tree / "AUCoding/AU_OCC/F001_T1.csv").write_bytes(b"")
    refuses("empty; a header line", take, "bp4d", tree)
    refuses("AUCoding is missing", take, "bp4d", tree / "2D+3D")
    (tree / "2D+3D").rename(tree / "elsewhere")
    refuses("no folders of subjects", take, "bp4d", tree)


def coded(root, person, frames=3, start=1, end="\n", **rows):
    """Label files of a person: all intensities 0, but for units given as au1=[...]."""
    home = root / "ActionUnit_Labels" / person
    home.mkdir(parents=True, exist_ok=True)
    for unit in UNITS["all"]:
        lines = rows.get(f"au{unit}", [f"{frame},0" for frame in range(start, start + frames)])
        (home / f"{person}_au{unit}.txt").write_bytes(end.join([*lines, ""]).encode())


@pytest.fixture
def disfa(tmp_path, pictures):
    units = {"au1": ["1,0", "2,3", "3,5"], "au2": ["1,1", "2,x", "3,6", "3,2"], "au4": ["1,4", "1,0", "", "3"]}
    coded(tmp_path, "SN001", **units, au5=["1,2", "2,2", "3,2"])
    coded(tmp_path, "SN003", end="\r\n", au1=["﻿1,2.0", "2,0", "3,0"])
    left = [f"LeftVideoSN001_comp/{n}.png" for n in (0, 1, 3)] + [f"SN003/000{n}.png" for n in range(3)]
    pictures(tmp_path / "Videos_LeftCamera", *left, form="PNG")
    pictures(tmp_path / "Videos_RightCamera/SN003", "0.jpg", "1.jpg", "2.jpg")
    return tmp_path


def test_disfa_rows_are_as_written_down(disfa, take):
    found = take("disfa", disfa)
    units = found.column("action_units")
    zeros = {f"AU{unit}": 0.0 for unit in UNITS["benchmark"]}
    assert units["left/SN001/0"] == zeros | {"AU2": 1.0, "AU4": 4.0}  # frame 1
    without = {name: value for name, value in zeros.items() if name not in ("AU2", "AU4")}
    assert units["left/SN001/1"] == without | {"AU1": 3.0}  # frame 2
    assert units["left/SN003/0000"] == zeros | {"AU1": 2.0}
    assert sorted(units) == ["left/SN001/0", "left/SN001/1", *(f"left/SN003/000{n}" for n in range(3))]
    home = "ActionUnit_Labels/SN001/SN001_au"
    assert found.refused == [
        Refused(f"{home}2.txt", 2, "'2,x' is not a frame, a comma and an intensity of 0 to 5"),
        Refused(f"{home}2.txt", 3, "'3,6' is not a frame, a comma and an intensity of 0 to 5"),
        Refused(f"{home}4.txt", 2, "frame 1 has a row already"),
        Refused(f"{home}4.txt", 4, "'3' is not a frame, a comma and an intensity of 0 to 5"),
        Refused("Videos_LeftCamera/LeftVideoSN001_comp/2.png", 3, "the picture is missing"),
        Refused("Videos_LeftCamera/LeftVideoSN001_comp/3.png", 0, "no label row for frame 4"),
    ]


def test_all_units_and_the_other_camera(disfa, take):
    assert take("disfa", disfa, units="all").column("action_units")["left/SN001/0"]["AU5"] == 2.0
    right = take("disfa", disfa, camera="right")
    assert sorted(right.column("split")) == ["right/SN003/0", "right/SN003/1", "right/SN003/2"]
    (disfa / "ActionUnit_Labels/SN001/SN001_au5.txt").unlink()
    refuses(r"SN001_au5\.txt is missing", take, "disfa", disfa, units="all")


def test_a_shift_of_one_is_noticed(tmp_path, pictures, take):
    coded(tmp_path, "SN001", au1=["1,0", "2,3", "3,0"])
    pictures(tmp_path / "images/SN001", "1.png", "2.png", "3.png", form="PNG")
    refuses(r"labels count frames from 1 to 3, pictures from 1 to 3.*-1 does not fit, 0", take, "disfa", tmp_path)
    rows = take("disfa", tmp_path, frame_offset="0").column("action_units")
    assert [rows[f"SN001/{n}"]["AU1"] for n in (1, 2, 3)] == [0.0, 3.0, 0.0]


def test_labels_from_zero(tmp_path, picture, take):
    coded(tmp_path, "SN001", start=0)
    picture(tmp_path / "SN001/0.png", form="PNG")
    found = take("disfa", tmp_path)
    assert [row["source_id"] for row in found.rows] == ["SN001/0"]
    assert found.refused[0].reason == "frame 0 with frame_offset -1 has no picture"


def test_disfa_folds_by_person(disfa, take):
    share = ["ingest.validation_share=0", "ingest.test_share=0.3"]
    for fold, expected in (("1", ("train", "test")), ("2", ("train", "train")), ("3", ("test", "train"))):
        split = take("disfa", disfa, share, fold=fold).column("split")
        assert (split["left/SN001/0"], split["left/SN003/0000"]) == expected
    everybody = [person for people in HELD_OUT_DISFA.values() for person in people.split()]
    assert len(everybody) == len(set(everybody)) == 27
    assert len({row["subject_id"] for row in take("disfa", disfa, fold="none").rows}) == 2


def test_people_outside_the_folds_and_thinning(tmp_path, pictures, take):
    coded(tmp_path, "SN014")
    pictures(tmp_path / "img/SN014", "0.png", "1.png", "2.png", form="PNG")
    labels, reason = "ActionUnit_Labels/SN014/SN014_au1.txt", "SN014 is in no fold; set the option fold: none"
    assert take("disfa", tmp_path).refused[0] == Refused(labels, 1, reason)
    assert [row["source_id"] for row in take("disfa", tmp_path, fold="none", every="2").rows] == ["SN014/0", "SN014/2"]


def test_missing_folders(disfa, take):
    (disfa / "Videos_RightCamera").rename(disfa / "other")
    refuses("Videos_LeftCamera is there but none of Videos_RightCamera", take, "disfa", disfa, camera="right")
    refuses("ActionUnit_Labels is missing", take, "disfa", disfa / "Videos_LeftCamera")
