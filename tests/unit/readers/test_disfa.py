"""DISFA: labels count from 1 and pictures from 0, intensities stay 0 to 5, cameras and folds."""

from __future__ import annotations

import pytest

from facemllm.errors import UserError
from facemllm.ingest.reader import Refused
from facemllm.ingest.readers.action_units import DISFA_HELD_OUT as HELD_OUT
from facemllm.ingest.readers.action_units import DISFA_UNITS as UNITS


def coded(root, person, frames=3, start=1, end="\n", **rows):
    """Label files of a person: all intensities 0, but for units given as au1=[...]."""
    home = root / "ActionUnit_Labels" / person
    home.mkdir(parents=True, exist_ok=True)
    for unit in UNITS["all"]:
        lines = rows.get(f"au{unit}", [f"{frame},0" for frame in range(start, start + frames)])
        (home / f"{person}_au{unit}.txt").write_bytes(end.join([*lines, ""]).encode())


@pytest.fixture
def tree(tmp_path, picture):
    coded(
        tmp_path,
        "SN001",
        au1=["1,0", "2,3", "3,5"],
        au2=["1,1", "2,x", "3,6", "3,2"],
        au4=["1,4", "1,0", "", "3"],
        au5=["1,2", "2,2", "3,2"],
    )
    coded(tmp_path, "SN003", end="\r\n", au1=["﻿1,2.0", "2,0", "3,0"])
    for seed, number in enumerate((0, 1, 3)):
        picture(tmp_path / f"Videos_LeftCamera/LeftVideoSN001_comp/{number}.png", seed=seed, form="PNG")
    for seed, number in enumerate((0, 1, 2)):
        picture(tmp_path / f"Videos_LeftCamera/SN003/{number:04d}.png", seed=10 + seed, form="PNG")
        picture(tmp_path / f"Videos_RightCamera/SN003/{number}.jpg", seed=20 + seed)
    return tmp_path


def test_rows_are_as_written_down(tree, take):
    found = take("disfa", tree)
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


def test_all_units_and_the_other_camera(tree, take):
    (tree / "ActionUnit_Labels/SN001/SN001_au5.txt").rename(tree / "au5.txt")
    with pytest.raises(UserError, match=r"SN001_au5\.txt is missing"):
        take("disfa", tree, units="all")
    (tree / "au5.txt").rename(tree / "ActionUnit_Labels/SN001/SN001_au5.txt")
    assert take("disfa", tree, units="all").column("action_units")["left/SN001/0"]["AU5"] == 2.0
    right = take("disfa", tree, camera="right")
    assert sorted(right.column("split")) == ["right/SN003/0", "right/SN003/1", "right/SN003/2"]


def test_a_shift_of_one_is_noticed(tmp_path, picture, take):
    coded(tmp_path, "SN001", au1=["1,0", "2,3", "3,0"])
    for number in (1, 2, 3):
        picture(tmp_path / f"images/SN001/{number}.png", seed=number, form="PNG")
    with pytest.raises(UserError, match=r"labels count frames from 1 to 3, pictures from 1 to 3.*-1 does not fit, 0"):
        take("disfa", tmp_path)
    rows = take("disfa", tmp_path, frame_offset="0").column("action_units")
    assert [rows[f"SN001/{n}"]["AU1"] for n in (1, 2, 3)] == [0.0, 3.0, 0.0]


def test_labels_from_zero(tmp_path, picture, take):
    coded(tmp_path, "SN001", start=0)
    picture(tmp_path / "SN001/0.png", form="PNG")
    found = take("disfa", tmp_path)
    assert [row["source_id"] for row in found.rows] == ["SN001/0"]
    assert found.refused[0].reason == "frame 0 with frame_offset -1 has no picture"


def test_folds_by_person(tree, take):
    share = ["ingest.validation_share=0", "ingest.test_share=0.3"]
    for fold, expected in (("1", ("train", "test")), ("2", ("train", "train")), ("3", ("test", "train"))):
        split = take("disfa", tree, share, fold=fold).column("split")
        assert (split["left/SN001/0"], split["left/SN003/0000"]) == expected
    everybody = [person for people in HELD_OUT.values() for person in people.split()]
    assert len(everybody) == len(set(everybody)) == 27
    assert len({row["subject_id"] for row in take("disfa", tree, fold="none").rows}) == 2


def test_people_outside_the_folds_and_thinning(tmp_path, picture, take):
    coded(tmp_path, "SN014")
    for number in range(3):
        picture(tmp_path / f"img/SN014/{number}.png", seed=number, form="PNG")
    refused = take("disfa", tmp_path).refused
    assert refused[0] == Refused(
        "ActionUnit_Labels/SN014/SN014_au1.txt", 1, "SN014 is in no fold; set the option fold: none"
    )
    assert [row["source_id"] for row in take("disfa", tmp_path, fold="none", every="2").rows] == ["SN014/0", "SN014/2"]


def test_missing_folders(tree, take):
    (tree / "Videos_RightCamera").rename(tree / "other")
    with pytest.raises(UserError, match="Videos_LeftCamera is there but none of Videos_RightCamera"):
        take("disfa", tree, camera="right")
    with pytest.raises(UserError, match="ActionUnit_Labels is missing"):
        take("disfa", tree / "Videos_LeftCamera")
