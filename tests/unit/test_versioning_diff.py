"""`version diff` names the rows that changed, and in what; `version log` tells which revision holds what."""

import json

import pyarrow.parquet as pq
import pytest

from facemllm import settings
from facemllm.tables import open_table
from facemllm.version.record import LISTED, diff, log, record, render_diff, render_log
from tests.refusing import refuses


@pytest.fixture
def place(tmp_path):
    return settings.load("laptop", [f"storage.home={tmp_path / 'home'}"])


@pytest.fixture
def version(place, faces_table, conversations_table, face_rows, conversation_rows):
    """`version(change, **options)`: records all faces after a change to their rows, and a conversation about each."""
    count = iter(range(9))

    def make(change=lambda rows: rows, talk=lambda rows: rows, **options):
        rows, number = change(face_rows()), next(count)
        faces = faces_table(rows, f"faces-{number}", **options)
        spoken = conversations_table(talk(conversation_rows(rows)), f"conversations-{number}", **options)
        return record(place, faces, spoken), faces

    return make


def test_added_removed_and_changed_rows_are_named_with_their_columns(place, version, face_rows):
    def change(rows):
        rows[3]["caption"] = "A smiling face."
        rows[5]["age"], rows[5]["attributes"] = None, []
        rows[7]["original_id"] = "a" * 64
        return rows[:30][::-1]

    rows = face_rows()
    one, two = version(lambda rows: rows[2:])[0], version(change)[0]
    found = diff(place, one.sha[:8], two.sha)
    assert (found["a"], found["b"]) == (one.sha, two.sha)
    faces = found["tables"]["faces"]
    assert (faces["a"], faces["b"]) == (one.faces, two.faces)
    counts = {kind: faces[kind] for kind in ("added", "removed", "changed", "same")}
    assert counts == {"added": 2, "removed": 10, "changed": 3, "same": 25}, "their order is no change"
    assert [row["image_id"] for row in faces["rows"]["added"]] == [rows[1]["image_id"], rows[0]["image_id"]]
    assert [row["image_id"] for row in faces["rows"]["removed"]] == [row["image_id"] for row in rows[30:]]
    assert faces["rows"]["changed"] == [
        {"image_id": rows[7]["image_id"], "columns": ["original_id"]},
        {"image_id": rows[5]["image_id"], "columns": ["attributes", "age"]},
        {"image_id": rows[3]["image_id"], "columns": ["caption"]},
    ]
    assert faces["columns"] == {"age": 1, "attributes": 1, "caption": 1, "original_id": 1}
    talk = found["tables"]["conversations"]
    assert (talk["added"], talk["removed"], talk["changed"], talk["same"]) == (2, 10, 0, 28)
    assert json.loads(json.dumps(found)) == found


def test_a_changed_answer_shows_as_a_changed_conversation(place, version, face_rows):
    def talk(rows):
        rows[4]["messages"][1]["content"][0]["text"] = "A man."
        rows[4]["conversation_id"] = "0" * 64  # follows from the content
        return rows

    one, two = version()[0], version(talk=talk)[0]
    found = diff(place, one.sha, two.sha)["tables"]
    (changed,) = found["conversations"]["rows"]["changed"]
    assert changed == {"image_id": face_rows()[4]["image_id"], "columns": ["messages"]}
    assert (found["faces"]["changed"], found["faces"]["same"]) == (0, 40)


def test_several_conversations_about_a_picture_are_one_row_and_a_revision_does_not_differ_from_itself(place, version):
    one, two = version(talk=lambda rows: rows + rows[:1])[0], version()[0]
    found = diff(place, one.sha, two.sha)["tables"]["conversations"]
    assert (found["added"], found["removed"], found["changed"], found["same"]) == (0, 0, 1, 39)

    found = diff(place, one.sha, one.sha)["tables"]["faces"]
    assert [found[kind] for kind in ("added", "removed", "changed", "same")] == [0, 0, 0, 40]
    assert found["rows"] == {"added": [], "removed": [], "changed": []}
    refuses("is unknown", diff, place, one.sha, "abcdef0")


def test_shards_that_both_have_and_pictures_are_not_read(place, version, monkeypatch):
    def many(rows):
        return [row | {"image_id": f"{part}{row['image_id'][1:]}"} for part in range(7) for row in rows]

    def changed(rows):
        rows = many(rows)
        rows[-1]["caption"] = "Another face."
        return rows

    (one, faces), (two, _) = version(many, shard_mb=0), version(changed, shard_mb=0)
    assert len(open_table(faces).manifest["shards"]) == 3
    read, real = [], pq.ParquetFile.iter_batches

    def spy(self, *args, **options):
        read.append((self.metadata.num_rows, options["columns"]))
        return real(self, *args, **options)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", spy)
    found = diff(place, one.sha, two.sha)["tables"]["faces"]
    assert (found["changed"], found["same"]) == (1, 279)
    faces_read = [rows for rows, columns in read if "skin_tone" in columns]
    assert faces_read == [24] * 4, "the last shard of either, once for rows and once for columns"
    assert not any({"image", "images"} & set(columns) for _, columns in read)


def test_the_text_says_what_changed_and_how_much_is_not_listed(place, version):
    one, two = version()[0], version(lambda rows: [row | {"caption": "New."} for row in rows])[0]
    text = render_diff(diff(place, one.sha, two.sha))
    lines = text.splitlines()
    assert lines[0] == f"{one.sha[:12]} -> {two.sha[:12]}"
    assert [line.split() for line in lines[1:4]] == [
        ["table", "added", "removed", "changed", "same"],
        ["faces", "0", "0", "40", "0"],
        ["conversations", "0", "0", "0", "40"],
    ]
    assert "faces, columns changed: caption (40)" in lines
    assert sum(line.endswith(" caption") for line in lines) == LISTED
    assert lines[-1] == "  changed: 20 more"
    assert len(diff(place, one.sha, two.sha, listed=3)["tables"]["faces"]["rows"]["changed"]) == 3


def test_the_log_says_which_revision_holds_what(place, version):
    one, two = version()[0], version(lambda rows: rows[:30])[0]
    entries = [(entry["sha"], entry["faces_rows"], entry["replaces"]) for entry in log(place)]
    assert entries == [(two.sha, 30, []), (one.sha, 40, [])]
    newest = render_log(log(place)).splitlines()[0]
    assert newest.startswith(f"{two.sha[:12]}  faces {two.faces[:12]} (30 rows)  conversations")
    assert render_log([]) == "nothing is recorded yet"
