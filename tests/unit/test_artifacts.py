"""What a step shows in Kubeflow's pages: numbers, a report, a model, each as a file and as metadata."""

import json
from pathlib import Path
from typing import Any

import pytest
from kfp import dsl

from facemllm.core.digests import of_json
from facemllm.errors import UserError
from facemllm.settings import Settings
from facemllm.tracking import runs as tracking
from facemllm.workflow import artifacts, runner
from tests.conftest import picture
from tests.evaluation_example import figure

CLOSED = figure(0.81, 0.7, 0.9, 0.5, 0.6, metric="balanced_accuracy", higher_is_better=True, unit="")
METRICS = {"tasks": {"expression": CLOSED}, "closed_mean": CLOSED}


@pytest.fixture
def home(settings: Settings, tmp_path: Path) -> Settings:
    storage = settings.storage.model_copy(update={"home": str(tmp_path / "home"), "runs": str(tmp_path / "runs")})
    return settings.model_copy(update={"storage": storage})


def result(home: Settings, files: dict[str, Any], **facts: Any) -> dict[str, Any]:
    digest = of_json(files)
    folder = home.home / "store" / digest
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    record = {"digest": digest, "output": digest, "figure": "", "seconds": 12.5, "settings": {"seed": 7}, "inputs": {}}
    record |= {"step": "ingest", **facts}
    (home.home / "keys").mkdir(parents=True, exist_ok=True)
    (home.home / "keys" / f"{digest}.json").write_text(json.dumps(record), "utf-8")
    return record


def run(monkeypatch: pytest.MonkeyPatch, home: Settings, record: dict[str, Any], *shown: Any, name: str = "any") -> str:
    monkeypatch.setattr(artifacts, "load", lambda *_: home)
    monkeypatch.setattr(runner, "run_record", lambda *_, **__: (record, False))
    return artifacts.run_component(name, "laptop", [], shown)


def made(kind: Any, folder: Path) -> Any:
    return kind(name=kind.__name__, uri=str(folder / kind.__name__.lower() / "file"))


def test_the_numbers_of_a_table_and_of_what_it_took(home, tmp_path, monkeypatch) -> None:
    record = result(
        home, {"manifest.json": {"rows": 40, "quarantined": 2, "digest": "x"}}, cost={"device": "CPU", "flops": 3}
    )
    metrics = made(dsl.Metrics, tmp_path)
    assert run(monkeypatch, home, record, metrics) == record["output"]
    assert metrics.metadata == {"seconds": 12.5, "cost/flops": 3.0, "rows": 40.0, "quarantined": 2.0}
    assert json.loads(Path(metrics.path).read_text()) == metrics.metadata, "an engine that remembers looks for the file"


def test_an_evaluation_shows_its_figures_and_the_report_so_far(home, tmp_path, monkeypatch) -> None:
    record = result(home, {"metrics.json": METRICS, "samples/samples.json": []}, step="evaluate")
    metrics, page = made(dsl.Metrics, tmp_path), made(dsl.HTML, tmp_path)
    run(monkeypatch, home, record, metrics, page)
    assert metrics.metadata["closed_mean/balanced_accuracy"] == 0.81
    assert "0.81" in Path(page.path).read_text("utf-8")
    verdict = {"passed": False, "reasons": ["gender 0.62 is below the threshold 0.85"], "checks": []}
    gate = result(home, {"gate.json": verdict}, step="gate", gate={"passed": False, "reasons": verdict["reasons"]})
    run(monkeypatch, home, gate, page)
    assert "gender 0.62 is below the threshold" in Path(page.path).read_text("utf-8")


def test_a_report_of_its_own_is_shown_as_it_is(home, tmp_path, monkeypatch) -> None:
    page = made(dsl.HTML, tmp_path)
    run(monkeypatch, home, result(home, {"report.html": "<html>checks</html>"}), page)
    assert Path(page.path).read_text("utf-8") == "<html>checks</html>"


def test_a_verdict_and_a_model(home, tmp_path, monkeypatch) -> None:
    metrics, model = made(dsl.Metrics, tmp_path), made(dsl.Model, tmp_path)
    run(monkeypatch, home, result(home, {}, step="gate", gate={"passed": True, "reasons": []}), metrics)
    assert metrics.metadata == {"seconds": 12.5, "passed": 1.0}
    registered = result(home, {"registered.json": {}}, name="face-mllm", version=3, model_digest="ab" * 32, output="3")
    assert run(monkeypatch, home, registered, model) == "3"
    known = {"digest": "ab" * 32, "framework": "transformers", "name": "face-mllm", "version": 3}
    assert model.metadata == known == json.loads(Path(model.path).read_text())
    trained = made(dsl.Model, tmp_path / "trained")
    stage = result(home, {"config.json": {}})
    run(monkeypatch, home, stage, trained)
    assert trained.metadata == {"digest": stage["digest"], "framework": "transformers"}


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """What is told to MLflow at the end of a run."""
    finished: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setenv("FACEMLLM_RUN", "a-run")
    monkeypatch.setattr(tracking, "join_pipeline", lambda _, run: f"mlflow {run}")
    monkeypatch.setattr(tracking, "finish_pipeline", lambda _, run, summary, folder: finished.append((run, summary)))
    return finished


def test_the_last_task_writes_the_runs_folder_and_closes_its_run(home, tmp_path, monkeypatch, closed) -> None:
    evaluation = result(home, {"metrics.json": METRICS, "samples/samples.json": []}, step="evaluate")
    (home.home / "store" / evaluation["digest"] / "samples" / "0.jpg").write_bytes(picture(0))
    run(monkeypatch, home, evaluation, name="evaluate")
    page = made(dsl.HTML, tmp_path)

    def ended() -> dict[str, Any]:
        assert artifacts.finish_run("laptop", ["seed=3"], "FAILED", page) == str(home.runs / "a-run")
        return dict(json.loads((home.runs / "a-run" / "summary.json").read_text()))

    monkeypatch.setattr(artifacts, "load", lambda *_: home)
    monkeypatch.setattr(runner, "run_record", broken)
    with pytest.raises(UserError, match="no room"):
        artifacts.run_component("instruct", "laptop", [], [])
    summary = ended()
    states = {step["name"]: step["state"] for step in summary["steps"]}
    assert (states["evaluate"], states["instruct"], states["release"]) == ("done", "failed", "skipped")
    assert {step["name"]: step["figure"] for step in summary["steps"]}["instruct"] == "no room"
    assert (summary["run"], summary["state"], summary["overrides"]) == ("a-run", "FAILED", ["seed=3"])
    assert closed == [("mlflow a-run", summary)]
    assert "</html>" in Path(page.path).read_text("utf-8")
    run(monkeypatch, home, result(home, {"config.json": {}}, step="instruct"), name="instruct")
    states = {step["name"]: step["state"] for step in ended()["steps"]}
    assert states["instruct"] == "done", "the attempt that failed is forgotten"


def broken(*_: Any, **__: Any) -> Any:
    raise UserError("no room")


@pytest.mark.parametrize(
    ("named", "commit"),
    [
        ("ab" * 20, "ab" * 20),
        ("ab" * 20 + "+changes", "ab" * 20 + "+changes"),
        ("", None),
        ("main", None),
        ("ab" * 20 + "\n", None),
    ],
)
def test_outside_a_repository_the_image_says_its_commit(monkeypatch, tmp_path, project, named, commit) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    monkeypatch.setenv("FACEMLLM_COMMIT", named)
    tracking.commit.cache_clear()
    try:
        assert tracking.commit() == commit
    finally:
        tracking.commit.cache_clear()


def test_the_image_is_built_with_its_commit() -> None:
    lines = Path("Dockerfile").read_text("utf-8").splitlines()
    assert 'ARG COMMIT=""' in lines
    assert f"ENV {tracking.IMAGE_COMMIT}=$COMMIT" in lines
    assert "LABEL org.opencontainers.image.revision=$COMMIT" in lines
