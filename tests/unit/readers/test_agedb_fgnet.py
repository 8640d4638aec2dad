"""AgeDB and FG-NET: people and ages out of file names, however odd the names."""

from __future__ import annotations

import os
import sys
import unicodedata

import pytest

from facemllm.errors import UserError
from facemllm.ingest.reader import Refused
from facemllm.tables import subject_id


def test_agedb_names(tmp_path, take, picture):
    composed, decomposed = (unicodedata.normalize(form, "RenéClair") for form in ("NFC", "NFD"))
    names = (
        *("12083_ElsaMartinelli_74_f.jpg", "7_J_R_R_Tolkien_60_m.JPG", "8_O'Toole-2nd_5_M.jpg", "9_ 50_Cent _35_m.jpg"),
        *(f"10_{composed}_40_m.jpg", f"11_{decomposed}_45_m.jpg", "12_NoSex_40.jpg", "13_TooOld_121_f.jpg"),
        *("14_NoAge_x_f.jpg", "15__50_f.jpg", "7_Twice_50_m.jpg", "readme.txt", ".DS_Store"),
    )
    for seed, name in enumerate(names):
        picture(tmp_path / "AgeDB" / name, seed)
    (tmp_path / "AgeDB" / "folder").mkdir()
    found = take("agedb", tmp_path)
    assert [(row["source_id"], row["age"], row["gender"], row["subject_id"]) for row in found.rows] == [
        (f"10_{composed}_40_m", 40, "male", subject_id("agedb", composed)),
        (f"11_{decomposed}_45_m", 45, "male", subject_id("agedb", composed)),
        ("12083_ElsaMartinelli_74_f", 74, "female", subject_id("agedb", "ElsaMartinelli")),
        ("7_J_R_R_Tolkien_60_m", 60, "male", subject_id("agedb", "J_R_R_Tolkien")),
        ("8_O'Toole-2nd_5_M", 5, "male", subject_id("agedb", "O'Toole-2nd")),
        ("9_ 50_Cent _35_m", 35, "male", subject_id("agedb", " 50_Cent ")),
    ]
    form = "the name is not [number]_[name]_[age]_[f or m].jpg"
    assert found.refused == [
        Refused("AgeDB/12_NoSex_40.jpg", 0, form),
        Refused("AgeDB/13_TooOld_121_f.jpg", 0, "the age is 121, outside 0 to 120"),
        Refused("AgeDB/14_NoAge_x_f.jpg", 0, form),
        Refused("AgeDB/15__50_f.jpg", 0, form),
        Refused("AgeDB/7_Twice_50_m.jpg", 0, "number 7 stands there already"),
        Refused("AgeDB/readme.txt", 0, form),
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="only here may a file's name be any bytes")
def test_a_name_that_is_not_utf8_is_refused_readably(tmp_path, take, picture):
    picture(tmp_path / "1_Someone_20_f.jpg")
    for name in (b"2_Ren\xe9_30_m.jpg", b"3_Ren\xe9.jpg"):
        os.close(os.open(os.fsencode(tmp_path) + b"/" + name, os.O_CREAT | os.O_WRONLY))
    found = take("agedb", tmp_path)
    assert [row["source_id"] for row in found.rows] == ["1_Someone_20_f"]
    assert found.refused == [
        Refused(r"2_Ren\udce9_30_m.jpg", 0, "the file's name is not UTF-8; rename it"),
        Refused(r"3_Ren\udce9.jpg", 0, "the name is not [number]_[name]_[age]_[f or m].jpg"),
    ]


POINTS = [[n + 0.25, 2 * n] for n in range(68)]


def points_file(points):
    inner = "".join(f"{x} {y}\r\n" for x, y in points)
    return f"version: 1\r\nn_points: {len(points)}\r\n{{\r\n{inner}}}\r\n"


def test_fgnet_names_and_points(tmp_path, take, picture):
    names = ("001A02.JPG", "001A43a.JPG", "001A43b.jpg", "078A11.JPG", "079A7.JPG", "80A10.JPG", "082A10.JPG", "x.png")
    for seed, name in enumerate(names):
        picture(tmp_path / "images" / name, seed, (150, 160))
    points = tmp_path / "points"
    points.mkdir()
    (points / "001a02.pts").write_text(points_file(POINTS))
    (points / "001A43a.pts").write_text(points_file(POINTS))
    (points / "078a11.pts").write_text(points_file(POINTS[:67]))
    (points / "082a10.pts").write_text("version: 1\n")
    found = take("fgnet", tmp_path)
    person = subject_id("fgnet", "001")
    assert [(row["source_id"], row["age"], row["subject_id"], row.get("landmarks")) for row in found.rows] == [
        ("001A02", 2, person, POINTS),
        ("001A43a", 43, person, POINTS),
        ("001A43b", 43, person, None),
    ]
    form = "the name is not [person]A[age][letter].jpg"
    assert found.refused == [
        Refused("images/078A11.JPG", 0, "078a11.pts: not 68 points of two numbers"),
        Refused("images/079A7.JPG", 0, form),
        Refused("images/082A10.JPG", 0, "082a10.pts: no points between braces"),
        Refused("images/80A10.JPG", 0, form),
        Refused("images/x.png", 0, form),
    ]
    assert len({row["split"] for row in found.rows}) == 1


def test_a_link_from_a_point_file_leads_nowhere_outside(tmp_path, take, picture):
    (tmp_path / "secret.pts").write_text(points_file(POINTS))
    home = tmp_path / "fgnet"
    picture(home / "images/001A02.JPG")
    (home / "points").mkdir()
    (home / "points/001a02.pts").symlink_to(tmp_path / "secret.pts")
    reason = "001a02.pts: a link leads out of the dataset's folder"
    assert take("fgnet", home).refused == [Refused("images/001A02.JPG", 0, reason)]


@pytest.mark.parametrize(("source", "example"), [("agedb", "12083_ElsaMartinelli_74_f.jpg"), ("fgnet", "078A11.JPG")])
def test_an_empty_folder_is_named(tmp_path, take, source, example):
    with pytest.raises(UserError, match=f"no picture in it; .* are named as {example}"):
        take(source, tmp_path)
