"""MORPH II: contradictory people refused as a whole, and the two protocols."""

from __future__ import annotations

import pytest

from facemllm.errors import UserError
from facemllm.ingest.reader import Refused
from facemllm.tables import subject_id

HEADER = "id_num,picture_num,dob,doa,race,gender,facial_hair,age,age_diff,glasses,photo"


def line(person, photo, age, race="W", gender="M", dob="04/02/1951"):
    return f"{person},1,{dob},10/07/2005,{race},{gender},NULL,{age},0,NULL,{photo}"


ROWS = (
    *(line("009055", "Album2/009055_1M54.JPG", 54), line("009055", "Album2/009055_2M55.JPG", 55)),
    *(line("9055", "Album2/009055_3M56.JPG", 56, dob="NULL"), line("012345", "Album2/012345_0F16.JPG", 16, "B", "F")),
    *(line("000001", "Album2/000001_0M30.JPG", 30), line("000001", "Album2/000001_1F31.JPG", 31, gender="F")),
    *(line("000002", "Album2/000002_0M30.JPG", 30), line("000002", "Album2/000002_1M31.JPG", 31, race="H")),
    *(line("000003", "Album2/000003_0M30.JPG", 30), line("000003", "Album2/000003_1M31.JPG", 31, dob="01/01/1970")),
    *(line("000004", "Album2/000004_0M30.JPG", 33), line("000004", "Album2/000005_0M30.JPG", 30)),
    *(line("000006", "Album2/000006_0F30.JPG", 30), line("000007", "Album2/000007_0M30.JPG", "nan")),
    *(line("000008", "Album2/000008_0M30.JPG", 30, race="X"), line("", "Album2/000009_0M30.JPG", 30)),
    *(line("009055", "Album2/009055_1M54.JPG", 54), "000010,1,2", line("000011", "/Album2/000011_0M30.JPG", 30)),
    *(line("000012", "Album2/000012_0M30.JPG", 30, race=""), line("000013", "Album2/000013_0M30.JPG", 30)),
)
PHOTOS = ("009055_1M54", "009055_2M55", "009055_3M56", "012345_0F16", "000012_0M30", "000001_0M30")


@pytest.fixture
def tree(tmp_path, picture):
    for seed, name in enumerate(PHOTOS):
        picture(tmp_path / f"Album2/{name}.JPG", seed, (100, 120))
    (tmp_path / "morph_2008_nonCommercial.csv").write_bytes("\r\n".join((HEADER, *ROWS, "")).encode("utf-8-sig"))
    return tmp_path


def test_rows_are_taken_and_contradictory_people_refused(tree, take):
    found = take("morph2", tree)
    told = ("source_id", "age", "gender", "ethnicity", "subject_id")
    man, woman, last = (subject_id("morph2", person) for person in ("9055", "12345", "12"))
    assert [tuple(row.get(name) for name in told) for row in found.rows] == [
        ("009055_1M54", 54, "male", "white", man),
        ("009055_2M55", 55, "male", "white", man),
        ("009055_3M56", 56, "male", "white", man),
        ("012345_0F16", 16, "female", "black", woman),
        ("000012_0M30", 30, "male", None, last),
    ]
    listed = "morph_2008_nonCommercial.csv"
    clash = "the rows of id {} contradict one another in {}"
    assert found.refused == [
        Refused(listed, 6, clash.format("000001", "sex")),
        Refused(listed, 7, clash.format("000001", "sex")),
        Refused(listed, 8, clash.format("000002", "race")),
        Refused(listed, 9, clash.format("000002", "race")),
        Refused(listed, 10, clash.format("000003", "date of birth")),
        Refused(listed, 11, clash.format("000003", "date of birth")),
        Refused(listed, 12, "the photo's name says age 30, its row 33"),
        Refused(listed, 13, "the photo's name says id 5, its row 4"),
        Refused(listed, 14, "the photo's name says sex F, its row M"),
        Refused(listed, 15, "age is nan, outside 0 to 120"),
        Refused(listed, 16, "race is 'X', not one of W, B, A, H, O"),
        Refused(listed, 17, "id_num is empty"),
        Refused(listed, 18, "Album2/009055_1M54.JPG has a row already"),
        Refused(listed, 19, "3 fields where the header has 11"),
        Refused(listed, 20, "the path '/Album2/000011_0M30.JPG' leads out of the dataset's folder"),
        Refused("Album2/000013_0M30.JPG", 22, "the picture is missing"),
    ]


@pytest.fixture
def one_person(tmp_path, picture):
    rows = [line("000001", f"Album2/000001_{n}M30.JPG", 30) for n in range(60)]
    for n in range(60):
        picture(tmp_path / f"Album2/000001_{n}M30.JPG", n, (16, 16))
    (tmp_path / "morph_2008_nonCommercial.csv").write_text("\n".join((HEADER, *rows)))
    return tmp_path


def test_the_random_protocol_leaks_people_and_says_nothing_of_them(one_person, take):
    plain = ["ingest.test_share=0.0", "ingest.validation_share=0.0"]
    found = take("morph2", one_person, plain, protocol="random_80_20")
    splits = [row["split"] for row in found.rows]
    assert {row["subject_id"] for row in found.rows} == {None}
    assert set(splits) == {"train", "test"}
    assert 5 <= splits.count("test") <= 20
    again = take(
        "morph2", one_person, ["ingest.test_share=0.5", "ingest.validation_share=0.4"], protocol="random_80_20"
    )
    carved = [row["split"] for row in again.rows]
    assert [split == "test" for split in carved] == [split == "test" for split in splits]
    assert "validation" in carved
    exclusive = take("morph2", one_person, plain)
    assert {row["split"] for row in exclusive.rows} == {"train"}


def test_a_table_of_another_form_stops_the_import(tree, take):
    path = tree / "morph_2008_nonCommercial.csv"
    path.write_text("id_num,age,photo\n1,2,x.jpg\n")
    with pytest.raises(UserError, match="line 1: column dob, race, gender is missing; found id_num, age, photo"):
        take("morph2", tree)
    path.unlink()
    with pytest.raises(UserError, match=r"morph_2008_nonCommercial\.csv .*is missing"):
        take("morph2", tree)
