"""The readers of AgeDB, FG-NET, UTKFace, MORPH II and FairFace: labels in names and tables, however odd."""

import os
import sys
import unicodedata

import pytest

from facemllm.ingest.reader import Refused
from facemllm.tables import subject_id
from tests.refusing import refuses


def test_agedb_names(tmp_path, take, pictures):
    composed, decomposed = (unicodedata.normalize(form, "RenéClair") for form in ("NFC", "NFD"))
    names = (
        *("12083_ElsaMartinelli_74_f.jpg", "7_J_R_R_Tolkien_60_m.JPG", "8_O'Toole-2nd_5_M.jpg", "9_ 50_Cent _35_m.jpg"),
        *(f"10_{composed}_40_m.jpg", f"11_{decomposed}_45_m.jpg", "12_NoSex_40.jpg", "13_TooOld_121_f.jpg"),
        *("14_NoAge_x_f.jpg", "15__50_f.jpg", "7_Twice_50_m.jpg", "readme.txt", ".DS_Store"),
    )
    pictures(tmp_path / "AgeDB", *names)
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


def test_fgnet_names_and_points(tmp_path, take, pictures):
    names = ("001A02.JPG", "001A43a.JPG", "001A43b.jpg", "078A11.JPG", "079A7.JPG", "80A10.JPG", "082A10.JPG", "x.png")
    pictures(tmp_path / "images", *names, size=(150, 160))
    points = tmp_path / "points"
    points.mkdir()
    whole = points_file(POINTS)
    texts = {"001a02": whole, "001A43a": whole, "078a11": points_file(POINTS[:67]), "082a10": "version: 1\n"}
    for name, text in texts.items():
        (points / f"{name}.pts").write_text(text)
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
    reason = "001a02.pts: a link leads out of the dataset's folder; name where it leads in ingest.links"
    assert take("fgnet", home).refused == [Refused("images/001A02.JPG", 0, reason)]


@pytest.mark.parametrize(("source", "example"), [("agedb", "12083_ElsaMartinelli_74_f.jpg"), ("fgnet", "078A11.JPG")])
def test_an_empty_folder_is_named(tmp_path, take, source, example):
    refuses(f"no picture in it; .* are named as {example}", take, source, tmp_path)


BROKEN = "the name is not [age]_[sex]_[race]_[date].jpg; what is missing there is not guessed"


@pytest.fixture
def tree(tmp_path, pictures):
    names = (
        *("1_0_0_20161219140623097.jpg.chip.jpg", "116_1_4_20170112213500903.jpg.chip.jpg"),
        *("25_1_3_20170104020210475.jpg.chip.jpg", "40_0_1_20170104020210475.jpg", "33_1_2_20170104020210475.jpg"),
        *("39_1_20170116174525125.jpg.chip.jpg", "61_1_20170109142408075.jpg.chip.jpg"),
        *("61_1_20170109150557335.jpg.chip.jpg", "53__0_20170116184028385.jpg.chip.jpg"),
        *("24_0_1_20170116220224657 .jpg.chip.jpg", "55_0_0_20170116232725357jpg.chip.jpg"),
        *("117_0_0_20161219140623097.jpg.chip.jpg", "30_2_0_20161219140623097.jpg", "30_0_5_20161219140623097.jpg"),
        *("-1_0_0_20161219140623097.jpg", "1_0_0_20161219140623097.png", "Thumbs.db", ".DS_Store"),
    )
    pictures(tmp_path / "UTKFace", *names, size=(200, 200))
    wild = ("part1/25_1_3_20170104020210475.jpg", "part1/61_3_20170109150557335.jpg")
    more = ("part2/44_1_4_20170116235150272.pg", "part3/55_0_0_20170116232725357JPG")
    pictures(tmp_path, *wild, *more, "part3/25_1_3_20170104020210475.jpg", size=(90, 120))
    return tmp_path


def test_aligned_names_are_the_labels_and_broken_ones_are_refused(tree, take):
    found = take("utkface", tree)
    assert [(row["source_id"], row["facts"]) for row in found.rows] == [
        ("116_1_4_20170112213500903", {"age": 116, "gender": "female", "ethnicity": "others"}),
        ("1_0_0_20161219140623097", {"age": 1, "gender": "male", "ethnicity": "white"}),
        ("24_0_1_20170116220224657", {"age": 24, "gender": "male", "ethnicity": "black"}),
        ("25_1_3_20170104020210475", {"age": 25, "gender": "female", "ethnicity": "indian"}),
        ("33_1_2_20170104020210475", {"age": 33, "gender": "female", "ethnicity": "asian"}),
        ("40_0_1_20170104020210475", {"age": 40, "gender": "male", "ethnicity": "black"}),
        ("55_0_0_20170116232725357", {"age": 55, "gender": "male", "ethnicity": "white"}),
    ]
    assert all(row["subject_id"] is None and row["width"] == 200 for row in found.rows)
    assert found.refused == [
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
    refuses("no aligned picture of UTKFace in it; option pictures: wild reads part1", take, "utkface", tree / "empty")
    refuses("no wild picture of UTKFace in it", take, "utkface", tree / "empty", pictures="wild")


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
def morph2(tmp_path, pictures):
    pictures(tmp_path / "Album2", *(f"{name}.JPG" for name in PHOTOS), size=(100, 120))
    (tmp_path / "morph_2008_nonCommercial.csv").write_bytes("\r\n".join((HEADER, *ROWS, "")).encode("utf-8-sig"))
    return tmp_path


def test_rows_are_taken_and_contradictory_people_refused(morph2, take):
    found = take("morph2", morph2)
    columns = ("source_id", "age", "gender", "ethnicity", "subject_id")
    man, woman, last = (subject_id("morph2", person) for person in ("9055", "12345", "12"))
    assert [tuple(row.get(name) for name in columns) for row in found.rows] == [
        ("009055_1M54", 54, "male", "white", man),
        ("009055_2M55", 55, "male", "white", man),
        ("009055_3M56", 56, "male", "white", man),
        ("012345_0F16", 16, "female", "black", woman),
        ("000012_0M30", 30, "male", None, last),
    ]
    listed = "morph_2008_nonCommercial.csv"
    clash = "the rows of id {} contradict one another in {}"
    clashes = [("000001", "sex")] * 2 + [("000002", "race")] * 2 + [("000003", "date of birth")] * 2
    assert found.refused == [
        *(Refused(listed, row, clash.format(*words)) for row, words in enumerate(clashes, start=6)),
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


def test_the_random_protocol_leaks_people_and_says_nothing_of_them(tmp_path, pictures, take):
    photos = [f"Album2/000001_{n}M30.JPG" for n in range(60)]
    pictures(tmp_path, *photos, size=(16, 16))
    table = "\n".join((HEADER, *(line("000001", photo, 30) for photo in photos)))
    (tmp_path / "morph_2008_nonCommercial.csv").write_text(table)
    plain, shares = ([f"ingest.test_share={t}", f"ingest.validation_share={v}"] for t, v in ((0, 0), (0.5, 0.4)))
    found = take("morph2", tmp_path, plain, protocol="random_80_20")
    splits = [row["split"] for row in found.rows]
    assert {row["subject_id"] for row in found.rows} == {None}
    assert set(splits) == {"train", "test"}
    assert 5 <= splits.count("test") <= 20
    again = take("morph2", tmp_path, shares, protocol="random_80_20")
    carved = [row["split"] for row in again.rows]
    assert [split == "test" for split in carved] == [split == "test" for split in splits]
    assert "validation" in carved
    assert set(take("morph2", tmp_path, plain).column("split").values()) == {"train"}


def test_a_table_of_another_form_stops_the_import(morph2, take):
    path = morph2 / "morph_2008_nonCommercial.csv"
    path.write_text("id_num,age,photo\n1,2,x.jpg\n")
    refuses("line 1: column dob, race, gender is missing; found id_num, age, photo", take, "morph2", morph2)
    path.unlink()
    refuses(r"morph_2008_nonCommercial\.csv .*is missing", take, "morph2", morph2)


TRAIN = (
    "file,age,gender,race,service_test",
    *("train/1.jpg,0-2,Male,East Asian,False", "train/2.jpg,more than 70,Female,Latino_Hispanic,True"),
    *("train/3.jpg,3-Sep,Male,Black,False", "train/4.jpg,19-Oct,Male,Black,False"),
    "train/5.jpg,Oct-19,Male,Black,True",
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
def fairface(tmp_path, pictures):
    names = [f"train/{number}.jpg" for number in (*range(1, 9), 10, 77)]
    for margin, side in (("025", 50), ("125", 90)):
        pictures(tmp_path / f"fairface-img-margin{margin}-trainval", *names, "val/1.jpg", size=(side, side))
    (tmp_path / "fairface_label_train.csv").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(TRAIN).encode())
    (tmp_path / "fairface_label_val.csv").write_text("\n".join(VAL))
    return tmp_path


def test_rows_splits_and_what_is_refused(fairface, take):
    found = take("fairface", fairface, ["ingest.validation_share=0.0"])
    assert [(row["source_id"], row["split"], row["facts"]) for row in found.rows] == [
        ("train/1", "train", {"age_range": "0-2", "gender": "male", "ethnicity": "east_asian"}),
        ("train/2", "train", {"age_range": "70+", "gender": "female", "ethnicity": "latino_hispanic"}),
        ("train/10", "train", {"age_range": "20-29", "gender": "female", "ethnicity": "middle_eastern"}),
        ("val/1", "test", {"age_range": "60-69", "gender": "female", "ethnicity": "southeast_asian"}),
    ]
    assert all(row["width"] == 50 and row["subject_id"] is None for row in found.rows)
    date = ": a spreadsheet turned the bin into a date; use the label file as it was downloaded"
    bins = "0-2, 3-9, 10-19, 20-29, 30-39, 40-49, 50-59, 60-69, more than 70"
    races = "White, Black, Latino_Hispanic, East Asian, Southeast Asian, Indian, Middle Eastern"
    home, listed = "fairface-img-margin025-trainval", "fairface_label_train.csv"
    assert found.refused == [
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


def test_the_text_false_is_not_true(fairface, take):
    found = take("fairface", fairface, rows="service_test")
    assert set(found.column("split")) == {"train/2", "val/1"}
    assert Refused("fairface_label_train.csv", 14, "service_test is 'nan', not True or False") in found.refused


def test_margins_lie_in_folders_of_their_own(fairface, take):
    assert {row["width"] for row in take("fairface", fairface, margin="125").rows} == {90}
    flat = fairface / "fairface-img-margin025-trainval"
    for part in ("train", "val"):
        (flat / f"fairface_label_{part}.csv").write_bytes((fairface / f"fairface_label_{part}.csv").read_bytes())
    assert len(take("fairface", flat).rows) == 4
    refuses("fairface-img-margin125-trainval/train is missing", take, "fairface", flat, margin="125")


def test_a_label_file_of_another_form_stops_the_import(fairface, take):
    for text, said in (
        (b"file,age,sex,race\n", "line 1: column gender is missing; found file, age, sex, race"),
        (b"", "fairface_label_val.csv: empty"),
    ):
        (fairface / "fairface_label_val.csv").write_bytes(text)
        refuses(said, take, "fairface", fairface)
    (fairface / "fairface_label_val.csv").write_text("file,age,gender,race\n")
    refuses("column service_test is missing", take, "fairface", fairface, rows="service_test")
