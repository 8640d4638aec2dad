"""AffectNet in both layouts: codes and splits, the crop of whole pictures, lists without header, hostile arrays."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from facemllm.errors import UserError
from facemllm.ingest.reader import Refused

HEADER = "subDirectory_filePath,face_x,face_y,face_width,face_height,facial_landmarks,expression,valence,arousal"
LIST = "Manually_Annotated_file_lists/{}.csv"
POINTS = ";".join(f"{20 + n}.5;{30 + n}" for n in range(68))


def line(name, expression, box="20,30,60,50", points=POINTS):
    return f"{name},{box},{points},{expression},0.1,-0.2"


@pytest.fixture
def old(tmp_path, picture):
    """The layout with whole pictures and CSV lists, with every trap in it."""
    home = tmp_path / "Manually_Annotated/Manually_Annotated_Images"
    for seed, name in enumerate(("1/aa.jpg", "2/bb.jpg", "2/cc.JPG", "3/ff.png")):
        picture(home / name, seed, (120, 100), "PNG")
    red = np.zeros((100, 120, 3), np.uint8)
    red[30:80, 20:80] = (255, 0, 0)
    Image.fromarray(red).save(home / "1/aa.jpg", "PNG")
    training = [
        *(HEADER, line("1/aa.jpg", 0), line("2/bb.jpg", 7), line("1/aa.jpg", 1), line("4/gone.jpg", 2)),
        *(line("1/d.jpg", 8), line("1/e.jpg", 9), line("1/f.jpg", 10, "NULL,NULL,NULL,NULL", "NULL"), "1/g.jpg,1,2"),
        *(line("1/h.jpg", 1, "20,30,-1,50"), line("1/i.jpg", 1, points="1;2;3"), line("/etc/passwd", 1)),
        *(line("1/j.jpg", "happy"), line("1/k.jpg", 11), line("1/l.jpg", 1, points=POINTS.replace("20.5", "nan"))),
    ]
    (tmp_path / "Manually_Annotated_file_lists").mkdir()
    (tmp_path / LIST.format("training")).write_bytes(b"\xef\xbb\xbf" + "\r\n".join([*training, ""]).encode())
    validation = "\n".join((HEADER, line("2/cc.JPG", 6), line("3/ff.png", 3, "-10,90,40,40")))
    (tmp_path / LIST.format("validation")).write_text(validation)
    return tmp_path


def array(path, values, kind):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, np.array(values, kind))


@pytest.fixture
def new(tmp_path, picture):
    """The layout with cropped faces and an array a label."""
    points = np.arange(136) / 2
    for name, codes in (("train_set", {0: "1", 2: "7", 10: "9", 11: "4"}), ("val_set", {0: "5"})):
        for number, code in codes.items():
            picture(tmp_path / name / f"images/{number}.jpg", number, (224, 224))
            array(tmp_path / name / f"annotations/{number}_exp.npy", code, "U2")
            array(tmp_path / name / f"annotations/{number}_val.npy", "-2.0", "U4")
            array(tmp_path / name / f"annotations/{number}_lnd.npy", points, np.float64)
    picture(tmp_path / "train_set/images/12.jpg")
    array(tmp_path / "train_set/annotations/13_exp.npy", 3, np.int64)
    return tmp_path


def test_old_rows_are_cropped_to_their_face(old, take):
    found = take("affectnet", old, ["ingest.validation_share=0.0"])
    assert [(row["source_id"], row["split"], row["expression"]) for row in found.rows] == [
        ("1/aa", "train", "neutral"),
        ("2/bb", "train", "contempt"),
        ("2/cc", "test", "anger"),
        ("3/ff", "test", "surprise"),
    ]
    assert found.rows[0]["subject_id"] is None
    first, outside = found.rows[0], found.rows[3]
    assert (first["width"], first["height"], first["box"]) == (60, 50, [0, 0, 60, 50])
    assert first["landmarks"] == [[n + 0.5, n] for n in range(68)]
    assert (outside["width"], outside["height"], outside["box"]) == (30, 10, [0, 0, 30, 10])
    stored = np.asarray(Image.open(io.BytesIO(first["image"]["bytes"])))
    assert (stored[..., 0] > 240).all()
    assert (stored[..., 1:] < 15).all()


def test_old_rows_that_cannot_be_used_are_refused_with_their_line(old, take):
    listed = LIST.format("training")
    assert take("affectnet", old).refused == [
        Refused(listed, 4, "1/aa.jpg has a row already"),
        Refused("Manually_Annotated/Manually_Annotated_Images/4/gone.jpg", 5, "the picture is missing"),
        Refused(listed, 6, "expression is 8 (none), not one of the 8 classes"),
        Refused(listed, 7, "expression is 9 (uncertain), not one of the 8 classes"),
        Refused(listed, 8, "expression is 10 (non-face), not one of the 8 classes"),
        Refused(listed, 9, "3 fields where the header has 9"),
        Refused(listed, 10, "the face box is -1 x 50 pixels"),
        Refused(listed, 11, "3 landmark numbers where 68 points have 136"),
        Refused(listed, 12, "the path '/etc/passwd' leads out of the dataset's folder"),
        Refused(listed, 13, "expression is 'happy', not a number"),
        Refused(listed, 14, "expression is 11, outside 0 to 10"),
        Refused(listed, 15, "a landmark is nan, outside -inf to inf"),
    ]


def test_seven_classes_leave_contempt_out(old, take):
    found = take("affectnet", old, classes="7")
    assert set(found.column("expression")) == {"1/aa", "2/cc", "3/ff"}
    assert Refused(LIST.format("training"), 3, "expression is 7 (contempt), not one of the 7 classes") in found.refused


def test_a_list_without_header_is_read_in_the_known_order(tmp_path, take, picture):
    picture(tmp_path / "Automatically_Annotated/Automatically_Annotated_Images/1/a.jpg", 1, (120, 100))
    lists = tmp_path / "Automatically_Annotated_file_lists"
    lists.mkdir()
    rows = (line("1/a.jpg", 4), line("1/a.jpg", 4), "1/b.jpg,1,2")
    (lists / "automatically_annotated.csv").write_bytes("\r\n".join(rows).encode())
    found = take("affectnet", tmp_path, ["ingest.validation_share=0.0"], annotated="automatic")
    assert [(row["source_id"], row["split"], row["expression"]) for row in found.rows] == [("1/a", "train", "fear")]
    listed = "Automatically_Annotated_file_lists/automatically_annotated.csv"
    assert found.refused == [
        Refused(listed, 2, "1/a.jpg has a row already"),
        Refused(listed, 3, "3 fields where the header has 9"),
    ]


def test_the_new_layout_is_told_by_its_folders(new, take):
    found = take("affectnet", new, ["ingest.validation_share=0.0"])
    assert [(row["source_id"], row["split"], row["expression"]) for row in found.rows] == [
        ("train_set/0", "train", "happiness"),
        ("train_set/2", "train", "contempt"),
        ("train_set/11", "train", "fear"),
        ("val_set/0", "test", "disgust"),
    ]
    assert all((row["width"], row["height"]) == (224, 224) for row in found.rows)
    assert found.rows[0]["landmarks"] == [[n, n + 0.5] for n in range(68)]
    assert found.refused == [
        Refused("train_set/images/10.jpg", 0, "expression is 9 (uncertain), not one of the 8 classes"),
        Refused("train_set/images/12.jpg", 0, "no 12_exp.npy in train_set/annotations"),
        Refused("train_set/images/13.jpg", 0, "the picture is missing"),
    ]


def header_of(shape):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f8", "fortran_order": False, "shape": shape})
    return file.getvalue()


def test_arrays_are_never_unpickled_nor_trusted_in_size(new, take):
    def first_refusal(name, data):
        (new / "train_set/annotations" / name).write_bytes(data)
        found = take("affectnet", new).refused[0]
        assert (found.file, found.row) == ("train_set/images/0.jpg", 0)
        return found.reason

    pickled = io.BytesIO()
    np.save(pickled, np.array([{"a": 1}], object), allow_pickle=True)
    assert first_refusal("0_exp.npy", pickled.getvalue()) == "0_exp.npy: object of shape (1,), not 1 numbers"
    huge = header_of((10**9, 10**9))
    assert first_refusal("0_exp.npy", huge).startswith("0_exp.npy: float64 of shape (1000000000, 1000000000), not 1")
    short = header_of((1,)) + b"\0" * 3
    assert first_refusal("0_exp.npy", short) == "0_exp.npy: 3 bytes of numbers where its header says 8"
    assert first_refusal("0_exp.npy", b"PK\x03\x04") == "0_exp.npy: not a NumPy array"
    assert first_refusal("0_exp.npy", header_of((1,)) + np.float64(1.5).tobytes()) == (
        "expression is 1.5, not a whole number"
    )


def test_a_folder_of_another_form_is_named(tmp_path, old, take, picture):
    with pytest.raises(UserError, match="neither train_set and val_set nor Manually_Annotated_file_lists"):
        take("affectnet", old / "Manually_Annotated_file_lists")
    (old / LIST.format("validation")).unlink()
    with pytest.raises(UserError, match=r"file_lists/validation.csv or .* is missing"):
        take("affectnet", old)
    (old / LIST.format("training")).write_text("subDirectory_filePath,expression\n1/aa.jpg,1\n")
    with pytest.raises(UserError, match=r"training.csv, line 1: column face_x, .* is missing"):
        take("affectnet", old)
    picture(old / "train_set/images/1.jpg")
    with pytest.raises(UserError, match="holds both layouts"):
        take("affectnet", old)
