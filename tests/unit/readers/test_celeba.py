"""CelebA in its three layouts (the release, torchvision's, the CSV re-pack), aligned and wild, with damaged labels."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from facemllm.ingest.reader import Refused
from facemllm.ingest.readers.celeba import Beside, pairs, split
from facemllm.tables import subject_id
from facemllm.tables.schemas import CELEBA as NAMES
from tests.refusing import refuses

POINTS = "lefteye_x lefteye_y righteye_x righteye_y nose_x nose_y leftmouth_x leftmouth_y rightmouth_x rightmouth_y"
ALIGNED = "Img/img_align_celeba"
ATTRIBUTES = "Anno/list_attr_celeba.txt"
PARTITION = "Eval/list_eval_partition.txt"
LANDMARKS = "Anno/list_landmarks_align_celeba.txt"


def values(true, no="-1", **others):
    return [others.get(name, "1" if name in true else no) for name in NAMES]


def line(name, *true, **others):
    """A row with the release's runs of blanks: values are aligned to the right in two places."""
    return f"{name} " + " ".join(f"{value:>2}" for value in values(true, **others))


def write(path: Path, *lines, end="\n", mark=b""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(mark + "".join(text + end for text in lines).encode())


@pytest.fixture
def release(tmp_path, picture):
    """The official folders, every label file with Windows line ends, and every trap in the attributes."""
    for number in (1, 2, 3, 4, 6, 7, 8, 10):
        picture(tmp_path / f"{ALIGNED}/{number:06d}.jpg", number, (178, 218))
    (tmp_path / ALIGNED / ".hidden.jpg").write_bytes(b"")
    rows = (
        line("000001.jpg", "Smiling", "No_Beard"),
        line("000002.jpg", "Male", "Young"),
        line("000003.jpg", Bald="2"),
        line("000004.jpg") + " -1",
        line("000001.jpg", "Male"),
        line("000005.jpg", "Male"),
        line("../000001.jpg", "Male"),
        line("000006.jpg", "Male"),
        line("000007.jpg", "Male"),
        line("000008.jpg", no="0"),
    )
    write(tmp_path / ATTRIBUTES, "12", " ".join(NAMES), *rows, end="\r\n", mark=b"\xef\xbb\xbf")
    splits = ("000001.jpg 2", "000002.jpg 1", "000003.jpg 0", "000005.jpg 0", "../000001.jpg 0", "000007.jpg 7")
    write(tmp_path / PARTITION, *splits, "000008.jpg 0", "000011.jpg 0", end="\r\n")
    people = ("000001.jpg 2880", "000001.jpg 1", "000002.jpg 2880", "000005.jpg 5")
    write(tmp_path / "Anno/identity_CelebA.txt", *people, end="\r\n")
    points = ("000001.jpg 69  109  106  113   77  142   73  152  108  154", "000002.jpg nan 1 2 3 4 5 6 7 8 9")
    write(tmp_path / "Anno/list_landmarks_align_celeba.txt", "2", POINTS + " ", *points, end="\r\n")
    return tmp_path


def test_release_gives_labels_splits_subjects_and_landmarks_and_refuses_the_rest_where_it_stands(release, take):
    found = take("celeba", release)
    assert found.column("split") == {"000001": "test", "000002": "validation"}
    assert set(found.column("subject_id").values()) == {subject_id("celeba", "2880")}
    assert found.column("gender") == {"000001": "female", "000002": "male"}
    assert found.column("attributes") == {
        "000001": dict.fromkeys(NAMES, False) | {"Smiling": True, "No_Beard": True},
        "000002": dict.fromkeys(NAMES, False) | {"Male": True, "Young": True},
    }
    points = [[69, 109], [106, 113], [77, 142], [73, 152], [108, 154]]
    assert found.column("landmarks") == {"000001": points, "000002": None}
    assert all((row["width"], row["height"]) == (178, 218) for row in found.rows)
    assert all(row.get("box") is None for row in found.rows)
    assert found.refused == [
        Refused("Anno/identity_CelebA.txt", 2, "000001.jpg has a row already"),
        Refused("Anno/list_landmarks_align_celeba.txt", 4, "000002.jpg: lefteye_x is nan, outside -100000 to 100000"),
        Refused(ATTRIBUTES, 5, "Bald is '2'; 1 and -1, or 1 and 0, were expected"),
        Refused(ATTRIBUTES, 6, "42 fields where 41 were expected"),
        Refused(ATTRIBUTES, 7, "000001.jpg has a row already"),
        Refused(f"{ALIGNED}/000005.jpg", 8, "the picture is missing"),
        Refused(ATTRIBUTES, 9, "the path '../000001.jpg' leads out of the dataset's folder"),
        Refused(ATTRIBUTES, 10, f"000006.jpg has no row in {PARTITION}"),
        Refused(PARTITION, 6, "000007.jpg: partition is '7', not 0, 1 or 2"),
        Refused(ATTRIBUTES, 12, "5_o_Clock_Shadow is 0 in a file of 1 and -1"),
        Refused(ATTRIBUTES, 1, "says 12 rows, 10 follow; the file may be cut off"),
        Refused(PARTITION, 8, f"000011.jpg has no usable row in {ATTRIBUTES}"),
        Refused(f"{ALIGNED}/000004.jpg", 0, "no label row"),
        Refused(f"{ALIGNED}/000010.jpg", 0, "no label row"),
    ]


def test_csv_repack_with_nested_pictures_and_zeros(tmp_path, picture, take):
    for number in (1, 2, 3):
        picture(tmp_path / f"img_align_celeba/img_align_celeba/{number:06d}.jpg", number, (178, 218))
    header = ",".join(("image_id", *NAMES))
    rows = [",".join((f"{n:06d}.jpg", *values(true, "0"))) for n, true in ((1, ["Male"]), (2, []), (3, ["Young"]))]
    write(tmp_path / "list_attr_celeba.csv", header, *rows, rows[0], end="\r\n", mark=b"\xef\xbb\xbf")
    write(tmp_path / "list_eval_partition.csv", "image_id,partition", "000001.jpg,0", "000002.jpg,1", "000003.jpg,2")
    points = ",".join(("image_id", *POINTS.split()))
    write(tmp_path / "list_landmarks_align_celeba.csv", points, "000002.jpg,1,2,3,4,5,6,7,8,9,10")
    found = take("celeba", tmp_path, ["ingest.validation_share=0.0"])
    assert found.column("split") == {"000001": "train", "000002": "validation", "000003": "test"}
    assert found.column("gender") == {"000001": "male", "000002": "female", "000003": "female"}
    assert found.column("attributes")["000003"] == dict.fromkeys(NAMES, False) | {"Young": True}
    assert found.column("landmarks")["000002"] == [[1, 2], [3, 4], [5, 6], [7, 8], [9, 10]]
    assert all(row["subject_id"] is None for row in found.rows)
    assert found.refused == [Refused("list_attr_celeba.csv", 5, "000001.jpg has a row already")]


def test_flat_folder_as_torchvision_leaves_it(tmp_path, picture, take):
    picture(tmp_path / "img_align_celeba/000001.jpg", 1, (178, 218))
    write(tmp_path / "list_attr_celeba.txt", "1", " ".join(NAMES), line("000001.jpg", "Male"))
    write(tmp_path / "list_eval_partition.txt", "000001.jpg 0")
    write(tmp_path / "identity_CelebA.txt", "000001.jpg 12")
    found = take("celeba", tmp_path)
    assert found.column("subject_id") == {"000001": subject_id("celeba", "12")}
    assert (found.column("split"), found.refused) == ({"000001": "train"}, [])


@pytest.fixture
def wild(tmp_path, picture):
    for number in (1, 2, 3, 4):
        picture(tmp_path / f"Img/img_celeba/{number:06d}.jpg", number, (200, 160), "PNG")
    write(tmp_path / ATTRIBUTES, "4", " ".join(NAMES), *(line(f"{number:06d}.jpg", "Male") for number in (1, 2, 3, 4)))
    write(tmp_path / PARTITION, *(f"{number:06d}.jpg 0" for number in (1, 2, 3, 4)))
    boxes = ("000001.jpg    40  30  100  90", "000002.jpg   150  -10  100  90", "000003.jpg     0   0    0   0")
    write(tmp_path / "Anno/list_bbox_celeba.txt", "3", "image_id x_1 y_1 width height", *boxes)
    points = [f"{number:06d}.jpg 160 50 180 50 170 60 165 70 175 70" for number in (1, 2)]
    write(tmp_path / "Anno/list_landmarks_celeba.txt", "2", POINTS, *points)
    return tmp_path


def test_wild_pictures_are_cut_to_their_boxes(wild, take):
    found = take("celeba", wild, pictures="wild")
    first, second = found.rows
    assert (first["width"], first["height"], first["box"]) == (100, 90, [0, 0, 100, 90])
    assert first["landmarks"] == [[120, 20], [140, 20], [130, 30], [125, 40], [135, 40]]
    whole = Image.open(wild / "Img/img_celeba/000001.jpg")
    kept = np.asarray(Image.open(io.BytesIO(first["image"]["bytes"])), float)
    assert np.abs(kept - np.asarray(whole.crop((40, 30, 140, 120)), float)).mean() < 4
    assert np.abs(kept - np.asarray(whole.crop((50, 40, 150, 130)), float)).mean() > 20
    # reaches beyond the right and the upper border: 150 to 200 and 0 to 80 are left
    assert (second["width"], second["height"], second["box"]) == (50, 80, [0, 0, 50, 80])
    assert second["landmarks"] == [[10, 50], [30, 50], [20, 60], [15, 70], [25, 70]]
    assert found.refused == [
        Refused("Anno/list_bbox_celeba.txt", 5, "000003.jpg: width is 0, outside 1 to 100000"),
        Refused(ATTRIBUTES, 6, "000004.jpg has no row in Anno/list_bbox_celeba.txt"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (PARTITION, None, "list_eval_partition.txt .or .csv. is missing here and in Anno/ and Eval/"),
        (ATTRIBUTES, None, "list_attr_celeba.txt .or .csv. is missing"),
        (ATTRIBUTES, b"", "expected the number of rows on its first line and the columns' names on its second"),
        (ATTRIBUTES, " ".join(NAMES).encode() + b"\n" + line("1.jpg").encode(), "expected the number of rows on its"),
        (ATTRIBUTES, b"1\n" + " ".join(NAMES[:-1]).encode(), "line 2: column Young is missing"),
        (ATTRIBUTES, b"1\n" + " ".join((*NAMES, "Tall")).encode(), "line 2: column Tall is unknown"),
        (ATTRIBUTES, b"1\n" + " ".join((*NAMES, "Bald")).encode(), "line 2: column Bald is there twice"),
        (ATTRIBUTES, "1\nCafé".encode("latin-1"), "not UTF-8 text"),
        (PARTITION, b"000001.jpg \xff", "not UTF-8 text"),
        (LANDMARKS, b"1\nlefteye_x lefteye_y\n", "line 2: columns lefteye_x lefteye_y; exp"),
    ],
)
def test_a_wrong_label_file_is_named(release, take, name, content, message):
    if content is None:
        (release / name).unlink()
    else:
        (release / name).write_bytes(content)
    refuses(message, take, "celeba", release)


def test_missing_pictures_and_boxes_are_named(release, take):
    refuses("Img/img_celeba or img_celeba is missing", take, "celeba", release, pictures="wild")
    (release / "Img/img_celeba").mkdir()
    refuses(r"list_bbox_celeba\.txt", take, "celeba", release, pictures="wild")


def test_csv_without_its_column_is_named(release, take):
    (release / PARTITION).unlink()
    write(release / "list_eval_partition.csv", "image_id,part", "000001.jpg,0")
    refuses(r"list_eval_partition\.csv, line 1: columns part; expected partition", take, "celeba", release)


def test_rows_in_another_order_are_found_and_in_the_same_order_not_kept(tmp_path):
    path = tmp_path / "list_eval_partition.txt"
    write(path, "a.jpg 0", "b.jpg 1", "c.jpg 2", "d.jpg 0", "e")
    rows = Beside(pairs(path, tmp_path, "partition"), split)
    assert [rows.find(name) for name in ("a.jpg", "b.jpg")] == ["train", "validation"]
    assert not rows._passed
    assert [rows.find(name) for name in ("d.jpg", "c.jpg", "x.jpg")] == ["train", "test", None]
    assert list(rows.rest()) == [Refused(path.name, 5, "1 fields where 2 were expected")]
