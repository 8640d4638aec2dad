"""Corrections that users send: stored whole and bounded, read as labels with consent alone, and forgotten."""

import json
import multiprocessing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from facemllm import settings as settings_room
from facemllm import tasks
from facemllm.core import digests
from facemllm.core.corrections import LINES, PICTURES, Correction, Corrections, Full, TooOften, read
from facemllm.forgetting.erasing import forget
from facemllm.ingest.readers.feedback import labels_of
from facemllm.ingest.run import import_source
from facemllm.settings import Settings
from facemllm.settings.data import Source
from facemllm.tables import mapping, open_table
from tests.conftest import picture
from tests.refusing import refuses


def said(image: str, task: str | None, item: str | None, label: str | None, **more: Any) -> Correction:
    fields = {"question": None, "answer": "no", "correction": label or "so", "consent": True, "consent_text": "1"}
    fields |= {"picture": True, "model": "cd" * 32, "time": "2026-11-29T12:00:00+00:00", **more}
    return Correction(image=image, task=task, item=item, label=label, **fields)


@pytest.fixture
def store(tmp_path: Path) -> Corrections:
    return Corrections(tmp_path / "corrections", max_bytes=10**6, per_minute=100)


def put(store: Corrections, seed: int, *labels: tuple[str, str, str], **more: Any) -> str:
    """Add corrections (task, item, label) of a picture; its digest."""
    data = picture(seed)
    image = digests.of_bytes(data)
    for task, item, label in labels:
        one = said(image, task, item, label, **more)
        store.add(one, data if one.picture else None, "a client")
    return image


def test_a_correction_is_stored_with_its_picture_for_its_owner_alone(store: Corrections) -> None:
    image = put(store, 1, ("age", "age", "34"), ("age", "age", "35"))
    kept = store.folder / PICTURES / image
    assert kept.read_bytes() == picture(1)
    assert kept.stat().st_mode & 0o077 == (store.folder / LINES).stat().st_mode & 0o077 == 0
    assert [(number, one.label) for number, one in read(store.folder) if isinstance(one, Correction)] == [
        (1, "34"),
        (2, "35"),
    ]
    with pytest.raises(ValueError, match="with consent"):
        store.add(said(image, "age", "age", "34", consent=False), picture(1), "a client")


def test_one_client_and_all_of_them_are_slowed_down_and_the_folder_is_bounded(tmp_path: Path) -> None:
    now = [0.0]
    store = Corrections(tmp_path, max_bytes=10**6, per_minute=2, clock=lambda: now[0])
    one = said("ab" * 32, "age", "age", "34", picture=False)
    store.add(one, None, "a")
    now[0] = 20
    store.add(one, None, "a")
    with pytest.raises(TooOften) as refused:
        store.add(one, None, "a")
    assert refused.value.retry_after == 40
    for n in range(18):
        store.add(one, None, f"client {n}")
    with pytest.raises(TooOften):
        store.add(one, None, "yet another")
    now[0] = 61
    store.add(one, None, "a")
    size = sum(file.stat().st_size for file in tmp_path.iterdir())
    full = Corrections(tmp_path, max_bytes=size + 100, per_minute=100)
    with pytest.raises(Full):
        full.add(one, None, "a")
    with pytest.raises(Full):
        Corrections(tmp_path, 10**9, 9).add(replace(one, question="?" * 20_000), None, "a")
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) == size


def test_a_client_does_not_fill_the_folder_alone(tmp_path: Path) -> None:
    store = Corrections(tmp_path, max_bytes=10**5, per_minute=100)
    one = said("ab" * 32, "age", "age", "34", picture=False, answer="x" * 1500)

    def fill() -> None:
        for _ in range(20):
            store.add(one, None, "a")

    with pytest.raises(Full, match="of one client"):
        fill()
    assert 8_000 < (tmp_path / LINES).stat().st_size <= 10**4
    store.add(one, None, "b")


def test_a_line_that_was_cut_short_costs_that_line_alone(store: Corrections) -> None:
    image = put(store, 1, ("age", "age", "34"))
    with (store.folder / LINES).open("a") as file:
        file.write('{"image": "' + "b" * 20)
    put(store, 1, ("gender", "gender", "female"))
    with (store.folder / LINES).open("a") as file:
        file.write(json.dumps({**vars(said(image, None, None, None)), "consent": "yes"}) + "\n[]\n")
    found = [one if isinstance(one, str) else one.label for _, one in read(store.folder)]
    short, kind = "no correction, or one that was cut short", "a value of another kind than the server writes"
    assert found == ["34", short, "female", kind, short]


def _many(folder: Path, who: int) -> None:
    store = Corrections(folder, max_bytes=10**7, per_minute=1000)
    for n in range(30):
        store.add(said(f"{who:02}" * 32, "age", "age", str(n), picture=False), None, "a")


def test_several_processes_write_and_one_forgets(tmp_path: Path) -> None:
    spawned = multiprocessing.get_context("fork")
    workers = [spawned.Process(target=_many, args=(tmp_path, who)) for who in (1, 2)]
    for worker in workers:
        worker.start()
    put(store := Corrections(tmp_path, 10**7, 1000), 5, ("age", "age", "34"))
    gone = digests.of_bytes(picture(5))
    assert store.forget({gone}) == 2
    for worker in workers:
        worker.join()
    found = [one.label for _, one in read(tmp_path) if isinstance(one, Correction)]
    assert sorted(found) == sorted([str(n) for n in range(30)] * 2)
    assert not store.holds({gone})


@pytest.mark.parametrize(
    ("task", "item", "value", "labels"),
    [
        ("age", "age", "34", {("age", ""): 34.0}),
        ("expression", "expression", "fear", {("expression", ""): "fear"}),
        ("gender", "gender", "female", {("gender", ""): "female"}),
        ("age_range", "age_range", "20-29", {("age_range", ""): "20-29"}),
        ("head_pose", "yaw", "-12.5", {("yaw", ""): -12.5}),
        ("attributes", "Wearing_Hat", "no", {("attributes", "Wearing_Hat"): False}),
        ("presence", "Eyeglasses", "yes", {("attributes", "Eyeglasses"): True}),
        ("action_units", "AU12", "yes", {("action_units", "AU12"): 1.0}),
        ("parsing", "ear_hidden", "yes", {}),
        ("caption", "caption", "a man", {}),
        ("age", "age", "999", {}),
        ("expression", "expression", "contempt", {}),
    ],
)
def test_a_correction_becomes_the_label_that_makes_it_true(
    task: str, item: str, value: str, labels: dict[Any, Any]
) -> None:
    assert labels_of(tasks.get(task).item(item), value) == labels


def test_every_colour_of_hair_but_one_is_denied() -> None:
    found = labels_of(tasks.get("attributes").item("hair_color"), "Red_Hair")
    assert found.pop(("attributes", "Red_Hair")) is True
    assert len(found) > 3
    assert not any(found.values())


def taken(store: Corrections, out: Path, own: Settings, **options: str) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows that an import gives, and the reasons for which others were refused."""
    import_source(own, Source(name="feedback", root=str(store.folder), options=options), out)
    table = open_table(out)
    return list(table.iterate()), [row["reason"] for row in table.refused()]


@pytest.fixture
def own(project: Path, tmp_path: Path) -> Settings:
    overrides = ["storage.home=home", "services.mlflow_port=1025", "ingest.ledger=null"]
    return settings_room.load("laptop", [*overrides, f"serve.feedback.folder={tmp_path / 'corrections'}"])


def test_the_corrections_of_a_picture_become_a_row_of_faces(store: Corrections, own: Settings, tmp_path: Path) -> None:
    image = put(
        store, 1, ("age", "age", "34"), ("attributes", "Wearing_Hat", "yes"), ("expression", "expression", "fear")
    )
    put(store, 1, ("age", "age", "34"), ("expression", "expression", "anger"))
    put(store, 2, ("age", "age", "20"), ("age", "age", "60"))
    put(store, 3, ("age", "age", "20"), consent=False, consent_text=None, picture=False)
    put(store, 4, ("gone", "gone", "20"), ("parsing", "ear_hidden", "yes"))
    rows, refused = taken(store, tmp_path / "faces", own)
    (row,) = rows
    assert (row["source"], row["source_id"], row["original_id"], row["split"]) == ("feedback", image, image, "train")
    assert (row["age"], mapping(row["attributes"]), row["expression"]) == (34.0, {"Wearing_Hat": True}, None)
    assert refused == [
        "no consent was given",
        "a question that is no task's",
        "no label of a face answers parsing.ear_hidden",
        "the corrections of this picture contradict one another",
    ]
    about = open_table(tmp_path / "faces").manifest["about"]
    assert about["sources"] == ["feedback"]
    assert about["uses"] == ["train", "evaluate", "serve"], "not sent to third parties"


def test_consent_to_another_text_does_not_count_and_no_file_is_said(
    store: Corrections, own: Settings, tmp_path: Path
) -> None:
    put(store, 1, ("age", "age", "34"))
    put(store, 2, ("age", "age", "34"), consent_text="2")
    rows, refused = taken(store, tmp_path / "faces", own, consent="2")
    assert [row["source_id"] for row in rows] == [digests.of_bytes(picture(2))]
    assert refused == ["consent was given to text 1, not to 2"]
    (store.folder / LINES).unlink()
    refuses("corrections.jsonl: not there", taken, store, tmp_path / "none", own)


def test_forgetting_takes_corrections_picture_and_answers_and_leaves_the_others(
    store: Corrections, own: Settings, project: Path
) -> None:
    image, other = put(store, 1, ("age", "age", "34")), put(store, 2, ("age", "age", "20"))
    own.answers.mkdir(parents=True)
    for name, digest in (("answers-2026-11-28.jsonl", other), ("answers-2026-11-29.jsonl", image)):
        (own.answers / name).write_text(json.dumps({"image": digest}) + "\n")
    source = Source(name="feedback", root=str(store.folder))
    made = own.home / "store" / "faces"
    manifest = import_source(own, source, made)
    made.rename(made.with_name(manifest["digest"]))
    report = forget(own, image=image, reason="withdrawn", by="Ada Lovelace")
    assert {one["place"] for one in report["removed"]} == {"store", "corrections", "answers"}
    assert report["found"] == 0
    assert [one.image for _, one in read(store.folder) if isinstance(one, Correction)] == [other]
    assert [file.name for file in (store.folder / PICTURES).iterdir()] == [other]
    assert [file.name for file in own.answers.iterdir()] == ["answers-2026-11-28.jsonl"]
    left = [file for file in project.rglob("*") if file.is_file() and picture(1) in file.read_bytes()]
    assert left == []
    put(store, 1, ("age", "age", "34"))
    again = import_source(own, source, project / "again")
    assert (again["rows"], again["quarantined"]) == (1, 1), "what comes back is kept out of every table"


def test_a_picture_that_was_never_imported_is_forgotten_by_its_whole_digest(
    store: Corrections, own: Settings, project: Path
) -> None:
    image = put(store, 1, ("age", "age", "34"))
    forget(own, image=image, reason="withdrawn", by="Ada Lovelace")
    assert not store.holds({image})
    assert not (store.folder / PICTURES / image).exists()


def test_a_folder_within_the_projects_data_keeps_the_corrections_of_others(project: Path) -> None:
    store = Corrections(project / "data" / "corrections", max_bytes=10**6, per_minute=100)
    image, other = put(store, 1, ("age", "age", "34")), put(store, 2, ("age", "age", "20"))
    given = settings_room.load(
        "laptop", ["storage.home=home", "services.mlflow_port=1025", "serve.feedback.folder=data/corrections"]
    )
    forget(given, image=image, reason="withdrawn", by="Ada Lovelace")
    assert [one.image for _, one in read(store.folder) if isinstance(one, Correction)] == [other]


@pytest.mark.parametrize("given", ["{answers: true, days: 0}", "{answers: false, days: 3}"])
def test_a_retention_without_days_is_refused(given: str) -> None:
    refuses("give answers: true with days", settings_room.load, "laptop", [f"serve.retention={given}"])
