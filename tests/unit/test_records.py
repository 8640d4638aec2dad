"""The two tables: what is written comes back, whatever is damaged is refused, and nothing half-written is left."""

import json
import os
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from facemllm import tables as records
from facemllm.core.files import atomic_write
from facemllm.tables import CONVERSATIONS, FACES, TableWriter, mapping, open_table, pairs
from tests.conftest import conversation
from tests.refusing import refuses


def listing(folder):
    return sorted(path.name for path in folder.iterdir())


def test_rows_come_back_as_they_were_written(faces_table, face_rows):
    rows = face_rows()
    table = open_table(faces_table(rows), FACES)
    assert table.rows == len(rows)
    back = list(table.iterate())
    for row, found in zip(rows, back, strict=True):
        assert {name: found[name] for name in row} == row
        assert found["ethnicity"] is None
    assert mapping(back[0]["attributes"]) == {"Smiling": True, "Bald": False}


def test_conversations_come_back_and_pairs_and_mapping_are_inverse(conversations_table, conversation_rows, face_rows):
    rows = conversation_rows(face_rows())
    back = list(open_table(conversations_table(rows), CONVERSATIONS).iterate())
    assert [{name: found[name] for name in row} for row, found in zip(rows, back, strict=True)] == rows
    assert mapping(pairs({"b": False, "a": True})) == {"a": True, "b": False}
    assert [pair["name"] for pair in pairs({"b": 1, "a": 2})] == ["a", "b"]
    assert mapping(None) == {}


def test_the_digest_depends_on_neither_batching_nor_place(tmp_path, face_rows):
    rows = face_rows(300)
    for folder, size in ((tmp_path / "one", len(rows)), (tmp_path / "deeper" / "two", 7)):
        with TableWriter(folder, FACES) as table:
            for start in range(0, len(rows), size):
                table.write(iter(rows[start : start + size]))
    one, two = open_table(tmp_path / "one"), open_table(tmp_path / "deeper" / "two")
    assert one.digest == two.digest == one.manifest["digest"]
    assert len({(table.path / "part-00000.parquet").read_bytes() for table in (one, two)}) == 1


def test_the_digest_depends_on_rows_parents_and_facts(faces_table, face_rows):
    rows = face_rows(4)
    made = [faces_table(rows, "a"), faces_table(rows[::-1], "b")]
    made += [faces_table(rows, "c", parents=["x"]), faces_table(rows, "d", about={"seed": 1})]
    assert len({open_table(path).digest for path in made}) == 4


def test_shards_are_cut_by_size_and_read_as_one(faces_table, face_rows, monkeypatch):
    monkeypatch.setattr("facemllm.tables.storage.ROW_GROUP", 8)
    rows = face_rows(24)
    found = open_table(faces_table(rows, shard_mb=0))
    assert [shard["rows"] for shard in found.manifest["shards"]] == [8, 8, 8]
    assert [row["source_id"] for row in found.iterate(["source_id"])] == [row["source_id"] for row in rows]


def test_batches_respect_split_columns_and_size(faces_table, face_rows):
    rows = face_rows()
    table = open_table(faces_table(rows))
    batches = list(table.batches(["image_id", "split"], split="validation", batch_rows=3))
    assert all(batch.schema.names == ["image_id", "split"] and 0 < batch.num_rows <= 3 for batch in batches)
    found = [name for batch in batches for name in batch.column("image_id").to_pylist()]
    assert found == [row["image_id"] for row in rows if row["split"] == "validation"]


def test_rows_put_aside_make_the_bytes_that_written_ones_make(tmp_path, face_rows):
    rows = face_rows(300)
    rows[5] |= {"landmarks": None, "attributes": [], "caption": ""}
    with TableWriter(tmp_path / "plain", FACES) as plain:
        plain.write(rows[:100] + rows[170:])
    with TableWriter(tmp_path / "t", FACES) as table:
        for row in rows:
            table.defer(row)
        number = 0
        for group in table.deferred():
            stays = [not 100 <= number + place < 170 for place in range(group.num_rows)]
            table.write_table(group.filter(pa.array(stays)))
            number += group.num_rows
    assert table.manifest == plain.manifest


def test_a_bad_row_that_is_put_aside_is_named_and_leaves_nothing(tmp_path, face_rows):
    def write():
        with TableWriter(tmp_path / "bad", FACES) as bad:
            for row in (*face_rows(150), face_rows(1)[0] | {"source": None}):
                bad.defer(row)
            list(bad.deferred())

    refuses("row 150: column 'source' must not be empty", write)
    assert not list(tmp_path.iterdir())


def test_refused_rows_stand_in_the_quarantine(tmp_path, face_rows):
    with TableWriter(tmp_path / "t", FACES) as table:
        table.write(face_rows(2))
        table.quarantine("list.csv", 7, "no image")
    assert open_table(tmp_path / "t").manifest["quarantined"] == 1
    refused = pq.read_table(tmp_path / "t" / "quarantine.parquet").to_pylist()
    assert refused == [{"file": "list.csv", "row": 7, "reason": "no image"}]


def test_an_empty_table_can_be_opened_and_one_of_the_other_schema_is_refused(faces_table):
    table = open_table(faces_table([]), FACES)
    assert (table.rows, list(table.iterate(["image_id"], split="train"))) == (0, [])
    refuses(r"is a 'faces/1' table; 'conversations/1' is needed", open_table, table.path, CONVERSATIONS)


def test_datasets_opens_the_tables_with_images_decoded(faces_table, conversations_table, face_rows, tmp_path):
    datasets = pytest.importorskip("datasets")
    faces = face_rows()
    talks = [conversation(face) | {"segmentation": face["segmentation"]} for face in faces]
    for table, look in (
        (faces_table(faces), lambda row: [row["image"], row["segmentation"]]),
        (conversations_table(talks), lambda row: [*row["images"], row["segmentation"]]),
    ):
        files = [str(path) for path in sorted(table.glob("part-*.parquet"))]
        loaded = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
        assert len(loaded) == 40
        assert all(isinstance(image, Image.Image) and image.size == (48, 48) for image in look(loaded[0]))


def test_an_exception_leaves_nothing(tmp_path, faces_table, face_rows):
    def broken_source():
        yield from face_rows(200)
        raise RuntimeError("midway")

    refuses("midway", faces_table, broken_source(), error=RuntimeError)
    assert listing(tmp_path) == []


def test_existing_output_is_refused_and_kept(tmp_path, faces_table):
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "mine.txt").write_text("mine")
    refuses("exists already", faces_table, [], "t")
    assert listing(tmp_path / "t") == ["mine.txt"]
    assert listing(tmp_path) == ["t"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image_id": None}, r"row 1: column 'image_id' must not be empty"),
        ({"age": "old"}, r"column 'age' does not hold float"),
        ({"colour": "red"}, r"row 1 has unknown columns \['colour'\]"),
    ],
)
def test_rows_that_do_not_fit_are_named(tmp_path, faces_table, face_rows, change, words):
    rows = face_rows(3)
    rows[1] |= change
    refuses(words, faces_table, rows)
    assert listing(tmp_path) == []


def flip_a_byte(table):
    path = table / "part-00000.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def change_manifest(table):
    manifest = json.loads((table / "manifest.json").read_text())
    manifest["rows"] += 1
    (table / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (flip_a_byte, r"part-00000\.parquet: bytes do not match"),
        (lambda t: os.truncate(t / "part-00000.parquet", 999), r"part-00000\.parquet: bytes do not match"),
        (lambda t: (t / "part-00000.parquet").unlink(), r"shards differ.*part-00000\.parquet"),
        (lambda t: shutil.copy(t / "part-00000.parquet", t / "part-00001.parquet"), r"shards differ.*part-00001"),
        (lambda t: (t / "quarantine.parquet").unlink(), r"shards differ.*quarantine\.parquet"),
        (lambda t: (t / "quarantine.parquet").write_bytes(b"x"), r"quarantine\.parquet: bytes do not match"),
        (change_manifest, r"manifest\.json: the manifest does not match its own digest"),
        (lambda t: (t / "manifest.json").write_text("{"), r"manifest\.json: damaged manifest"),
        (lambda t: (t / "manifest.json").write_text("[]"), r"manifest\.json: damaged manifest"),
        (lambda t: (t / "manifest.json").unlink(), r"is not a table"),
    ],
)
def test_a_damaged_table_is_refused_with_the_file_named(tmp_path, face_rows, damage, named):
    with TableWriter(tmp_path / "t", FACES) as table:
        table.write(face_rows(2))
        table.quarantine("list.csv", 1, "no image")
    damage(tmp_path / "t")
    refuses(named, open_table, tmp_path / "t", FACES)


@pytest.mark.parametrize(("where", "name"), [(pq.ParquetWriter, "write_table"), (os, "fsync")])
def test_a_full_disk_is_one_clear_line_and_leaves_nothing(tmp_path, faces_table, face_rows, monkeypatch, where, name):
    def no_space(*args, **options):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(where, name, no_space)
    refuses("no space left on the device", faces_table, face_rows(600))
    assert listing(tmp_path) == []
    if where is os:
        refuses("no space left on the device", atomic_write, tmp_path / "file.json", b"{}")
        assert listing(tmp_path) == []


def test_a_folder_that_cannot_be_written_is_one_clear_line(tmp_path, faces_table, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    refuses("a part of this path is a file", faces_table, [], "file/t")

    def read_only(*args, **options):
        raise OSError(30, os.strerror(30))

    monkeypatch.setattr("pathlib.Path.mkdir", read_only)
    refuses("the file system is read-only", faces_table, [])


def test_subject_ids_tell_people_and_sources_apart_and_give_no_name_away():
    names = [records.subject_id(*person) for person in (("celeba", "17"), ("utkface", "17"), ("celeba", "18"))]
    assert len(set(names)) == 3
    assert records.subject_id("celeba", "17") == names[0] != records.subject_id("celeba", "17", key=b"other")
