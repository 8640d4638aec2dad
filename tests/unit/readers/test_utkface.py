"""UTKFace: labels out of names, whole ones read, broken ones refused and never guessed."""

from __future__ import annotations

import pytest

from facemllm.errors import UserError
from facemllm.ingest.reader import Refused

BROKEN = "the name is not [age]_[sex]_[race]_[date].jpg; what is missing there is not guessed"


@pytest.fixture
def tree(tmp_path, picture):
    names = (
        *("1_0_0_20161219140623097.jpg.chip.jpg", "116_1_4_20170112213500903.jpg.chip.jpg"),
        *("25_1_3_20170104020210475.jpg.chip.jpg", "40_0_1_20170104020210475.jpg", "33_1_2_20170104020210475.jpg"),
        *("39_1_20170116174525125.jpg.chip.jpg", "61_1_20170109142408075.jpg.chip.jpg"),
        *("61_1_20170109150557335.jpg.chip.jpg", "53__0_20170116184028385.jpg.chip.jpg"),
        *("24_0_1_20170116220224657 .jpg.chip.jpg", "55_0_0_20170116232725357jpg.chip.jpg"),
        *("117_0_0_20161219140623097.jpg.chip.jpg", "30_2_0_20161219140623097.jpg", "30_0_5_20161219140623097.jpg"),
        *("-1_0_0_20161219140623097.jpg", "1_0_0_20161219140623097.png", "Thumbs.db", ".DS_Store"),
    )
    for seed, name in enumerate(names):
        picture(tmp_path / "UTKFace" / name, seed, (200, 200))
    wild = (
        "part1/25_1_3_20170104020210475.jpg",
        "part1/61_3_20170109150557335.jpg",
        "part2/44_1_4_20170116235150272.pg",
    )
    for seed, name in enumerate((*wild, "part3/55_0_0_20170116232725357JPG", "part3/25_1_3_20170104020210475.jpg")):
        picture(tmp_path / name, seed, (90, 120))
    return tmp_path


def test_aligned_names_are_the_labels(tree, take):
    rows = take("utkface", tree).rows
    assert [(row["source_id"], row["facts"]) for row in rows] == [
        ("116_1_4_20170112213500903", {"age": 116, "gender": "female", "ethnicity": "others"}),
        ("1_0_0_20161219140623097", {"age": 1, "gender": "male", "ethnicity": "white"}),
        ("24_0_1_20170116220224657", {"age": 24, "gender": "male", "ethnicity": "black"}),
        ("25_1_3_20170104020210475", {"age": 25, "gender": "female", "ethnicity": "indian"}),
        ("33_1_2_20170104020210475", {"age": 33, "gender": "female", "ethnicity": "asian"}),
        ("40_0_1_20170104020210475", {"age": 40, "gender": "male", "ethnicity": "black"}),
        ("55_0_0_20170116232725357", {"age": 55, "gender": "male", "ethnicity": "white"}),
    ]
    assert all(row["subject_id"] is None and row["width"] == 200 for row in rows)


def test_broken_names_are_refused(tree, take):
    assert take("utkface", tree).refused == [
        Refused("UTKFace/-1_0_0_20161219140623097.jpg", 0, BROKEN),
        Refused("UTKFace/117_0_0_20161219140623097.jpg.chip.jpg", 0, "the age is 117, outside 0 to 116"),
        Refused("UTKFace/1_0_0_20161219140623097.png", 0, "1_0_0_20161219140623097 stands there already"),
        Refused("UTKFace/30_0_5_20161219140623097.jpg", 0, BROKEN),
        Refused("UTKFace/30_2_0_20161219140623097.jpg", 0, BROKEN),
        Refused("UTKFace/39_1_20170116174525125.jpg.chip.jpg", 0, BROKEN),
        Refused("UTKFace/53__0_20170116184028385.jpg.chip.jpg", 0, BROKEN),
        Refused("UTKFace/61_1_20170109142408075.jpg.chip.jpg", 0, BROKEN),
        Refused("UTKFace/61_1_20170109150557335.jpg.chip.jpg", 0, BROKEN),
        Refused("UTKFace/Thumbs.db", 0, BROKEN),
    ]


def test_wild_parts_share_names_and_splits_with_the_aligned_pictures(tree, take):
    wild = take("utkface", tree, pictures="wild")
    assert wild.column("age") == {
        "25_1_3_20170104020210475": 25,
        "44_1_4_20170116235150272": 44,
        "55_0_0_20170116232725357": 55,
    }
    assert all((row["width"], row["height"]) == (90, 120) for row in wild.rows)
    assert wild.refused == [
        Refused("part1/61_3_20170109150557335.jpg", 0, BROKEN),
        Refused("part3/25_1_3_20170104020210475.jpg", 0, "25_1_3_20170104020210475 stands there already"),
    ]
    settings = ["ingest.test_share=0.5", "ingest.validation_share=0.2"]
    aligned = take("utkface", tree, settings).column("split")
    for name, split in take("utkface", tree, settings, pictures="wild").column("split").items():
        assert aligned.get(name, split) == split


def test_pictures_may_lie_at_the_root_and_must_lie_somewhere(tree, take):
    assert len(take("utkface", tree / "UTKFace").rows) == 7
    (tree / "empty/part1").mkdir(parents=True)
    with pytest.raises(UserError, match="no aligned picture of UTKFace in it; option pictures: wild reads part1"):
        take("utkface", tree / "empty")
    with pytest.raises(UserError, match="no wild picture of UTKFace in it"):
        take("utkface", tree / "empty", pictures="wild")
