"""Steps and runs: keys, recall, failures, the live view, and one clear line for what a user can get wrong."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from rich.console import Console

import commands
from facemllm.cli import main as cli
from facemllm.core import digests, progress
from facemllm.core.step import PARENT_RUN, Context, Outcome, Step
from facemllm.errors import UserError
from facemllm.promote.registry import model_dir
from facemllm.settings import Settings, load
from facemllm.tracking import client
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


def test_of_two_runs_at_the_same_work_one_does_it_and_of_others_each_does_its_own(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on, calls, given = threading.Event(), threading.Event(), [], []

    def work(context: Context) -> Outcome:
        calls.append(context.settings.ingest.identities)
        context.out.mkdir()
        begun.set()
        assert go_on.wait(60)
        (context.out / "data.txt").write_text(f"identities {context.settings.ingest.identities}")
        return Outcome(digests.of_tree(context.out), "made")

    real = steps(load())["ingest"]
    step = Step(name="ingest", module=real.module, sections=real.sections, inputs={}, work=work)
    monkeypatch.setattr(workflow, "steps", lambda settings: {**steps(settings), "ingest": step})
    other = settings.model_copy(update={"ingest": settings.ingest.model_copy(update={"identities": 7})})
    first = threading.Thread(target=lambda: given.append(workflow.run_record("ingest", settings)[0]))
    second = threading.Thread(target=lambda: given.append(workflow.run_record("ingest", settings)[0]))
    third = threading.Thread(target=lambda: given.append(workflow.run_record("ingest", other)[0]))
    first.start()
    assert begun.wait(60)
    second.start()
    third.start()
    go_on.set()
    for one in (first, second, third):
        one.join()
    assert sorted(calls) == sorted([settings.ingest.identities, 7])
    assert len(given) == 3
    assert len({record["digest"] for record in given}) == 2
    assert not (settings.home / "locks").exists()


def test_a_plan_tells_what_would_run_and_why_and_does_nothing(
    settings: Settings, counted: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    planned = {one.step: one for one in workflow.plan(settings)}
    assert list(planned) == list(steps(settings))
    assert (planned["ingest"].action, planned["ingest"].why) == ("run", "has not run yet")
    assert planned["annotate"].why == "after ingest"
    assert not settings.home.exists()
    workflow.execute("ingest", settings)
    planned = {one.step: one for one in workflow.plan(settings)}
    assert {planned[name].action for name in ("annotate", "gate", "deploy")} == {"run"}
    assert planned["ingest"].action == "recall"
    other = settings.model_copy(update={"ingest": settings.ingest.model_copy(update={"identities": 7})})
    assert workflow.plan(other)[0].why == "changed: ingest.identities"
    monkeypatch.setattr(digests, "of_code", lambda *_: "edited")
    assert workflow.plan(settings)[0].why == "its code has changed"
    monkeypatch.setattr(commands, "load", lambda *_: settings)
    before = sorted(settings.home.rglob("*"))
    commands.run(plan=True)
    said = capsys.readouterr().out.splitlines()
    assert said[0].split()[:4] == ["ingest", "will", "run", "took"]
    assert said[0].endswith("its code has changed")
    assert sorted(settings.home.rglob("*")) == before
    assert not settings.runs.exists()


def test_the_plan_of_a_finished_run_leaves_open_what_goes_by_the_champion(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    recalled = {"output": "d", "step": "any", "seconds": 1.0}
    monkeypatch.setattr(workflow, "_recall", lambda *_: recalled)
    actions = {one.step: (one.action, one.why) for one in workflow.plan(settings)}
    assert actions["evaluate"] == ("recall", "")
    assert actions["gate"] == ("open", "goes by the champion then")
    assert actions["register"] == ("open", "after gate")
    assert actions["release"] == ("run", "once it is approved")


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


def test_the_view_tells_how_far_training_is_and_what_time_is_left(tmp_path: Path) -> None:
    def figure(**events: str) -> str:
        lines = [{"step": "align", "state": "running", "time": 1.0}]
        for place, (done, note) in enumerate(events.items()):
            line = {"step": "align", "time": 10.0 * place, "total": 1300, "note": note}
            lines.append({**line, "progress": int(done[1:])})
        return view_of(tmp_path / "events.jsonl", *lines).steps["align"].figure

    assert figure(_200="loss 2.1") == "200 of 1,300, loss 2.1"
    assert figure(_200="loss 2.1", _300="loss 1.1") == "300 of 1,300, 1 min 40 s left, loss 1.1"
    assert figure(_200="a", _1300="b") == "1,300 of 1,300, b"
    assert figure(_200="a", _10="b", _20="20 of 1300 heads") == "20 of 1300 heads, 21 min 20 s left"


def test_a_note_of_a_step_is_shown_once_and_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    view = view_of(tmp_path / "events.jsonl", {"time": 1.0, "step": "align", "note": "3 questions are too long [/x]"})
    assert view.steps["align"].state == "waiting"
    for _ in range(2):
        runs._say(Console(width=120), view)
    assert capsys.readouterr().out == "align: 3 questions are too long [/x]\n"


def test_a_step_waits_for_a_tracking_server_that_is_away(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    answers = iter([*[client._Away("no MLflow server there")] * 2, None, client._Away("gone for good")])

    def probe(address: str) -> None:
        if isinstance(answer := next(answers), UserError):
            raise answer

    monkeypatch.setattr(client, "_probe", probe)
    monkeypatch.setattr(client, "_PAUSE_S", 0.0)
    answering = SimpleNamespace(search_experiments=lambda max_results: [])
    monkeypatch.setattr(client, "open_client", lambda address: answering)
    with pytest.raises(UserError, match="no MLflow server there"):
        client.connect(settings)  # a command of a person's does not wait
    monkeypatch.setenv(PARENT_RUN, "run")
    monkeypatch.setenv(progress.EVENTS, str(tmp_path / "events.jsonl"))
    monkeypatch.setenv(progress.STEP, "gate")
    assert client.connect(settings) is answering
    view = runs.RunView.of(settings, tmp_path / "events.jsonl")
    view.refresh()
    assert view.said == ["gate: no MLflow server there; waiting for it, 60 s at most"]
    monkeypatch.setattr(client, "PATIENCE_S", -1.0)
    with pytest.raises(UserError, match="gone for good"):
        client.connect(settings)


def test_piped_output_is_never_silent_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from rich.console import Console

    view = view_of(tmp_path / "events.jsonl")
    ended = iter([None, None, 0])
    with view.events.open("a") as file:
        file.write(json.dumps({"step": "align", "state": "running", "time": 1.0}) + "\n")
        file.write(json.dumps({"step": "align", "time": 2.0, "progress": 5, "total": 9, "note": "loss 2"}) + "\n")
    monkeypatch.setattr(runs, "_LINE_S", -1.0)
    runs.follow(Console(width=120), view, SimpleNamespace(poll=lambda: next(ended)), 0.0)  # type: ignore[arg-type]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert all(line.startswith("align          running") and line.endswith("5 of 9, loss 2") for line in lines)


def test_what_to_do_next_is_the_command_that_was_given(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    given = ["train.workers=2", "storage.home=my home"]
    model = {"name": "face-mllm", "version": "3", "digest": "d" * 64}
    empty = dict.fromkeys(("tasks", "gate", "endpoint"))
    summary = {"run": "gentle", "overrides": given, "steps": [], "seconds": 1.0, "approval": "pending", "model": model}
    commands._show(Console(), load("ci"), {**empty, **summary}, Path("runs/gentle"))
    review, approve, reject, run = capsys.readouterr().out.splitlines()[-4:]
    assert review.endswith("facemllm review --profile ci --set 'storage.home=my home'")
    assert "promote approve 3 --profile ci --set 'storage.home=my home' --by" in approve
    assert "promote reject 3 --profile ci" in reject
    said = "run --profile ci --name gentle --set train.workers=2 --set 'storage.home=my home'"
    assert run.endswith(said)


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
    ("-m facemllm step polish", 1, "step polish: the steps that can be done alone are annotate, align"),
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
    from pipeline import GRAPHS

    program, *arguments = words.removeprefix("-m ").split()
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # a run takes over the signals of its process
    with mock.patch.dict(os.environ), pytest.raises(SystemExit) as ended:
        commands.main(GRAPHS) if program == "pipeline.py" else cli.main()
    check_end(int(str(ended.value.code)), capsys.readouterr().err, code, says)


INTERRUPTED = """
import runpy, sys

class Interrupts:
    def find_spec(self, name, path, target=None):
        if name == sys.argv[1]:
            raise KeyboardInterrupt

sys.meta_path.insert(0, Interrupts())
run = runpy.run_path if sys.argv[2].endswith(".py") else runpy.run_module
run(sys.argv[2], run_name="__main__")
"""


@pytest.mark.parametrize(("loading", "program"), [("kfp", "pipeline.py"), ("typer", "facemllm")])
def test_an_interruption_while_modules_are_loading_is_one_line(loading: str, program: str) -> None:
    command = [sys.executable, "-c", INTERRUPTED, loading, program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode
    assert done.stderr.splitlines() == ["error: interrupted; run the same command again to go on"]
