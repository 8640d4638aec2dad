"""From faces of a reader to rows: geometry, links and pipes, order and bytes, the bounded window, fingerprints."""

import hashlib
import io
import os
import shutil
import subprocess
import sys
from functools import partial

import numpy as np
import psutil
import pytest
from PIL import Image

from facemllm.core import digests
from facemllm.ingest import importing
from facemllm.ingest.importing import HASH, fingerprint, imported, options_of, split_of
from facemllm.ingest.reader import Face, Reader, Refuse, Refused
from facemllm.ingest.run import import_source
from facemllm.ingest.step import STEP
from facemllm.settings import load
from facemllm.settings.data import Source
from facemllm.tables import FACES, Table, TableWriter, mapping, open_table, subject_id
from tests.pictures import encode, progressive, repeated_scans
from tests.refusing import refuses


def squares(size=(80, 60), at=(20, 10, 60, 50), color=(255, 0, 0)):
    """A black picture, `size` as (width, height), with one coloured rectangle."""
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    pixels[at[1] : at[3], at[0] : at[2]] = color
    return pixels


def decoded(stored):
    return np.asarray(Image.open(io.BytesIO(stored["bytes"])))


@pytest.fixture
def run(tmp_path, monkeypatch):
    """`run(faces, *settings, official=(), workers=0)`: what an import makes of a reader that gives these."""

    def go(faces, *settings, official=(), workers=0):
        fake = Reader(lambda root, options: iter(faces), official=official)
        monkeypatch.setattr(importing, "reader", lambda name: fake)
        data = load("laptop", list(settings)).ingest
        return imported(Source(name="imagefolder", root=str(tmp_path)), data, workers)

    return go


def one(run, *settings, file="a", image=None, **facts):
    """What an import makes of one face."""
    (row,) = run([Face(file=file, source_id="a", image=image or encode(squares()), **facts)], *settings)
    return row


def test_a_picture_that_is_dear_to_open_is_quarantined_with_its_reason(run):
    bomb = repeated_scans(progressive(64), 1500)
    refused = one(run, file="b.jpg", image=bomb)
    assert (refused.file, refused.reason) == ("b.jpg", "a JPEG with more than 200 scans; save a plain JPEG")


def test_a_row_holds_what_the_face_says(run):
    labels = {"attributes": {"Young": True, "Bald": False}, "action_units": {"AU1": 2.0}, "age": 30.0}
    row = one(run, file="a.png", subject="Anna", split="test", labels=labels)
    assert len(row.pop(HASH)) == 64
    assert (row["source"], row["source_id"], row["split"]) == ("imagefolder", "a", "test")
    assert row["subject_id"] == subject_id("imagefolder", "Anna")
    assert row["original_id"] == hashlib.sha256(encode(squares())).hexdigest()
    assert (row["image_id"], row["width"], row["height"]) == (digests.of_bytes(row["image"]["bytes"]), 80, 60)
    assert mapping(row["attributes"]) == {"Young": True, "Bald": False}
    origins = [(said["field"], said["origin"]) for said in row["provenance"]]
    assert origins == [(name, "source") for name in ("action_units", "age", "attributes")]


def test_crop_box_landmarks_and_mask_move_together(run):
    mask = np.zeros((60, 80), np.uint8)
    mask[10:50, 20:60] = 7
    labels = {"box": [20, 10, 60, 50], "landmarks": [[20, 10], [40.5, 30], [80, 60]], "segmentation": mask}
    row = one(run, crop=(20, 10, 60, 50), labels=labels)
    assert (row["width"], row["height"], row["box"]) == (40, 40, [0, 0, 40, 40])
    assert row["landmarks"] == [[0, 0], [20.5, 20], [60, 50]]
    assert (decoded(row["segmentation"]) == 7).all()
    assert (decoded(row["image"])[..., 0] > 240).all()
    assert (decoded(row["image"])[..., 1:] < 15).all()


def test_large_crops_are_reduced_and_everything_in_them_scaled(run):
    picture = encode(squares((400, 300), (100, 100, 300, 200)))
    mask = np.zeros((150, 200), np.uint8)  # half the size of the picture
    mask[50:100, 50:150] = 3
    labels = {"box": [100, 100, 300, 200], "landmarks": [[100, 100]], "segmentation": mask}
    row = one(run, "ingest.max_side=100", image=picture, crop=(0, 100, 400, 300), labels=labels)
    assert (row["width"], row["height"], row["box"], row["landmarks"]) == (100, 50, [25, 0, 75, 25], [[25, 0]])
    red = decoded(row["image"])[..., 0] > 128
    classes = decoded(row["segmentation"])
    assert classes.shape == (50, 100)
    assert set(np.unique(classes)) == {0, 3}
    for found in (red, classes == 3):
        columns, rows = np.flatnonzero(found.any(axis=0)), np.flatnonzero(found.any(axis=1))
        assert (columns[0], columns[-1] + 1, rows[0], rows[-1] + 1) == (25, 75, 0, 25)


def test_small_pictures_are_never_enlarged_nor_resampled(run):
    row = one(run, "ingest.max_side=512")
    assert (row["width"], row["height"]) == (80, 60)
    edge = decoded(row["image"])[30, 18:22, 0]
    assert edge[0] < 40 < 215 < edge[3]


def test_crops_reach_out_of_the_picture_only_so_far(run):
    for crop, size in (((-10.5, -4, 39.2, 1000), (40, 60)), ((10.7, 5.2, 39.2, 49.1), (30, 45))):
        row = one(run, crop=crop)
        assert (row["width"], row["height"]) == size
    for crop in ((90, 0, 200, 60), (10, 10, 14, 60), (50, 50, 20, 20)):
        said = f"the crop {crop} leaves nothing of a picture of 80x60"
        assert one(run, row=3, crop=crop) == Refused("a", 3, said)
    assert one(run, row=3, crop=(0, 0, float("nan"), 9)) == Refused("a", 3, "the crop (0, 0, nan, 9) is not finite")


def test_crops_are_of_the_upright_picture(run):
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encode(squares((80, 60), (0, 0, 40, 60)), exif=exif)
    row = one(run, image=turned, crop=(0, 0, 60, 40), labels={"box": [0, 0, 60, 40]})
    assert (row["width"], row["height"], row["box"]) == (60, 40, [0, 0, 60, 40])
    assert (decoded(row["image"])[..., 0] > 240).all()


def test_further_labels_and_their_crop_are_taken_from_more(run):
    def refuse():
        raise Refuse("the other file is damaged")

    faces = [
        Face(file="a", source_id="a", image=encode(squares()), labels={"age": 1.0}, more=lambda: {"age": 2.0}),
        Face(file="b", source_id="b", image=encode(squares()), more=lambda: {"crop": (20, 10, 60, 50)}),
        Face(file="c", row=9, source_id="c", image=encode(squares()), more=refuse),
    ]
    first, second, third = run(faces)
    assert first["age"] == 2
    assert second["width"] == 40
    assert "crop" not in second
    assert third == Refused("c", 9, "the other file is damaged")


def test_numbers_that_are_not_finite_are_refused(run):
    nan = float("nan")
    values = [("age", nan), ("yaw", float("inf")), ("box", [0, 0, nan, 4])]
    for name, value in (*values, ("landmarks", [[1.0, nan]]), ("landmarks", [[1e39, 5.0]])):
        assert one(run, row=4, labels={name: value}) == Refused("a", 4, f"{name} is not a finite number")


def test_a_label_that_is_no_column_is_our_own_mistake(run):
    refuses("'happiness' is no column of the faces table", one, run, labels={"happiness": 1}, error=ValueError)


@pytest.mark.parametrize(
    ("official", "own", "splits"),
    [
        ((), None, {"train", "validation", "test"}),
        ((), "train", {"train", "validation", "test"}),
        (("train", "test"), "train", {"train", "validation"}),
        (("train", "validation", "test"), "train", {"train"}),
        (("train", "test"), "test", {"test"}),
        (("train", "test"), None, {"train", "validation", "test"}),
    ],
)
def test_splits_that_a_source_lacks_are_carved_out_of_train(run, official, own, splits):
    data = encode(squares((8, 8)))
    faces = [Face(file=f"{n}", source_id=f"{n}", image=data, subject=f"{n // 2}", split=own) for n in range(60)]
    rows = list(run(faces, "ingest.validation_share=0.3", "ingest.test_share=0.3", official=official))
    assert {row["split"] for row in rows} == splits
    assert all(rows[n]["split"] == rows[n + 1]["split"] for n in range(0, 60, 2))


def test_drawn_splits_keep_their_shares_and_do_not_move():
    drawn = [split_of(f"person {n}", 0.1, 0.2) for n in range(4000)]
    assert abs(drawn.count("test") / 4000 - 0.2) < 0.02
    assert abs(drawn.count("validation") / 4000 - 0.1) < 0.02
    assert drawn[:8] == [split_of(f"person {n}", 0.1, 0.2) for n in range(8)]
    assert {split_of("anyone", 0.0, 0.0), split_of("anyone", 0.0, 0.99999999)} == {"train", "test"}


def test_files_that_must_not_be_opened_are_refused(run, tmp_path):
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    outside.mkdir()
    (outside / "x.png").write_bytes(encode(squares()))
    (tmp_path / "in.png").write_bytes(encode(squares()))
    (tmp_path / "link.png").symlink_to(outside / "x.png")
    (tmp_path / "folder").symlink_to(outside)
    (tmp_path / "good.png").symlink_to("in.png")
    (tmp_path / "round.png").symlink_to("round.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "big.png").touch()
    os.truncate(tmp_path / "big.png", 64 * 2**20 + 1)
    names = ("link", "folder/x", "round", "pipe", "empty", "big", "gone", "in.png/x", "good", "n" * 300)
    faces = [Face(file=name, row=n, source_id=name, image=tmp_path / f"{name}.png") for n, name in enumerate(names)]
    found = list(run(faces))
    reasons = {item.file: item.reason for item in found if isinstance(item, Refused)}
    out = "a link leads out of the dataset's folder; name where it leads in ingest.links"
    assert reasons.pop("round").startswith("the picture cannot be read: ")
    assert reasons == {
        "link": out,
        "folder/x": out,
        "pipe": "not a regular file",
        "empty": "the file is empty",
        "big": "the file has 67,108,865 bytes, more than 67,108,864",
        "gone": "the picture is missing",
        "in.png/x": "the picture is missing",
        "n" * 300: "the picture cannot be read: File name too long",
    }
    assert [row["source_id"] for row in found if not isinstance(row, Refused)] == ["good"]


def test_a_root_that_is_a_link_itself_is_read(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real/a.png").write_bytes(encode(squares()))
    (tmp_path / "root").symlink_to("real")
    (row,) = imported(Source(name="imagefolder", root=str(tmp_path / "root")), load("laptop").ingest)
    assert row["source_id"] == "a"


def test_names_that_are_not_utf8_are_refused_in_words_a_table_can_hold(run):
    faces = [
        Face(file="Ren\udce9.jpg", row=2, source_id="Ren\udce9", image=encode(squares())),
        Refused("b\udcff", 3, "no \udcff"),
    ]
    assert list(run(faces)) == [
        Refused(r"Ren\udce9.jpg", 2, "the file's name is not UTF-8; rename it"),
        Refused(r"b\udcff", 3, r"no \udcff"),
    ]


def test_order_and_bytes_do_not_depend_on_the_number_of_workers(run):
    rng = np.random.default_rng(5)
    heights = [600 if n % 20 == 0 else 20 + n % 50 for n in range(200)]  # some take much longer than others
    pictures = [encode(rng.integers(0, 255, (height, 30, 3), dtype=np.uint8)) for height in heights]

    def faces():
        for n, data in enumerate(pictures):
            yield Face(file=f"{n}", source_id=f"{n}", image=data, crop=(1, 1, 29, 19), more=partial(dict, age=n))
            if n % 20 == 5:
                yield Refused("list", n, "odd")

    one_worker, many = (list(run(faces(), "ingest.max_side=32", workers=count)) for count in (1, 2))
    assert one_worker == many
    named = [int(row.row if isinstance(row, Refused) else row["source_id"]) for row in many]
    assert named == sorted(named)
    assert len(many) == 210


def test_the_reader_is_never_far_ahead_of_what_was_taken(run):
    pulled = 0

    def faces():
        nonlocal pulled
        for n in range(10_000):
            pulled += 1
            yield Refused("list", n, "odd")

    rows = run(faces(), workers=2)
    assert pulled == 0
    for taken in range(1, 301):
        next(rows)
        assert pulled <= taken + 96
    rows.close()
    assert pulled <= 396


def test_closing_early_leaves_no_process(run):
    data = encode(squares())
    before = set(psutil.Process().children())
    rows = run((Face(file=f"{n}", source_id=f"{n}", image=data) for n in range(1000)), workers=2)
    for _ in range(100):
        next(rows)
    started = [one for one in psutil.Process().children() if one not in before]
    assert len(started) >= 2
    rows.close()
    workers = [one for one in started if one.is_running() and "resource_tracker" not in " ".join(one.cmdline())]
    assert not psutil.wait_procs(workers, timeout=20)[1]


def test_mistakes_in_a_source_are_named(tmp_path):
    for source, said in (
        (Source(name="nosuch", root=str(tmp_path)), "no reader for source 'nosuch'; there are readers for 300w-lp, af"),
        (Source(name="imagefolder"), r"ingest\.sources: 'imagefolder' needs root, the folder that holds the dataset"),
        (Source(name="imagefolder", root=str(tmp_path / "gone")), r"gone: no such folder \(root of source 'imagefold"),
    ):
        refuses(said, list, imported(source, load("laptop").ingest))
    for options, said in (
        ({"corp": "box"}, "source 'imagefolder' has no option 'corp'; it has crop"),
        ({"crop": "all"}, "option crop of source 'imagefolder' is one of none, box, not all"),
    ):
        refuses(said, options_of, Source(name="imagefolder", options=options))
    assert options_of(Source(name="imagefolder")) == {"crop": "none"}


def test_a_fingerprint_changes_with_the_files_and_only_with_them(tmp_path):
    source = Source(name="imagefolder", root=str(tmp_path))
    (tmp_path / "a").mkdir()
    (tmp_path / "a/1.jpg").write_bytes(b"1")
    fingerprints = [fingerprint(source)]
    assert fingerprint(source) == fingerprints[0]

    for change in (
        lambda: (tmp_path / "a/2.jpg").write_bytes(b"1"),
        lambda: (tmp_path / "a/2.jpg").write_bytes(b"12"),
        lambda: os.utime(tmp_path / "a/2.jpg", ns=(1, 1)),
        lambda: (tmp_path / "a/2.jpg").rename(tmp_path / "2.jpg"),
        lambda: (tmp_path / "2.jpg").rename(tmp_path / "3.jpg"),
    ):
        change()
        assert fingerprint(source) not in fingerprints
        fingerprints.append(fingerprint(source))
    (tmp_path / "3.jpg").unlink()
    assert fingerprint(source) == fingerprints[0]
    assert fingerprint(Source(name="render")) == ""


def test_a_mended_reader_and_no_other_changes_the_key_of_ingest(tmp_path, monkeypatch):
    settings = load("laptop", [f"ingest.sources=[{{name: imagefolder, root: {tmp_path}}}]"])
    mended, parsed = set(), digests._parsed
    monkeypatch.setattr(digests, "_parsed", lambda path: (f"mended {path.name in mended} {path}", parsed(path)[1]))

    def key(*names):
        mended.clear()
        mended.update(names)
        digests.of_code.cache_clear()
        return STEP.sections(settings), digests.of_code(STEP.module)

    before = key()
    assert key("imagefolder.py") != before
    assert key("labels.py") != before
    assert key("celeba.py") == before
    digests.of_code.cache_clear()
    assert set(importing.code_of([Source(name="render"), Source(name="fgnet")])) == {"fgnet"}


@pytest.fixture
def pictures(tmp_path):
    """A folder of 150 pictures, more than a row group, number 3 of which is number 7 again."""
    (tmp_path / "mine").mkdir()
    for number in range(150):
        noise = np.random.default_rng(7 if number == 3 else number).integers(0, 255, (8, 8, 3), dtype=np.uint8)
        image = Image.fromarray(noise).resize((32, 32), Image.Resampling.BICUBIC)
        image.save(tmp_path / f"mine/{number:03d}.png")
    (tmp_path / "mine/odd.txt").touch()
    return Source(name="imagefolder", root=str(tmp_path / "mine"))


def test_a_table_is_written_once_whatever_is_dropped_from_it(pictures, tmp_path, monkeypatch):
    tables, enter = [], TableWriter.__enter__
    monkeypatch.setattr(TableWriter, "__enter__", lambda table: tables.append(table.out) or enter(table))
    monkeypatch.setattr(Table, "iterate", None)  # no row is read back as Python values
    settings = load("laptop", [f"storage.home={tmp_path}/home", "ingest.workers=1"])
    manifest = import_source(settings, pictures, tmp_path / "faces")
    assert tables == [tmp_path / "faces"]
    monkeypatch.undo()
    assert (manifest["rows"], manifest["quarantined"]) == (149, 2)
    table = open_table(tmp_path / "faces", FACES)
    (_, dropped) = table.refused()
    assert (dropped["file"], dropped["row"]) in (("imagefolder/003", 3), ("imagefolder/007", 7))
    with TableWriter(tmp_path / "plain", FACES, about=manifest["about"]) as plain:
        plain.write(table.iterate())
        for refused in table.refused():
            plain.quarantine(**refused)
    assert plain.manifest["digest"] == manifest["digest"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["faces", "mine", "plain"]


def test_a_new_label_is_one_entry_of_one_list(tmp_path):
    """A copy of the package with one more `Label`: a reader's label of that name is in the table, and the annotators
    and the checks know of it."""
    shutil.copytree(digests.PACKAGE, tmp_path / "facemllm", ignore=shutil.ignore_patterns("__pycache__"))
    schemas = tmp_path / "facemllm/tables/schemas.py"
    entry = '    Label("age_range", pa.string()),\n'
    text = schemas.read_text()
    assert text.count(entry) == 1
    schemas.write_text(text.replace(entry, entry + '    Label("squint", pa.float32(), (0, 1)),\n'))
    (tmp_path / "mine").mkdir()
    for name, width in (("a", 80), ("b", 90)):
        (tmp_path / f"mine/{name}.png").write_bytes(encode(squares((width, 60))))
    (tmp_path / "mine/labels.csv").write_text("file,squint\na.png,0.5\nb.png,7\n")
    script = """
import sys
from pathlib import Path
from facemllm.annotate.annotator import Annotation, checked
from facemllm.ingest.run import import_source
from facemllm.reformat.questions import RARE
from facemllm.settings import load
from facemllm.settings.data import Source
from facemllm.tables import open_table
from facemllm.validate.memory import Originals
here = Path(sys.argv[1])
settings = load("laptop", [f"storage.home={here}/home", "ingest.workers=1"])
import_source(settings, Source(name="imagefolder", root=str(here / "mine")), here / "faces")
table = open_table(here / "faces")
(row,), (refused,) = table.iterate(), table.refused()
originals = Originals()
originals.add(row, None)
changed = originals.changed({**row, "squint": 0.25}, None)[1]
checked(Annotation(labels={"squint": 0.75}))
print(row["squint"], row["provenance"][0]["field"], refused["reason"], changed, "squint" in RARE, sep="|")
"""
    command = [sys.executable, "-P", "-c", script, str(tmp_path)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.stdout.strip() == "0.5|squint|column squint is 7, outside 0 to 1|['squint']|True", done.stderr


def linked(tmp_path, count=1):
    """A dataset whose files are links into a cache outside of it, as DVC and hubs make them."""
    cache, root = tmp_path / "cache/files", tmp_path / "root"
    cache.mkdir(parents=True)
    (root / "sub").mkdir(parents=True)
    (cache / "1f").write_bytes(encode(squares()))
    (cache / "2e").write_text("file,age\n" + "".join(f"sub/{n}.png,30\n" for n in range(count)))
    for n in range(count):
        (root / f"sub/{n}.png").symlink_to("../../cache/files/1f")
    (root / "labels.csv").symlink_to(cache / "2e")
    return root


def test_links_into_a_folder_that_is_allowed_are_read_by_every_process(tmp_path):
    source = Source(name="imagefolder", root=str(linked(tmp_path, count=70)))
    allowed = load("laptop", [f"ingest.links=[{tmp_path / 'cache'}]"]).ingest
    assert {row["age"] for row in imported(source, allowed, workers=2)} == {30}
    for links in ("[]", f"[{tmp_path / 'cach'}]"):
        said = r"labels.csv: a link that leads out of .* name .*/cache/files in ingest.links"
        refuses(said, list, imported(source, load("laptop", [f"ingest.links={links}"]).ingest))


def test_a_linked_folder_is_walked_where_it_is_allowed_and_only_once(tmp_path):
    root, cache = tmp_path / "root", tmp_path / "cache"
    (root / "own").mkdir(parents=True)
    cache.mkdir()
    for place, color in ((cache / "a.png", (255, 0, 0)), (root / "own/b.png", (0, 255, 0))):
        place.write_bytes(encode(squares(color=color)))
    for link, target in (
        (root / "far", cache),
        (root / "farther", cache),
        (root / "near", root / "own"),
        (cache / "up", cache),
    ):
        link.symlink_to(target)
    found = list(
        imported(Source(name="imagefolder", root=str(root)), load("laptop", [f"ingest.links=[{cache}]"]).ingest)
    )
    assert [row["source_id"] for row in found if not isinstance(row, Refused)] == ["far/a", "own/b"]
    read_there = "a link to a folder; what is there is read there"
    assert {row.file: row.reason for row in found if isinstance(row, Refused)} == dict.fromkeys(
        ("far/up", "farther", "near"), read_there
    )


def test_a_linked_file_that_changes_changes_the_fingerprint(tmp_path):
    source = Source(name="imagefolder", root=str(linked(tmp_path)))
    before = fingerprint(source)
    (tmp_path / "cache/files/1f").write_bytes(encode(squares()) + b"more")
    assert fingerprint(source) != before


def test_a_missing_picture_says_what_is_there_instead(run, tmp_path):
    (tmp_path / "One.JPG").write_bytes(encode(squares()))
    (tmp_path / "cached.png").symlink_to("gone")
    found = run([Face(source_id=name, image=tmp_path / name) for name in ("one.jpg", "two.jpg", "cached.png")])
    assert [row.reason for row in found] == [
        "the picture is missing; there is One.JPG: write the name as it is",
        "the picture is missing",
        "the picture is a link to a file that is not there",
    ]


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        ({"segmentation": np.zeros((30, 40), np.uint8)}, "its segmentation holds no part of a face"),
        ({"caption": " \u200b\ufeff "}, "caption is blank"),
        ({"alt_text": ""}, "alt_text is blank"),
        ({"attributes": {}}, "every label is unknown"),
        ({"attributes": {}, "action_units": {}, "age": None}, "every label is unknown"),
        ({"box": [100, 10, 120, 40]}, "the box lies outside the picture"),
    ],
    ids=["map", "caption", "alternative text", "attributes", "everything", "box"],
)
def test_labels_that_are_empty_are_refused(run, labels, reason):
    assert one(run, file="a.png", labels=labels) == Refused("a.png", 0, reason)


def test_a_crop_that_leaves_no_part_of_the_map_is_refused(run):
    mask = np.zeros((60, 80), np.uint8)
    mask[:, 60:] = 1
    row = one(run, labels={"segmentation": mask}, crop=(0, 0, 40, 40))
    assert row.reason == "its segmentation holds no part of a face"


def test_a_person_whose_name_is_written_in_two_unicode_forms_is_one(run):
    faces = [Face(file=n, source_id=n, image=encode(squares()), subject=n) for n in ("Jos\u00e9", "Jose\u0301")]
    first, second = run(faces)
    assert first["subject_id"] == second["subject_id"]
    assert first["split"] == second["split"]
