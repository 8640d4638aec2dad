"""The dataset ledger: complete, laid over by the user's own rows, and refusing what is not allowed."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from facemllm.core import step
from facemllm.ingest import benchmarks
from facemllm.ingest.importing import READERS
from facemllm.settings import Settings, load
from facemllm.version import ledger
from facemllm.workflow.steps import DATA, steps
from tests.refusing import refuses


@pytest.fixture
def settings():
    return load("laptop")


def own(tmp_path: Path, rows: object) -> Settings:
    path = tmp_path / "ledger.yaml"
    path.write_text(yaml.safe_dump(rows))
    return load("laptop", [f"ingest.ledger={path}"])


def test_every_source_that_can_be_read_has_a_row_and_no_row_is_idle(settings: Settings) -> None:
    assert set(ledger.entries(settings)) == {*READERS, *benchmarks.KEYS, "render"}


def test_what_terms_or_the_ledger_do_not_allow_is_refused(settings: Settings) -> None:
    """Research data is not served nor sent away, benchmarks are never trained on, an unknown source is not used."""
    for row in ledger.entries(settings).values():
        if row.status == "restricted":
            assert "serve" not in row.uses, row.key
    assert not any("train" in ledger.entries(settings)[key].uses for key in benchmarks.KEYS)
    ledger.require(settings, ["raf-db"], "train", "evaluate")
    said = r"'raf-db' do not allow to send its pictures to a third party; ledger row: RAF-DB"
    refuses(said, ledger.require, settings, ["raf-db"], "third_party")

    said = r"'scraped' is not in the dataset ledger; .*ingest\.ledger"
    refuses(said, ledger.require, settings, ["render", "scraped"])


def test_allowed_uses_are_those_of_all_sources(settings: Settings) -> None:
    assert ledger.allowed(settings, ["render"]) == ["train", "evaluate", "serve", "third_party"]
    assert ledger.allowed(settings, ["render", "laion-face"]) == ["train", "evaluate", "third_party"]
    assert ledger.allowed(settings, ["laion-face", "raf-db"]) == ["train", "evaluate"]


def test_own_rows_lie_over_the_projects_and_withdraw_a_source(tmp_path: Path) -> None:
    settings = own(tmp_path, {"celeba": {"uses": ["train", "evaluate", "serve"], "terms": "our contract of 2026"}})
    ledger.require(settings, ["celeba"], "serve")
    assert ledger.entries(settings)["celeba"].licence.startswith("celeba-dataset")
    settings = own(tmp_path, {"celeba": {"status": "withdrawn", "terms": "withdrawn by its owner"}})
    refuses("withdrawn by its owner", ledger.require, settings, ["celeba"])


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ({"celeba": {"uses": ["sell"]}}, "row 'celeba': uses.0"),
        ({"celeba": {"colour": "red"}}, "row 'celeba': colour"),
        ({"mine": {"name": "Mine"}}, "row 'mine': homepage"),
        (["celeba"], "a mapping of source keys"),
        ({"celeba": "fine"}, "a mapping of source keys"),
    ],
)
def test_a_wrong_row_is_named(rows: object, said: str, tmp_path: Path) -> None:
    refuses(said, ledger.entries, own(tmp_path, rows))


def test_a_ledger_file_that_is_missing_or_broken_is_named(tmp_path: Path) -> None:
    absent = load("laptop", [f"ingest.ledger={tmp_path / 'absent.yaml'}"])
    refuses(r"absent\.yaml: cannot be read", ledger.entries, absent)
    (tmp_path / "ledger.yaml").write_text("{")
    refuses("cannot be read as a ledger", ledger.entries, load("laptop", [f"ingest.ledger={tmp_path / 'ledger.yaml'}"]))


def test_a_model_says_what_it_was_trained_on(tmp_path: Path) -> None:
    (tmp_path / "lineage.json").write_text(json.dumps({"sources": ["render", "celeba"]}))
    assert ledger.sources_of_model(tmp_path) == ["celeba", "render"]
    (tmp_path / "lineage.json").write_text("{}")
    refuses("does not say which sources", ledger.sources_of_model, tmp_path)


def test_a_model_of_research_data_is_not_released(settings: Settings, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "lineage.json").write_text(json.dumps({"sources": ["celeba", "render"]}))
    approved = SimpleNamespace(version=1, name="m", digest="0" * 64, bundle="b")
    bundle = {"model": {"name": "m", "version": 1}}
    decisions = SimpleNamespace(open=lambda *_: SimpleNamespace(stale=None, bundle=lambda digest: bundle))
    monkeypatch.setattr("facemllm.promote.registry.find_version", lambda settings, version: approved)
    fakes = {"authorize": lambda *_: approved, "local": SimpleNamespace(policy=lambda settings: None)}
    for name, fake in (fakes | {"Decisions": decisions, "model_dir": lambda settings, version: tmp_path}).items():
        monkeypatch.setattr(f"facemllm.serve.release.{name}", fake)
    context = SimpleNamespace(settings=settings, inputs={"version": "1"})
    said = "'celeba' do not allow to put a model trained on it into production"
    refuses(said, steps(settings)["release"].work, context)


def test_data_that_may_not_be_trained_on_stops_before_training(settings: Settings, faces_table: Any) -> None:
    path = faces_table(about={"sources": ["facexbench"]})
    context = SimpleNamespace(settings=settings, inputs={}, path=lambda name: path)
    refuses("'facexbench' do not allow to train a model on it", steps(settings)["align"].work, context)
    context.path = lambda name: faces_table(name="two", about={"sources": ["gone"]})
    refuses("'gone' is not in the dataset ledger", steps(settings)["evaluate"].work, context)


def test_a_withdrawn_source_stops_a_run_whose_faces_are_remembered(tmp_path: Path) -> None:
    key = step.step_key(DATA[0], load("laptop"), {})
    assert key == step.step_key(DATA[0], own(tmp_path, {}), {})
    withdrawn = own(tmp_path, {"render": {"status": "withdrawn"}})
    refuses("source 'render' is withdrawn", step.step_key, DATA[0], withdrawn, {})
    narrower = own(tmp_path, {"render": {"uses": ["evaluate"]}})
    assert step.step_key(DATA[0], narrower, {}) != key
