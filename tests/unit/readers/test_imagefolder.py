"""Pictures of one's own: what a table may say, and that every likely mistake is answered with the way to mend it."""

import os
import re

import pytest

from facemllm.ingest.importing import split_of
from facemllm.ingest.labels import ATTRIBUTES
from facemllm.ingest.reader import Refused
from facemllm.ingest.run import import_source
from facemllm.settings import load
from facemllm.settings.data import Source
from facemllm.tables import subject_id
from facemllm.tables.schemas import CELEBA, MAAD_ONLY
from facemllm.tasks import attributes
from tests.refusing import refuses

NO_PICTURE = "not a picture by its name (.jpg, .jpeg, .jpe, .jfif, .png, .webp, .bmp)"
TRAIN_ONLY = ["ingest.test_share=0.0", "ingest.validation_share=0.0"]


@pytest.fixture
def folder(tmp_path, pictures):
    """`folder(table, *names)`: pictures, and labels.csv when the table is not None."""

    def make(table, *names):
        pictures(tmp_path, *names, size=(100, 80))
        if table is not None:
            data = table if isinstance(table, bytes) else table.encode()
            (tmp_path / "labels.csv").write_bytes(data)
        return tmp_path

    return make


def one_row(take, folder, header, cells):
    """What an import makes of a table with one labelled picture."""
    return take("imagefolder", folder(f"file,{header}\na.jpg,{cells}\n", "a.jpg"))


def test_without_a_table_every_picture_is_read_and_nothing_is_known(folder, take):
    names = ("b.JPG", "a/z.png", "a/y.webp", "a/y.jpg", ".hidden/x.jpg", ".x.jpg", "c d/é.jpeg")
    root = folder(None, *names)
    for name in ("notes.txt", "a/anim.gif", "Thumbs.db"):
        (root / name).write_text("x")
    found = take("imagefolder", root, TRAIN_ONLY)
    assert [(row["source_id"], row["split"], row["subject_id"], row["facts"]) for row in found.rows] == [
        (name, "train", None, {}) for name in ("b", "a/y", "a/y.webp", "a/z", "c d/é")
    ]
    assert found.refused == [
        Refused("Thumbs.db", 0, NO_PICTURE),
        Refused("notes.txt", 0, NO_PICTURE),
        Refused("a/anim.gif", 0, "not a JPEG, PNG, WEBP, BMP picture, whatever its name says"),
    ]


def test_every_column_is_read(folder, take):
    said = (
        *(("age", "31.5", 31.5), ("gender", "Female", "female"), ("age_range", "20 - 29", "20-29")),
        *(("expression", "Happiness", "happiness"), ("ethnicity", "East Asian", "east_asian"), ("skin_tone", "4", 4)),
        *(("yaw", "-12.5", -12.5), ("pitch", "0", 0), ("roll", "1e1", 10), ("alt_text", "none", "none")),
        *(("caption", '"A woman, smiling."', "A woman, smiling."), ("box", "10 20 60 70", [10, 20, 60, 70])),
        ("landmarks", '"[[20, 30], [40, 30]]"', [[20, 30], [40, 30]]),
    )
    attributes = {"Smiling": "1", "Wearing_Hat": "no", "Sunglasses": "0.0", "Young": "TRUE", "Bald": ""}
    columns = {"file": "anna/a.jpg", "subject": "Anna", "split": "Test", **{name: cell for name, cell, _ in said}}
    columns |= {"AU1": "0.5", "AU12": "5"} | attributes
    table = "\r\n".join((",".join(columns), ",".join(columns.values()), ""))
    (row,) = take("imagefolder", folder(table.encode("utf-8-sig"), "anna/a.jpg")).rows
    person = subject_id("imagefolder", "Anna")
    assert (row["source_id"], row["split"], row["subject_id"]) == ("anna/a", "test", person)
    assert row["facts"] == {name: value for name, _, value in said} | {
        "action_units": {"AU1": 0.5, "AU12": 5},
        "attributes": {"Smiling": True, "Wearing_Hat": False, "Sunglasses": False, "Young": True},
    }
    assert {said["field"] for said in row["provenance"]} == set(row["facts"])


def test_pictures_are_cropped_to_their_box_only_when_asked(folder, take):
    root = folder("file,box,landmarks\na.jpg,10 20 60 70,20 30 40 30\nb.jpg,,1 2\n", "a.jpg", "b.jpg")
    whole = take("imagefolder", root)
    assert [(row["width"], row["height"]) for row in whole.rows] == [(100, 80), (100, 80)]
    cropped = take("imagefolder", root, crop="box")
    (row,) = cropped.rows
    assert (row["width"], row["height"], row["box"]) == (50, 50, [0, 0, 50, 50])
    assert row["landmarks"] == [[10, 10], [30, 10]]
    assert cropped.refused == [Refused("labels.csv", 3, "column box is empty, and the option crop: box needs it")]


def test_splits_that_are_given_stand_and_others_are_drawn_by_person(folder, take):
    names = [f"{n}.jpg" for n in range(12)]
    given = ["train", "validation", "test", *[""] * 9]
    people = ["", "", "", *[f"p{n % 3}" for n in range(6)], "", "", ""]
    lines = [",".join(cells) for cells in zip(names, people, given, strict=True)]
    root = folder("\n".join(("file,subject,split", *lines)), *names)
    found = take("imagefolder", root, ["ingest.test_share=0.4", "ingest.validation_share=0.4"])
    splits = list(found.column("split").values())
    assert splits[:3] == ["train", "validation", "test"]
    drawn = [row["subject_id"] or f"imagefolder:{row['source_id']}" for row in found.rows[3:]]
    assert splits[3:] == [split_of(person, 0.4, 0.4) for person in drawn]
    assert splits[3:6] == splits[6:9]
    assert len(set(splits[3:])) > 1


def test_rows_that_cannot_be_used_are_refused_with_their_line(folder, take, tmp_path):
    rows = (
        *("file,age", "a.jpg,30", "a.jpg,31", "./a.jpg,32", "gone.jpg,5", "/etc/hosts,5", "../a.jpg,5", "C:\\a.jpg,5"),
        *("sub\\b.jpg,7", "c.jpg", "d.jpg,1,2", ",5", 'e.jpg,"5', "f.jpg,nan", "link.jpg,1", "zip.jpg,2", "sub,3"),
        *(".,1", "./,1", "./.,1"),
    )
    root = folder("\n".join(rows), "in/a.jpg", "in/sub/b.jpg", "in/extra.png", "outside.jpg")
    (root / "labels.csv").rename(root / "in/labels.csv")
    root = root / "in"
    (root / "link.jpg").symlink_to(tmp_path / "outside.jpg")
    (root / "zip.jpg").write_bytes(b"PK\x03\x04 and more")
    (root / "there").symlink_to(tmp_path, target_is_directory=True)
    (root / "f.jpg").write_bytes(b"")
    found = take("imagefolder", root)
    assert found.column("age") == {"a": 30, "sub/b": 7}
    outside = "the path {!r} leads out of the dataset's folder"
    archive = "not a JPEG, PNG, WEBP, BMP picture, whatever its name says (it looks like a ZIP archive)"
    assert found.refused == [
        Refused("labels.csv", 3, "a.jpg has a row already"),
        Refused("labels.csv", 4, "a.jpg has a row already"),
        Refused("gone.jpg", 5, "the picture is missing"),
        Refused("labels.csv", 6, outside.format("/etc/hosts")),
        Refused("labels.csv", 7, outside.format("../a.jpg")),
        Refused("labels.csv", 8, outside.format("C:\\a.jpg")),
        Refused("labels.csv", 10, "1 fields where the header has 2"),
        Refused("labels.csv", 11, "3 fields where the header has 2"),
        Refused("labels.csv", 12, "column file is empty"),
        Refused(
            "labels.csv", 13, "line break inside quotes, or a quote that is never closed; write the row on one line"
        ),
        Refused("labels.csv", 14, "column age is 'nan'; leave the cell empty where it is unknown"),
        Refused("link.jpg", 15, "a link leads out of the dataset's folder; name where it leads in ingest.links"),
        Refused("zip.jpg", 16, archive),
        Refused("sub", 17, "the picture cannot be read: Is a directory"),
        *(Refused("labels.csv", 18 + n, outside.format(name)) for n, name in enumerate((".", "./", "./."))),
        Refused("there", 0, "a link to a folder; put the folder itself here, or name where it leads in ingest.links"),
        Refused("extra.png", 0, "no row in labels.csv"),
    ]


@pytest.mark.parametrize(
    ("column", "cell", "reason"),
    [
        ("age", "young", "column age is 'young', not a number"),
        ("age", "121", "column age is 121, outside 0 to 120"),
        ("age", "inf", "column age is inf, outside 0 to 120"),
        ("age", "1_0", "column age is '1_0', not a number"),
        ("age", "٣٤", "column age is '٣٤', not a number"),
        ("yaw", "200", "column yaw is 200, outside -180 to 180"),
        ("skin_tone", "11", "column skin_tone is 11, outside 1 to 10"),
        ("skin_tone", "2.5", "column skin_tone is 2.5, not a whole number"),
        ("gender", "man", "column gender is 'man', not one of female, male"),
        ("gender", "unknown", "column gender is 'unknown'; leave the cell empty where it is unknown"),
        ("split", "val", "column split is 'val', not one of train, validation, test"),
        ("age_range", "29-20", "column age_range is '29-20', not a range as 20-29 or 70+"),
        ("age_range", "3-Sep", "column age_range is '3-Sep', not a range as 20-29 or 70+"),
        ("expression", "happy", "column expression is 'happy'; write happiness"),
        ("expression", "7", "column expression is '7', not a word"),
        ("ethnicity", "?!", "column ethnicity is '?!', not a word"),
        ("Smiling", "-1", "column Smiling is '-1', not 0 or 1 (true, false, yes, no; empty: unknown)"),
        ("Smiling", "2", "column Smiling is '2', not 0 or 1 (true, false, yes, no; empty: unknown)"),
        ("AU4", "6", "column AU4 is 6, outside 0 to 5"),
        ("box", "1 2 3", "column box has 3 numbers, not four: left top right bottom"),
        ("box", "50 10 20 20", "column box is '50 10 20 20': left top right bottom, so right exceeds left and bottom "),
        ("box", "1 2 x 4", "column box is 'x', not a number"),
        ("landmarks", "1 2 3", "column landmarks has 3 numbers; points are pairs, as in '30 40 70 40'"),
        ("landmarks", "1 nan", "column landmarks is nan, outside -inf to inf"),
    ],
)
def test_a_bad_value_is_refused_with_its_column(folder, take, column, cell, reason):
    found = one_row(take, folder, column, cell)
    assert found.rows == []
    (refused,) = found.refused
    assert (refused.file, refused.row) == ("labels.csv", 2)
    assert refused.reason.startswith(reason)


@pytest.mark.parametrize(
    ("column", "answer"),
    [
        ("smiling", "no column is called 'smiling'; did you mean 'Smiling'?"),
        ("Wearing Hat", "no column is called 'Wearing Hat'; did you mean 'Wearing_Hat'?"),
        ("Eyeglases", "no column is called 'Eyeglases'; did you mean 'Eyeglasses'?"),
        ("Age", "no column is called 'Age'; did you mean 'age'?"),
        ("emotion", "no column is called 'emotion'; did you mean 'expression'?"),
        ("race", "no column is called 'race'; did you mean 'ethnicity'?"),
        ("bbox", "no column is called 'bbox'; did you mean 'box'?"),
        ("person_id", "no column is called 'person_id'; did you mean 'subject'?"),
        ("AU01_r", "no column is called 'AU01_r'; action units are AU1 to AU64: did you mean 'AU1'?"),
        ("AU65", "no column is called 'AU65'; action units are AU1 to AU64"),
        ("favourite_colour", "no column is called 'favourite_colour'; there are file, subject, split, gender"),
        ("", "column 2 has no name; name it or save the table without its index"),
        ("Unnamed: 0", "column 2 has no name; name it or save the table without its index"),
        ("file", "a column stands there twice"),
    ],
)
def test_an_unknown_column_stops_the_import_with_a_suggestion(folder, take, column, answer):
    refuses(r"labels\.csv, line 1: " + re.escape(answer), one_row, take, folder, column, "1")


@pytest.mark.parametrize(
    ("table", "answer"),
    [
        (b"", "labels.csv: empty; write a header (file,age,...) and a row for every picture, or remove it"),
        (b"file,age\n", "labels.csv: a header and no rows; write a row for every picture, or remove the file"),
        (b"file;age\na.jpg;3\n", "line 1: columns are parted by ';'; save the table with commas"),
        (b"file\tage\na.jpg\t3\n", "line 1: columns are parted by '\\t'; save the table with commas"),
        (b"filename,age\na.jpg,3\n", "line 1: no column is called 'filename'; did you mean 'file'?"),
        (b"age,gender\n3,male\n", "line 1: column file is missing; it holds the path of each picture"),
        (b"file,subject\na.jpg,Ren\xe9\n", "labels.csv: not UTF-8 text"),
        ("file,age\na.jpg,3\n".encode("utf-16"), "labels.csv: not UTF-8 text"),
    ],
)
def test_a_table_of_another_form_stops_the_import(folder, take, table, answer):
    refuses(re.escape(answer), take, "imagefolder", folder(table, "a.jpg"))


def test_a_table_under_another_name_is_not_silently_passed_over(folder, take):
    root = folder(None, "a.jpg")
    for name in ("Labels.csv", "label.csv", "labels.csv.txt", "labels.xlsx"):
        (root / name).write_text("file,age\na.jpg,3\n")
        refuses(re.escape(f"{name}: labels are read from a file named labels.csv"), take, "imagefolder", root)
        (root / name).unlink()
    (root / "labels.csv").symlink_to("nowhere.csv")
    refuses(r"labels\.csv: not a file that can be read", take, "imagefolder", root)
    (root / "labels.csv").unlink()
    (root / "a.jpg").rename(root / "notes.txt")
    refuses(r"no picture in it \(\.jpg, .*\); give the folder that holds them", take, "imagefolder", root)


def test_a_table_in_a_folder_further_down_is_not_silently_passed_over(folder, take):
    root = folder(None, "anna/a.jpg")
    (root / "anna/Labels.csv").write_text("file,age\na.jpg,3\n")
    refuses(r"anna/Labels\.csv: labels are read from .*/labels\.csv alone; give .*/anna as", take, "imagefolder", root)


def test_a_line_break_inside_quotes_is_named_at_both_lines(folder, take):
    found = take("imagefolder", folder('file,alt_text\na.jpg,"one\ntwo"\nb.jpg,three\nc.jpg\n', "a.jpg", "b.jpg"))
    reasons = {refused.row: refused.reason for refused in found.refused}
    assert reasons[2].startswith("line break inside quotes")
    assert reasons[3] == (
        "1 fields where the header has 2; perhaps the rest of line 2, which has a line break inside quotes"
    )
    assert (reasons[5], [row["source_id"] for row in found.rows]) == ("1 fields where the header has 2", ["b"])


def test_a_pipe_does_not_hold_the_import(folder, take):
    root = folder(None, "a.jpg")
    os.mkfifo(root / "pipe.jpg")
    found = take("imagefolder", root)
    assert [row["source_id"] for row in found.rows] == ["a"]
    assert found.refused == [Refused("pipe.jpg", 0, "not a regular file")]


def test_the_vocabulary_holds_what_the_tasks_ask_about():
    assert (len(CELEBA), len(set(CELEBA) | set(MAAD_ONLY)), len(set(ATTRIBUTES))) == (40, 53, len(ATTRIBUTES))
    for item in attributes.TASK.items:
        answers = [option.value for option in item.options]
        names = [item.name] if set(answers) <= {"yes", "no"} else answers
        assert set(names) <= set(ATTRIBUTES), item.name


def test_splits_that_the_table_never_names_are_carved_out_of_training(folder, take):
    names = [f"{number:02d}.png" for number in range(60)]
    rows = [f"{name},p{n},{'train' if n % 6 else 'test'}" for n, name in enumerate(names)]
    root = folder("\n".join(("file,subject,split", *rows)), *names)
    found = take("imagefolder", root, ["ingest.validation_share=0.3", "ingest.test_share=0.3"]).column("split")
    assert {name for name, split in found.items() if split == "test"} == {f"{n:02d}" for n in range(0, 60, 6)}
    assert 5 < list(found.values()).count("validation") < 30


def test_a_table_that_leads_elsewhere_or_has_an_endless_line_is_not_read(tmp_path, folder, take):
    root = folder(None, "root/a.png") / "root"
    (tmp_path / "secret.csv").write_text("file,age\na.png,44\n")
    (root / "labels.csv").symlink_to(tmp_path / "secret.csv")
    refuses("a link that leads out of", take, "imagefolder", root)
    (root / "labels.csv").unlink()
    with (root / "labels.csv").open("wb") as file:
        file.truncate(2**30)
    refuses("longer than 100000 characters", take, "imagefolder", root)


COMPOSED, PARTED = "Jos\u00e9", "Jose\u0301"


@pytest.mark.parametrize(("written", "stored"), [(COMPOSED, PARTED), (PARTED, COMPOSED)])
def test_a_name_in_another_unicode_form_is_matched(folder, take, written, stored):
    found = take("imagefolder", folder(f"file,age\n{written}/{written}.jpg,30\n", f"{stored}/{stored}.jpg"))
    assert found.column("age") == {f"{COMPOSED}/{COMPOSED}": 30}
    assert found.refused == []


def test_files_whose_names_differ_in_unicode_form_alone_are_told_apart_or_said(folder, take):
    found = take("imagefolder", folder(f"file,age\n{PARTED}.jpg,30\n", f"{PARTED}.jpg", f"{COMPOSED}.jpg"))
    assert found.column("age") == {COMPOSED: 30}
    assert found.refused[0].file == f"{COMPOSED}.jpg"
    assert found.refused[0].reason.startswith(
        "no row in labels.csv; a file that has one is of the same name in another"
    )


def test_a_name_that_fits_two_files_is_refused(folder, take):
    names = ("e\u0301\u00e9.jpg", "\u00e9e\u0301.jpg")
    found = take("imagefolder", folder("file,age\n\u00e9\u00e9.jpg,30\n", *names))
    assert found.refused[0] == Refused(
        "labels.csv", 2, "\u00e9\u00e9.jpg is 2 files, each in another Unicode form of the name; rename all but one"
    )


def test_several_faces_of_one_picture_are_rows_told_apart_by_box(tmp_path, picture, take):
    picture(tmp_path / "group.png", 1, (192, 96))
    picture(tmp_path / "one.png", 2, (96, 96))
    rows = ("file,subject,age,box", "group.png,a,31,0 0 96 96", "group.png,b,52,96 0 192 96", "one.png,c,40,0 0 48 48")
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    found = take("imagefolder", tmp_path)
    assert found.refused == []
    assert found.column("age") == {"group/0": 31, "group/1": 52, "one": 40}
    assert found.column("width") == {"group/0": 96, "group/1": 96, "one": 96}
    assert found.column("box")["group/1"] == [0, 0, 96, 96]
    assert len({row["image_id"] for row in found.rows}) == len({row["subject_id"] for row in found.rows}) == 3
    out = tmp_path.parent / f"{tmp_path.name}-faces"
    manifest = import_source(load("laptop", TRAIN_ONLY), Source(name="imagefolder", root=str(tmp_path)), out)
    assert (manifest["rows"], manifest["quarantined"]) == (3, 0)


def test_faces_of_one_picture_that_nobody_names_are_two_people_in_one_split(tmp_path, picture, take):
    rows = ["file,box"]
    for n in range(30):
        picture(tmp_path / f"{n}.png", n, (192, 96))
        rows += [f"{n}.png,0 0 96 96", f"{n}.png,96 0 192 96"]
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    found = take("imagefolder", tmp_path, ["ingest.validation_share=0.3", "ingest.test_share=0.3"])
    splits = found.column("split")
    assert len(splits) == 60
    assert set(splits.values()) == {"train", "validation", "test"}
    assert all(splits[f"{n}/0"] == splits[f"{n}/1"] for n in range(30))
    assert {row["subject_id"] for row in found.rows} == {None}


def test_rows_of_one_picture_that_boxes_do_not_tell_apart_are_refused(tmp_path, picture, take):
    for name in ("a", "b", "c"):
        picture(tmp_path / f"{name}.png", ord(name), (192, 96))
    rows = ("a.png,0 0 96 96", "a.png,", 'a.png,"0,0,96,96"', "b.png,", "b.png,", "c.png,", "c.png,0 0 96 96")
    (tmp_path / "labels.csv").write_text("\n".join(("file,box", *rows)))
    found = take("imagefolder", tmp_path)
    assert list(found.column("box")) == ["a/0", "b", "c/1"]
    no_box = "{} has several rows, and this one no box; say in which part of the picture its face is"
    assert [(row.row, row.reason) for row in found.refused] == [
        (3, no_box.format("a.png")),
        (4, "a.png has a row already"),
        (6, "b.png has a row already"),
        (7, no_box.format("c.png")),
    ]


def test_what_the_name_of_a_foreign_picture_says_its_content_decides(folder, take):
    root = folder(None, "good.HEIC")
    (root / "phone.jpg").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    found = take("imagefolder", root)
    assert list(found.column("age")) == ["good"]
    assert [(row.file, "a HEIC; convert it to JPEG" in row.reason) for row in found.refused] == [("phone.jpg", True)]
