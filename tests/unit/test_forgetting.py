"""Forgetting: the picture is nowhere afterwards, what has nothing to do with it is untouched, the report says so."""

import base64
import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from facemllm import settings
from facemllm.asking.requests import Reply
from facemllm.asking.store import Replies
from facemllm.core import digests
from facemllm.core.store import Store
from facemllm.evaluate.compare import find
from facemllm.forgetting import erasing
from facemllm.forgetting import models as models_room
from facemllm.forgetting.copies import Copy, copies
from facemllm.forgetting.erasing import forget, render
from facemllm.ingest.run import import_source
from facemllm.promote import registry
from facemllm.promote.lineage import lineage
from facemllm.signing import local, manifest
from facemllm.tables import FACES, PREDICTIONS, TableWriter, open_table, subject_id
from facemllm.version import rewriting
from facemllm.version.archive import Archive, archive
from facemllm.version.record import has, log, record, render_log, restore
from facemllm.version.repository import Repository
from facemllm.version.tombstones import Marks, Tombstones, name_id
from tests.approved import Home, evaluation_of, make_model
from tests.refusing import refuses

ADA = {"reason": "she asked", "by": "Ada Lovelace"}


@pytest.fixture
def place(project):
    """Settings of a project of this test's own, with nobody answering for MLflow."""
    return settings.load("laptop", ["storage.home=home", "services.mlflow_port=1025", "ingest.ledger=null"])


def occurrences(folder: Path, needle: bytes) -> list[Path]:
    """Files that hold these bytes: plain, base64, or in any column of a Parquet file."""
    found = []
    for file in (path for path in folder.rglob("*") if path.is_file()):
        data = file.read_bytes()
        held = needle in data or base64.b64encode(needle) in data
        if not held and data[:4] == b"PAR1" and data[-4:] == b"PAR1":
            held = any(needle in cell for cell in cells(pq.read_table(file).to_pylist()))
        if held:
            found.append(file)
    return found


def cells(value):
    if isinstance(value, bytes):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from cells(part)


@pytest.fixture
def version(place, faces_table, conversations_table, face_rows, conversation_rows):
    """`version(choose, name)`: records the rows that are chosen; gives the revision and both folders."""

    def make(choose=lambda rows: rows, name="a", **options):
        rows = choose(face_rows())
        faces = faces_table(rows, f"faces-{name}", **options)
        parents = [open_table(faces).digest]
        conversations = conversations_table(conversation_rows(rows), f"conversations-{name}", parents=parents)
        return record(place, faces, conversations), faces, conversations

    return make


def trees(folder: Path) -> list[str]:
    return [digests.of_tree(folder / name) for name in ("faces", "conversations")]


def ids(table: Path) -> list[str]:
    return [row["image_id"] for row in open_table(table).iterate(["image_id"])]


def test_revisions_are_rewritten_and_others_are_left_to_the_bit(place, version, face_rows, tmp_path):
    target = face_rows()[3]
    one, _, _ = version(name="one")
    two, *others = version(lambda rows: [row for row in rows if row["source_id"] != "0003"], "two")
    three, _, _ = version(lambda rows: rows[:20], "three")
    restore(place, two.sha, tmp_path / "before")
    assert occurrences(tmp_path, target["image"]["bytes"]), "the search must find what is there"
    report = forget(place, image=target["image_id"], **ADA)

    assert [entry["revision"] for entry in report["revisions"]] == [one.sha, three.sha]
    assert [report["revisions"][0][key] for key in ("rows", "shards")] == [{"faces": 1, "conversations": 1}] * 2
    assert (report["found"], report["finished"]) == (0, True)
    assert occurrences(place.home, target["image"]["bytes"]) == []
    for old, count in ((one, 39), (three, 19)):
        successor = next(entry["successor"] for entry in report["revisions"] if entry["revision"] == old.sha)
        said = rf"{old.sha[:12]} held rows .* restore {successor[:12]}, which replaces it"
        refuses(said, restore, place, old.sha, tmp_path / "old")
        assert (has(place, successor), has(place, old.sha)) == (True, False)
        restore(place, successor, tmp_path / successor)
        assert len(ids(tmp_path / successor / "faces")) == count
        assert target["image_id"] not in ids(tmp_path / successor / "faces")
        assert target["image_id"] not in ids(tmp_path / successor / "conversations")
        parent = open_table(tmp_path / successor / "conversations").manifest["parents"]
        assert parent == [open_table(tmp_path / successor / "faces").digest]
    restore(place, two.sha, tmp_path / "after")
    assert trees(tmp_path / "after") == trees(tmp_path / "before")
    assert trees(tmp_path / "after") == [digests.of_tree(table) for table in others]
    entries = {entry["sha"]: entry for entry in log(place)}
    assert entries[two.sha]["replaced_by"] is None
    assert entries[entries[one.sha]["replaced_by"]]["replaces"] == [one.sha]
    assert f"replaced by {entries[one.sha]['replaced_by'][:12]}" in render_log(log(place))


def test_shards_without_the_row_keep_their_bytes(place, faces_table, conversations_table, face_rows, tmp_path):
    rows = [row | {"source_id": f"{part}-{row['source_id']}"} for part in range(8) for row in face_rows()]
    for number, row in enumerate(rows):
        row["image_id"] = digests.of_bytes(b"%d" % number)
    faces, conversations = faces_table(rows, shard_mb=0), conversations_table()
    before = open_table(faces).manifest["shards"]
    assert len(before) == 3
    one = record(place, faces, conversations)
    report = forget(place, image=rows[200]["image_id"], **ADA)
    assert report["revisions"][0]["shards"] == {"faces": 1, "conversations": 0}
    restore(place, report["revisions"][0]["successor"], tmp_path / "back")
    after = open_table(tmp_path / "back" / "faces").manifest
    assert [new == old for new, old in zip(after["shards"], before, strict=True)] == [True, False, True]
    assert after["about"]["rewritten_from"] == one.faces
    assert ids(tmp_path / "back" / "faces") == [row["image_id"] for row in rows if row is not rows[200]]
    assert digests.of_tree(tmp_path / "back" / "conversations") == digests.of_tree(conversations)


@pytest.mark.parametrize("named", ["id", "name"])
def test_a_person_is_forgotten_with_all_pictures(place, version, face_rows, tmp_path, named):
    person = subject_id("render", "4")
    version()
    report = forget(place, subject=person if named == "id" else "render:4", **ADA)
    gone = [row for row in face_rows() if row["subject_id"] == person]
    keys = report["keys"]
    assert (keys["subject"], keys["image"]) == ([person], sorted(row["image_id"] for row in gone))
    assert report["revisions"][0]["rows"] == {"faces": 2, "conversations": 2}
    for row in gone:
        assert occurrences(place.home, row["image"]["bytes"]) == []
        anonymous = {"image_id": "0" * 64, "source": "render", "source_id": row["source_id"], "subject_id": None}
        assert Tombstones.of(place).covers(anonymous), "not even under another digest and without its subject"


def test_the_same_picture_in_another_size_goes_and_its_neighbour_stays(place, version, face_rows):
    def originals(rows):
        for row in rows[:2]:
            row["original_id"] = "a" * 64  # two faces of one photograph
        rows[4]["original_id"] = "b" * 64
        return rows

    def smaller(rows):
        rows = originals(rows)
        rows[0]["image_id"], rows[4]["image_id"] = "c" * 64, "d" * 64
        rows[4]["source_id"] = "renamed"
        return rows

    version(originals)
    version(smaller, "b")
    rows = face_rows()
    report = forget(place, image=rows[0]["image_id"], **ADA)
    assert report["keys"]["image"] == sorted([rows[0]["image_id"], "c" * 64]), "found by its name"
    assert "original" not in report["keys"], "it would catch the other face of the photograph"
    assert [entry["rows"]["faces"] for entry in report["revisions"]] == [1, 1]
    report = forget(place, image=rows[4]["image_id"], **ADA)
    assert report["keys"]["image"] == sorted([rows[4]["image_id"], "d" * 64]), "found by its original"
    assert set(report["keys"]["name"]) == {name_id("render", "0004"), name_id("render", "renamed")}


def test_unclear_requests_are_refused_and_change_nothing_and_what_is_not_here_is_kept_out(place, version):
    def alike(rows):
        rows[0]["image_id"], rows[1]["image_id"] = "ab" * 4 + "0" * 56, "ab" * 4 + "1" * 56
        return rows

    revision, _, _ = version(alike)
    for named, message in (
        ({}, "name what to forget"),
        ({"image": "a" * 64, "subject": "x:y"}, "name what to forget"),
        ({"image": "abcdef"}, "at least 8"),
        ({"image": "Ada"}, "give an image_id"),
        ({"image": "0" * 8}, "no picture here begins so"),
        ({"image": "ab" * 4}, "several pictures begin so"),
        ({"subject": "Ada"}, "SOURCE:NAME"),
        ({"subject": "nowhere:1"}, "not in the dataset ledger"),
        ({"subject": "render:1", "by": " "}, "nobody is named"),
        ({"subject": "render:1", "reason": " "}, "needs a reason"),
    ):
        refuses(message, forget, place, **{**ADA, **named})
        assert (Tombstones.of(place).entries, has(place, revision.sha)) == ((), True), message
    report = forget(place, image="ab" * 4 + "0", **ADA)
    assert report["keys"]["image"] == ["ab" * 4 + "0" * 56]
    report = forget(place, image="e" * 64, **ADA)
    assert (report["revisions"], report["found"]) == ([], 0)
    assert "nothing of it was found here" in render(report)
    assert Tombstones.of(place).covers({"image_id": "e" * 64})


def stored_workflow(place, version, face_rows) -> dict[str, str]:
    """A home as a run leaves it: tables, two models, an evaluation, its reports, caches, replies, unfinished work."""
    _, faces, conversations = version(about={"sources": ["render"]})
    store = Store(place.home)

    def keep(step, folder, digest, inputs, **facts):
        facts = {"step": step, "inputs": inputs, "output": digest, "figure": "", "seconds": 1.0, **facts}
        store.keep(digests.of_bytes(step.encode()), folder, digest, facts)
        return digest

    shown = face_rows()[10]
    other = next(row for row in face_rows() if row["split"] == "test")
    named = {"faces": open_table(faces).digest, "conversations": open_table(conversations).digest}
    shutil.copytree(faces, place.home.parent / "data" / "faces")
    shutil.copytree(faces, place.home.parent / "data" / ".faces.1.partial")
    cut = place.home.parent / "data" / ".faces.1.partial" / "part-00000.parquet"
    (cut.parent / "manifest.json").unlink()
    os.truncate(cut, cut.stat().st_size - 9)
    cached = place.home.parent / ".dvc" / "cache" / "files" / "md5" / "ab"
    cached.mkdir(parents=True)
    shutil.copyfile(faces / "part-00000.parquet", cached / "cd")
    (cached / "free").write_text("no picture")
    keep("annotate", faces, named["faces"], {"faces": "0" * 64})
    keep("reformat", conversations, named["conversations"], {"annotated": named["faces"]})
    for stage, base in (("align", {}), ("instruct", {"model": "align"})):
        folder = place.home.parent / stage
        folder.mkdir()
        inputs = {"conversations": named["conversations"], **{key: named[value] for key, value in base.items()}}
        (folder / "lineage.json").write_text(json.dumps({"stage": stage, "inputs": inputs}))
        (folder / "model.safetensors").write_bytes(b"weights")
        named[stage] = keep(stage, folder, digests.of_tree(folder), inputs)
    folder = place.home.parent / "evaluation"
    with TableWriter(folder / "predictions", PREDICTIONS) as table:
        table.write(dict.fromkeys(("sample_id", "image_id"), r["image_id"]) | {"task": "age"} for r in (shown, other))
    (folder / "samples").mkdir()
    (folder / "samples" / "00.jpg").write_bytes(shown["image"]["bytes"])
    (folder / "samples" / "samples.json").write_text(json.dumps([{"image": "00.jpg", "image_id": shown["image_id"]}]))
    inputs = {"model": named["instruct"], "conversations": named["conversations"]}
    named["evaluation"] = keep("evaluate", folder, digests.of_tree(folder), inputs)
    folder = place.home.parent / "registered"
    folder.mkdir()
    (folder / "registered.json").write_text("{}")
    facts = {"model_digest": named["instruct"], "name": "face-mllm", "version": 4}
    keep("register", folder, digests.of_tree(folder), {"model": named["instruct"]}, **facts)
    page = '<img alt="face {}" src="data:image/jpeg;base64,{}">'
    reports = {"shows": shown, "other": other}
    for name, row in reports.items():
        folder = place.runs / name
        folder.mkdir(parents=True)
        encoded = base64.b64encode(row["image"]["bytes"]).decode()
        (folder / "report.html").write_text(page.format(row["image_id"][:12], encoded))
        (folder / "face.jpg").write_bytes(row["image"]["bytes"])
        (folder / "summary.json").write_text("{}")
        artifacts = place.home / "mlflow" / "artifacts" / "1" / name / "artifacts"
        shutil.copytree(folder, artifacts, ignore=shutil.ignore_patterns("face.jpg"))
        (artifacts / "answers.json").write_text(json.dumps({"image_id": [row["image_id"]]}))
    (place.home / "cache" / "kfp").mkdir(parents=True)
    np.save(place.home / "cache" / f"pixels-{named['conversations'][:24]}-00000000.npy", np.zeros(3))
    np.save(place.home / "cache" / f"pixels-{'9' * 24}-00000000.npy", np.frombuffer(shown["image"]["bytes"], np.uint8))
    (place.home / "work" / "one").mkdir(parents=True)
    (place.home / "work" / "one" / "half.parquet").write_bytes(b"PAR1" + shown["image"]["bytes"])
    kept = place.home / "work" / "two" / "align-0123456789abcdef" / "checkpoint_1"
    kept.mkdir(parents=True)
    (kept / "model.pt").write_bytes(b"weights")
    for row in (shown, other):
        facts = {"key": "k" * 64, "model": "m", "prompt_hash": "p", "text": "a face"}
        Replies(place.home).write(Reply(image_id=row["image_id"], **facts))
    return named


def test_every_copy_goes_and_models_are_named(place, version, face_rows):
    named = stored_workflow(place, version, face_rows)
    shown = face_rows()[10]
    spared = next(row for row in face_rows() if row["split"] == "test")
    project = place.home.parent
    assert len(occurrences(project, shown["image"]["bytes"])) > 10
    before = digests.of_tree(place.home / "store" / named["instruct"])
    (place.home / "services").mkdir()
    served = {"model": "x", "digest": named["instruct"], "version": "4"}
    (place.home / "services" / "production.model").write_text(json.dumps(served))

    report = forget(place, image=shown["image_id"][:12], **ADA)
    assert occurrences(project, shown["image"]["bytes"]) == []
    text = subprocess.run(["grep", "-rl", shown["image_id"], project], capture_output=True, text=True).stdout
    assert {Path(line).parent.name for line in text.splitlines()} <= {"forgotten"}, "but for the report itself"
    places = {"cache", "data", "dvc cache", "mlflow", "run", "store", "work"}
    assert {copy["place"] for copy in report["removed"]} == places
    assert report["replies"] == 1
    stages = ("align", "instruct")
    assert report["models"] == [{"digest": named[stage], "stage": stage, "saw": "training"} for stage in stages]
    expected = {"name": "face-mllm", "version": 4, "digest": named["instruct"], "saw": "training"}
    expected |= {"decision": "unknown", "by": None, "at": None, "aliases": [], "serves": ["production"]}
    assert report["versions"] == [expected]
    assert digests.of_tree(place.home / "store" / named["instruct"]) == before, "models are never deleted"
    for path in (
        *(place.runs / name for name in ("other/report.html", "other/face.jpg", "shows/summary.json")),
        place.home / "mlflow/artifacts/1/other/artifacts/answers.json",
        place.home / "work/two/align-0123456789abcdef/checkpoint_1/model.pt",
        project / ".dvc/cache/files/md5/ab/free",
    ):
        assert path.exists(), path
    assert Replies(place.home).read(spared["image_id"], "k" * 64) is not None
    assert not (place.home / "store" / named["faces"]).exists()
    refuses("it was deleted 20.* to forget a picture; run the pipeline", Store(place.home).path, named["evaluation"])
    chain = lineage(place, named["instruct"]).nodes
    kept = {named["align"], named["conversations"], named["faces"], "source:render"}
    assert kept <= set(chain), "the chain outlives the pictures"
    expected = f"deleted {report['at'][:10]} to forget a picture: she asked (report {report['id']})"
    assert expected in chain[named["faces"]].text
    down = lineage(place, shown["image_id"]).nodes
    assert {named["faces"], named["conversations"], named["align"], "face-mllm/4"} <= set(down)
    assert expected in down[f"image:{shown['image_id']}"].text
    assert chain["face-mllm/4"].facts["serves"] == ["production"]
    summary = {"steps": [{"name": "evaluate", "digest": named["evaluation"]}]}
    (place.runs / "shows" / "summary.json").write_text(json.dumps(summary))
    refuses("to forget a picture; run the pipeline again", find, place, "shows", str)
    for said in ("face-mllm version 4", "trained on it, unknown, serves in production", "MLflow is away"):
        assert said in render(report)
    assert render(report).endswith("found 0")
    assert json.loads((place.home / "forgotten" / f"{report['id']}.json").read_text()) == report
    again = forget(place, image=shown["image_id"], reason="again", by="Charles Babbage")
    assert again == report, "nothing is left to do, and the first entry stands"
    assert len(Tombstones.of(place).entries) == 1


def test_a_picture_of_the_test_split_taught_nobody(place, version, face_rows):
    named = stored_workflow(place, version, face_rows)
    report = forget(place, image=next(row for row in face_rows() if row["split"] == "test")["image_id"], **ADA)
    assert report["models"] == [{"digest": named["instruct"], "stage": "instruct", "saw": "evaluation"}]
    assert "which still contain what they have learnt: 0" in render(report)
    assert "measured on it only" in render(report)


def test_decisions_come_from_signed_statements(place, monkeypatch, tmp_path):
    home = Home(place)
    local.policy(place)
    home.person("Ada", "requester", "approver")
    model = make_model(tmp_path / "decided")
    digest = manifest.of(model).digest
    home.approve(model, 2)
    common = {"name": "face-mllm", "gate": "passed", "source": "", "run_id": "", "created": "", "description": ""}
    behind = {"facemllm.lineage": json.dumps({"reformat": "c" * 64})}
    forged = {"facemllm.approval": "approved by Ada", **behind}
    versions = [
        registry.Version(version=3, digest="f" * 64, evaluation="e" * 64, tags=forged, **common),
        registry.Version(version=2, digest=digest, evaluation=evaluation_of(2), aliases=("champion",), **common),
        registry.Version(version=1, digest="b" * 64, evaluation="e" * 64, **common),
    ]
    monkeypatch.setattr(registry, "versions", lambda settings: versions)
    affected = [{"digest": digest, "stage": "specialize", "saw": "training"}]
    registered = models_room.registered(place, affected, {"c" * 64: {"train"}})
    assert registered["asked"]
    found = [(v["version"], v["decision"], v["by"], v["aliases"]) for v in registered["versions"]]
    assert found == [(2, "approved", "Ada", ["champion"]), (3, "pending", None, [])]


CUT = {"after signing": (erasing, "rewrite"), "first copy": (Copy, "remove"), "replies": (erasing, "_purge_replies")}
CUT |= {"before noting": (Tombstones, "replace"), "half of the objects": (Archive, "delete")}


@pytest.mark.parametrize(("where", "name"), CUT.values(), ids=CUT)
def test_a_call_cut_short_is_finished_by_the_next(place, version, face_rows, monkeypatch, where, name):
    stored_workflow(place, version, face_rows)
    target, original, calls = face_rows()[10], getattr(where, name), []

    def die(*args, **kwargs):
        calls.append(name)
        if where is Archive and len(calls) < 3:
            return original(*args, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(where, name, die)
        refuses(None, forget, place, image=target["image_id"], **ADA, error=KeyboardInterrupt)
    left = json.loads(next((place.home / "forgotten").glob("*.json")).read_text())
    assert not left["finished"]
    assert Tombstones.of(place).covers(target), "what is signed is obeyed at once"
    report = forget(place, image=target["image_id"], **ADA)
    assert len(Tombstones.of(place).entries) == 1
    assert occurrences(place.home.parent, target["image"]["bytes"]) == []
    assert (report["finished"], report["found"], len(report["revisions"])) == (True, 0, 1)
    assert len(report["tables"]) == 3, "faces, conversations, predictions: what the first call saw is not lost"
    assert [model["stage"] for model in report["models"]] == ["align", "instruct"]
    assert has(place, report["revisions"][0]["successor"])


def test_strays_of_an_interrupted_recording_go_and_foreign_objects_stay(place, version, face_rows, monkeypatch):
    target = face_rows()[3]
    first, *_ = version(lambda rows: rows[10:])
    with monkeypatch.context() as patch:
        patch.setattr(Repository, "commit", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        refuses(None, version, name="b", error=KeyboardInterrupt)
    stray = occurrences(place.home, target["image"]["bytes"])
    assert {path.relative_to(place.home).parts[0] for path in stray} >= {"data-repo", "dvc-remote"}
    foreign = place.home / "dvc-remote" / "files" / "md5" / "ab" / ("c" * 30)
    foreign.parent.mkdir(parents=True, exist_ok=True)
    foreign.write_text("of another repository")
    report = forget(place, image=target["image_id"], **ADA)
    assert (report["revisions"], report["objects"]["objects"] > 0) == ([], True)
    assert occurrences(place.home, target["image"]["bytes"]) == []
    assert foreign.read_text() == "of another repository"
    assert has(place, first.sha)


def test_a_revision_whose_bytes_are_half_lost_has_no_successor(place, version, face_rows, tmp_path):
    one, *_ = version()
    target = face_rows()[3]
    with archive(Repository.of(place)) as objects:
        objects.delete(objects.files(one.sha, "conversations")["part-00000.parquet"])
    report = forget(place, image=target["image_id"], **ADA)
    assert report["revisions"][0]["successor"] == ""
    assert occurrences(place.home, target["image"]["bytes"]) == []
    refuses("is gone; nothing replaces it", restore, place, one.sha, tmp_path / "back")
    assert "some of its bytes were lost before" in render(report)


def test_a_second_forgetting_follows_the_first(place, version, face_rows, tmp_path):
    one, _, _ = version()
    rows = face_rows()
    first = forget(place, image=rows[3]["image_id"], **ADA)
    second = forget(place, image=rows[20]["image_id"], **ADA)
    middle, last = (report["revisions"][0]["successor"] for report in (first, second))
    assert second["revisions"][0]["revision"] == middle
    refuses(f"restore {last[:12]}", restore, place, one.sha, tmp_path / "back")
    restore(place, last, tmp_path / "last")
    assert len(ids(tmp_path / "last" / "faces")) == 38


def test_something_left_is_an_error_and_not_a_success(place, version, face_rows, monkeypatch):
    version()
    monkeypatch.setattr(erasing, "purge", lambda settings: {"objects": 0, "copies": 0})
    said = r"places still hold what was to be forgotten \(data-repo: object"
    refuses(said, forget, place, image=face_rows()[3]["image_id"], **ADA)
    report = json.loads(next((place.home / "forgotten").glob("*.json")).read_text())
    assert (report["finished"], report["found"] > 0) == (False, True)


def test_searching_reads_no_pictures(place, version, face_rows, monkeypatch):
    version()
    read, real = [], pq.ParquetFile.iter_batches

    def spy(self, *args, **options):
        read.append(set(options["columns"]))
        return real(self, *args, **options)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", spy)
    found = rewriting.held(place, Marks(image=frozenset({face_rows()[0]["image_id"]})))
    assert [len(rows) for rows in found[0].rows.values()] == [1, 1]
    assert read
    assert set().union(*read) <= {"image_id", "original_id", "source", "source_id", "subject_id", "split"}


def test_quarantine_notes_about_the_picture_go_with_it(place, conversations_table, face_rows, tmp_path):
    rows = face_rows()
    with TableWriter(tmp_path / "noted", FACES) as table:
        table.write(rows)
        table.quarantine("pictures/0003.jpg", 4, "twice")
        table.quarantine("pictures/0031.jpg", 9, f"the same as {rows[3]['image_id']}")
        table.quarantine("pictures/0009.jpg", 0, "damaged")
    record(place, tmp_path / "noted", conversations_table())
    report = forget(place, image=rows[3]["image_id"], **ADA)
    restore(place, report["revisions"][0]["successor"], tmp_path / "back")
    table = open_table(tmp_path / "back" / "faces")
    assert table.manifest["quarantined"] == 1
    assert pq.read_table(table.path / "quarantine.parquet").to_pylist()[0]["reason"] == "damaged"


@pytest.mark.parametrize("ended", [True, False])
def test_rows_that_a_killed_import_put_aside_go(place, face_rows, ended):
    rows, out = face_rows(130), place.home.parent / "data" / "faces"
    table = TableWriter(out, FACES).__enter__()  # never left: what a killed process does
    for row in rows:
        table.defer(row)
    if ended:
        next(table.deferred())
    found = copies(place, Marks(image=frozenset({rows[0]["image_id"]})))
    assert [copy.path for copy in found] == list(out.parent.iterdir())
    assert (found[0].path / "aside.parquet").is_file()


def test_a_smaller_copy_does_not_come_back_when_the_original_is_gone(place, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, seed in (("one", 1), ("two", 2), ("three", 3)):
        noise = np.random.default_rng(seed).integers(0, 255, (12, 12, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((120, 120), Image.Resampling.BICUBIC).save(folder / f"{name}.png")
    source = settings.data.Source(name="imagefolder", root=str(folder))
    kept = place.home / "store" / "faces"
    manifest = import_source(place, source, kept)
    kept.rename(place.home / "store" / manifest["digest"])
    row = next(r for r in open_table(place.home / "store" / manifest["digest"]).iterate() if r["source_id"] == "one")
    forget(place, image=row["image_id"], **ADA)
    Image.open(folder / "one.png").resize((90, 90)).save(folder / "copy.jpg", quality=80)
    (folder / "one.png").unlink()
    again = import_source(place, source, tmp_path / "again")
    assert (again["rows"], again["quarantined"]) == (2, 1)
    assert [refused["reason"] for refused in open_table(tmp_path / "again").refused()] == ["forgotten"]
    Image.fromarray(np.full((60, 60, 3), 9, np.uint8)).save(folder / "one.png")  # another picture under its old name
    assert import_source(place, source, tmp_path / "third")["rows"] == 3
