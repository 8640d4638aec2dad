"""FaceCaption-15M: shards whose .json carries the captions, and tables beside pictures, in whatever spelling."""

import io
import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from facemllm.errors import UserError
from facemllm.ingest.reader import Refused
from tests.refusing import refuses
from tests.unit.readers.conftest import encoded


def shard(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for number, (text, facts) in enumerate(rows):
            data = encoded(number, (120, 120))
            for kind, content in (("jpg", data), ("txt", text.encode()), ("json", json.dumps(facts).encode())):
                info = tarfile.TarInfo(f"{number:09d}.{kind}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))


def test_shards(tmp_path, take):
    url = "http://a/1.jpg"
    rows = [
        ("Alt one", {"url": url, "face_box": [20, 20, 60, 100], "face_caption": " She smiles. ", "laion_caption": "L"}),
        ("Alt two", {"url": url, "Face Box": "[10.0, 20, 50, 60]", "face caption": "He frowns.", "caption": None}),
        ("", {"url": "http://a/2.jpg", "face_box": [50, 50, 40, 60], "face_caption": "x"}),
        ("", {"url": "http://a/3.jpg", "face_box": "1, 2, 3", "face_caption": "x"}),
        ("", {"url": "http://a/4.jpg", "face_box": [0, 0, 50, 50], "face_caption": None}),
        ("", {"url": "http://a/5.jpg", "face_caption": "x"}),
    ]
    shard(tmp_path / "images/00000.tar", rows)
    found = take("facecaption", tmp_path)
    first, second = found.rows
    assert first["source_id"] == "images/00000/000000000"
    assert (first["caption"], first["alt_text"]) == ("She smiles.", "L")
    assert (second["caption"], second["alt_text"]) == ("He frowns.", "Alt two")
    # 20 - 10 to 60 + 10; 20 - 20 to 100 + 20
    assert (first["width"], first["height"], first["box"]) == (60, 120, [10, 20, 50, 100])
    assert (second["width"], second["height"], second["box"]) == (60, 60, [10, 10, 50, 50])
    assert first["subject_id"] == second["subject_id"] is not None
    assert first["split"] == second["split"]
    file = "images/00000.tar/00000000"
    assert found.refused == [
        Refused(f"{file}2.jpg", 0, "the face box 50, 50, 40, 60 is empty"),
        Refused(f"{file}3.jpg", 0, "the face box is \"['1', '2', '3']\", not four numbers"),
        Refused(f"{file}4.jpg", 0, "no face caption"),
        Refused(f"{file}5.jpg", 0, "the face box is 'None', not four numbers"),
    ]


def test_shards_without_the_columns(tmp_path, take):
    shard(tmp_path / "00000.tar", [("Alt", {"url": "u", "caption": "Alt"})])
    with pytest.raises(UserError, match=r"00000\.tar/000000000\.jpg: its \.json has no face_caption.*save_additional"):
        take("facecaption", tmp_path)


@pytest.mark.parametrize(("start", "end"), [("", "\n"), ("﻿", "\r\n")])
def test_csv(tmp_path, picture, take, start, end):
    rows = [
        "file,url,face_box,laion_caption,face_caption",
        'pics/a.jpg,u1,"[20, 20, 40, 40]",Alt,"Two\nlines, ""quoted"""',
        'pics/a.jpg,u1,"[0, 0, 30, 30]",,Another face',
        "pics/b.jpg,u2",
        'pics/none.jpg,u3,"[0, 0, 30, 30]",Alt,x',
        '../out.jpg,u4,"[0, 0, 30, 30]",Alt,x',
        ',u5,"[0, 0, 30, 30]",Alt,x',
        'pics/b.jpg,u6,"[0, 0, 30, nan]",Alt,x',
    ]
    (tmp_path / "FaceCaption-v1.csv").write_bytes((start + end.join([*rows, ""])).encode())
    picture(tmp_path / "pics/a.jpg", seed=1)
    found = take("facecaption", tmp_path)
    assert found.column("caption") == {"pics/a/3": 'Two\nlines, "quoted"', "pics/a/4": "Another face"}
    assert (found.column("alt_text"), found.rows[0]["width"]) == ({"pics/a/3": "Alt", "pics/a/4": None}, 30)
    assert len(set(found.column("subject_id").values())) == 1
    assert found.refused == [
        Refused("FaceCaption-v1.csv", 5, "2 fields where the header has 5"),
        Refused("pics/none.jpg", 6, "the picture is missing"),
        Refused("FaceCaption-v1.csv", 7, "the path '../out.jpg' leads out of the dataset's folder"),
        Refused("FaceCaption-v1.csv", 8, "the row names no picture"),
        Refused("FaceCaption-v1.csv", 9, "the face box is \"['0', '0', '30']\", not four numbers"),
    ]


def test_parquet_with_pictures_inside_and_boxes_as_sizes(tmp_path, take):
    data = encoded(1)
    table = {
        "image": [{"bytes": data, "path": None}, {"bytes": b"no picture", "path": None}],
        "URL": ["u1", "u2"],
        "face_box": [[20.0, 20, 20, 20], [0.0, 0, 30, 30]],
        "laion_caption": ["Alt", "Alt"],
        "face_caption": ["Smiling.", "x"],
        "other": [1, 2],
    }
    pq.write_table(pa.table(table), tmp_path / "FaceCaption-v1.parquet")
    found = take("facecaption", tmp_path, box="sizes")
    assert (found.column("caption"), found.rows[0]["width"]) == ({"FaceCaption-v1.parquet/1": "Smiling."}, 30)
    assert [(r.file, r.row) for r in found.refused] == [("FaceCaption-v1.parquet/2", 2)]
    assert "not a JPEG" in found.refused[0].reason


def test_tables_in_another_form(tmp_path, take):
    refuses("neither shards", take, "facecaption", tmp_path)
    path = tmp_path / "t.csv"
    for content, reason in (
        (b"url,face_box,face_caption\n", "no column image or file"),
        (b"", "no column image or file"),
        (b"file,face_box,face_caption\na.jpg,1 1 9 9,\xff\n", "not UTF-8 text"),
    ):
        path.write_bytes(content)
        refuses(reason, take, "facecaption", tmp_path)
    path.unlink()
    (tmp_path / "t.parquet").write_bytes(b"PAR1 no")
    refuses("no sound Parquet file", take, "facecaption", tmp_path)
