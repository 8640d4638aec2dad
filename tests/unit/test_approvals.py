"""Promotion, the parts that need no server: who is a person, which decision counts, the card, figures, lineage."""

import json
import logging
import os
import pickle
import re
from pathlib import Path
from typing import Any

import pytest

from facemllm.core.store import Store
from facemllm.errors import UserError
from facemllm.promote import approvals, lineage
from facemllm.promote.registry import Version
from facemllm.settings import Settings, load
from facemllm.tables import FACES, TableWriter
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


@pytest.fixture
def home(tmp_path: Path) -> Settings:
    settings = load("laptop", [f"storage.home={tmp_path / 'home'}", "tracking.uri=http://127.0.0.1:9"])
    store = Store(settings.home)
    with TableWriter(tmp_path / "faces", FACES, about={"seed": 0}) as table:
        table.write([{"image_id": "1", "image": {"bytes": b"x", "path": None}, "source": "render", "split": "train"}])
    faces = table.manifest["digest"]
    store.keep("k1", tmp_path / "faces", faces, {"step": "ingest", "inputs": {}, "figure": "1 face"})
    chain = {"reformat": "c" * 64, "align": "d" * 64, "specialize": DIGEST, "evaluate": "e" * 64}
    inputs = {
        "reformat": {"annotated": faces},
        "align": {"conversations": chain["reformat"]},
        "specialize": {"conversations": chain["reformat"], "model": chain["align"]},
        "evaluate": {"conversations": chain["reformat"], "model": chain["specialize"]},
    }
    for step, digest in chain.items():
        (tmp_path / step).mkdir()
        facts = {"step": step, "inputs": inputs[step], "run_id": f"run-{step}", "commit": "1234567"}
        store.keep(f"k-{step}", tmp_path / step, digest, facts)
    (settings.home / "keys" / "broken.json").write_text("{")
    return settings


def test_lineage_walks_to_the_sources_while_mlflow_is_away(home: Settings) -> None:
    links = lineage.lineage(home, "eeeeee")
    assert links[0]["kind"] == "evaluate"
    kinds = {"reformat", "ingest", "source", "specialize", "align", "run", "commit"}
    assert kinds <= {link["kind"] for link in links}
    assert [link["id"] for link in links if link["kind"] == "source"] == ["render"]
    notes = [link["facts"].get("note") for link in links if link["kind"] == "reformat"]
    assert notes == [None, "see above", "see above"]
    assert links[-1] == {"depth": 0, "kind": "note", "id": lineage.AWAY, "facts": {}}
    json.dumps(links)


def test_lineage_prints_a_line_a_result_and_the_store_names_what_is_behind_a_model(home: Settings, capsys) -> None:
    lineage.show(lineage.lineage(home, DIGEST[:8]))
    lines = [line.lstrip("│├└─ ") for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == "specialize aaaaaaaaaaaa  run run-spec  commit 1234567"
    faces = next(line for line in lines if line.startswith("ingest"))
    assert re.fullmatch(r"ingest [0-9a-f]{12}  1 face", faces)  # no cost, no settings of the table
    assert next(line for line in lines if line.startswith("source")).startswith("source render  CC0")
    kinds = [line.split()[0] for line in lines]
    assert kinds == ["specialize", "reformat", "ingest", "source", "align", "reformat", "note"]
    behind = Store(home.home).behind(DIGEST)
    assert set(behind) == {"specialize", "align", "reformat", "ingest"}
    assert behind["align"]["digest"] == "d" * 64


def test_promotion_has_no_circle_of_imports() -> None:
    found = {}
    for name in ("registry", "approvals", "lineage"):
        text = Path(f"facemllm/promote/{name}.py").read_text("utf-8")
        found[name] = set(re.findall(r"^ *from facemllm\.promote\.(\w+) import", text, re.MULTILINE))
    assert found == {"registry": set(), "approvals": {"registry"}, "lineage": {"registry", "approvals"}}


def test_lineage_of_nothing_and_of_an_ambiguous_prefix_is_refused(home: Settings, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no result begins with ffffff"):
        lineage.lineage(home, "ffffff")
    with pytest.raises(UserError, match="no MLflow server"):
        lineage.lineage(home, "champion")
    (tmp_path / "other").mkdir()
    Store(home.home).keep("k9", tmp_path / "other", "a" * 10 + "b" * 54, {"step": "align", "inputs": {}})
    with pytest.raises(UserError, match="2 digests begin with aaaaaa"):
        lineage.lineage(home, "aaaaaa")
