"""Progress where nobody looks on, processes tied to another, and checkpoints by name."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest

from facemllm.core import progress
from facemllm.core.files import fetched, placed
from facemllm.errors import UserError


@pytest.fixture
def clock(monkeypatch):
    """The seconds that have gone by, for a test to set; no pipeline listens."""
    monkeypatch.delenv(progress.EVENTS, raising=False)
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_without_a_terminal_a_line_is_printed_every_half_minute(clock, capsys):
    with progress.bar("align", 40) as bar:
        for done in range(40):
            bar.update(done, f"loss {done / 10:.1f}")
            clock[0] += 2
    assert capsys.readouterr().err.splitlines() == ["align 15/40 loss 1.5", "align 30/40 loss 3.0"]
    with progress.bar("reading", 0) as bar:  # without a total
        for _ in range(3):
            clock[0] += 20
            bar.update(7)
    assert capsys.readouterr().err == "reading 7\n"


def test_a_note_is_printed_or_goes_to_the_events(clock, capsys, monkeypatch, tmp_path):
    progress.event(note="3 questions are left out")
    progress.event(state="running")
    assert capsys.readouterr().err == "3 questions are left out\n"
    monkeypatch.setenv(progress.EVENTS, str(tmp_path / "events"))
    progress.event(note="3 questions are left out")
    assert json.loads((tmp_path / "events").read_text())["note"] == "3 questions are left out"
    assert capsys.readouterr().err == ""


TIED = """
import sys, time
from facemllm.core.processes import die_with
die_with(int(sys.argv[1]))
print('tied', flush=True)
time.sleep(60)
"""


def test_a_process_ends_with_the_one_it_is_tied_to_also_when_that_is_gone() -> None:
    engine = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    tied = [sys.executable, "-c", TIED, str(engine.pid)]
    step = subprocess.Popen(tied, stdout=subprocess.PIPE, text=True)
    assert step.stdout.readline() == "tied\n"
    assert step.poll() is None
    engine.kill()
    engine.wait()
    assert step.wait(timeout=10) == -signal.SIGKILL
    late = subprocess.run(tied, timeout=30, capture_output=True)
    assert (late.returncode, late.stdout) == (-signal.SIGKILL, b"")


def test_a_folder_is_taken_as_it_is(tmp_path):
    assert fetched(str(tmp_path), "model.base") == tmp_path.resolve()
    assert fetched("facemllm", "model.base") == Path("facemllm").resolve()


def test_a_folder_that_was_placed_is_found_from_outside_of_the_project(tmp_path, monkeypatch):
    inside, hub_id = placed("facemllm"), placed("nobody/nothing")
    monkeypatch.chdir(tmp_path)  # as Ray's workers
    assert fetched(inside, "model.base") == Path(inside)
    assert placed(hub_id) == hub_id == "nobody/nothing"


def test_the_reason_is_told_whole_and_the_setting_named(monkeypatch):
    reason = " ".join(["the hub says a lot"] * 40) + "; log in with `hf auth login`"

    def refuse(*_, **__):
        raise OSError(reason.replace("; ", ";\n"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(UserError) as refused:
        fetched("nobody/nothing", "model.tower")
    said = str(refused.value)
    assert said == f"model.tower: nobody/nothing is no folder, nor a model of the hub: {reason}"
