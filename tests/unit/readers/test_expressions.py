"""The readers of RAF-DB, AffectNet and Emo135: codes and splits, crops, the traps of label files, hostile arrays."""

import io

import numpy as np
import pytest
from PIL import Image

from facemllm.errors import UserError
from facemllm.ingest.reader import Refused
from tests.refusing import refuses

MANUAL = "30\t40\n70 40\n50.5\t60\n35 80\n65 80\n{}\n{}\n{}\n"


@pytest.fixture
def tree(tmp_path, picture):
    """Five listed pictures, one unlisted, and a list with every trap in it."""
    basic = tmp_path / "basic"
    for seed, stem in enumerate(("train_00001", "train_00002", "test_0001", "train_00007", "train_00099")):
        picture(basic / f"Image/aligned/{stem}_aligned.jpg", seed, (100, 100))
        picture(basic / f"Image/original/{stem}.jpg", seed, (120, 100), "PNG")
    manual = basic / "Annotation" / "manual"
    manual.mkdir(parents=True)
    for number, codes in ((1, (1, 2, 4)), (2, (2, 0, 0)), (7, (0, 1, 9))):
        (manual / f"train_{number:05d}_manu_attri.txt").write_text(MANUAL.format(*codes))
    labels = basic / "EmoLabel" / "list_patition_label.txt"
    labels.parent.mkdir()
    lines = ("train_00001.jpg 4", "train_00002.jpg 7", "test_0001.jpg 1", "train_00003.jpg 2", "train_00001.jpg 5")
    odd = ("train_00004.jpg 8", "train_00005.jpg", "../train_00006.jpg 1", "train_00007.jpg 3")
    labels.write_bytes(b"\xef\xbb\xbf" + "\r\n".join((*lines, *odd, "")).encode())
    return tmp_path


def test_aligned_pictures_get_their_labels_and_what_cannot_be_used_is_refused_with_its_line(tree, take):
    found = take("raf-db", tree, ["ingest.validation_share=0.0"])
    old = {"gender": "female", "age_range": "70+"}
    assert [(row["source_id"], row["split"], row["facts"]) for row in found.rows] == [
        ("basic/train_00001", "train", {"expression": "happiness", "ethnicity": "asian"} | old),
        ("basic/train_00002", "train", {"expression": "neutral", "ethnicity": "caucasian", "age_range": "0-3"}),
        ("basic/test_0001", "test", {"expression": "surprise"}),
    ]
    assert all(row["subject_id"] is None and (row["width"], row["height"]) == (100, 100) for row in found.rows)
    listed = "basic/EmoLabel/list_patition_label.txt"
    aligned = "basic/Image/aligned"
    class_8 = "the basic expression is '8', not one of 1 to 7; a compound list needs the option subset: compound"
    bin_9 = "train_00007_manu_attri.txt: the age bin is '9', not one of 0 to 4"
    assert found.refused == [
        Refused(f"{aligned}/train_00003_aligned.jpg", 4, "the picture is missing"),
        Refused(listed, 5, "train_00001.jpg has a row already"),
        Refused(listed, 6, class_8),
        Refused(listed, 7, "1 fields where 2 were expected"),
        Refused(listed, 8, "'../train_00006.jpg' is no picture name of RAF-DB (train_00001.jpg, test_0001.jpg)"),
        Refused(f"{aligned}/train_00007_aligned.jpg", 9, bin_9),
        Refused(f"{aligned}/train_00099_aligned.jpg", 0, "no label row in list_patition_label.txt"),
    ]


def test_original_pictures_without_boxes_are_whole_and_have_landmarks(tree, take):
    row = take("raf-db", tree, pictures="original").rows[0]
    assert (row["width"], row["height"]) == (120, 100)
    assert row["landmarks"] == [[30, 40], [70, 40], [50.5, 60], [35, 80], [65, 80]]


@pytest.mark.parametrize("place", ["Annotation/boundingbox", "boundingbox"])
def test_original_pictures_are_cropped_to_their_box(tree, take, place):
    boxes = tree / "basic" / place
    boxes.mkdir(parents=True)
    for stem in ("train_00001", "test_0001"):
        (boxes / f"{stem}_boundingbox.txt").write_text("20 30 80.0 90\n")
    (boxes / "train_00002_boundingbox.txt").write_text("20 30 80\n")
    red = np.zeros((100, 120, 3), np.uint8)
    red[30:90, 20:80] = (255, 0, 0)
    Image.fromarray(red).save(tree / "basic/Image/original/train_00001.jpg", "PNG")
    found = take("raf-db", tree, pictures="original")
    row = found.rows[0]
    assert (row["width"], row["height"], row["box"]) == (60, 60, [0, 0, 60, 60])
    assert row["landmarks"] == [[10, 10], [50, 10], [30.5, 30], [15, 50], [45, 50]]
    stored = np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])))
    assert (stored[..., 0] > 240).all()
    assert (stored[..., 1:] < 15).all()
    assert [row["source_id"] for row in found.rows] == ["basic/train_00001", "basic/test_0001"]
    reasons = {refused.file: refused.reason for refused in found.refused}
    ragged = "train_00002_boundingbox.txt: 3 numbers where a box has four"
    assert reasons["basic/Image/original/train_00002.jpg"] == ragged
    assert reasons["basic/Image/original/train_00007.jpg"].startswith("train_00007_manu_attri.txt")


def test_damaged_manual_files_are_refused(tree, take):
    manual = tree / "basic/Annotation/manual"
    for text, reason in (
        (b"1 2\n3 4\n0\n0\n0\n", "not five points and three codes"),
        (MANUAL.replace("50.5", "nan").format(0, 0, 0).encode(), "a landmark is nan, outside -inf to inf"),
        (b"\xff\xfe1 2", "not UTF-8 text"),
        (b"1" * 70_000, "the file has 70,000 bytes, more than 65,536"),
    ):
        (manual / "train_00001_manu_attri.txt").write_bytes(text)
        said = Refused("basic/Image/aligned/train_00001_aligned.jpg", 1, f"train_00001_manu_attri.txt: {reason}")
        assert take("raf-db", tree).refused[0] == said


def test_the_eleven_compound_classes(tmp_path, take, pictures):
    names = [
        *("happily_surprised", "happily_disgusted", "sadly_fearful", "sadly_angry", "sadly_surprised"),
        *("sadly_disgusted", "fearfully_angry", "fearfully_surprised", "angrily_surprised", "angrily_disgusted"),
        "disgustedly_surprised",
    ]
    pictures(tmp_path / "compound/Image/aligned", *(f"train_{n:04}_aligned.jpg" for n in range(1, 12)))
    rows = [f"train_{n:04}.jpg {n}" for n in range(1, 12)]
    (tmp_path / "compound/EmoLabel").mkdir()
    (tmp_path / "compound/EmoLabel/list_partition_label.txt").write_text("\n".join([*rows, "train_0012.jpg 12"]))
    found = take("raf-db", tmp_path, subset="compound")
    assert found.column("expression") == {f"compound/train_{n:04}": name for n, name in enumerate(names, start=1)}
    assert [refused.reason for refused in found.refused] == ["the compound expression is '12', not one of 1 to 11"]
    assert len(take("raf-db", tmp_path / "compound", subset="compound").rows) == 11
    with pytest.raises(UserError, match="this is the compound subset; say so in the source's options: subset: comp"):
        take("raf-db", tmp_path / "compound")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"train_00001.jpg 4 0\n", "list_patition_label.txt, line 1: 'train_00001.jpg 4 0' has 3 columns where RAF-DB"),
        (b"train_00001.jpg 4 \xe9\n", "list_patition_label.txt: not UTF-8 text"),
        (b"", "has 0 columns"),
    ],
)
def test_a_list_of_another_form_stops_the_import(tree, take, text, said):
    (tree / "basic/EmoLabel/list_patition_label.txt").write_bytes(text)
    refuses(said, take, "raf-db", tree)


def test_what_is_missing_is_named(tree, take):
    refuses("compound/EmoLabel or EmoLabel is missing", take, "raf-db", tree, subset="compound")
    (tree / "basic/EmoLabel/list_patition_label.txt").unlink()
    refuses(r"list_patition_label\.txt or EmoLabel/list_partition_label\.txt is missing", take, "raf-db", tree)


HEADER = "subDirectory_filePath,face_x,face_y,face_width,face_height,facial_landmarks,expression,valence,arousal"
LIST = "Manually_Annotated_file_lists/{}.csv"
POINTS = ";".join(f"{20 + n}.5;{30 + n}" for n in range(68))


def line(name, expression, box="20,30,60,50", points=POINTS):
    return f"{name},{box},{points},{expression},0.1,-0.2"


@pytest.fixture
def old(tmp_path, pictures):
    """The layout with whole pictures and CSV lists, with every trap in it."""
    home = tmp_path / "Manually_Annotated/Manually_Annotated_Images"
    pictures(home, "1/aa.jpg", "2/bb.jpg", "2/cc.JPG", "3/ff.png", size=(120, 100), form="PNG")
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


def test_old_rows_are_cropped_to_their_face_or_refused_with_their_line(old, take):
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
    listed = LIST.format("training")
    assert found.refused == [
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
    pickled = io.BytesIO()
    np.save(pickled, np.array([{"a": 1}], object), allow_pickle=True)
    for data, reason in (
        (pickled.getvalue(), "0_exp.npy: object of shape (1,), not 1 numbers"),
        (header_of((10**9, 10**9)), "0_exp.npy: float64 of shape (1000000000, 1000000000), not 1 numbers"),
        (header_of((1,)) + b"\0" * 3, "0_exp.npy: 3 bytes of numbers where its header says 8"),
        (b"PK\x03\x04", "0_exp.npy: not a NumPy array"),
        (header_of((1,)) + np.float64(1.5).tobytes(), "expression is 1.5, not a whole number"),
    ):
        (new / "train_set/annotations/0_exp.npy").write_bytes(data)
        assert take("affectnet", new).refused[0] == Refused("train_set/images/0.jpg", 0, reason)


def test_a_folder_of_another_form_is_named(tmp_path, old, take, picture):
    with pytest.raises(UserError, match="neither train_set and val_set nor Manually_Annotated_file_lists"):
        take("affectnet", old / "Manually_Annotated_file_lists")
    (old / LIST.format("validation")).unlink()
    refuses(r"file_lists/validation.csv or .* is missing", take, "affectnet", old)
    (old / LIST.format("training")).write_text("subDirectory_filePath,expression\n1/aa.jpg,1\n")
    refuses(r"training.csv, line 1: column face_x, .* is missing", take, "affectnet", old)
    picture(old / "train_set/images/1.jpg")
    refuses("holds both layouts", take, "affectnet", old)


def test_folders_are_emotions(tmp_path, take, pictures):
    emotions = ("grief/1.jpg", "grief/2.PNG", "Self-Pity/1.jpg", "012. Tender Love/a.b.webp")
    pictures(tmp_path, *emotions, "99/1.jpg", "stray.jpg")
    (tmp_path / "grief/notes.txt").write_text("x")
    (tmp_path / "grief/.hidden.jpg").write_text("x")
    (tmp_path / "grief/deeper").mkdir()
    found = take("emo135", tmp_path)
    assert [(row["source_id"], row["expression"], row["subject_id"]) for row in found.rows] == [
        ("012. Tender Love/a.b", "tender_love", None),
        ("Self-Pity/1", "self_pity", None),
        ("grief/1", "grief", None),
        ("grief/2", "grief", None),
    ]
    assert found.refused == [
        Refused("stray.jpg", 0, "not in the folder of an emotion"),
        Refused("99/1.jpg", 0, "the folder '99' names no emotion"),
        Refused("grief/deeper", 0, "a folder inside the folder of an emotion"),
        Refused("grief/notes.txt", 0, "not a picture by its name (.jpg, .jpeg, .jpe, .jfif, .png, .webp, .bmp)"),
    ]


def test_folders_of_splits_above_are_kept_and_validation_is_carved(tmp_path, take, pictures):
    pictures(tmp_path, "Train/grief/1.jpg", "test/grief/1.jpg", "val/love/1.jpg", "val/x.jpg")
    found = take("emo135", tmp_path, ["ingest.validation_share=0.0"])
    assert found.column("split") == {"Train/grief/1": "train", "test/grief/1": "test", "val/love/1": "validation"}
    assert found.refused == [Refused("val/x.jpg", 0, "not in the folder of an emotion")]
    carved = take("emo135", tmp_path, ["ingest.validation_share=0.99", "ingest.test_share=0.0"])
    assert carved.column("split")["Train/grief/1"] == "validation"


def test_a_folder_without_folders_is_named(tmp_path, take, picture):
    picture(tmp_path / "1.jpg")
    refuses("no folder in it; Emo135 is read as one folder an emotion", take, "emo135", tmp_path)
