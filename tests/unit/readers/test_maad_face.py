"""MAAD-Face: 0 is unknown, splits are VGGFace2's folders, and a row that contradicts itself is refused."""

from __future__ import annotations

import pytest

from facemllm.errors import UserError
from facemllm.ingest.labels import Names
from facemllm.ingest.reader import Refused
from facemllm.tables import subject_id

HEADER = (
    "Male Young Middle_Aged Senior Asian White Black Rosy_Cheeks Shiny_Skin Bald Wavy_Hair Receding_Hairline Bangs "
    "Sideburns Black_Hair Blond_Hair Brown_Hair Gray_Hair No_Beard Mustache 5_o_Clock_Shadow Goatee Oval_Face "
    "Square_Face Round_Face Double_Chin High_Cheekbones Chubby Obstructed_Forehead Fully_Visible_Forehead Brown_Eyes "
    "Bags_Under_Eyes Bushy_Eyebrows Arched_Eyebrows Mouth_Closed Smiling Big_Lips Big_Nose Pointy_Nose Heavy_Makeup "
    "Wearing_Hat Wearing_Earrings Wearing_Necktie Wearing_Lipstick No_Eyewear Eyeglasses Attractive"
)
NAMES = HEADER.split()
FILE = "MAAD_Face.csv"
KEEP = ["ingest.validation_share=0.0", "ingest.test_share=0.0"]


def line(name, identity, **values):
    return ",".join((name, str(identity), *(str(values.get(attribute, 0)) for attribute in NAMES)))


def write(root, *rows, header=("Filename", "Identity", *NAMES), end="\r\n", mark=b"\xef\xbb\xbf"):
    text = end.join((",".join(header), *rows, ""))
    (root / FILE).write_bytes(mark + text.encode())


@pytest.fixture
def tree(tmp_path, picture):
    for seed, name in enumerate(("train/n000002/0001_01", "train/n000002/0002_01", "test/n000001/0001_01")):
        picture(tmp_path / f"{name}.jpg", seed)
    for seed, name in enumerate(("train/n000713/0437_101", "test/n000005/0001_01", "train/n000005/0002_02"), start=10):
        picture(tmp_path / f"{name}.jpg", seed)
    picture(tmp_path / "train/n000002/0009_01.jpg", 20)
    write(
        tmp_path,
        line("n000002/0001_01.jpg", 2, Male=1, Smiling=-1, Bald=-1),
        line("n000002/0002_01.jpg", "n000002", Male=-1, Attractive=1),
        line("n000001/0001_01.jpg", 1, Young=1, White=1, Asian=-1),
        line("n000713/0437_101.jpg", "713\\"),
        line("n000002/0001_01.jpg", 2, Male=1),
        line("n000002/0003_01.jpg", 2, Male=1),
        line("n000002/0004_01.jpg", 2, Male=2),
        line("n000002/0005_01.jpg", 2) + ",1",
        line("n000002/0006_01.jpg", 3),
        line("n000005/0001_01.jpg", 5),
        line("../n000002/0001_01.jpg", 2),
        line("train/n000002/0001_01.jpg", 2),
        line("n000009/0001_01.jpg", 9, Male=1),
    )
    return tmp_path


def test_undefined_is_left_out_and_splits_are_the_folders(tree, take):
    found = take("maad-face", tree, KEEP)
    assert found.column("attributes") == {
        "n000002/0001_01": {"Male": True, "Smiling": False, "Bald": False},
        "n000002/0002_01": {"Male": False, "Attractive": True},
        "n000001/0001_01": {"Young": True, "White": True, "Asian": False},
    }
    assert found.column("gender") == {"n000002/0001_01": "male", "n000002/0002_01": "female", "n000001/0001_01": None}
    assert list(found.column("split").values()) == ["train", "train", "test"]
    persons = [subject_id("maad-face", person) for person in ("n000002", "n000002", "n000001")]
    assert list(found.column("subject_id").values()) == persons


def test_refused_rows(tree, take):
    assert take("maad-face", tree).refused == [
        Refused(FILE, 5, "Identity '713\\\\' contradicts the n000713 of Filename"),
        Refused(FILE, 6, "n000002/0001_01.jpg has a row already"),
        Refused("train/n000002/0003_01.jpg", 7, "the picture is missing"),
        Refused(FILE, 8, "Male is '2'; 1, -1 or 0 was expected"),
        Refused(FILE, 9, "50 fields where the header has 49"),
        Refused(FILE, 10, "Identity '3' contradicts the n000002 of Filename"),
        Refused(FILE, 11, "n000005 lies in train and test; a person is in one split only"),
        Refused(FILE, 12, "the path '../n000002/0001_01.jpg' leads out of the dataset's folder"),
        Refused(FILE, 13, "Filename 'train/n000002/0001_01.jpg' is no person's picture, as n000002/0001_01.jpg"),
        Refused("n000009/0001_01.jpg", 14, "the picture is missing"),
        Refused("train/n000002/0009_01.jpg", 0, "no label row"),
        Refused("train/n000005/0002_02.jpg", 0, "no label row"),
        Refused("train/n000713/0437_101.jpg", 0, "no label row"),
    ]


def test_another_spelling_of_the_header_and_a_saved_index(tmp_path, picture, take):
    for seed, name in enumerate(("val/n000003/0001_01", "train/n000004/0001_01")):
        picture(tmp_path / f"data/{name}.jpg", seed)
    header = ("", "filename", "IDENTITY", *(name.replace("_", " ").lower() for name in NAMES))
    rows = ("0," + line("n000003\\0001_01.jpg", 3, Wearing_Hat=1), "1," + line("n000004/0001_01.jpg", 4))
    write(tmp_path, *rows, header=header, end="\n", mark=b"")
    found = take("maad-face", tmp_path, KEEP)
    assert found.column("attributes") == {"n000003/0001_01": {"Wearing_Hat": True}, "n000004/0001_01": {}}
    assert found.column("split") == {"n000003/0001_01": "validation", "n000004/0001_01": "train"}
    assert found.refused == []


def test_persons_right_in_the_root_are_split_by_person(tmp_path, picture, take):
    names = [f"n{person:06d}/{number:04d}_01.jpg" for person in range(12) for number in (1, 2)]
    for seed, name in enumerate(names):
        picture(tmp_path / name, seed)
    write(tmp_path, *(line(name, int(name[1:7])) for name in names))
    found = take("maad-face", tmp_path, ["ingest.validation_share=0.3", "ingest.test_share=0.3"])
    splits = [row["split"] for row in found.rows]
    assert set(splits) == {"train", "validation", "test"}
    assert splits[::2] == splits[1::2]


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (("Identity", *NAMES), "line 1: column Filename is missing or there twice"),
        (("Filename", *NAMES), "line 1: column Identity is missing or there twice"),
        (("Filename", "Identity", *NAMES[1:]), "line 1: column Male is missing; these were expected: "),
        (("Filename", "Identity", "Tall", *NAMES), "line 1: column Tall is unknown"),
        (("Filename", "Identity", "male", *NAMES), "line 1: column Male is there twice"),
    ],
)
def test_a_wrong_header_is_named(tree, take, header, message):
    write(tree, header=header)
    with pytest.raises(UserError, match=message):
        take("maad-face", tree)


def test_missing_or_empty_files_are_named(tree, take):
    (tree / FILE).write_bytes(b"")
    with pytest.raises(UserError, match="column Filename, Identity is missing"):
        take("maad-face", tree)
    (tree / FILE).unlink()
    with pytest.raises(UserError, match=r"MAAD_Face\.csv or .* is missing"):
        take("maad-face", tree)


def test_missing_persons_are_named(tmp_path, take):
    write(tmp_path, line("n000002/0001_01.jpg", 2))
    with pytest.raises(UserError, match=r"no person's folder .as n000002. here, in train/ or in test/"):
        take("maad-face", tmp_path)


def test_a_set_of_names_is_exact_and_small():
    names = Names()
    assert all(names.add(f"n{number // 360:06d}/{number:04d}_01.jpg") for number in range(20_000))
    assert not any(names.add(f"n{number // 360:06d}/{number:04d}_01.jpg") for number in range(0, 20_000, 7))
    assert "n000000/0000_01.jpg" in names
    assert "n000000/0000_02.jpg" not in names
