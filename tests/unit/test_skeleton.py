"""What `make task` and `make reader` write: it loads, its line and row stand, and its test says what is left."""

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from facemllm.cli import skeleton
from facemllm.errors import UserError
from facemllm.settings import root

PROJECT = root()


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "facemllm/version").mkdir(parents=True)
    for file in ("params.yaml", "facemllm/version/ledger.yaml"):
        shutil.copy(PROJECT / file, tmp_path / file)
    monkeypatch.chdir(tmp_path)


def loaded(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_task_is_a_file_a_line_and_a_test_of_what_is_left():
    module, params, test = skeleton.task("glasses")
    assert loaded(module).TASK.name == "glasses"
    before = yaml.safe_load((PROJECT / "params.yaml").read_text())
    after = yaml.safe_load(params.read_text())
    assert after["reformat"].pop("tasks") == [*before["reformat"].pop("tasks"), "glasses"]
    assert after == before
    with pytest.raises(AssertionError, match=r"glasses\.py:1: .*FILL IN"):
        loaded(test).test_nothing_is_left_to_fill_in()


def test_a_reader_is_a_file_a_row_and_a_test_of_what_is_left():
    module, ledger, test = skeleton.reader("my_faces")  # a source's name has hyphens
    assert module.name == "my_faces.py"
    assert list(loaded(module).READERS) == ["my-faces"]
    rows = yaml.safe_load(ledger.read_text())
    assert rows.pop("my-faces")["uses"] == []
    assert rows == yaml.safe_load((PROJECT / ledger).read_text())
    with pytest.raises(AssertionError, match=r"my_faces\.py:1: .*FILL IN"):
        loaded(test).test_nothing_is_left_to_fill_in()


@pytest.mark.parametrize("make", [skeleton.task, skeleton.reader])
def test_nothing_is_overwritten_and_names_are_plain(make):
    make("mine")
    kept = {path: path.read_bytes() for path in Path().rglob("*.*")}
    for name in ("mine", "", "Two Words", "../up"):
        with pytest.raises(UserError, match=r"exists already|has a row already|give a name in a-z"):
            make(name)
    assert {path: path.read_bytes() for path in Path().rglob("*.*")} == kept


def test_wrong_words_are_wrong_usage(capsys):
    assert skeleton.main(["door", "x"]) == skeleton.main(["task"]) == 2
    assert "task|reader NAME" in capsys.readouterr().err
