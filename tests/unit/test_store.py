"""Results by digest, digests of code that decide whether a result still counts, whole files, and locks."""

import multiprocessing
import os
import shutil
import signal
import threading
import time
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest

from facemllm.core import digests
from facemllm.core.files import atomic_file, locked
from facemllm.core.step import key_of, step_key
from facemllm.core.store import Store
from facemllm.settings import load
from facemllm.workflow.steps import steps
from tests.refusing import refuses

KEY = "k" * 64


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "home")


def result(tmp_path, text="result", name="made"):
    folder = tmp_path / name
    folder.mkdir()
    (folder / "file.txt").write_text(text)
    return folder, digests.of_tree(folder)


def test_what_is_kept_is_recalled_under_no_other_key_nor_when_it_is_lost(store, tmp_path):
    folder, digest = result(tmp_path)
    (store.work(KEY) / "half").write_text("unfinished")
    assert (store.work(KEY) / "half").read_text() == "unfinished"
    kept = store.keep(KEY, folder, digest, {"rows": 3})
    assert kept == store.path(digest) == store.find(digest[:8])
    assert (kept / "file.txt").read_text() == "result"
    assert store.recall(KEY) == {"digest": digest, "rows": 3}
    assert not folder.exists()
    assert not (store.home / "work" / KEY[:32]).exists()
    assert store.recall("j" * 64) is None
    shutil.rmtree(kept)
    assert store.recall(KEY) is None
    refuses("the store has no result", store.path, kept.name)


def test_the_same_bytes_are_kept_once_under_two_keys(store, tmp_path):
    first, digest = result(tmp_path)
    store.keep(KEY, first, digest, {})
    second, again = result(tmp_path)
    assert again == digest
    store.keep("j" * 64, second, digest, {})
    assert not second.exists()
    assert len(list((store.home / "store").iterdir())) == 1
    assert store.recall("j" * 64) == {"digest": digest}


def test_a_folder_that_lies_there_whole_is_never_taken_away_and_a_damaged_one_is_mended(store, tmp_path):
    first, digest = result(tmp_path)
    kept = store.keep(KEY, first, digest, {})
    served = (kept / "file.txt").stat().st_ino
    store.keep("j" * 64, result(tmp_path)[0], digest, {})
    assert (kept / "file.txt").stat().st_ino == served, "a server may have it open"
    (kept / "file.txt").write_text("damaged")
    store.keep("i" * 64, result(tmp_path)[0], digest, {})
    assert (kept / "file.txt").read_text() == "result"
    assert {path.name for path in (store.home / "store").iterdir()} == {digest}
    assert not list((store.home / "work").glob("*.damaged"))


def test_the_same_bytes_at_once_are_kept_once(store, tmp_path):
    made = [result(tmp_path, name=f"made-{number}") for number in range(8)]
    gate, trouble = threading.Barrier(len(made)), []

    def keep(number: int) -> None:
        gate.wait()
        try:
            store.keep(f"{number}" * 64, *made[number], {})
        except Exception as error:
            trouble.append(error)

    threads = [threading.Thread(target=keep, args=(number,)) for number in range(len(made))]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert trouble == []
    assert (store.path(made[0][1]) / "file.txt").read_text() == "result"
    assert all(store.recall(f"{number}" * 64) for number in range(len(made)))


def test_find_wants_one_result(store, tmp_path):
    digest = result(tmp_path)[1]
    refuses(f"0 results begin with '{digest[:4]}'", store.find, digest[:4])
    for number in range(2):
        folder, _ = result(tmp_path, name=f"made-{number}")
        store.keep(f"{number}", folder, f"abc{number}", {})
    refuses("2 results begin with 'abc'", store.find, "abc")


def test_the_key_depends_on_step_settings_and_inputs():
    step, other = (steps(load())[name] for name in ("annotate", "reformat"))
    base = (step, {"code": "a", "settings": {"seed": 0}}, {"faces": "a"})
    changed = [(other, *base[1:]), (step, {"code": "b", "settings": {"seed": 0}}, base[2])]
    changed += [(step, {"code": "a", "settings": {"seed": 1}}, base[2]), (*base[:2], {"faces": "b"})]
    assert len({key_of(*arguments) for arguments in (base, *changed)}) == 5
    assert key_of(*base) == key_of(*base)


def forget(caches=(digests.of_code, digests._parsed, digests._remembered)):
    for known in caches:
        known.cache_clear()


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package: `a` imports `b.deep`, which imports `c` inside a function, and asks tasks by name; `d` stands alone;
    `e` uses one task, and imports a part of the tasks' package, not the package itself."""
    root = tmp_path / "facemllm"
    files = {
        "__init__.py": "",
        "a/__init__.py": "from facemllm import tasks\nfrom ..b import deep\nfrom facemllm.core import progress\n",
        "a/words.json": "{}",
        "b/__init__.py": "",
        "b/deep.py": "def f():\n    from .. import c\n    return c\n",
        "c.py": '"""Words."""\nVALUE = 1\n"""More words."""\n',
        "d.py": "VALUE = 1\n",
        "e.py": "from facemllm.tasks import base\nfrom facemllm.tasks.age import TASK\n",
        "core/__init__.py": "",
        "core/progress.py": "from facemllm import d\n",
        "tasks/__init__.py": "from facemllm.tasks import base\n",
        "tasks/base.py": "VALUE = 1\n",
        "tasks/age.py": "from facemllm.tasks import years\nTASK = 1\n",
        "tasks/years.py": "VALUE = 1\n",
        "tasks/gender.py": "TASK = 1\n",
        "root.json": "{}",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    monkeypatch.setattr(digests, "PACKAGE", root)
    forget()
    yield root
    forget()


@pytest.mark.parametrize(
    ("edited", "text", "module", "matters"),
    [
        ("a/__init__.py", "VALUE = 2", "a", True),
        ("a/words.json", " ", "a", True),
        ("b/__init__.py", "VALUE = 2", "a", True),
        ("b/deep.py", "VALUE = 2", "a", True),
        ("c.py", "VALUE = 2", "a", True),
        ("c.py", "# a comment", "a", False),
        ("c.py", "'Words of a constant.'", "a", False),
        ("d.py", "VALUE = 2", "a", False),
        ("root.json", " ", "a", False),
        ("core/progress.py", "VALUE = 2", "a", False),
        ("tasks/age.py", "TASK = 2", "a", True),
        ("tasks/years.py", "VALUE = 2", "a", True),
        ("tasks/base.py", "VALUE = 2", "a", True),
        ("tasks/gender.py", "TASK = 2", "a", False),
        ("tasks/new.py", "TASK = 2", "a", False),
        ("tasks/years.py", "VALUE = 2", "e", True),
        ("tasks/__init__.py", "VALUE = 2", "e", True),
        ("tasks/gender.py", "TASK = 2", "e", False),
    ],
)
def test_a_code_digest_follows_imports_data_files_and_the_tasks_asked(package, edited, text, module, matters):
    before = digests.of_code(f"facemllm.{module}", ("age",))
    with (package / edited).open("a") as file:
        file.write(text)
    forget()
    assert (digests.of_code(f"facemllm.{module}", ("age",)) != before) == matters


def test_where_no_tasks_are_named_all_of_them_count(package):
    assert package / "tasks/gender.py" in digests.code_files("facemllm.a")


@pytest.fixture
def keys_after(tmp_path, monkeypatch):
    """What the keys of all steps are in a copy of the package, after edits that stay."""
    copy = tmp_path / "facemllm"
    shutil.copytree(digests.PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(digests, "PACKAGE", copy)
    parse = lru_cache(None)(lambda path, text, parsed=digests._parsed.__wrapped__: parsed(path))
    monkeypatch.setattr(digests, "_parsed", lambda path: parse(path, path.read_bytes()))  # most files never change
    settings = load("ci")

    def keys(**edits):
        for name, text in edits.items():
            with (copy / name.replace("__", "/")).with_suffix(".py").open("a") as file:
                file.write(text)
        forget()
        found = [replace(step, sections=str) for step in steps(settings).values() if step.keeps]
        return {step.name: step_key(step, settings, {}) for step in found}

    yield keys
    forget()


def test_what_decides_no_byte_runs_no_step_again(keys_after):
    before = keys_after()
    serving = "\nclass Serve(Section):\n    limit: int\n"
    assert keys_after(settings__operations=serving, core__progress="\nX = 1\n", errors="\nX = 1\n") == before
    assert keys_after(tasks__age="\n# a comment\n", tasks__unused="\nTASK = None\n") == before
    changed = {name for name, key in keys_after(train__loop="\nX = 1\n").items() if key != before[name]}
    assert changed == set(load("ci").stages())
    changed |= {name for name, key in keys_after(tasks__age="\nX = 1\n").items() if key != before[name]}
    assert set(before) - changed == {"ingest", "version"}


def test_a_file_is_read_once_a_process_until_it_changes(tmp_path, monkeypatch):
    reads = []
    read = digests._read
    monkeypatch.setattr(digests, "_read", lambda path: reads.append(path) or read(path))
    monkeypatch.setattr(digests, "_SETTLED_NS", 0)
    path = tmp_path / "file"
    path.write_text("one")
    first = digests.of_file(path)
    assert [digests.of_file(path), digests.of_tree(tmp_path) and len(reads)] == [first, 1]
    assert digests.of_file(path, fresh=True) == first
    assert len(reads) == 2
    state = path.stat()
    path.write_text("two")
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    assert digests.of_file(path) != first
    assert len(reads) == 3
    monkeypatch.setattr(digests, "_SETTLED_NS", 10**18)
    digests.of_file(path), digests.of_file(path)
    assert len(reads) == 5, "a file that has just been written may change again within a tick of the clock"


def test_of_tree_sees_names_and_contents_and_of_json_is_canonical(tmp_path):
    folder, before = result(tmp_path)
    (folder / "file.txt").rename(folder / "other.txt")
    renamed = digests.of_tree(folder)
    (folder / "other.txt").write_text("changed")
    assert len({before, renamed, digests.of_tree(folder)}) == 3
    assert digests.of_json({"b": 1, "a": "é"}) == digests.of_json({"a": "é", "b": 1})


@pytest.mark.parametrize("wait_s", [0.0, 0.1])
def test_a_lock_refuses_or_waits_and_leaves_nothing(tmp_path: Path, wait_s: float):
    lock = tmp_path / "work" / ".lock"
    order: list[str] = []

    def second() -> None:
        with locked(lock):
            order.append("second")

    with locked(lock):
        refuses(rf"^taken \(lock {lock}, pid {os.getpid()}\)$", locked(lock, "taken", wait_s).__enter__)
        waits = threading.Thread(target=second)
        waits.start()
        waits.join(0.1)
        order.append("first")
    waits.join(5)
    assert order == ["first", "second"]
    assert not lock.parent.exists()


def hold(lock: Path, pipe) -> None:
    with locked(lock):
        pipe.send("held")
        signal.pause()


def test_a_killed_holder_leaves_the_lock_to_the_next(tmp_path: Path):
    here, there = multiprocessing.get_context("fork").Pipe()
    holder = multiprocessing.get_context("fork").Process(target=hold, args=(tmp_path / "lock", there))
    holder.start()
    assert here.recv() == "held"
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    with locked(tmp_path / "lock", "taken"):
        pass


def test_writers_of_the_same_file_do_not_meet_and_old_leftovers_go(tmp_path):
    path, old, new, other = (tmp_path / n for n in ("a.npy", ".b.npy.7.partial", ".c.npy.7.partial", ".d"))
    for left in (old, new, other):
        left.touch()
    for left in (old, other):
        os.utime(left, (time.time() - 90_000,) * 2)
    with atomic_file(path, tidy=True) as one, atomic_file(path) as two:
        one.write_bytes(b"one")
        two.write_bytes(b"two")
        assert not path.exists()
    assert path.read_bytes() == b"one"
    with pytest.raises(FileNotFoundError), atomic_file(tmp_path / "e.npy"):
        pass  # nothing was written
    assert sorted(tmp_path.iterdir()) == [new, other, path]
