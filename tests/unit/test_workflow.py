"""Steps and runs: keys, recall, failures, the live view, and one clear line for what a user can get wrong."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from rich.console import Console

import commands
import pipeline
from facemllm.cli import main as cli
from facemllm.core import digests, progress
from facemllm.core.step import Context, Outcome, Step
from facemllm.errors import UserError
from facemllm.promote.step import model_dir
from facemllm.settings import Settings, load
from facemllm.workflow import runner as workflow
from facemllm.workflow import runs
from facemllm.workflow.steps import steps


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return load("laptop", [f"storage.home={tmp_path / 'home'}", f"storage.runs={tmp_path / 'runs'}"])


@pytest.fixture
def counted(monkeypatch) -> list[str]:
    """A step `ingest` that writes a file and counts its calls."""
    calls: list[str] = []

    def work(context: Context) -> Outcome:
        calls.append("called")
        context.out.mkdir()
        (context.out / "data.txt").write_text(f"identities {context.settings.ingest.identities}")
        return Outcome(digests.of_tree(context.out), "made")

    real = steps(load())["ingest"]
    step = Step(name="ingest", module=real.module, sections=real.sections, inputs={}, work=work)
    monkeypatch.setattr(workflow, "steps", lambda settings: {**steps(settings), "ingest": step})
    return calls


def test_a_step_is_recalled_until_something_it_depends_on_changes(settings: Settings, counted: list[str]):
    first = workflow.execute("ingest", settings)
    assert workflow.execute("ingest", settings) == first
    assert len(counted) == 1
    other = settings.model_copy(update={"ingest": settings.ingest.model_copy(update={"identities": 7})})
    assert workflow.execute("ingest", other) != first
    assert len(counted) == 2
    gate = settings.model_copy(update={"serve": settings.serve.model_copy(update={"threads": 2})})
    workflow.execute("ingest", gate)
    assert len(counted) == 2
    more = settings.model_copy(update={"ingest": settings.ingest.model_copy(update={"workers": 5})})
    step = steps(settings)["ingest"]
    assert workflow.step_key(step, settings, {}) == workflow.step_key(step, more, {})
    with pytest.raises(ValueError, match="takes inputs"):
        workflow.execute("annotate", settings)


@pytest.mark.parametrize("lost", ["result", "half of the record"])
def test_what_is_lost_is_made_again(settings: Settings, counted: list[str], lost: str):
    digest = workflow.execute("ingest", settings)
    if lost == "result":
        shutil.rmtree(settings.home / "store" / digest)
    else:
        record = next((settings.home / "keys").glob("*.json"))
        record.write_text(record.read_text()[:20])
    assert workflow.execute("ingest", settings) == digest
    assert len(counted) == 2


def test_a_failing_step_tells_why_and_keeps_nothing(settings, monkeypatch, tmp_path):
    def work(context: Context) -> Outcome:
        raise UserError("the sky is green; paint it blue")

    step = Step(name="ingest", module="facemllm.ingest.run", sections=lambda s: {}, inputs={}, work=work)
    monkeypatch.setattr(workflow, "steps", lambda settings: {**steps(settings), "ingest": step})
    monkeypatch.setenv(progress.EVENTS, str(tmp_path / "events.jsonl"))
    with pytest.raises(UserError, match="green"):
        workflow.execute("ingest", settings)
    view = runs.RunView.of(settings, tmp_path / "events.jsonl")
    view.refresh()
    assert view.failure() == ("ingest", "the sky is green; paint it blue")
    assert not (settings.home / "keys").exists()


def test_a_model_whose_bytes_changed_is_refused(settings: Settings):
    folder = settings.home / "store" / "made"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    digest = digests.of_tree(folder)
    folder.rename(folder.parent / digest)
    version = SimpleNamespace(digest=digest, version=3)
    assert model_dir(settings, version) == settings.home / "store" / digest
    (settings.home / "store" / digest / "model.safetensors").write_bytes(b"weightS")
    with pytest.raises(UserError, match="do not match the digest of version 3"):
        model_dir(settings, version)


def view_of(path: Path, *lines: dict[str, Any], rest: str = "") -> runs.RunView:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + rest)
    view = runs.RunView.of(load(), path)
    view.refresh()
    return view


def test_view_fills_in_what_the_engine_answered_from_its_cache(tmp_path: Path):
    view = view_of(
        tmp_path / "events.jsonl",
        {"time": 1.0, "step": "deploy", "state": "running"},
        {"time": 1.5, "step": "deploy", "progress": 1, "total": 2, "note": "half"},
        {"time": 2.0, "step": "deploy", "state": "done", "seconds": 1.0, "digest": "d", "figure": "url"},
        rest='{"half a li',
    )
    assert [name for name, step in view.steps.items() if step.state == "done"] == ["deploy"]
    view.settle({"ingest": {"seconds": 3.0, "digest": "i", "figure": "4 faces"}})
    assert view.steps["ingest"].state == "cached"
    assert view.steps["release"].state == "skipped"
    assert view.failure() is None


def test_the_live_table_shows_what_a_step_says_to_the_letter(tmp_path: Path):
    failed = {"time": 1.0, "step": "gate", "state": "failed", "message": "see [/tmp/x]"}
    out = io.StringIO()
    Console(width=100, file=out).print(runs.steps_table(view_of(tmp_path / "events.jsonl", failed), 0.0))
    assert "see [/tmp/x]" in out.getvalue()


def test_one_run_at_a_time(settings: Settings):
    refused = pytest.raises(UserError, match="another pipeline run")
    with runs.exclusive(settings), refused, runs.exclusive(settings):
        pass
    with runs.exclusive(settings):
        pass


def test_a_run_folder_stands_inside_of_one_that_can_be_made(settings: Settings):
    for name in ("", "../x", "a/b", ".hidden"):
        with pytest.raises(UserError, match="plain name"):
            runs.run_folder(settings, name)
    settings.runs.parent.mkdir(parents=True, exist_ok=True)
    settings.runs.write_text("a file where a folder should be")
    with pytest.raises(UserError, match=r"storage\.runs"):
        runs.run_folder(settings, "x")


BEHIND = {
    "ingest": ("heads/raster.py", "heads/assets/head.npz"),
    **{"annotate": ("annotate/annotator.py",), "reformat": ("reformat/run.py",), "validate": ("validate/suites.py",)},
    **{"version": ("version/repository.py",), "align": ("train/loop.py", "model/tiny.py")},
    "evaluate": ("evaluate/predict.py", "model/inference.py", "scoring/metrics.py"),
    **{"gate": ("scoring/stats.py",), "register": ("report/card.py",)},
}


@pytest.mark.parametrize("step", BEHIND)
def test_the_code_behind_a_step_and_no_other_enters_its_key(step: str):
    files = digests.code_files(steps(load())[step].module)
    assert {digests.PACKAGE / behind for behind in BEHIND[step]} <= set(files)
    if step == "ingest":
        assert not any(path.is_relative_to(digests.PACKAGE / "serve") for path in files)


WRONG = [
    ("pipeline.py run --set train.worker=2", 1, "did you mean 'workers'?"),
    ("-m facemllm services up production", 1, "pipeline.py release"),
    ("pipeline.py run --set train.workers=two", 1, "train.workers"),
    ("pipeline.py run --profile nowhere", 1, "no profile 'nowhere'"),
    ("pipeline.py run --profile ../params", 1, "plain name"),
    ("pipeline.py run --set storage.home=/proc/nowhere", 1, "cannot write"),
    ("pipeline.py compile /nowhere/at/all.yaml", 1, "cannot write"),
    ("pipeline.py compile spec.txt", 1, ".yaml"),
    ("pipeline.py fly", 2, "No such command"),
    ("pipeline.py submit --endpoint http://127.0.0.1:9", 1, "no Kubeflow Pipelines API answers"),
    ("-m facemllm train polish", 1, "no stage 'polish'"),
    ("-m facemllm reformat /nowhere /tmp/never-made", 1, "is not a table"),
    ("-m facemllm evaluate /nowhere /nowhere /tmp/never-made", 1, "is not a model directory"),
]


def check_end(code: int, stderr: str, expected: int, says: str):
    assert code == expected, stderr
    assert says in stderr
    assert "Traceback" not in stderr
    if code == 1:
        assert len(stderr.strip().splitlines()) == 1, stderr


@pytest.mark.parametrize(("words", "code", "says"), WRONG[:2])
def test_a_process_ends_with_one_clear_line(words: str, code: int, says: str):
    done = subprocess.run([sys.executable, *words.split()], capture_output=True, text=True, timeout=60, check=False)
    check_end(done.returncode, done.stderr, code, says)


@pytest.mark.parametrize(("words", "code", "says"), WRONG[2:])
@pytest.mark.usefixtures("quick_kfp")
def test_command_lines_end_with_one_clear_line(words, code, says, monkeypatch, capsys):
    program, *arguments = words.removeprefix("-m ").split()
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # a run takes over the signals of its process
    with mock.patch.dict(os.environ), pytest.raises(SystemExit) as ended:
        commands.main(pipeline.build) if program == "pipeline.py" else cli.main()
    check_end(int(str(ended.value.code)), capsys.readouterr().err, code, says)
