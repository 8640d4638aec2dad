"""Data versions: the same bytes have one name, and every name brings its bytes back."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.schedules import newest_data
from facemllm import settings
from facemllm.core import digests, progress
from facemllm.tables import open_table
from facemllm.version import repository
from facemllm.version.record import has, log, record, restore
from facemllm.version.repository import Repository
from tests.refusing import refuses


@pytest.fixture
def place(tmp_path):
    """Settings whose data repository and remote are this test's own."""

    def make(home="home", **versioning):
        overrides = [f"version.{key}={value}" for key, value in versioning.items()]
        return settings.load("laptop", [f"storage.home={tmp_path / home}", *overrides])

    return make


@pytest.fixture
def tables(faces_table, conversations_table):
    return faces_table(), conversations_table()


@pytest.fixture
def other_tables(faces_table, conversations_table, face_rows, conversation_rows):
    """A second version of the data: two people fewer."""
    rows = face_rows(36)
    return faces_table(rows, "faces-2"), conversations_table(conversation_rows(rows), "conversations-2")


def same(restored, tables):
    found = [restored / "faces", restored / "conversations"]
    return list(map(digests.of_tree, found)) == list(map(digests.of_tree, tables))


def test_what_was_recorded_comes_back_bit_for_bit(place, tables, tmp_path):
    def state():
        return [(digests.of_tree(t), [(p.stat().st_mode, p.stat().st_nlink) for p in t.iterdir()]) for t in tables]

    before = state()
    revision = record(place(), *tables)
    assert revision.new
    assert revision.faces == open_table(tables[0]).digest
    assert revision.conversations_rows == 40
    found = restore(place(), revision.sha[:7], tmp_path / "back")
    assert (found.sha, found.faces) == (revision.sha, revision.faces)
    assert same(tmp_path / "back", tables)
    assert state() == before, "recording must leave the originals as they are"


def test_what_a_schedule_sees_is_the_newest_revision_that_is_whole(place, tables, other_tables, tmp_path):
    assert newest_data(place()) is None
    first = record(place(), *tables)
    newest = newest_data(place())
    assert newest.revision == first.sha
    pushed = set((tmp_path / "home" / "dvc-remote").rglob("*"))
    second = record(place(), *other_tables)
    now = newest_data(place())
    assert now.revision == second.sha
    assert now.digest != newest.digest
    for one in set((tmp_path / "home" / "dvc-remote").rglob("*")) - pushed:
        if one.is_file():
            one.unlink()
    assert newest_data(place()) == newest, "what is not all in the remote cannot be restored elsewhere"


def test_the_same_bytes_are_one_revision_and_versions_are_kept_apart(place, tables, other_tables, tmp_path):
    first = record(place(), *tables)
    (tables[0] / "notes.txt").write_text("no part of the table")
    again = record(place(), *tables)
    (tables[0] / "notes.txt").unlink()
    second = record(place(), *other_tables)
    third = record(place(), *tables)
    assert first.sha == again.sha == third.sha != second.sha
    assert [first.new, again.new, second.new, third.new] == [True, False, True, False]
    assert [entry["sha"] for entry in log(place())] == [second.sha, first.sha]
    restore(place(), first.sha, tmp_path / "one")
    restore(place(), second.sha, tmp_path / "two")
    assert same(tmp_path / "one", tables)
    assert same(tmp_path / "two", other_tables)


def test_a_first_revision_depends_on_the_bytes_alone(place, tables, tmp_path, monkeypatch):
    one = record(place(), *tables)
    monkeypatch.setenv("GIT_AUTHOR_NAME", "someone")
    monkeypatch.setenv("GIT_DIR", "/nowhere")
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    assert record(place("elsewhere", remote=tmp_path / "remote"), *tables).sha == one.sha
    assert os.environ["GIT_DIR"] == "/nowhere"


def test_bytes_that_are_nowhere_are_missed_and_recorded_anew_and_so_is_one_file(place, tables, tmp_path):
    revision = record(place(), *tables)
    assert has(place(), revision.sha)
    shutil.rmtree(tmp_path / "home" / "dvc-remote")
    assert not has(place(), revision.sha)
    shutil.rmtree(tmp_path / "home" / "data-repo" / ".dvc" / "cache")
    said = f"bytes are in neither cache nor remote.*{tmp_path}/home/dvc-remote"
    refuses(said, restore, place(), revision.sha, tmp_path / "back")
    assert not (tmp_path / "back").exists()
    assert record(place(), *tables).sha == revision.sha
    assert has(place(), revision.sha)
    restore(place(), revision.sha, tmp_path / "back")
    assert same(tmp_path / "back", tables)
    objects = [path for path in (tmp_path / "home" / "dvc-remote").rglob("*") if path.is_file()]
    max(objects, key=lambda path: path.stat().st_size).unlink()
    assert not has(place(), revision.sha)
    assert record(place(), *tables).sha == revision.sha
    assert has(place(), revision.sha)


def test_a_damaged_object_is_not_restored(place, tables, tmp_path):
    revision = record(place(), *tables)
    cache = tmp_path / "home" / "data-repo" / ".dvc" / "cache"
    largest = max((p for p in cache.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    largest.chmod(0o644)
    largest.write_bytes(b"x" + largest.read_bytes()[1:])
    said = rf"part-00000\.parquet: bytes do not match.*delete {cache}"
    refuses(said, restore, place(), revision.sha, tmp_path / "back")
    assert not (tmp_path / "back").exists()
    shutil.rmtree(cache)
    restore(place(), revision.sha, tmp_path / "back")
    assert same(tmp_path / "back", tables)


def test_unknown_revisions_and_outputs_in_the_way_are_refused(place, tables, tmp_path):
    refuses("no data repository at", restore, place(), "abcdef", tmp_path / "back")
    assert log(place()) == []
    assert not has(place(), "abcdef")
    revision = record(place(), *tables)
    for unknown in ("abcdef0", "HEAD", "main", "--all", "", revision.sha[:3]):
        refuses(r"is unknown in .*facemllm version log", restore, place(), unknown, tmp_path / "back")
    refuses("exists already", restore, place(), revision.sha, tmp_path)


def test_an_interrupted_recording_is_repaired_by_the_next(place, tables, other_tables, tmp_path):
    first = record(place(), *tables)
    repository = tmp_path / "home" / "data-repo"
    (repository / "faces").mkdir()
    (repository / "faces" / "half.parquet").write_bytes(b"half")
    for lock in (".git/index.lock", ".git/HEAD.lock", ".git/refs/heads/main.lock", ".git/facemllm-index.lock"):
        (repository / lock).write_text("")
    (repository / ".dvc" / "tmp" / "rwlock").write_text("{half")
    (repository / "faces.dvc").write_text("outs: [half")
    (repository / "README.md").write_text((repository / "README.md").read_text() + "edited\n")
    assert record(place(), *tables).sha == first.sha
    second = record(place(), *other_tables)
    restore(place(), second.sha, tmp_path / "back")
    assert same(tmp_path / "back", other_tables)


def test_an_interrupted_first_recording_is_repaired(place, tables, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Repository, "commit", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        refuses(None, record, place(), *tables, error=KeyboardInterrupt)
    assert log(place()) == []
    assert record(place(), *tables).new


def test_of_two_recordings_at_once_one_waits_and_says_for_whom(place, tables, tmp_path, monkeypatch):
    lock = tmp_path / "home" / "data-repo.lock"
    lock.parent.mkdir()
    said = []
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        held.write("pid 4711")
        held.flush()
        taken = r"another process is recording.*\(lock .*data-repo.lock, pid 4711\)"
        refuses(taken, Repository.of(place()).lock().__enter__)

        def event(note):
            said.append(note)
            held.close()

        monkeypatch.setattr(progress, "event", event)
        assert record(place(), *tables).new, "a lock whose holder is gone holds nobody up"
    assert [note.endswith("another process is recording (pid 4711); waiting for it") for note in said] == [True]


@pytest.mark.parametrize("name", ["Ada's 100%2F", 'say "cheese" #1', "what? ünï", "back\\slash"])
def test_a_repository_may_lie_anywhere(name, place, tables, tmp_path):
    settings = place(json.dumps(name)[1:-1])
    revision = record(settings, *tables)
    restore(settings, revision.sha, tmp_path / "out")
    assert digests.of_tree(tmp_path / "out" / "faces") == digests.of_tree(tables[0])


@pytest.mark.skipif(os.getuid() != 0, reason="only root may give a folder to another user")
def test_gits_advice_on_a_repository_of_another_user_has_effect(place, tables, tmp_path, monkeypatch):
    settings = place()
    revision = record(settings, *tables)
    path = Repository.of(settings).path
    for one in (path, path / ".git"):
        os.chown(one, 12345, 12345)
    monkeypatch.setenv("HOME", str(tmp_path))
    repository._trusted.cache_clear()
    refuses(r"safe\.directory", log, settings)
    subprocess.run(["git", "config", "--global", "--add", "safe.directory", path], check=True)
    repository._trusted.cache_clear()
    assert log(settings)[0]["sha"] == revision.sha
    repository._trusted.cache_clear()


def test_a_foreign_folder_is_left_alone_and_without_git_there_is_one_clear_line(place, tables, tmp_path, monkeypatch):
    foreign = tmp_path / "foreign"
    subprocess.run(["git", "init", "-q", foreign], check=True)
    (foreign / "work.txt").write_text("work")
    refuses(r"is no data repository of ours; set version\.repository", record, place(repository=foreign), *tables)
    assert sorted(path.name for path in foreign.iterdir()) == [".git", "work.txt"]
    monkeypatch.setenv("PATH", "/nowhere")
    refuses("git is not installed", record, place(), *tables)


def test_damaged_tables_and_an_unwritable_remote_are_one_clear_line_and_no_revision(place, tables, tmp_path):
    (tmp_path / "file").write_text("in the way")
    broken = place(remote=tmp_path / "file" / "remote")
    refuses(r"DVC failed in .*file/remote", record, broken, *tables)
    (tables[0] / "part-00000.parquet").write_bytes(b"x")
    refuses("bytes do not match", record, place(), *tables)
    assert log(broken) == log(place()) == []


def test_nothing_is_written_outside_the_home_and_nothing_is_said(place, tables, tmp_path, monkeypatch, capfd):
    away = tmp_path / "user"
    away.mkdir()
    for variable in ("HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(variable, str(away))
    (away / ".gitconfig").write_text("[commit]\n gpgSign = true\n[core]\n hooksPath = /bin\n autocrlf = true\n")
    code = (
        "import sys; from pathlib import Path; from facemllm import settings; from facemllm.version import record as v;"
        "s = settings.load('laptop', ['storage.home=' + sys.argv[1]]);"
        "r = v.record(s, Path(sys.argv[2]), Path(sys.argv[3])); v.restore(s, r.sha, Path(sys.argv[4]))"
    )
    project = Path(settings.root())
    arguments = [tmp_path / "home", *tables, tmp_path / "back"]
    subprocess.run([sys.executable, "-c", code, *map(str, arguments)], cwd=project, check=True)
    assert [path.name for path in away.rglob("*")] == [".gitconfig"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "conversations", "faces", "home", "user"]
    assert capfd.readouterr() == ("", "")
    status = subprocess.run(["git", "status", "--short"], cwd=tmp_path / "home" / "data-repo", capture_output=True)
    assert status.stdout == b""
