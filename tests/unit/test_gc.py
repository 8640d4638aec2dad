"""`facemllm gc`: what is named, what that was made from, and what is young stays; the rest is told, then goes."""

import json
import os
import threading
import time
from pathlib import Path

import pytest

from facemllm.core import digests
from facemllm.core.servers import Deployed, note_deployed
from facemllm.core.store import Store
from facemllm.errors import UserError
from facemllm.settings import Settings, load
from facemllm.workflow import gc

OLD = time.time() - 90 * gc.DAY_S


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return load("laptop", [f"storage.home={tmp_path / 'home'}", f"storage.runs={tmp_path / 'runs'}"])


def aged(path: Path, when: float = OLD) -> None:
    for one in (path, *path.rglob("*")):
        os.utime(one, (when, when))


def kept(settings: Settings, text: str, step: str = "ingest", **inputs: str) -> str:
    """A result in the store, remembered, all of it old; its digest."""
    store, folder = Store(settings.home), settings.home / "made"
    folder.mkdir(parents=True)
    (folder / "data.txt").write_text(text * 1000)
    digest, key = digests.of_tree(folder), digests.of_json([step, text])
    store.keep(key, folder, digest, {"step": step, "inputs": inputs, "output": digest})
    aged(store.path(digest))
    aged(settings.home / "keys" / f"{key}.json")
    return digest


def work(settings: Settings, key: str) -> Path:
    folder = Store(settings.home).work(key)
    (folder / "checkpoint").write_text("half")
    aged(folder)
    return folder


def found(settings: Settings, *named: str) -> dict[str, str]:
    every = gc.behind(Store(settings.home), set(named))
    return {one.name: one.kind for one in gc.unnamed(settings, every, 30)}


def test_what_is_named_and_all_it_was_made_of_stays(settings: Settings) -> None:
    faces = kept(settings, "faces")
    annotated = kept(settings, "annotated", "annotate", faces=faces)
    model = kept(settings, "model", "align", conversations=annotated)
    other = kept(settings, "another model", "align", conversations=annotated)
    assert found(settings, model) == {other: "result"}
    assert found(settings, other) == {model: "result"}
    assert set(found(settings)) == {faces, annotated, model, other}


def test_nothing_goes_until_it_is_said_and_then_its_record_goes_with_it(settings: Settings) -> None:
    one, two = kept(settings, "one"), kept(settings, "two")
    half = work(settings, "k" * 64)
    before = sorted(settings.home.rglob("*"))
    rubbish = gc.unnamed(settings, {one}, 30)
    assert sorted(settings.home.rglob("*")) == before
    assert {(unnamed.kind, unnamed.step) for unnamed in rubbish} == {("result", "ingest"), ("work", "")}
    assert gc.remove(settings, rubbish, 30) == 3000 + 4
    assert [path.name for path in (settings.home / "store").iterdir()] == [one]
    assert not half.exists()
    assert set(Store(settings.home).records()) == {one}
    assert two not in str(sorted(settings.home.rglob("*")))
    assert "3 folders" not in gc.render(rubbish, {"removed": True, "freed": 3004})


def test_what_is_young_or_was_recalled_stays(settings: Settings) -> None:
    young, recalled, gone = kept(settings, "young"), kept(settings, "recalled"), kept(settings, "gone")
    aged(Store(settings.home).path(young), time.time())
    Store(settings.home).used(digests.of_json(["ingest", "recalled"]))
    assert set(found(settings)) == {gone}
    assert recalled in Store(settings.home).records()


def test_what_is_used_between_telling_and_removing_stays(settings: Settings) -> None:
    digest = kept(settings, "data")
    rubbish = gc.unnamed(settings, set(), 30)
    Store(settings.home).used(digests.of_json(["ingest", "data"]))
    assert gc.remove(settings, rubbish, 30) == 0
    assert Store(settings.home).path(digest).is_dir()


def test_work_that_a_run_is_at_stays(settings: Settings) -> None:
    half, key = work(settings, "k" * 64), "k" * 64
    held, done = threading.Event(), threading.Event()

    def run() -> None:
        with Store(settings.home).working(key):
            held.set()
            done.wait(60)

    thread = threading.Thread(target=run)
    thread.start()
    assert held.wait(60)
    rubbish = [gc.Unnamed("work", half.name, "", 4, 90.0)]
    assert found(settings) == {}
    assert gc.remove(settings, rubbish, 30) == 0
    done.set()
    thread.join()
    assert found(settings) == {half.name: "work"}
    assert gc.remove(settings, rubbish, 30) == 4


def test_runs_servers_and_what_mlflow_says_are_names(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    told = [f"{letter}" * 64 for letter in "abc"]
    (settings.runs / "laptop").mkdir(parents=True)
    summary = {"steps": [{"digest": told[0]}], "model": {"digest": None}}
    (settings.runs / "laptop" / "summary.json").write_text(json.dumps(summary))
    note_deployed(settings, "staging", Deployed(Path("/model"), told[1], "1"))
    monkeypatch.setattr(gc, "_in_mlflow", lambda _: [f"output {told[2]}", "d" * 65])
    assert gc.named(settings) == set(told)


def test_where_mlflow_cannot_be_asked_nothing_is_rubbish(settings: Settings) -> None:
    away = settings.model_copy(update={"tracking": settings.tracking.model_copy(update={"uri": "http://127.0.0.1:9"})})
    with pytest.raises(UserError, match=r"127\.0\.0\.1:9"):
        gc.named(away)
