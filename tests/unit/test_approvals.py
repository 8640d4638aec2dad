"""Promotion, the parts that need no server: who is a person, which decision counts, the card, figures."""

import json
import logging
import os
import pickle
import re
from pathlib import Path
from typing import Any

import pytest

from facemllm.errors import UserError
from facemllm.promote import approvals
from facemllm.promote.registry import Version
from facemllm.tracking import client as curves
from facemllm.tracking import runs as tracking

DIGEST = "a" * 64


def version(tags: dict[str, str] | None = None) -> Version:
    about = {"created": "2026-01-01T00:00:00+00:00", "description": "", "tags": tags or {}}
    return Version("m", 3, DIGEST, "passed", "e" * 64, source="models:/m-1", run_id="", **about)


def stored(**changed: Any) -> dict[str, str]:
    body = {"event": "decision", "decision": "approved", "by": "Ada Lovelace", "reason": "card read", "digest": DIGEST}
    about = {"name": "m", "version": 3, "evaluation": "e" * 64, "at": "2026-01-02T03:04:05+00:00"}
    return {approvals.DECISION: json.dumps({**body, **about, **changed})}


@pytest.mark.parametrize(
    "name", ["Ada Lovelace", "ada@example.org", "Nguyễn Văn A", "李娜", "  Ada \n Lovelace ", "Root, Ann"]
)
def test_a_person_is_a_person(name: str) -> None:
    assert approvals.person(name) == " ".join(name.split())


@pytest.mark.parametrize(
    "name",
    ["", "\t \n", "ci", "CI", "root", "Admin", "github-actions[bot]", "dependabot [bot]", "ML team", "root@localhost"]
    + ["Your Name", "42", "--", "the maintainers", "x" * 201],
)
def test_a_role_is_no_person(name: str) -> None:
    with pytest.raises(UserError, match=re.escape('--by "Ada Lovelace"')):
        approvals.person(name)


def test_the_default_person_is_gits(tmp_path: Path, monkeypatch) -> None:
    config = tmp_path / "gitconfig"
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(config))
    monkeypatch.setenv("GIT_CONFIG_SYSTEM", os.devnull)
    (tmp_path / "params.yaml").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="nobody is named"):
        approvals.person(None)
    config.write_text("[user]\n\tname = Grace Hopper\n")
    assert approvals.person(None) == "Grace Hopper"


def test_a_decision_counts_for_its_bytes_alone(caplog) -> None:
    decided, problem = approvals.read_decision(version(stored()))
    assert (decided.decision, decided.by, problem) == ("approved", "Ada Lovelace", None)
    assert approvals.read_decision(version()) == (None, None)
    decided, problem = approvals.read_decision(version(stored(digest="b" * 64)))
    assert decided is None
    assert "about other bytes, bbbbbbbbbbbb" in problem
    with caplog.at_level(logging.WARNING):
        assert approvals._in_force(version(stored(digest="b" * 64))) is None
    assert "counts as undecided" in caplog.text


def test_an_unreadable_decision_counts_as_none_and_stays_in_the_history() -> None:
    for text in ("", "{", "[]", "3", '"approved"', '{"decision": "approved"}'):
        assert approvals.read_decision(version({approvals.DECISION: text}))[0] is None, text
    assert approvals.read_decision(version(stored(decision="maybe"))) == (None, "the stored decision is unreadable")
    tags = {f"{approvals.HISTORY}00002-b": '{"event": "decision"}', f"{approvals.HISTORY}00001-a": "{"}
    assert [entry["event"] for entry in approvals.history(version(tags))] == ["unreadable", "decision"]


def test_a_process_is_known_by_host_number_and_start() -> None:
    host, pid, started = tracking._process().split("/")
    assert tracking._alive(f"{host}/{pid}/{started}")
    assert not [p for p in (f"{host}/{pid}/1.00", f"else/{pid}/{started}", "", f"{host}/x/1.00") if tracking._alive(p)]


def test_points_leave_out_what_is_no_number() -> None:
    points = curves.points_of({"train/loss": 1, "bad(name)": 2.0, "text": "x", "none": None}, 7)
    assert [(name, value, step) for name, value, _, step in points] == [("train/loss", 1.0, 7), ("bad_name_", 2.0, 7)]


def test_a_curve_logger_outlives_its_server(caplog, monkeypatch) -> None:
    sent: list[curves.Point] = []
    fails = [True, True]

    def send(client: Any, run_id: str, points: list[curves.Point]) -> None:
        if fails:
            fails.pop()
            raise ConnectionError("refused")
        sent.extend(points)

    monkeypatch.setattr(curves, "open_client", lambda uri: object())
    monkeypatch.setattr(curves, "send", send)
    curve = pickle.loads(pickle.dumps(curves.CurveLogger("http://127.0.0.1:9", "run", interval_s=0.01)))
    for step in range(2000):
        curve(step, {"train/loss": 1 / (step + 1)})
    assert curve.flush(10)
    assert [step for *_, step in sent] == list(range(2000))
    assert caplog.text.count("takes no metrics now") == 1
    curve(2000, {"train/loss": 0.0})
    assert curve.flush(10)
    assert len(sent) == 2001


def test_a_curve_logger_gives_up_in_time(caplog, monkeypatch) -> None:
    monkeypatch.setattr(curves, "open_client", lambda uri: 1 / 0)
    curve = curves.CurveLogger("http://127.0.0.1:9", "run", interval_s=0.01)
    curve(1, {"train/loss": 1.0})
    assert not curve.flush(0.3)
    assert "could not be sent" in caplog.text


def test_promotion_has_no_circle_of_imports() -> None:
    found = {}
    for path in Path("facemllm/promote").glob("*.py"):
        text = path.read_text("utf-8")
        used = re.findall(r"^from facemllm\.promote\.(\w+) import", text, re.MULTILINE)
        for names in re.findall(r"^from facemllm\.promote import ([\w, ]+)$", text, re.MULTILINE):
            used += names.split(", ")
        found[path.stem] = set(used)
    assert "records" in found["lineage"]
    while found:
        free = {name for name, used in found.items() if not used & set(found)}
        assert free, f"a circle among {sorted(found)}"
        found = {name: used for name, used in found.items() if name not in free}
