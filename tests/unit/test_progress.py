"""Progress and notes where there is neither a terminal nor a file of events."""

from __future__ import annotations

import json

import pytest

from facemllm.core import progress


@pytest.fixture(autouse=True)
def _no_pipeline(monkeypatch):
    monkeypatch.delenv(progress.EVENTS, raising=False)


@pytest.fixture
def clock(monkeypatch):
    """The seconds that have gone by, for a test to set."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_without_a_terminal_a_line_is_printed_every_half_minute(clock, capsys):
    with progress.bar("align", 40) as bar:
        for done in range(40):
            bar.update(done, f"loss {done / 10:.1f}")
            clock[0] += 2
    assert capsys.readouterr().err.splitlines() == ["align 15/40 loss 1.5", "align 30/40 loss 3.0"]


def test_without_a_total_the_line_has_none(clock, capsys):
    with progress.bar("reading", 0) as bar:
        for _ in range(3):
            clock[0] += 20
            bar.update(7)
    assert capsys.readouterr().err == "reading 7\n"


def test_a_note_is_printed_or_goes_to_the_events(capsys, monkeypatch, tmp_path):
    progress.event(note="3 questions are left out")
    progress.event(state="running")
    assert capsys.readouterr().err == "3 questions are left out\n"
    monkeypatch.setenv(progress.EVENTS, str(tmp_path / "events"))
    progress.event(note="3 questions are left out")
    assert json.loads((tmp_path / "events").read_text())["note"] == "3 questions are left out"
    assert capsys.readouterr().err == ""
