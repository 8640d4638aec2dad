"""The list of what was forgotten: who may write it, what it covers, and that nobody takes an entry away unseen."""

import json
import subprocess

import pyarrow.parquet as pq
import pytest

from facemllm import settings
from facemllm.tables import open_table
from facemllm.version.record import log, record, restore
from facemllm.version.repository import Repository
from facemllm.version.tombstones import Marks, Tombstones, covered_rows, name_id
from tests.refusing import refuses

ADA = {"reason": "she asked", "by": "Ada Lovelace"}


@pytest.fixture
def place(tmp_path):
    return settings.load("laptop", [f"storage.home={tmp_path / 'home'}"])


def image(letter: str) -> Marks:
    return Marks(image=frozenset({letter * 64}))


def git(place, *words: str, text: str | None = None) -> str:
    command = ["git", "-C", str(Repository.of(place).path), "-c", "user.name=x", "-c", "user.email=x", *words]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout.strip()


def rewritten(place, entries) -> None:
    """Put another list in the place of the newest commit's, as a careful forger would."""
    blob = git(place, "hash-object", "-w", "--stdin", text=json.dumps({"entries": entries}))
    tree = git(place, "mktree", text=f"100644 blob {blob}\ttombstones.json\n")
    parents = git(place, "rev-list", "--parents", "-n1", "tombstones").split()[1:]
    commit = git(place, "commit-tree", tree, *(word for p in parents for word in ("-p", p)), "-m", "forged")
    git(place, "update-ref", "refs/heads/tombstones", commit)


def stored(place):
    return json.loads(git(place, "show", "tombstones:tombstones.json"))["entries"]


def test_nothing_is_forgotten_at_first_and_an_entry_is_signed_kept_and_read_back(place):
    assert not Tombstones.of(place).covers({"image_id": "a" * 64})
    assert Tombstones.of(place).digest == ""
    assert not place.home.exists(), "nothing is made by asking"
    added = Tombstones.of(place).add("image", image("a"), affected=["a" * 64], **ADA)
    found = Tombstones.of(place)
    assert found == added
    entry = found.entries[0]
    assert (entry.by, entry.reason, entry.kind) == ("Ada Lovelace", "she asked", "image")
    assert entry.at.endswith("+00:00")
    assert found.covers({"image_id": "a" * 64})
    assert not found.covers({"image_id": "b" * 64, "subject_id": None})
    assert log(place) == [], "the list is there before any revision"


def test_rows_are_told_by_any_of_their_marks(face_rows, faces_table):
    rows = face_rows(6)
    rows[3]["original_id"] = "c" * 64
    values = {"image": rows[0]["image_id"], "subject": rows[5]["subject_id"], "original": "c" * 64}
    values |= {"name": name_id("render", "0002")}
    marks = Marks(**{kind: frozenset({value}) for kind, value in values.items()})
    expected = [True, False, True, True, True, True]
    assert [marks.covers(row) for row in rows] == expected
    shard = faces_table(rows) / "part-00000.parquet"
    found = [row["source_id"] for row in covered_rows(pq.ParquetFile(shard), marks)]
    assert found == [row["source_id"] for row, covered in zip(rows, expected, strict=True) if covered]
    assert not marks.covers({"image_id": "x"})
    assert Marks.from_json(marks.as_json()) == marks


def test_names_in_the_list_give_no_name_away(place):
    Tombstones.of(place).add("image", Marks(name=frozenset({name_id("celeba", "000123")})), **ADA)
    assert "000123" not in git(place, "show", "tombstones:tombstones.json")
    assert Tombstones.of(place).covers({"source": "celeba", "source_id": "000123"})
    assert not Tombstones.of(place).covers({"source": "lfwa", "source_id": "000123"})


@pytest.mark.parametrize(
    ("kind", "marks", "facts", "message"),
    [
        ("image", Marks(image=frozenset({"a"})), {**ADA, "by": " \t"}, "nobody is named"),
        ("image", Marks(image=frozenset({"a"})), {**ADA, "reason": "\n"}, "needs a reason"),
        ("image", Marks(image=frozenset({"a"})), {**ADA, "reason": "x" * 2001}, "at most 2000"),
        ("subject", Marks(), ADA, "nothing to forget"),
    ],
)
def test_an_unsigned_entry_is_refused(place, kind, marks, facts, message):
    refuses(message, Tombstones.of(place).add, kind, marks, **facts)
    assert Tombstones.of(place).entries == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda entries: [entries[0] | {"reason": "nobody asked"}, *entries[1:]], "entry 1 was changed"),
        (lambda entries: entries[1:], "entry 1 was changed, or one before it is missing"),
        (lambda entries: [entries[0], entries[2]], "entry 2 was changed, or one before it is missing"),
        (lambda entries: entries[:2], "has 2 entries, its history 3"),
        (lambda entries: [*entries[:2], {"kind": "image"}], "is damaged"),
        (lambda entries: None, "is damaged"),
    ],
)
def test_a_changed_list_is_refused(place, change, message):
    for letter in "abc":
        Tombstones.of(place).add("image", image(letter), **ADA)
    rewritten(place, change(stored(place)))
    refuses(message, Tombstones.of, place)


def test_a_list_set_back_is_noticed_by_the_reports_it_had(place):
    first = Tombstones.of(place).add("image", image("a"), **ADA)
    second = first.add("image", image("b"), **ADA)
    reports = place.home / "forgotten"
    reports.mkdir()
    (reports / f"{second.entries[-1].id}.json").write_text("{}")
    assert len(Tombstones.of(place).entries) == 2
    git(place, "update-ref", "refs/heads/tombstones", "tombstones~1")
    refuses(f"lacks entry {second.entries[-1].id}", Tombstones.of, place)
    git(place, "update-ref", "-d", "refs/heads/tombstones")
    refuses("bring the branch 'tombstones' back", Tombstones.of, place)


def test_covered_tables_are_not_recorded_and_names_of_revisions_stay(place, tmp_path, faces_table, conversations_table):
    tables = faces_table(), conversations_table()
    plain = record(settings.load("laptop", [f"storage.home={tmp_path / 'other'}"]), *tables)
    forgotten = Tombstones.of(place).add("image", image("a"), **ADA)
    assert record(place, *tables).sha == plain.sha, "the list must not enter the names of revisions"
    row = next(open_table(tables[0]).iterate(["image_id"]))
    forgotten.add("image", Marks(image=frozenset({row["image_id"]})), **ADA)
    refuses(r"faces: 1 of 40 rows were forgotten.*make the table again", record, place, *tables)
    said = f"revision {plain.sha[:12]}, faces: 1 of 40 rows were forgotten"
    refuses(said, restore, place, plain.sha, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_the_digest_names_what_is_covered_and_nothing_else(place, tmp_path):
    one = Tombstones.of(place).add("image", image("a"), **ADA)
    other = settings.load("laptop", [f"storage.home={tmp_path / 'other'}"])
    assert Tombstones.of(other).add("image", image("a"), reason="other", by="Charles Babbage").digest == one.digest
    with one.repository.lock():
        assert one.replace("1" * 40, "2" * 40).digest == one.digest
    assert one.add("image", image("b"), **ADA).digest != one.digest


def test_a_clone_obeys_the_list_and_goes_on_with_it(place, tmp_path, faces_table, conversations_table):
    record(place, faces_table(), conversations_table())
    Tombstones.of(place).add("image", image("a"), **ADA)
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", Repository.of(place).path, clone], check=True)
    away = settings.load("laptop", [f"storage.home={tmp_path / 'away'}", f"version.repository={clone}"])
    assert Tombstones.of(away).covers({"image_id": "a" * 64})
    Tombstones.of(away).add("image", image("b"), **ADA)
    Tombstones.of(place).add("image", image("c"), **ADA)
    subprocess.run(["git", "-C", clone, "fetch", "-q"], check=True)
    assert Tombstones.of(away).marks.image == {letter * 64 for letter in "abc"}
    assert [entry["keys"]["image"][0][0] for entry in stored(away)] == ["a", "b"]


def test_a_longer_list_from_elsewhere_takes_nothing_away(place, tmp_path):
    there = settings.load("laptop", [f"storage.home={tmp_path / 'there'}"])
    for where, letter in ((place, "a"), (there, "b"), (there, "c")):
        Tombstones.of(where).add("image", image(letter), **ADA)
    git(place, "remote", "add", "peer", str(Repository.of(there).path))
    git(place, "fetch", "-q", "peer")
    Tombstones.of(place).add("image", image("d"), **ADA)
    assert len(Tombstones.of(place).entries) == 4
    assert Tombstones.of(place).marks.image == {letter * 64 for letter in "abcd"}
