"""Results by digest, and the digests of code that decide whether a result still counts."""

from __future__ import annotations

import pytest

from facemllm.core import digests
from facemllm.core.store import Store
from facemllm.errors import UserError

KEY = "k" * 64


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "home")


def result(tmp_path, text="result", name="made"):
    folder = tmp_path / name
    folder.mkdir()
    (folder / "file.txt").write_text(text)
    return folder, digests.of_tree(folder)


def test_what_is_kept_is_recalled(store, tmp_path):
    folder, digest = result(tmp_path)
    (store.work(KEY) / "half").write_text("unfinished")
    kept = store.keep(KEY, folder, digest, {"rows": 3})
    assert kept == store.path(digest) == store.find(digest[:8])
    assert (kept / "file.txt").read_text() == "result"
    assert store.recall(KEY) == {"digest": digest, "rows": 3}
    assert not folder.exists()
    assert not (store.home / "work" / KEY[:32]).exists()


def test_nothing_is_recalled_under_another_key(store, tmp_path):
    store.keep(KEY, *result(tmp_path), {})
    assert store.recall("j" * 64) is None


def test_a_lost_result_is_not_recalled(store, tmp_path):
    kept = store.keep(KEY, *result(tmp_path), {})
    (kept / "file.txt").unlink()
    kept.rmdir()
    assert store.recall(KEY) is None
    with pytest.raises(UserError, match="the store has no result"):
        store.path(kept.name)


def test_the_same_bytes_are_kept_once_under_two_keys(store, tmp_path):
    first, digest = result(tmp_path)
    store.keep(KEY, first, digest, {})
    second, again = result(tmp_path)
    assert again == digest
    store.keep("j" * 64, second, digest, {})
    assert not second.exists()
    assert len(list((store.home / "store").iterdir())) == 1
    assert store.recall("j" * 64) == {"digest": digest}


def test_unfinished_work_stays_until_its_result_is_kept(store):
    (store.work(KEY) / "step-100").write_text("state")
    assert (store.work(KEY) / "step-100").read_text() == "state"


def test_find_wants_one_result(store, tmp_path):
    digest = result(tmp_path)[1]
    with pytest.raises(UserError, match=f"0 results begin with '{digest[:4]}'"):
        store.find(digest[:4])
    for number in range(2):
        folder, _ = result(tmp_path, name=f"made-{number}")
        store.keep(f"{number}", folder, f"abc{number}", {})
    with pytest.raises(UserError, match="2 results begin with 'abc'"):
        store.find("abc")


def test_the_key_depends_on_step_settings_and_inputs(store):
    base = ("ingest", "facemllm.core.store", {"seed": 0}, {"faces": "a"})
    changed = [
        ("annotate", *base[1:]),
        (base[0], "facemllm.settings", *base[2:]),
        (*base[:2], {"seed": 1}, base[3]),
        (*base[:3], {"faces": "b"}),
    ]
    keys = {store.key(*arguments) for arguments in (base, *changed)}
    assert len(keys) == 5
    assert store.key(*base) == store.key(*base)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of three rooms: `a` imports `b.deep`, which imports `c` inside a function; `d` stands alone."""
    root = tmp_path / "facemllm"
    files = {
        "__init__.py": "",
        "a/__init__.py": "from facemllm.b import deep\n",
        "a/words.json": "{}",
        "b/__init__.py": "",
        "b/deep.py": "def f():\n    from .. import c\n    return c\n",
        "c.py": "VALUE = 1\n",
        "d.py": "VALUE = 1\n",
        "root.json": "{}",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    monkeypatch.setattr(digests, "PACKAGE", root)
    digests.of_code.cache_clear()
    yield root
    digests.of_code.cache_clear()


@pytest.mark.parametrize(
    ("edited", "matters"),
    [
        ("a/__init__.py", True),
        ("a/words.json", True),
        ("b/__init__.py", True),
        ("b/deep.py", True),
        ("c.py", True),
        ("d.py", False),
        ("root.json", False),
    ],
)
def test_a_code_digest_follows_imports_and_data_files(package, edited, matters):
    before = digests.of_code("facemllm.a")
    with (package / edited).open("a") as file:
        file.write("\n# edited\n" if edited.endswith(".py") else " ")
    digests.of_code.cache_clear()
    assert (digests.of_code("facemllm.a") != before) == matters


def test_of_tree_sees_names_and_contents(tmp_path):
    folder, before = result(tmp_path)
    (folder / "file.txt").rename(folder / "other.txt")
    renamed = digests.of_tree(folder)
    (folder / "other.txt").write_text("changed")
    assert len({before, renamed, digests.of_tree(folder)}) == 3


def test_of_json_is_canonical():
    assert digests.of_json({"b": 1, "a": "é"}) == digests.of_json({"a": "é", "b": 1})
